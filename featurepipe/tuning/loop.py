"""The loop that tunes: AdamW with warm-up and cosine decay, early stopping, and checkpoints from which a killed run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featurepipe.backbones.tail import Model, State
from featurepipe.errors import Message, Option, UsageError
from featurepipe.progress import Progress
from featurepipe.store.atomic import atomic_file
from featurepipe.tuning.objective import Rows, TuningObjective, mixed_inputs, mixing_share
from featurepipe.tuning.options import Schedule
from featurepipe.tuning.peers import Peers

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SAVE_SECONDS = 30.0
"""How long after a checkpoint the next one is due."""
SAVE_SHARE = 0.1
"""Checkpoints of large networks are written less often, so that they take at most this share of the time ..."""
MOST_SECONDS = 55.0
"""... but a kill never costs more than a minute of steps; scoring that it falls into is made again."""


class Examples(Protocol):
    """The inputs of a model by row."""

    @property
    def scored(self) -> int:
        """How many are scored at once."""
        ...

    def release(self) -> None:
        """Gives back the memory of what can be read again."""
        ...

    def batches(self, parts: Sequence[Rows], draw: Draw | None = None) -> Iterator[tuple[Tensor, Rows]]:
        """The inputs (m, ...) of each part of the rows in turn, and the rows that could be read of it.

        Args:
            parts: Rows, one array for each batch.
            draw: What random changes of the inputs follow from, beside the row; None for the inputs as they are.
        """
        ...


Draw = tuple[int, int]
"""The seed of a run, and the epoch."""


@dataclass
class Tuning:
    """What a run of the loop leaves.

    Attributes:
        best: The tuned parameters that scored best on the validation images; the start is none of them.
        score: What they scored.
        epoch: After which epoch that was; 0 before the first has ended.
        history: An entry for each epoch: ``epoch``, ``train_loss``, ``loss`` and ``score`` on the validation images, ``seconds``.
        ended: Why it ended, in words; empty while it has not.
        unfinished: Where it was when a stop was asked for; empty if none was.
        failed: Why nothing was learned; None if something was.
    """

    best: State
    score: float
    epoch: int
    history: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""
    unfinished: str = ""
    failed: Message | None = None

    @property
    def goodness(self) -> tuple[float, float]:
        """By which runs are compared: the best score and, where scores are equal, the smaller loss on the validation images."""
        losses = [entry["loss"] for entry in self.history if entry["epoch"] == self.epoch]
        return self.score, -losses[-1] if losses else -math.inf


class LossNotFinite(UsageError):
    """The loss is infinite or not a number at the start, or became so before anything got better."""


class TuningCheckpoint:
    """Where a run is written down while it goes on.

    Args:
        path: The file.
        identity: Of all that decides the outcome; a file of another identity is not gone on from.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether the last one was written long enough ago."""
        return self._age >= min(MOST_SECONDS, max(SAVE_SECONDS, self._cost / SAVE_SHARE))

    def is_due_before(self, seconds: float) -> bool:
        """Whether the last one would be too old after so many seconds in which none can be written."""
        return self._age + seconds > MOST_SECONDS

    @property
    def _age(self) -> float:
        return time.monotonic() - self._last

    def write(self, content: Mapping[str, Any]) -> None:
        """Writes a checkpoint in place of the one before, whole or not at all."""
        start = time.monotonic()
        buffer = io.BytesIO()
        torch.save({"identity": self.identity, **content}, buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:
            file.write(buffer.getbuffer())
        self._last = time.monotonic()
        self._cost = self._last - start

    def read(self) -> dict[str, Any] | None:
        """The content; None if there is none, it is of another run, or it cannot be read."""
        if not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # noqa: BLE001 - torch raises whatever a damaged file leads to, and a new start is always right
            return None
        return content if isinstance(content, dict) and content.get("identity") == self.identity else None

    def remove(self) -> None:
        """Removes the file, and its folder."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a run's outcome, given as JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def tune(run: TuningRun, *, checkpoint: TuningCheckpoint, stop: Callable[[], bool], progress: Progress) -> Tuning:
    """Tunes a model's parameters on the training rows, and leaves it with those that scored best on the validation rows.

    AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019); rates rise from 0 during the warm-up, then
    fall to 0 as a cosine does. The lower a block, the smaller its rate. The same seed on the same machine with the same number
    of threads gives the same parameters, whether or not a run was killed in between.

    Args:
        run: At its start; the model as it is there is scored as epoch 0.
        checkpoint: Where the run is written down.
        stop: Whether to stop: then the checkpoint has all that was done, and what comes back is ``unfinished``.
        progress: Told of steps.

    Raises:
        LossNotFinite: The loss is not finite at the start, or became so before anything got better.
    """
    options, peers = run.options, run.peers
    before = peers.from_first(checkpoint.read)

    def keep() -> None:
        if peers.is_first:
            checkpoint.write(run.content())

    if before is None:
        run.begin()
    else:
        run.restore(before)
        progress.say(f"going on from a checkpoint: epoch {run.epoch + 1}, step {run.step + 1}")
        progress.advance(run.epoch * run.steps + run.step)
    while not run.is_over:
        for inputs, rows in run.batches():
            if peers.any(stop()):
                keep()
                done = f"epoch {run.epoch + 1} of {options.epochs}, step {run.step} of {run.steps}"
                return replace(run.found, unfinished=done)
            loss = run.learn(inputs, rows)
            if not math.isfinite(loss):
                break
            progress.advance(1, f"loss {run.mean_loss:.4g}")
            if checkpoint.is_due:
                keep()
        if checkpoint.is_due_before(run.validation_seconds):
            keep()
        progress.say(run.end_epoch())
        keep()
    run.model.adopt(run.found.best)
    return run.found


