"""What both ways of tuning share: an exact head first, then runs of the loop, a mix of old and new weights, and the bundle."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.engine import NUMERICS
from featurepipe.backbones.tail import TunedLayers
from featurepipe.errors import UsageError
from featurepipe.features.settings import Settings
from featurepipe.heads.linear.linear_map import head_of_map, linear_map
from featurepipe.interrupt import StopRequest
from featurepipe.option_groups import as_asked, declared
from featurepipe.progress import show
from featurepipe.store import FeatureStore, Space, fingerprint
from featurepipe.store.options import LabelsOption, RoleOptions
from featurepipe.store.rows import ArrayRows
from featurepipe.store.views import FeatureSet
from featurepipe.training.fit import HeldOut, calibrate, fit, interval_of, labels_calibrated
from featurepipe.training.options import DEFAULT_HEADS, TrainOptions
from featurepipe.training.publish import Inputs, Network, publish, rows_learned, weights_learned
from featurepipe.training.settle import settle_rows
from featurepipe.training.task import Recipe, Task
from featurepipe.training.text import mix_text
from featurepipe.training.train import labels_name, roles_asked
from featurepipe.training.tuning import search
from featurepipe.tuning.loop import (
    Examples,
    Model,
    Rows,
    State,
    Tuning,
    TuningCheckpoint,
    TuningObjective,
    TuningRun,
    identity_of,
    score_rows,
    tune,
)
from featurepipe.tuning.options import TuneOptions

_WHERE = declared(LabelsOption).keys() | {"weights", "trust_code", "dataset", "backbone", "memory", "store_features"}
"""Options that say where things are, not what comes out."""
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the tuned weights that are tried on the validation images; the rest is the frozen network's."""


