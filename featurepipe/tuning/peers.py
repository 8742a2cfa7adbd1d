"""Several processes that tune one network together: each takes its part of every batch, and gradients are averaged.

``torchrun`` starts them, Lightning Fabric connects them (extra ``tune``), and PyTorch's DistributedDataParallel averages
gradients (Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurepipe.errors import Interrupted, Message, Option, UsageError, pip_install

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
Rows = npt.NDArray[np.int64]

LEAST = 2
"""Images of a batch that each process takes at least; BatchNorm in training needs two."""
_PATIENCE = timedelta(days=7)
"""How long processes wait for the first one while it extracts, fits the head or writes the bundle; one that ends ends all."""
_PRECISIONS: Mapping[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def processes() -> tuple[int, int]:
    """The rank of this process among those that ``torchrun`` has started, and how many they are; (0, 1) without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), world) if world > 1 else (0, 1)


def refuse_processes(what: str) -> None:
    """Refuses to do in each of several processes what one does.

    Args:
        what: For the message, such as ``a tail is tuned``.

    Raises:
        UsageError: ``torchrun`` has started several.
    """
    _, world = processes()
    if world > 1:
        raise UsageError(
            Message(
                f"{what} in one process, and torchrun has started {world}: start it without torchrun. Several processes tune all "
                "layers together: ", Option("from_node", "images"),
            )
        )  # fmt: skip


def fabric_on(device: str, precision: str, *, together: bool = False) -> Fabric:
    """Lightning Fabric on a device; of several processes each has its own.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``fp32`` or ``bf16``.
        together: Connect with the other processes, if ``torchrun`` has started several.

    Raises:
        UsageError: It is not installed; or there are several processes, and they are not meant, or share a GPU.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise UsageError(f"tuning from images needs Lightning Fabric; run: {pip_install('tune')}") from error
    kind, _, number = device.partition(":")
    _, world = processes()
    if world == 1:
        fabric = Fabric(accelerator=kind, devices=[int(number)] if number else 1, precision=_PRECISIONS[precision])
        fabric.launch()
        return fabric
    if not together:
        refuse_processes("this runs")
    if number:
        raise UsageError(
            Message(f"{world} processes cannot share ", Option("device", device), "; each takes one of its own with ",
                    Option("device", kind))
        )  # fmt: skip
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    if kind == "cuda" and local > torch.cuda.device_count():
        raise UsageError(
            f"torchrun has started {local} processes here, and there are {torch.cuda.device_count()} GPUs: give it "
            f"--nproc-per-node {torch.cuda.device_count()}"
        )
    strategy = DDPStrategy(timeout=_PATIENCE, gradient_as_bucket_view=True)
    fabric = Fabric(
        accelerator=kind, devices=local, num_nodes=world // local, strategy=strategy, precision=_PRECISIONS[precision]
    )
    fabric.launch()
    return fabric


class Peers:
    """The processes that make a run together; without Fabric, or with one process, this one alone.

    All of them call each method at the same place, and all get the same from it.

    Args:
        fabric: Lightning's, launched; None for this process alone.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank, self.world = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that extracts, chooses, writes and speaks."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of them are on this machine."""
        return 1 if self.world == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world)))

    def check(self, images: int, batch_size: int) -> None:
        """Refuses what cannot be divided among the processes.

        Raises:
            UsageError: There are fewer images, in all or in a batch, than `LEAST` for each process.
        """
        least = LEAST * self.world
        if self.world == 1 or min(images, batch_size) >= least:
            return
        if images < least:
            raise UsageError(
                f"{images:,} training images are too few for {self.world} processes, each of which takes at least {LEAST} of "
                f"every batch: give more images, or torchrun --nproc-per-node {max(1, images // LEAST)} at most"
            )
        raise UsageError(
            Message(
                f"batches of {batch_size} images are too small for {self.world} processes, each of which takes at least {LEAST} "
                "of every batch: give ", Option("batch_size", str(least)), " or more, or start fewer processes",
            )
        )  # fmt: skip

    def part(self, rows: Rows) -> Rows:
        """This process' part of some rows; all of them in every process, where they are too few to divide."""
        return rows if len(rows) < LEAST * self.world else rows[self.rank :: self.world]

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first process made; the others wait for it.

        Args:
            work: Called in the first process alone. What it returns is pickled; tensors of it are on the CPU.

        Raises:
            SystemExit: In the others, where the first has failed, which says why.
        """
        if self._fabric is None or self.world == 1:
            return work()
        made: list[T] = []
        try:
            if self.is_first:
                made.append(work())
        finally:  # also where it has failed: the others are told so
            with self._reaching():
                made = self._fabric.broadcast(made)
        if not made:
            raise SystemExit(1)
        return made[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes."""
        return flag if self.world == 1 else bool(self._sums([float(flag)])[0])

    def mean(self, value: float, weight: float) -> tuple[float, float] | None:
        """The weighted mean of a value over the processes, and by how much this one's counts, 1 on average; None of nothing."""
        if self.world == 1:
            return value, 1.0
        total, weights = self._sums([value * weight if weight else 0.0, weight])
        return (total / weights, weight * self.world / weights) if weights else None

    def average(self, values: Iterable[Tensor]) -> None:
        """Puts the mean over the processes in the place of tensors."""
        values = [value for value in values if value.is_floating_point()]
        if self._fabric is None or self.world == 1 or not values:
            return
        with self._reaching(), torch.no_grad():
            flat = torch.cat([value.flatten() for value in values])
            flat = self._reduced(flat) / self.world
            for value, mean in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
                value.copy_(mean.reshape(value.shape))

    def gathered(self, scores: npt.NDArray[np.float32], rows: Rows) -> tuple[npt.NDArray[np.float32], Rows]:
        """Scores (m, K) of some rows (m,), put together from those of all processes, by ascending row, each once."""
        if self.world == 1:
            return scores, rows
        parts: list[Any] = [None] * self.world
        with self._reaching():
            torch.distributed.all_gather_object(parts, (scores, rows))
        parts = [part for part in parts if len(part[1])] or parts[:1]
        found, first = np.unique(np.concatenate([rows for _, rows in parts]), return_index=True)
        return np.concatenate([scores for scores, _ in parts])[first], found

    def _sums(self, values: list[float]) -> list[float]:
        if self._fabric is None:
            return values
        with self._reaching():
            sums: list[float] = self._reduced(torch.tensor(values, dtype=torch.float64)).tolist()
        return sums

    def _reduced(self, values: Tensor) -> Tensor:
        assert self._fabric is not None  # noqa: S101 - asked before
        reduced = self._fabric.all_reduce(values.to(self._fabric.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)  # noqa: S101 - as the one that was given
        return reduced.to(values.device)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """While the block runs, other processes are waited for.

        Raises:
            Interrupted: One of them has ended.
        """
        try:
            yield
        except RuntimeError as error:  # of torch.distributed, whichever the backend
            raise Interrupted(
                f"process {self.rank} of {self.world} has lost another one, which has said why ({error}); run all of it again to "
                "go on from the last checkpoint", 15,
            ) from error  # fmt: skip


ALONE = Peers()
"""This process."""
