"""Worker processes that end with the process that started them, even where that was killed."""

from __future__ import annotations

import os
import threading
import time

EVERY = 0.2
"""Seconds between looks."""


def end_with(parent: int) -> None:
    """Ends this process as soon as its parent is another one than ``parent``: called in each worker when it starts.

    A process that is killed cannot end its workers. Those that are left would go on with their fits, beside those of the
    next call, for seconds or minutes, for nobody.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="featurepipe-parent", daemon=True).start()
