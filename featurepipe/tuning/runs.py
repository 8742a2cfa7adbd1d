"""The runs of a tuning, one for each cut and seed, mapped by an executor: the head they start from, and the mix they end in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurepipe.backbones import load_backbone
from featurepipe.backbones.tail import Model, State, Tail, Trunk, TunedLayers
from featurepipe.display import counted
from featurepipe.errors import Interrupted
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.features.session import NetworkName, alone_on_all_cores, load_network
from featurepipe.heads import fit_path
from featurepipe.heads.families import ROUGH, SMALL_VALUES, family_for, make_head
from featurepipe.heads.linear.linear_map import linear_map
from featurepipe.heads.multilabel import tune_labels
from featurepipe.interrupt import StopRequest
from featurepipe.progress import show
from featurepipe.training.fit import refusals, threads_for
from featurepipe.training.options import DEFAULT_HEADS
from featurepipe.training.tuning import climb
from featurepipe.tuning.loop import (
    Examples,
    LossNotFinite,
    Tuning,
    TuningCheckpoint,
    TuningRun,
    digest_of,
    score_rows,
    tune,
)
from featurepipe.tuning.objective import Floats, Rows, TuningObjective
from featurepipe.tuning.options import Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the tuned weights that are tried on the validation images; the rest is the frozen network's."""


def unit_of(values: npt.NDArray[np.float32]) -> float:
    """What features (n, D) are divided by so that their variance is 1 in the mean over the values; 1 if all are constant."""
    return float(np.sqrt(values.var(axis=0, dtype=np.float64).mean())) or 1.0


LEFT = 0.5
"""Of the loss of a head that knows nothing, what the head that layers are tuned from has at least on the images that train."""


def with_loss_left(
    head: tuple[Floats, Floats], values: npt.NDArray[np.float32], objective: TuningObjective, rows: Rows
) -> tuple[Floats, Floats]:
    """A head whose scores are shrunk until something is left to learn from.

    A head that has learned its few images by heart gives gradients next to nothing, and only of the hardest. A factor changes no
    answer. Squared errors of numbers need none.

    Args:
        head: Weight (K, D) and bias (K,), in the scores of the objective.
        values: (m, D), the features of the rows.
        objective: What is learned.
        rows: (m,) of the objective.
    """
    from scipy.optimize import brentq

    if objective.target_type == "continuous":
        return head
    weight, bias = head
    scores = (values @ weight.T + bias).astype(np.float32)
    wanted = LEFT * objective.mean_loss(0 * scores, rows)

    def too_much(factor: float) -> float:
        return objective.mean_loss(np.float32(factor) * scores, rows) - wanted

    if not too_much(1.0) < 0:
        return head
    factor = brentq(too_much, 0.0, 1.0, xtol=1e-6)
    return weight * factor, bias * factor


