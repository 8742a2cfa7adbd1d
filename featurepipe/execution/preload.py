"""Loaded first by every worker process that is started on this machine, see `featurepipe.execution.launchers.local`."""

from __future__ import annotations

import os


def dask_setup(_worker: object) -> None:
    """Called by Dask in the worker's process: standard output belongs to the client's result alone."""
    os.dup2(2, 1)
