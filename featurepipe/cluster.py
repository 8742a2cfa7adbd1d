"""The former name of `featurepipe.execution`, whose names it hands out with a warning."""

from __future__ import annotations

import warnings
from typing import Any

_FORMER = {"Team": "DaskExecutor"}


def __getattr__(name: str) -> Any:
    from featurepipe import execution

    now = _FORMER.get(name, name)
    if now not in execution.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it is now featurepipe.execution")
    warnings.warn(f"featurepipe.cluster.{name} is now featurepipe.execution.{now}", DeprecationWarning, stacklevel=2)
    return getattr(execution, now)