def exact_head(
    values: npt.NDArray[np.float32], rows: Rows, objective: TuningObjective, train: Rows, validation: Rows,
    *, outputs: int, seed: int, memory: int | None = None,
) -> tuple[tuple[Floats, Floats], dict[str, Any]]:  # fmt: skip
    """The head of LP-FT: exact on the frozen bottleneck, its penalty chosen on validation rows, but for a factor.

    Values are not standardised, but divided by one number: of a value that hardly varies a standardised head takes a large
    multiple, and then the first steps of tuning change that value most. The factor is that of `with_loss_left`.

    Args:
        values: (m, D), the frozen bottleneck features of some rows.
        rows: (m,) which rows of the objective these are, ascending; those that train and validate are among them.
        objective: What is learned.
        train: Rows that the head is fitted on.
        validation: Rows that its penalty is chosen by: of classes one C, tried as `featurepipe.training.tuning.climb` does; of
            several labels the C of each; of numbers one alpha.
        outputs: Classes or labels; 1 for a number.
        seed: Of the solver.
        memory: Bytes that a fit may take; above that, as with many values, it works in blocks. None for no bound.

    Returns:
        Weight (outputs, D) and bias (outputs,), in the scores of the objective; a class or label that the head could not learn
        scores lowest. And the parameters that were chosen.

    Raises:
        UsageError: The rows cannot be learned from.
    """
    kind, name = objective.target_type, DEFAULT_HEADS[objective.target_type]
    family = family_for(name, kind)
    fit, choose = np.searchsorted(rows, train), np.searchsorted(rows, validation)
    unit = unit_of(values[fit])
    weights = None if objective.weights is None else objective.weights[rows]
    data = _HeadRows(kind, values / unit, objective.answers[rows], weights, fit, choose)
    size = len(fit) * values.shape[1]
    in_blocks = size > SMALL_VALUES or (memory is not None and size * family.bytes_per_value > memory)
    one_sided: dict[str, Any] = {"one_sided": "drop"} if kind == "multilabel" else {}
    make = partial(
        make_head, name, target_type=kind, scale=False, random_state=seed, out_of_core=in_blocks, memory=memory, **one_sided
    )  # fmt: skip
    with refusals(name), threads_for(values.shape), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out", UserWarning)  # labels of one side; scored lowest below
        params = _penalty(make, family.grid, data, objective.error, in_blocks=in_blocks)
        head = make(**params).fit(**data.given())
    weight, bias = linear_map(head)
    if len(weight) < outputs:
        known, few, low = np.asarray(head.classes_, np.int64), weight, bias
        weight, bias = np.zeros((outputs, few.shape[1])), np.full(outputs, float(low.min(initial=0.0)) - 10.0)
        weight[known], bias[known] = few, low
    return with_loss_left(objective.to_scores(weight / unit, bias), values[fit], objective, train), params


@dataclass(frozen=True)
class _HeadRows:
    """What a head is fitted on, and its penalty chosen by: values (m, D), answers and weights of rows, and places in these."""

    kind: str
    values: npt.NDArray[np.float32]
    answers: npt.NDArray[Any]
    weights: Floats | None
    fit: Rows
    choose: Rows

    def given(self) -> dict[str, Any]:
        """What is learned from, as arguments of a fit."""
        weights = None if self.weights is None else self.weights[self.fit]
        return {"X": self.values[self.fit], "y": self.answers[self.fit], "sample_weight": weights}


def _penalty(
    make: Callable[..., Any], grid: Mapping[str, Sequence[Any]], data: _HeadRows, error: Callable[[float, int], float],
    *, in_blocks: bool,
) -> dict[str, Any]:  # fmt: skip
    """The parameters of the grid that do best on the rows that choose; of equals the first."""
    if data.kind == "multilabel":
        folds = [(data.fit, data.choose)]
        found = tune_labels(make(), data.values, data.answers, Cs=grid["C"], folds=folds, sample_weight=data.weights)
        return {"C": found.C.tolist()}
    learn, others, truth = data.given(), data.values[data.choose], data.answers[data.choose]
    if data.kind == "continuous":
        guesses = {alpha: make(alpha=alpha).fit(**learn).predict(others) for alpha in grid["alpha"]}
        return {"alpha": min(guesses, key=lambda alpha: float(((guesses[alpha] - truth) ** 2).mean()))}

    def accuracies(Cs: Sequence[float]) -> list[float]:
        if in_blocks:  # in shared passes
            (heads,) = fit_path(make(**ROUGH), **learn, Cs=Cs)
        else:
            heads = [make(C=C).fit(**learn) for C in Cs]
        return [float((head.predict(others) == truth).mean()) for head in heads]

    return {"C": climb(grid["C"], accuracies, len(truth), error)}


def random_head(outputs: int, width: int, seed: int) -> tuple[Floats, Floats]:
    """A head (K, D), (K,) that has learned nothing, in the scores of an objective."""
    weight = np.random.default_rng(seed).uniform(-1, 1, (outputs, width)) / np.sqrt(width)
    return weight, np.zeros(outputs)


def drawn_head(seed: int, outputs: int, width: int) -> State:
    """`random_head`, as a model's state has it."""
    weight, bias = (torch.from_numpy(part.astype(np.float32)) for part in random_head(outputs, width, seed))
    return {"head.weight": weight, "head.bias": bias}


