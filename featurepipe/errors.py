"""Every error featurepipe raises on purpose.

::

    FeaturepipeError                     exit code 1
    +-- UsageError (ValueError)          2   an argument is wrong: names the value, the choices, the next step
    |   +-- UnknownSnapshot              2   there is no snapshot of that id (any more)
    +-- SourceError                      1   a source as a whole cannot be read
    +-- Reject                           -   one image cannot be used; recorded with its reason, never fatal
    |   +-- Unavailable                  -   it cannot be read now, but perhaps in a moment
    +-- WeightsNotFound                  1   weights are not at hand and cannot be downloaded
    +-- StoreError                       1   the store cannot be read or written
    |   +-- CorruptPart                  1   a part's bytes are not what was committed
    |   +-- StoreMoved                   1   what was listed is gone: the store was compacted meanwhile; begin again
    |   +-- DiskFull                     1   no space left; what was committed is safe
    |   +-- StoreLocked                  75  someone else holds the lock
    +-- BundleError                      1   a bundle is damaged, foreign, or asked about features it does not know
    +-- NonFiniteFeatures                1   the network produced NaN or infinity
    +-- TooManyRejects                   4   more images were rejected than allowed
    +-- ClusterError                     1   a cluster cannot be reached or used, or went away; what was committed stands
    |   +-- WorkerRefused                -   one worker must not be used: other versions, weights, or no view of the store
    +-- Interrupted                      130 stopped by a signal, everything in flight committed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeaturepipeError(Exception):
    """Base of all errors that featurepipe raises on purpose; each argument is a line of its message."""

    exit_code = 1

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The message's lines, each on its own: names in them may hold line breaks, which are no ends of ours."""
        return tuple(map(str, self.args))


class UsageError(FeaturepipeError, ValueError):
    """An argument is wrong; the message names the value, the choices and the next step."""

    exit_code = 2


class UnknownSnapshot(UsageError):
    """There is no snapshot of that id, or none any more.

    Attributes:
        run_id: The id.
    """

    def __init__(self, message: str, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id


class SourceError(FeaturepipeError):
    """A source as a whole cannot be listed or read."""


class Reject(FeaturepipeError):
    """One image that cannot be used; ``str(error)`` is the reason that is recorded.

    Reasons start with a short stable code and a colon, such as ``truncated: ...`` or ``not-an-image: ...``.
    """


class Unavailable(Reject):
    """One image that cannot be read now, but perhaps in a moment: a server is busy, a share does not answer."""


class WeightsNotFound(FeaturepipeError):
    """Pretrained weights are not on this machine and cannot be downloaded."""


class StoreError(FeaturepipeError):
    """The feature store cannot be read or written."""


class CorruptPart(StoreError):
    """A part's bytes are not what was committed."""


class StoreMoved(StoreError):
    """What was listed a moment ago is gone: ``compact`` or ``gc`` rewrote the store meanwhile."""


class DiskFull(StoreError):
    """No space is left on the store's disk; what was committed before is safe."""


class StoreLocked(StoreError):
    """Another process holds the store's lock."""

    exit_code = 75


class BundleError(FeaturepipeError):
    """A model bundle is damaged, is none, or was made for another feature space."""


class NonFiniteFeatures(FeaturepipeError):
    """The network produced NaN or infinity for an image."""


class TooManyRejects(FeaturepipeError):
    """More images were rejected than ``max_rejects`` allows."""

    exit_code = 4


class ClusterError(FeaturepipeError):
    """A cluster cannot be reached or used, or went away; what its workers had committed stands."""


class WorkerRefused(ClusterError):
    """One worker must not be used: its versions, weights or feature space differ, or it cannot see the store.

    A task raises it in the worker; `featurepipe.execution` then reports that worker by name, leaves it alone from there on, and
    has the task done elsewhere.
    """


class Interrupted(FeaturepipeError):
    """Stopped by a signal; everything in flight was committed first."""

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unknown(kind: str, value: str, choices: Iterable[str], *, where: str = "", see: str = "") -> UsageError:
    """Builds the error for a name that is not among ``choices``: the value, the nearest ones, where to look.

    Example:
        >>> str(unknown("node", "layer5", ["layer3", "layer4"], where="resnet50", see="featurepipe nodes resnet50"))
        "unknown node 'layer5' in resnet50; nearest: layer4, layer3. See: featurepipe nodes resnet50"
    """
    names = list(choices)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    hint = (
        f"nearest: {', '.join(near)}"
        if near
        else f"choices: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    )
    inside = f" in {where}" if where else ""
    tail = f". See: {see}" if see else ""
    return UsageError(f"unknown {kind} {value!r}{inside}; {hint}{tail}")