@dataclass
class TuningRun:
    """A run of the loop, and where it is.

    Attributes:
        model: What is tuned.
        examples: What goes in.
        objective: What is learned.
        train: Positions of the rows to learn from.
        validation: Positions of the rows that choose.
        options: Rates, epochs, and so on, settled.
        blocks: Names of the body's parameters by block, from the lowest; as in ``model.body.network``.
        seed: Of the order of images.
        found: The best so far.
        epoch: Epochs that have ended.
        step: Steps of this epoch that were made.
        fabric: Lightning's, which says on which devices and in which precision; None for this process in float32. With several
            processes each takes its part of every batch, and all have the same weights after every step.
    """

    model: Model
    examples: Examples
    objective: TuningObjective
    train: Rows
    validation: Rows
    options: Schedule
    blocks: Mapping[str, list[str]]
    seed: int
    found: Tuning = field(default_factory=lambda: Tuning({}, -math.inf, 0))
    epoch: int = 0
    step: int = 0
    fabric: Fabric | None = None

    def __post_init__(self) -> None:
        self._loss, self._seconds, self._start = 0.0, 0.0, time.perf_counter()
        self._best_loss, self._diverged = math.inf, False
        self.validation_seconds = math.inf  # that scoring the validation images took; infinite before it was done
        self.peers = Peers(self.fabric)
        groups = _parameter_groups(self.model, self.blocks, self.options)
        self.optimiser = torch.optim.AdamW(groups, lr=self.options.rate, weight_decay=self.options.weight_decay)
        self._shares = [group["share"] for group in self.optimiser.param_groups]
        self._forward: nn.Module = self.model
        if self.fabric is not None:
            self._forward, self.optimiser = self.fabric.setup(self.model, self.optimiser)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.train) // self.options.batch_size)

    @property
    def is_over(self) -> bool:
        """Whether it has come to its end."""
        return bool(self.found.ended)

    @property
    def mean_loss(self) -> float:
        """Of the steps of this epoch."""
        return self._loss / max(self.step, 1)

    def begin(self) -> None:
        """Scores the start."""
        loss, score = self._validate()
        if not (math.isfinite(loss) and math.isfinite(score)):
            raise LossNotFinite(
                f"the loss of the network as it is, on the validation images, is {loss}: its activations or its head hold values "
                "that are not finite; look at the weights, and verify the store (featurepipe verify STORE)"
            )
        self._take(loss, score, train_loss=None)

    def batches(self) -> Iterator[tuple[Tensor, Rows]]:
        """What is left of this epoch, step by step: inputs and their rows, in a new order."""
        order = self.train[np.random.default_rng([self.seed, self.epoch]).permutation(len(self.train))]
        size = self.options.batch_size
        parts = [self.peers.part(order[start : start + size]) for start in range(0, len(order), size)]
        yield from self.examples.batches(parts[self.step :], (self.seed, self.epoch))

    def learn(self, inputs: Tensor, rows: Rows) -> float:
        """Makes a step; returns its loss, and changes nothing where that is not finite."""
        factor = _schedule(
            self.epoch * self.steps + self.step, self.options.epochs * self.steps, warmup=self.options.warmup
        )
        for group, share in zip(self.optimiser.param_groups, self._shares, strict=True):
            group["lr"] = self.options.rate * share * factor
        others = (self.peers.rank,) if self.peers.world > 1 else ()
        with self.model.body.learning((*self._draw, *others)):
            loss, value = self._loss_of(inputs, rows)
            if loss is None:  # none of the images could be read
                self.step += 1
                return self.mean_loss
            if not math.isfinite(value):
                self._diverged = True
                return math.nan
            self.optimiser.zero_grad(set_to_none=True)
            if self.fabric is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self.fabric.backward(loss)
        self.optimiser.step()
        self.peers.average(self.model.body.statistics().values())
        self._loss += value
        self.step += 1
        return value

    def _loss_of(self, inputs: Tensor, rows: Rows) -> tuple[Tensor | None, float]:
        """What gradients are computed of, whose mean over processes is that of the batch's loss; and this loss.

        The first is None where no process could read an image.
        """
        device = next(self.model.parameters()).device
        if self.peers.world == 1:
            loss = self._own_loss(inputs.to(device), rows) if len(rows) else None
            return loss, math.nan if loss is None else float(loss.detach())
        if len(rows):
            loss = self._own_loss(inputs.to(device), rows)
        else:  # the others wait for gradients of this process, too
            loss = self._forward(inputs.new_zeros(2, *inputs.shape[1:]).to(device)).sum() * 0
        found = self.peers.mean(float(loss.detach()), self.objective.total(rows))
        return (None, math.nan) if found is None else (loss * found[1], found[0])

    @property
    def _draw(self) -> tuple[int, int, int]:
        """What chance follows from in this step."""
        return self.seed, self.epoch, self.step

    def _own_loss(self, inputs: Tensor, rows: Rows) -> Tensor:
        """The loss of some rows, mixed with each other if that is asked for."""
        smoothing, share = self.options.label_smoothing, mixing_share(self.options.mixup, self._draw)
        if share == 1:
            return self.objective.loss(self._forward(inputs), rows, smoothing=smoothing)
        return self.objective.mixed_loss(self._forward(mixed_inputs(inputs, share)), rows, share, smoothing=smoothing)

    def end_epoch(self) -> str:
        """Scores, decides whether to go on, and says how it is."""
        if self._diverged:
            return self._end_diverged()
        loss, score = self._validate()
        if not (math.isfinite(loss) and math.isfinite(score)):
            return self._end_diverged()
        text = self._take(loss, score, train_loss=self.mean_loss)
        self.epoch, self.step, self._loss = self.epoch + 1, 0, 0.0
        if self.epoch >= self.options.epochs:
            self.found.ended = f"all {self.options.epochs} epochs"
        elif self.epoch - self.found.epoch >= self.options.patience:
            self.found.ended = f"no better for {self.options.patience} epochs"
        return text

    def content(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            "model": self.model.weights(),
            "optimiser": self.optimiser.state_dict(),
            "place": [self.epoch, self.step, self._loss, self._best_loss, self._elapsed()],
            "best": self.found.best,
            "found": [self.found.score, self.found.epoch, self.found.ended],
            "history": json.dumps(self.found.history),
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """Goes on from what `content` gave."""
        self.model.adopt(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.epoch, self.step, self._loss, self._best_loss, self._seconds = content["place"]
        score, epoch, ended = content["found"]
        self.found = Tuning(dict(content["best"]), score, epoch, json.loads(content["history"]), ended)

    def _validate(self) -> tuple[float, float]:
        start, part = time.perf_counter(), self.peers.part(self.validation)
        scores, rows = self.peers.gathered(*score_rows(self.model, self.examples, part))
        self.validation_seconds = time.perf_counter() - start
        return self.objective.mean_loss(scores, rows), self.objective.score(scores, rows)

    def _take(self, loss: float, score: float, *, train_loss: float | None) -> str:
        number = 0 if train_loss is None else self.epoch + 1
        entry = {"epoch": number, "train_loss": train_loss, "loss": loss, "score": score, "seconds": self._elapsed()}
        self.found.history.append(entry)
        better = number > 0 and (score, -loss) > (self.found.score, -self._best_loss)
        if better:
            self.found.best, self.found.score, self.found.epoch = self.model.weights(), score, number
            self._best_loss = loss
        name = self.objective.measure
        if train_loss is None:
            return f"before tuning: validation {name} {score:.4f}, loss {loss:.4g}"
        return (
            f"epoch {number} of {self.options.epochs}: loss {train_loss:.4g}, validation loss {loss:.4g}, {name} {score:.4f}"
            + (" (best)" if better else "")
        )

    def _end_diverged(self) -> str:
        lower = Option("rate", f"{min(self.options.rate / 10, 1e-3):g}")
        said = f"the loss became infinite or not a number in epoch {self.epoch + 1}, "
        said += f"step {self.step + 1}" if self._diverged else "after its last step"
        if self.found.epoch == 0:
            raise LossNotFinite(Message(f"{said}, before the first one ended; try ", lower))
        self.found.ended = f"{said}; kept is epoch {self.found.epoch}"
        return str(Message(f"{self.found.ended}. To go further: ", lower))

    def _elapsed(self) -> float:
        return round(self._seconds + time.perf_counter() - self._start, 3)


def _schedule(step: int, steps: int, *, warmup: float) -> float:
    """The factor of all rates at a step, from 0 to 1.

    Example:
        >>> [round(_schedule(step, 10, warmup=0.2), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _parameter_groups(model: Model, blocks: Mapping[str, list[str]], options: Schedule) -> list[dict[str, Any]]:
    """Parameters by rate and decay: blocks on a geometric scale from the lowest rate to that of the head; vectors never decay."""
    parameters = dict(model.body.named_parameters())
    parameters = {name.removeprefix("network."): value for name, value in parameters.items() if value.requires_grad}
    levels = [options.lowest_rate ** (1 - place / max(1, len(blocks) - 1)) for place in range(len(blocks))]
    if len(blocks) == 1:
        levels = [1.0]
    ranked = [
        (share, [parameters[name] for name in names]) for share, names in zip(levels, blocks.values(), strict=True)
    ]
    ranked.append((1.0, list(model.head.parameters())))
    groups = []
    for share, values in ranked:
        for decays in (True, False):
            chosen = [value for value in values if (value.ndim > 1) == decays]
            if chosen:
                decay = {} if decays else {"weight_decay": 0.0}
                groups.append({"params": chosen, "share": share, **decay})
    return groups


def score_rows(model: nn.Module, examples: Examples, rows: Rows) -> tuple[npt.NDArray[np.float32], Rows]:
    """What a model, or its body, gives for some rows, (m, K), without gradients; and which of them could be read, (m,)."""
    parts = [rows[start : start + examples.scored] for start in range(0, len(rows), examples.scored)]
    device = next(model.parameters()).device
    found, read = [], []
    with torch.inference_mode():
        for inputs, part in examples.batches(parts):
            if len(part):
                found.append(model(inputs.to(device)).float().cpu().numpy())
                read.append(part)
    if not found:
        return np.zeros((0, 1), np.float32), rows[:0]
    return np.concatenate(found), np.concatenate(read)
