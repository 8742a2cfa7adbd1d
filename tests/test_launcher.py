"""The processes that tests start: what one of them does cannot hold up the next."""

import signal

TAKES_LOCK = "import os, signal, tqdm; tqdm.tqdm.get_lock().acquire(); os.kill(os.getpid(), signal.SIGKILL)"
NEEDS_LOCK = "import tqdm; bar = tqdm.tqdm(total=1, disable=True); print('done')"


def test_a_process_that_is_killed_leaves_no_lock_behind(launcher):
    assert launcher.start(TAKES_LOCK).wait().code == -signal.SIGKILL
    assert launcher.start(NEEDS_LOCK).wait().out == "done\n"
