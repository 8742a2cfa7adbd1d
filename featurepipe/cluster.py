"""The former name of `featurepipe.execution`, whose names it hands out with a warning."""

from __future__ import annotations

import warnings
from typing import Any

_FORMER = {"Team": "DaskExecutor"}
_GONE = {  # what tasks called by themselves, and what executors do for them today
    "one_at_a_time": "hold `worker.alone()`, of the worker that `Executor.map` hands to the mapped function",
    "results": "call `map` of an executor: `featurepipe.execution.DaskExecutor`",
    "stop_of_task": "use `stop`, which `Executor.map` hands to the mapped function",
    "this_worker": "use `worker`, which `Executor.map` hands to the mapped function: its name, threads and memory",
}


def __getattr__(name: str) -> Any:
    from featurepipe import execution

    if name in _GONE:
        raise AttributeError(f"module {__name__!r} has {name!r} no more; {_GONE[name]}")
    now = _FORMER.get(name, name)
    if now not in execution.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it is now featurepipe.execution")
    warnings.warn(f"featurepipe.cluster.{name} is now featurepipe.execution.{now}", DeprecationWarning, stacklevel=2)
    return getattr(execution, now)