@dataclass
class TuningWork(ABC):
    """What is tuned on what; a subclass says where the inputs of the layers come from.

    Attributes:
        space: The feature space whose rows, and whose network, these are.
        backbone: The network.
        body: Its layers that are tuned.
        task: The rows, with bottleneck features that `fill` computes.
        recipe: Of the exact head.
        objective: What is learned.
        options: How.
    """

    space: Space
    backbone: Backbone
    body: TunedLayers
    task: Task
    recipe: Recipe
    objective: TuningObjective
    options: TuneOptions

    @property
    @abstractmethod
    def column(self) -> str:
        """What goes in, as a bundle's record of its inputs names it."""

    @abstractmethod
    def examples_of(self, rows: Rows) -> Examples:
        """The inputs of some rows of the task."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What is tuned, as JSON values."""

    def exact_head(self, say: Callable[[str], None]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The head on the frozen bottleneck, its penalty chosen on the validation rows, as an affine map."""
        division = self.task.division
        self.fill_frozen(self.learned_from)
        self.recipe = self.recipe.with_params(search(self.task, self.recipe, jobs=1, say=say).params)
        return linear_map(fit(self.task, self.recipe, division.train, say))

    def fill(self, body: torch.nn.Module, rows: Rows) -> None:
        """Computes bottleneck features of some rows of the task."""
        self.set_features(rows, score_rows(body, self.examples_of(rows), rows))

    def set_features(self, rows: Rows, values: npt.NDArray[np.float32]) -> None:
        """Sets the bottleneck features of some rows of the task."""
        held = self.task.features.rows
        assert isinstance(held, ArrayRows)  # noqa: S101 - made by `settled`
        held.values[held.positions[rows]] = values

    def fill_frozen(self, rows: Rows) -> None:
        """Sets the bottleneck features of the frozen network."""
        self.fill(self.body, rows)

    def fill_tuned(self, body: Any, rows: Rows) -> None:
        """Sets the bottleneck features that the bundle's network gives, as nearly as what is at hand allows."""
        self.fill(body, rows)

    @property
    def learned_from(self) -> Rows:
        """The rows that train or validate, ascending."""
        return np.union1d(self.task.division.train, self.task.division.validation)

    def inputs(self) -> Inputs:
        """What decides the outcome, in the form of a trained head's."""
        settings = {name: value for name, value in as_asked(self.options).items() if name not in _WHERE}
        return Inputs(
            fingerprint=self.space.fingerprint,
            columns=(self.column,),
            settings={**settings, **weights_learned(self.task)},
            is_tuned=True,
            **rows_learned(self.task),
        )


def settled(
    store: FeatureStore, found: FeatureSet, body: TunedLayers, options: TuneOptions, *, snapshot: str | None, say: Any
) -> tuple[Task, Recipe, TuningObjective]:
    """Settles rows, head and objective as `featurepipe.train` does, with room in memory for the bottleneck of every row.

    Args:
        store: The store.
        found: Rows of it, whatever their columns.
        body: The layers to tune.
        options: What was asked for.
        snapshot: As in `featurepipe.train`.
        say: Told of rows.

    Raises:
        UsageError: The labels cannot be learned from, or too few images are left to validate on.
    """
    bottleneck = replace(
        found,
        rows=ArrayRows((body.bottleneck,), np.zeros((len(found), body.width), np.float32), np.arange(len(found))),
        map_shape=None,
    )
    target_type = options.target_type
    training = TrainOptions(
        **RoleOptions.of(options).arguments(),
        labels=options.labels,
        head=DEFAULT_HEADS[target_type],
        split=options.split,
        min_class_size=options.min_class_size,
        memory=options.memory,
        seed=options.seed,
    )
    recipe = Recipe(DEFAULT_HEADS[target_type], {}, seed=options.seed, target_type=target_type)
    task = settle_rows(store, bottleneck, recipe, training, snapshot=snapshot, say=say)
    division = replace(task.division, is_carved=False)  # the layers do not get their validation images back
    task = replace(task, division=division)
    _check_validation(task)
    answers = task.codes if task.targets is None else task.targets
    weights = task.weights(np.arange(len(task.features)))
    return task, recipe, TuningObjective.of(target_type, answers, weights, division.train)


def tune_and_publish(
    work: TuningWork, folder: Path, stop: StopRequest, *, start: float, silent: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Fits the head, tunes, mixes, and writes the bundle; returns what was done.

    Args:
        work: What is tuned.
        folder: Of the bundle.
        stop: Whether to stop.
        start: When all began, as `time.perf_counter` told.
        silent: Show no progress.
        say: Told what happens.

    Raises:
        Interrupted: A stop was asked for; the next call goes on.
        UsageError: Nothing was learned before the loss became infinite.
    """
    options = work.options
    model = Model(work.body, *work.objective.to_scores(*work.exact_head(say)))
    frozen = model.weights()
    runs = _tuned(work, model, frozen, folder, stop, silent=silent)
    best = max(runs, key=lambda run: run.score)
    mixes = _mixes(work, model, frozen, best.best, MIXES if options.interpolate else MIXES[:: len(MIXES) - 1])
    share = max(mixes, key=lambda mix: (mixes[mix], -mix))  # of equal ones the one nearer to the frozen network
    model.adopt(mixed(frozen, best.best, share))
    say(mix_text(mixes, share, work.objective.measure))
    scores = {f"{mix:g}": score for mix, score in mixes.items()}
    about = {**work.about(), **_history(runs, best), "mixes": scores, "mix": share}
    with TemporaryDirectory() as scratch:
        file = _weights_file(work.backbone, work.body, Path(scratch))
        record = _published(work, model, folder, file, about, seconds=time.perf_counter() - start, say=say)
    for number in range(options.seeds):
        _checkpoint(folder, number, "").remove()
    return record


def _check_validation(task: Task) -> None:
    division = task.division
    if len(division.validation) and (task.targets is not None or len(np.unique(task.codes[division.validation])) > 1):
        return
    raise UsageError(
        f"{len(division.train) + len(division.validation):,} training images are too few to set validation images aside, which "
        "decide when to stop; give more images, or a split val"
    )


def _tuned(
    work: TuningWork, model: Model, frozen: State, folder: Path, stop: StopRequest, *, silent: bool
) -> list[Tuning]:
    """One run of the loop for each seed."""
    division, blocks, options = work.task.division, work.body.blocks(), work.options
    examples = work.examples_of(work.learned_from)
    facts = {
        "space": work.space.fingerprint,
        "from": work.body.node,
        "rows": work.inputs().as_dict(),
        "torch": torch.__version__,
    }
    runs = []
    for number in range(options.seeds):
        what = "tuning" if options.seeds == 1 else f"tuning {number + 1} of {options.seeds}"
        identity = identity_of({**facts, "run": number})
        model.adopt(frozen)
        run = TuningRun(
            model,
            examples,
            work.objective,
            division.train,
            division.validation,
            options,
            blocks,
            options.seed + number,
        )
        with show(run.steps * options.epochs, what, unit="steps", silent=silent) as progress:
            runs.append(tune(run, checkpoint=_checkpoint(folder, number, identity), stop=stop, progress=progress))
            progress.say(f"{what} ended: {runs[-1].ended}; best after epoch {runs[-1].epoch}")
    return runs


def _checkpoint(folder: Path, number: int, identity: str) -> TuningCheckpoint:
    return TuningCheckpoint(folder.with_name(f"{folder.name}.tuning") / f"run-{number}.pt", identity)


def mixed(frozen: State, tuned: Mapping[str, Tensor], share: float) -> State:
    """Weights between the frozen (0) and the tuned ones (1)."""
    if share in (0.0, 1.0):
        return dict(tuned if share else frozen)
    return {name: torch.lerp(value, tuned[name], share) for name, value in frozen.items()}


def _mixes(
    work: TuningWork, model: Model, frozen: State, tuned: Mapping[str, Tensor], shares: Sequence[float]
) -> dict[float, float]:
    """The validation score by share of the tuned weights."""
    rows, found = work.task.division.validation, {}
    examples = work.examples_of(rows)
    for share in shares:
        model.adopt(mixed(frozen, tuned, share))
        found[share] = work.objective.score(score_rows(model, examples, rows), rows)
    return found


def _history(runs: list[Tuning], best: Tuning) -> dict[str, Any]:
    entries = [
        {"history": run.history, "best_epoch": run.epoch, "score": run.score, "ended": run.ended} for run in runs
    ]
    return {"runs": entries, "kept_run": runs.index(best)}


def _weights_file(backbone: Backbone, body: TunedLayers, folder: Path) -> Path:
    """All weights of the network with the tuned ones in place, as a .safetensors file."""
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in backbone.state().items()}
    for name, value in body.network.named_parameters():
        state[name] = value.detach().to(state[name].dtype)
    path = folder / "tuned.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def _published(
    work: TuningWork, model: Model, folder: Path, file: Path, about: dict[str, Any], *, seconds: float, say: Any
) -> dict[str, Any]:  # fmt: skip
    """Tests the tuned network, writes the bundle, and returns what was done."""
    options = work.options
    like = None if work.backbone.is_random or work.backbone.weights.startswith("file:") else work.backbone.weights
    tuned = load_backbone(work.backbone.name, str(file), like=like)
    settings = Settings.of_space(work.space.fields, why="as in the store")
    fields = {**tuned.identity(), **settings.fields(), "numerics": NUMERICS}
    network = Network(
        {
            "name": tuned.name,
            "weights": "file",
            "seed": 0,
            **({} if like is None else {"like": like}),
            "description": tuned.description(),
        },
        fields,
        fingerprint(fields),
    )
    division = work.task.division
    work.fill_tuned(model.body, np.union1d(division.validation, division.test))
    origin = replace(work.task.features.origin, fields=fields, fingerprint=network.fingerprint)
    task = replace(work.task, features=replace(work.task.features, origin=origin))
    weight, bias = work.objective.to_target(
        model.head.weight.detach().double().numpy(), model.head.bias.detach().double().numpy()
    )
    head = head_of_map(work.objective.target_type, task.classes, weight, bias)
    return publish(
        folder, network, task, work.recipe, head, inputs=work.inputs(), search=None,
        calibration=_calibration(task, weight, bias, say), weights=file, labels=labels_name(options.labels),
        column=options.target, multilabel=options.multilabel or (), threshold=None, positive=None,
        roles=roles_asked(options), seconds=seconds, say=say, tuning=about,
    )  # fmt: skip


def _calibration(task: Task, weight: npt.NDArray[Any], bias: npt.NDArray[Any], say: Any) -> Any:
    """What makes probabilities or intervals of scores, from the validation images, which also chose when to stop."""
    rows = task.division.validation
    scores = task.features.read(np.float64, rows=rows) @ weight.T + bias
    if task.is_multilabel:
        return labels_calibrated(task, scores, task.answers(rows), say)
    if not task.is_numeric:
        return calibrate(HeldOut(rows, task.codes[rows], scores, task.classes), say)
    return interval_of(task, lambda: scores[:, 0], refitted=False, say=say)
