"""How long a forward takes up to each node, and on what that was measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from featurepipe.backbones.timing import is_undisturbed
from featurepipe.errors import UsageError
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.features.session import alone_on_all_cores
from featurepipe.layer_depth.journal import Journal, key_of
from featurepipe.records import host, versions

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone

FEW = 4
"""Images in a forward on a CPU: slow networks take long for more, and the time of one hardly changes."""


AGAIN = 3600.0
"""Seconds after which times of a busy machine are measured again."""


@dataclass(frozen=True)
class Timing:
    """What is timed, and where.

    Attributes:
        backbone: name of the network.
        nodes: up to each of which the forward is timed.
        precision: of weights and activations.
        device: a torch device.
        batch: images in a forward.
    """

    backbone: str
    nodes: tuple[str, ...]
    precision: str
    device: str
    batch: int

    @property
    def key(self) -> str:
        """Names all that the times depend on, the machine among them."""
        return key_of(what="times", torch=versions()["torch"], **asdict(self), **self.machine())

    def machine(self) -> dict[str, Any]:
        """What computes."""
        import torch

        is_cuda = self.device.startswith("cuda")
        return {
            "host": host()["name"],
            "processor": torch.cuda.get_device_name(self.device) if is_cuda else "cpu",
            "threads": torch.get_num_threads(),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"device": self.device, "precision": self.precision, "batch": self.batch, **self.machine()}

    def measure(self) -> dict[str, Any]:
        """Measures the forward for one image up to each node.

        Returns:
            ``{"milliseconds": {node: time}, "waited": share}``, see ``NodeTimes``.
        """
        from featurepipe.backbones.timing import node_times

        return asdict(
            node_times(
                network_to_time(self.backbone),
                self.nodes,
                precision=self.precision,
                device=self.device,
                batch=self.batch,
            )
        )


class TimedForward:
    """A forward that is timed by any one worker of an executor: where features are computed.

    Args:
        executor: times it.
        timing: what is timed.

    Attributes:
        key: see `Timing`, as the worker says it.
    """

    def __init__(self, executor: Executor, timing: Timing) -> None:
        self._executor, self._timing = executor, timing
        self.key, self._about = executor.once(_describe, timing)

    def as_dict(self) -> dict[str, Any]:
        """See `Timing`."""
        return self._about

    def measure(self) -> dict[str, Any]:
        """See `Timing`."""
        return self._executor.once(_measure, self._timing)


def _describe(_: None, timing: Timing, worker: Worker, _stop: Stop, _report: Report) -> tuple[str, dict[str, Any]]:
    with alone_on_all_cores(worker):
        return timing.key, timing.as_dict()


def _measure(_: None, timing: Timing, worker: Worker, _stop: Stop, _report: Report) -> dict[str, Any]:
    with alone_on_all_cores(worker):
        return timing.measure()


def least_disturbed(timing: TimedForward, journal: Journal) -> dict[str, Any]:
    """The times of all tries so far that waited least; tried again after an hour, while all were disturbed.

    So the same command says the same times again, and a machine that is always busy is not timed again and again.

    Returns:
        As `Timing.measure`, with ``tried``, when that was last, in seconds since 1970.

    Raises:
        DiskFull: no space is left to keep them.
    """
    known, now = journal.known(timing.key), time.time()
    if known is not None and (is_undisturbed(known) or 0 <= now - known.get("tried", 0.0) < AGAIN):
        return dict(known)
    tries = [timing.measure(), *([known] if known else [])]
    best = {**min(tries, key=lambda measured: float(measured["waited"])), "tried": now}
    journal.keep(timing.key, best)
    return best


def network_to_time(name: str) -> Backbone:
    """The network with random weights, which take the same time and are always at hand; else as its author's code builds it."""
    from featurepipe.backbones import load_backbone

    network = load_backbone(name, "none")
    try:
        network.module  # noqa: B018 - builds it
    except UsageError:  # a layer of the user's own whose values cannot be drawn anew
        return load_backbone(name)
    return network