def drawn_network(seed: int, name: str, batch_norm: str, outputs: int) -> State:
    """All that learns of a network with random weights, and a random head on it."""
    body = Trunk(load_backbone(name, "none", seed=seed), batch_norm)
    return Model(body, *random_head(outputs, body.width, seed)).weights()


@dataclass(frozen=True)
class CutRun:
    """One run: a shard of the tuning.

    Attributes:
        cut: The node above which layers are tuned, or ``images``.
        number: Of the run among those of its cut, from 0; with the tuning's seed it makes the run's own.
    """

    cut: str
    number: int


@dataclass
class TunedCut:
    """What is tuned above one node, from what.

    Attributes:
        examples: The inputs of the layers, by row.
        facts: What decides the outcome of a run beside its number; a checkpoint of other facts is not gone on from.
        body: The layers as they are before; None where a process is yet to build them from the network.
    """

    examples: Examples
    facts: Mapping[str, Any]
    body: TunedLayers | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "body": None}


@dataclass
class TuningContext:
    """What all runs of a tuning have in common.

    Attributes:
        network: As any process can load it; None for runs that stay in this one.
        head: Weight (K, D) and bias (K,) to start from, in the scores of the objective.
        objective: What is learned.
        train: Positions of the rows to learn from.
        validation: Positions of the rows that choose.
        schedule: Rates and lengths.
        seed: Of the order of images in run 0.
        folder: Of the checkpoints.
        cuts: What is tuned, by cut.
        seeds: Runs for each cut.
        fabric: Lightning's; None for PyTorch alone, in float32.
        drawn: The weights, by a run's seed, that runs begin with where these are random, so that every run has others; None
            where all begin alike.
    """

    network: NetworkName | None
    head: tuple[npt.NDArray[Any], npt.NDArray[Any]]
    objective: TuningObjective
    train: Rows
    validation: Rows
    schedule: Schedule
    seed: int
    folder: Path
    cuts: Mapping[str, TunedCut]
    seeds: int = 1
    fabric: Fabric | None = None
    drawn: Callable[[int], State] | None = None
    _started: dict[str, tuple[Model, State]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "folder": self.folder.absolute(), "_started": {}}

    def start(self, cut: str) -> tuple[Model, State]:
        """The layers above a cut with the head on them, as they are before tuning; and these weights."""
        if cut not in self._started:
            body = self.cuts[cut].body
            if body is None:
                if self.network is None:
                    raise RuntimeError("no other process was to tune this network")
                body = Tail(load_network(self.network, "cpu").backbone, cut)
            model = Model(body, *self.head)
            self._started[cut] = model, model.weights()
        for other in self.cuts.keys() - {cut}:
            self.cuts[other].examples.release()
        model, frozen = self._started[cut]
        model.adopt(frozen)
        return model, frozen

    def checkpoint(self, shard: CutRun) -> TuningCheckpoint:
        """Where a run is written down; of one cut alone, files have no name of it."""
        name = f"run-{shard.number}.pt"
        identity = digest_of({**self.cuts[shard.cut].facts, "run": shard.number})
        return TuningCheckpoint(self.folder / (name if len(self.cuts) == 1 else f"{shard.cut}-{name}"), identity)

    def run(self, shard: CutRun) -> TuningRun:
        """A run at its start."""
        model, _ = self.start(shard.cut)
        seed = self.seed + shard.number
        if self.drawn is not None and shard.number:  # the first has them already
            model.adopt(self.drawn(seed))
        return TuningRun(
            model, self.cuts[shard.cut].examples, self.objective, self.train, self.validation, self.schedule,
            model.body.blocks(), seed, fabric=self.fabric,
        )  # fmt: skip

    @property
    def most_steps(self) -> int:
        """Of a run that nothing ends early."""
        return -(-len(self.train) // self.schedule.batch_size) * self.schedule.epochs

    @property
    def shards(self) -> list[CutRun]:
        """All runs, cut by cut."""
        return [CutRun(cut, number) for cut in self.cuts for number in range(self.seeds)]

    def told(self, shard: CutRun) -> str:
        """Which run it is, in words; empty if there is one alone."""
        parts = [f"above {shard.cut}"] * (len(self.cuts) > 1)
        parts += [f"run {shard.number + 1} of {self.seeds}"] * (self.seeds > 1)
        return ", ".join(parts)


class _Reported:
    """Progress that is reported to whoever mapped the run; each step at once only where that is this process."""

    def __init__(self, shard: CutRun, what: str, worker: Worker, report: Report) -> None:
        self._shard, self._what, self._worker, self._report = shard, what, worker, report
        self._live = worker.live(report)

    def advance(self, images: int, bottleneck: str = "") -> None:
        """So many steps more were made."""
        self._live((self._shard, images, bottleneck))

    def say(self, message: str) -> None:
        """A line for the user."""
        self._report(self._worker.signed(f"{self._what}: {message}" if self._what else message))


def tune_cut(context: TuningContext, shard: CutRun, worker: Worker, stop: Stop, report: Report) -> Tuning:
    """Makes one run, or goes on with it from its checkpoint.

    Returns:
        What it leaves. One whose loss was not finite in its first epoch has ``failed``; one that was stopped ``unfinished``.
    """
    progress = _Reported(shard, context.told(shard), worker, report)
    with alone_on_all_cores(worker):
        try:
            return tune(context.run(shard), checkpoint=context.checkpoint(shard), stop=stop, progress=progress)
        except LossNotFinite as error:
            return Tuning({}, float("-inf"), 0, ended=error.message, failed=error.message)


@dataclass(frozen=True)
class TunedRun:
    """A run that has ended.

    Attributes:
        shard: Which.
        tuning: What it left.
    """

    shard: CutRun
    tuning: Tuning


def tuned_runs(context: TuningContext, executor: Executor, stop: StopRequest, *, silent: bool) -> list[TunedRun]:
    """Makes all runs, cut by cut; those that diverge are left out.

    Args:
        context: What they have in common.
        executor: Who makes them; workers elsewhere must see the folder of the checkpoints.
        stop: Whether to stop.
        silent: Show no progress.

    Raises:
        Interrupted: A stop was asked for; checkpoints have all that was done.
        LossNotFinite: In every run, before its first epoch ended.
        ClusterError: No worker sees the folder of the checkpoints.
    """
    shards = context.shards
    found: dict[CutRun, Tuning] = {}
    if not executor.is_local:
        context.folder.mkdir(parents=True, exist_ok=True)
        executor.require(partial(_refusal, str(context.folder.absolute())))
    what = "tuning" if len(shards) == 1 else f"tuning, {len(shards)} runs"
    with show(context.most_steps * len(shards), what, unit="steps", silent=silent) as progress:
        made = dict.fromkeys(shards, 0)

        def told(said: Any) -> None:
            if isinstance(said, str):
                progress.say(said)
            else:
                shard, steps, bottleneck = said
                made[shard] += steps
                progress.advance(steps, bottleneck)

        mapped = executor.map(
            tune_cut, shards, context=context, stop=stop, report=told, in_flight=1,
            interruptible=False,  # a run that is begun twice would write the checkpoint of the first
        )  # fmt: skip
        with closing(mapped) as results:
            for shard, tuning in results:
                found[shard] = tuning
                if tuning.unfinished:
                    continue
                progress.advance(max(0, context.most_steps - made[shard]))
                best = "" if tuning.failed else f"; best after epoch {tuning.epoch}"
                progress.say(f"{f'tuning {context.told(shard)}'.strip()} ended: {tuning.ended}{best}")
    _refuse_unfinished(shards, found, stop)
    ended = [TunedRun(shard, found[shard]) for shard in shards]
    if failed := [run.tuning.failed for run in ended if run.tuning.failed]:
        if len(failed) == len(ended):
            raise LossNotFinite(failed[0])
        ended = [run for run in ended if not run.tuning.failed]
    return ended


def _refusal(folder: str) -> str:
    return "" if Path(folder).is_dir() else f"it does not see {folder}, where the checkpoints of a tuning are written"


def _refuse_unfinished(shards: Sequence[CutRun], found: Mapping[CutRun, Tuning], stop: StopRequest) -> None:
    """Raises where a stop has left something undone.

    Raises:
        Interrupted: It has.
    """
    at = [tuning.unfinished for tuning in found.values() if tuning.unfinished]
    if not at and len(found) == len(shards):
        return
    where = at[0] if at else "before a run began"
    done = len(found) - len(at)
    several = f" ({done} of {counted(len(shards), 'run')} are done)" if len(shards) > 1 else ""
    raise Interrupted(
        f"stopped by {stop.name or 'the end of its time'} in {where}{several}; run it again to go on from there",
        stop.signal_number or 2,
    )


def mixed(frozen: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> State:
    """Weights between the frozen (0) and the tuned ones (1)."""
    if share in (0.0, 1.0):
        return dict(tuned if share else frozen)
    return {
        name: torch.lerp(value.to(tuned[name].device), tuned[name], share) if value.is_floating_point() else tuned[name]
        for name, value in frozen.items()
    }


@dataclass(frozen=True)
class Mix:
    """A share of the tuned weights, and how good the network with it is on the rows that choose.

    Attributes:
        share: From 0, the frozen network, to 1, the tuned one.
        score: The objective's score.
        loss: The objective's loss, at the temperature that suits it best.
    """

    share: float
    score: float
    loss: float


def adopt_best_mix(
    model: Model, frozen: State, tuned: State, shares: Sequence[float], examples: Examples, objective: TuningObjective,
    rows: Rows,
) -> tuple[Mix, list[Mix]]:  # fmt: skip
    """Leaves a model with the mix of frozen and tuned weights that is best on some rows (WiSE-FT; Wortsman et al., CVPR 2022).

    Few rows tell mixes apart badly, and the frozen weights are the more robust ones. So of the mixes whose score is within a
    standard error of the best score, that of the smallest share is taken whose loss is within a standard error of the least one,
    the error being that of the mean difference between the losses of the same rows.

    Args:
        model: The model.
        frozen: Its weights before.
        tuned: Those after.
        shares: Of the tuned weights, to try.
        examples: The inputs by row.
        objective: What scores.
        rows: That choose, as far as they can be read.

    Returns:
        The mix that was taken; and all.
    """
    mixes, losses = [], []
    for share in shares:
        model.adopt(mixed(frozen, tuned, share))
        scores, read = score_rows(model, examples, rows)
        losses.append(objective.sharpened_losses(scores, read))
        mixes.append(Mix(share, objective.score(scores, read), float(losses[-1].mean())))
    top = max(mix.score for mix in mixes)
    near = [k for k, mix in enumerate(mixes) if mix.score >= top - objective.error(top, len(read))]
    least = losses[min(near, key=lambda k: mixes[k].loss)]
    tied = [k for k in near if _within_an_error(losses[k] - least)]
    best = min((mixes[k] for k in tied), key=lambda mix: mix.share)
    model.adopt(mixed(frozen, tuned, best.share))
    return best, mixes


SAME_LOSS = 1e-4
"""Mean losses that differ by less are equal."""


def _within_an_error(differences: Floats) -> bool:
    """Whether the mean of paired differences (m,) is at most its standard error, which a single one does not tell."""
    if len(differences) < 2:
        return True
    return bool(differences.mean() <= differences.std(ddof=1) / np.sqrt(len(differences)) + SAME_LOSS)


def told_runs(runs: Sequence[TunedRun], *, several: bool) -> Iterator[dict[str, Any]]:
    """Runs as JSON values; ``from`` says which cut, where there are several."""
    for run in runs:
        tuning = run.tuning
        entry = {"history": tuning.history, "best_epoch": tuning.epoch, "score": tuning.score, "ended": tuning.ended}
        yield {**entry, **({"from": run.shard.cut} if several else {})}
