"""Processes as forks of one that has loaded what takes seconds: for processes of the launcher of `conftest`."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any


def fork_dask_workers() -> None:
    """Dask workers that this process will start by nannies become forks of it as it is now. It must have one thread only.

    They come from Python's fork server, which would otherwise be a new interpreter; here it is a fork.
    """
    import multiprocessing.forkserver
    import multiprocessing.util

    import dask

    start = multiprocessing.util.spawnv_passfds

    def forked(executable: bytes, arguments: list[str], kept: Collection[int]) -> int:
        if "multiprocessing.forkserver" not in arguments[-1]:  # but the tracker of resources
            return start(executable, arguments, kept)
        pid = os.fork()
        if not pid:
            _close_all_but({0, 1, 2, *kept})
            exec(arguments[-1], {})
            os._exit(0)
        return pid

    multiprocessing.util.spawnv_passfds = forked
    multiprocessing.forkserver.ensure_running()
    multiprocessing.util.spawnv_passfds = start
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})


def fork_python_processes() -> None:
    """``python -m`` and ``python -c`` of `subprocess` become forks of this process as it is now. It must have one thread only.

    They are its children as ever, with its exit codes, signals and times: see `_serve`.
    """
    # PR_SET_CHILD_SUBREAPER: who loses its parent becomes a child of this process
    if ctypes.CDLL(None).prctl(36, 1, 0, 0, 0):
        raise OSError("this process cannot become a reaper of others")
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asking = threading.Lock()
    if not os.fork():
        here.close()
        _serve(there)
    there.close()
    real = subprocess.Popen._execute_child

    def execute(self: Any, args: Any, *given: Any) -> None:
        words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else []
        if words[:1] != [sys.executable] or words[1] not in ("-m", "-c"):
            real(self, args, *given)
            return
        _, _, _, _, cwd, env, _, _, _, *pipes = given[:15]
        order = {"words": words[1:], "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        theirs = [pipe if pipe != -1 else usual for usual, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        with asking:
            socket.send_fds(here, [json.dumps(order).encode()], theirs)
            self.pid = int(here.recv(100))
        self._child_created = True
        self._close_pipe_fds(*pipes)

    subprocess.Popen._execute_child = execute


def _serve(orders: socket.socket) -> None:
    """Forks for each order, until nobody is there to ask; children whose parent has ended, so that they get another one."""
    while True:
        message, streams, *_ = socket.recv_fds(orders, 1 << 20, 3)
        if not message:
            os._exit(0)
        readable, writable = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if not pid:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                _close_all_but({0, 1, 2})
                _run(json.loads(message))
            os.write(writable, str(pid).encode())
            os._exit(0)
        os.close(writable)
        os.waitpid(between, 0)
        orders.send(os.read(readable, 100))
        for descriptor in (readable, *streams):
            os.close(descriptor)


def _run(order: dict[str, Any]) -> None:
    """Does what ``python -m MODULE ...`` or ``python -c CODE ...`` would, and ends the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    for number, name in enumerate(
        ("stdin", "stdout", "stderr")
    ):  # what they were may have been files, where these are pipes
        setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
    kind, what, *rest = order["words"]
    code: Any = 0
    try:
        if kind == "-m":
            if what == "distributed.cli.dask_worker":
                fork_dask_workers()
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001  # as an interpreter does, whatever it is
        traceback.print_exc()
        code = 1
    threading._shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _close_all_but(kept: Collection[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):  # that of the folder itself is closed already
                os.close(int(name))
