"""What both ways of tuning share: an exact head first, then runs of the loop, a mix of old and new weights, and the bundle."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.engine import NUMERICS
from featurepipe.backbones.from_user import check_trusted
from featurepipe.backbones.tail import Model, State, TunedLayers
from featurepipe.display import counted
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.features.session import NetworkName
from featurepipe.features.settings import Settings
from featurepipe.heads.linear.linear_map import head_of_map
from featurepipe.interrupt import StopRequest
from featurepipe.option_groups import as_asked, declared
from featurepipe.progress import took
from featurepipe.store import FeatureStore, Space, fingerprint
from featurepipe.store.choice import is_mirrored
from featurepipe.store.options import LabelsOption, RoleOptions
from featurepipe.store.rows import ArrayRows
from featurepipe.store.views import FeatureSet
from featurepipe.training.fit import HeldOut, calibrate, interval_of, labels_calibrated
from featurepipe.training.options import DEFAULT_HEADS, TrainOptions
from featurepipe.training.publish import Inputs, Network, publish, rows_learned, weights_learned, why_train
from featurepipe.training.settle import settle_rows
from featurepipe.training.splits import Division
from featurepipe.training.task import Recipe, Task
from featurepipe.training.text import mix_text
from featurepipe.training.train import labels_name, roles_asked
from featurepipe.tuning.activations import step_seconds
from featurepipe.tuning.loop import Examples, TuningCheckpoint, digest_of, score_rows
from featurepipe.tuning.objective import Rows, TuningObjective
from featurepipe.tuning.options import RANDOM, Schedule, TuneOptions
from featurepipe.tuning.peers import Peers
from featurepipe.tuning.runs import (
    MIXES,
    TunedCut,
    TunedRun,
    TuningContext,
    adopt_best_mix,
    drawn_head,
    exact_head,
    random_head,
    told_runs,
    tuned_runs,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_WHERE = declared(LabelsOption).keys() | {"weights", "trust_code", "dataset", "backbone", "memory", "store_features"}
"""Options that say where things are, not what comes out."""

HEAD_FILE = "head.pt"
"""Of the head that a tuning starts from, beside the checkpoints of its runs."""


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
        cut: The node above which layers are tuned, as it was asked for; or ``images``.
    """

    space: Space
    backbone: Backbone
    body: TunedLayers
    task: Task
    recipe: Recipe
    objective: TuningObjective
    options: TuneOptions
    cut: str

    @property
    def network_name(self) -> NetworkName | None:
        """The network as any process can load it; None for one that is tuned in this process alone."""
        return None

    @property
    def fabric(self) -> Fabric | None:
        """On which devices, and in which precision; None for this process in float32."""
        return None

    @property
    @abstractmethod
    def column(self) -> str:
        """What goes in, as a bundle's record of its inputs names it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What goes in at all cuts that are tried."""
        return (self.column,)

    @property
    def unreadable(self) -> dict[int, str]:
        """Why rows could not be read, by row; of activations, which come from the store, none."""
        return {}

    @abstractmethod
    def examples_of(self, rows: Rows) -> Examples:
        """The inputs of some rows of the task."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What is tuned, as JSON values."""

    def first_head(self, say: Callable[[str], None]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The affine map to begin with, in the unit of the target: exact on the frozen bottleneck (`exact_head`), or random."""
        if not self.is_scratch:
            self.leave_out(self.fill_frozen(self.learned_from), say)
        if self.begins_random:
            head = random_head(self.outputs, self.body.width, self.options.seed)
            return self.objective.to_target(*head)
        rows, division, start = self.learned_from, self.task.division, time.perf_counter()
        say(f"fitting the head to begin with, {self.recipe.head}: its penalty is chosen on validation images")
        head, params = exact_head(
            self.task.features.read(np.float32, rows=rows), rows, self.objective, division.train, division.validation,
            outputs=self.outputs, seed=self.recipe.seed, memory=self.task.cost.budget_bytes,
        )  # fmt: skip
        say(f"fitted {self.recipe.head} on {len(division.train):,} images in {took(time.perf_counter() - start)}")
        self.recipe = self.recipe.with_params(params)
        return self.objective.to_target(*head)

    def fill(self, body: torch.nn.Module, rows: Rows) -> Rows:
        """Computes bottleneck features of some rows of the task; returns those that could not be read."""
        values, read = score_rows(body, self.examples_of(rows), rows)
        self.set_features(read, values)
        return np.setdiff1d(rows, read)

    def set_features(self, rows: Rows, values: npt.NDArray[np.float32]) -> None:
        """Sets the bottleneck features of some rows of the task."""
        held = self.task.features.rows
        assert isinstance(held, ArrayRows)  # noqa: S101 - made by `settled`
        held.values[held.positions[rows]] = values

    def fill_frozen(self, rows: Rows) -> Rows:
        """Sets the bottleneck features of the frozen network; returns rows that could not be read."""
        return self.fill(self.body, rows)

    def fill_tuned(self, body: Any, rows: Rows) -> Rows:
        """Sets the features that the bundle's network gives, as nearly as what is at hand allows; returns unreadable rows."""
        return self.fill(body, rows)

    def leave_out(self, lost: Rows, say: Callable[[str], None]) -> None:
        """Takes rows that cannot be read out of the division.

        Raises:
            UsageError: None is left to learn from.
        """
        if not len(lost):
            return
        before = self.task.division
        left = replace(
            before,
            train=np.setdiff1d(before.train, lost),
            validation=np.setdiff1d(before.validation, lost),
            test=np.setdiff1d(before.test, lost),
        )
        self.task = replace(self.task, division=left)
        first = self.task.features.take(lost[:1]).ids[0]
        say(f"left out: {counted(len(lost), 'image')} that cannot be read now, such as {first!r}")
        check_validation(self.task)

    @property
    def settings(self) -> Settings:
        """How the bundle computes its features from images."""
        return Settings.of_space(self.space.fields, why="as in the store")

    @property
    def schedule(self) -> Schedule:
        """Rates and lengths."""
        return self.options.schedule(len(self.task.division.train), is_scratch=self.is_scratch)

    @property
    def is_scratch(self) -> bool:
        """Whether the network has learned nothing before."""
        return self.options.is_from_images and self.backbone.is_random

    @property
    def begins_random(self) -> bool:
        """Whether the head at least has learned nothing before."""
        return self.is_scratch or self.options.head_start == RANDOM

    @property
    def drawn(self) -> Callable[[int], State] | None:
        """The weights that a run of a seed begins with, as far as these are random; None if all runs begin alike."""
        return partial(drawn_head, outputs=self.outputs, width=self.body.width) if self.begins_random else None

    @property
    def outputs(self) -> int:
        """Classes or labels; 1 for a number."""
        return max(1, len(self.task.classes))

    def epoch_seconds(self) -> float:
        """How long an epoch takes, from a few steps on noise; validation, which takes no gradients, counts a third."""
        division, size = self.task.division, self.schedule.batch_size
        images = len(division.train) + len(division.validation) / 3
        return images / size * step_seconds(self.body, size)

    @property
    def learned_from(self) -> Rows:
        """The rows that train or validate, ascending."""
        return np.union1d(self.task.division.train, self.task.division.validation)

    def inputs(self, *, of_cut: bool = False) -> Inputs:
        """What decides the outcome, of all cuts or of this one, in the form of a trained head's."""
        options = replace(self.options, from_node=self.cut) if of_cut else self.options
        settings = {name: value for name, value in as_asked(options).items() if name not in _WHERE}
        return Inputs(
            fingerprint=self.space.fingerprint,
            columns=(self.column,) if of_cut else self.columns,
            settings={**settings, **weights_learned(self.task)},
            is_own=True,
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
    recipe = Recipe(DEFAULT_HEADS[target_type], {}, seed=options.seed, target_type=target_type, scale=False)
    task = settle_rows(store, bottleneck, recipe, training, snapshot=snapshot, say=say)
    division = replace(task.division, is_carved=False)  # the layers do not get their validation images back
    task = replace(task, division=division)
    check_validation(task)
    answers = task.codes if task.targets is None else task.targets
    weights = task.weights(np.arange(len(task.features)))
    return task, recipe, TuningObjective.of(target_type, answers, weights, division.train)


def why_tune(work: TuningWork, folder: Path, say: Callable[[str], None]) -> list[str]:
    """Says why a tuning could give another bundle than the one that is there; nothing if it could not."""
    found = why_train(folder, work.inputs())
    for reason in found:
        say(f"{folder.name} is tuned: {reason}")
    return found


def tune_and_publish(
    works: Sequence[TuningWork],
    folder: Path,
    stop: StopRequest,
    executor: Executor,
    *,
    start: float,
    silent: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Fits the head, tunes, mixes, and writes the bundle; returns what was done.

    Args:
        works: What is tuned, one for each cut, all with the same rows; the best on the validation images becomes the bundle.
        folder: Of the bundle.
        stop: Whether to stop.
        executor: Who makes the runs.
        start: When all began, as `time.perf_counter` told.
        silent: Show no progress.
        say: Told what happens.

    Raises:
        Interrupted: A stop was asked for; the next call goes on.
        LossNotFinite: Nothing was learned before the loss became infinite.
    """
    first = works[0]
    peers = Peers(first.fabric)
    head, division = peers.from_first(lambda: (_starting_head(first, folder, say), first.task.division))
    first.task = replace(first.task, division=division)
    context = runs_of(works, first.objective.to_scores(*head), folder)
    runs = tuned_runs(context, executor, stop, silent=silent)
    return peers.from_first(lambda: _best_published(works, context, runs, folder, start=start, say=say))


def _starting_head(
    work: TuningWork, folder: Path, say: Callable[[str], None]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The head to start from; after a stop the one that the tuning began with, whose penalty may have taken long to choose."""
    if work.is_scratch:
        return work.first_head(say)
    kept = TuningCheckpoint(_checkpoints(folder) / HEAD_FILE, digest_of(_facts(work)))
    if (found := kept.read()) is not None:
        say("going on with the head of the tuning that was stopped")
        work.unreadable.update({int(row): why for row, why in json.loads(found["unreadable"]).items()})
        work.leave_out(found["lost"].numpy(), say)
        work.recipe = work.recipe.with_params(json.loads(found["params"]))
        return found["weight"].numpy(), found["bias"].numpy()
    before = work.task.division
    weight, bias = work.first_head(say)
    lost = np.setdiff1d(_rows_of(before), _rows_of(work.task.division))
    arrays = {"weight": weight, "bias": bias, "lost": lost.astype(np.int64)}
    texts = {"params": work.recipe.params, "unreadable": work.unreadable}
    kept.write(
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        | {name: json.dumps(value, default=float) for name, value in texts.items()}
    )
    return weight, bias


def _rows_of(division: Division) -> Rows:
    return np.concatenate([division.train, division.validation, division.test])


def _checkpoints(folder: Path) -> Path:
    """Where a tuning is written down while it goes on."""
    return folder.with_name(f"{folder.name}.tuning")


def _facts(work: TuningWork) -> dict[str, Any]:
    """What decides the outcome of a run beside its number."""
    return {
        "space": work.space.fingerprint,
        "weights": work.backbone.weights_sha256,
        "from": work.body.node,
        "rows": work.inputs(of_cut=True).as_dict(),
        "schedule": asdict(work.schedule),
        "torch": torch.__version__,
    }


def _best_published(
    works: Sequence[TuningWork],
    context: TuningContext,
    runs: Sequence[TunedRun],
    folder: Path,
    *,
    start: float,
    say: Any,
) -> dict[str, Any]:
    """Mixes the weights of the best run with the frozen ones, and writes the bundle."""
    first = works[0]
    best = max(runs, key=lambda run: run.tuning.goodness)
    work = next(work for work in works if work.cut == best.shard.cut)
    work.task, work.recipe = first.task, first.recipe
    model, frozen = context.start(best.shard.cut)
    options = work.options
    shares = MIXES[-1:] if work.begins_random else MIXES if options.interpolate else MIXES[:: len(MIXES) - 1]
    examples, rows = work.examples_of(work.learned_from), work.task.division.validation
    kept, mixes = adopt_best_mix(model, frozen, best.tuning.best, shares, examples, work.objective, rows)
    start_tested = None if work.begins_random else _tested_at_start(work, model, frozen)
    if len(works) > 1:
        say(f"kept: the cut at {best.shard.cut}, which is best on the validation images")
    if not work.begins_random:
        say(mix_text([asdict(mix) for mix in mixes], kept.share, work.objective.measure))
    elif options.interpolate:
        what = (
            "random weights, from which the network started, have"
            if work.is_scratch
            else "a random head, which it began with, has"
        )
        say(f"nothing is mixed: {what} nothing to give")
    about = {
        **work.about(),
        "schedule": asdict(work.schedule),
        "runs": [*told_runs(runs, several=len(works) > 1)],
        "kept_run": runs.index(best),
        **({"diverged": len(context.shards) - len(runs)} if len(runs) < len(context.shards) else {}),
        "mixes": {f"{mix.share:g}": mix.score for mix in mixes},
        "mix_losses": {f"{mix.share:g}": mix.loss for mix in mixes},
        "mix": kept.share,
        **({} if start_tested is None else {"start_test": start_tested}),
    }
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "tuned.safetensors"
        work.body.save(work.backbone, file)
        record = _published(work, model, folder, file, about, seconds=time.perf_counter() - start, say=say)
    for shard in context.shards:
        context.checkpoint(shard).remove()
    TuningCheckpoint(_checkpoints(folder) / HEAD_FILE, "").remove()
    return record


def _tested_at_start(work: TuningWork, model: Model, frozen: State) -> dict[str, Any] | None:
    """How the exact head on the frozen network does on the test images, to compare with; leaves the model with its weights.

    None where there are no test images.
    """
    rows = work.task.division.test
    if work.task.targets is None:
        rows = rows[work.task.codes[rows] >= 0]
    if not len(rows):
        return None
    kept = {name: value.clone() for name, value in model.weights().items()}
    model.adopt(frozen)
    scores, read = score_rows(model, work.examples_of(rows), rows)
    model.adopt(kept)
    return {"images": len(read), "score": work.objective.score(scores, read)} if len(read) else None


def runs_of(
    works: Sequence[TuningWork], head: tuple[npt.NDArray[Any], npt.NDArray[Any]], folder: Path
) -> TuningContext:
    """What the runs of some cuts have in common; the rows, the head and the schedule are those of the first.

    Args:
        works: What is tuned, one for each cut.
        head: To start from, in the scores of the objective.
        folder: Of the bundle.
    """
    first = works[0]
    division = first.task.division

    def tuned(work: TuningWork) -> TunedCut:
        return TunedCut(work.examples_of(work.learned_from), _facts(work), work.body)

    return TuningContext(
        first.network_name, head, first.objective, division.train, division.validation, first.schedule,
        first.options.seed, _checkpoints(folder), {work.cut: tuned(work) for work in works},
        first.options.seeds, first.fabric, first.drawn,
    )  # fmt: skip


def network_of(space: Space, options: TuneOptions) -> tuple[Backbone, NetworkName]:
    """The network of a feature space, and how other processes load it.

    Raises:
        UsageError: Its weights are a file that is not given, or are others; its code is not trusted; or its images are mirrored.
    """
    if is_mirrored(space.fields):
        raise UsageError(
            Message(
                f"{space.name} is of mirrored images, from which layers are tuned beside the images as they are: name the space "
                "of those, with ", Option("augment", "flip"),
            )
        )  # fmt: skip
    check_trusted(space.backbone, options.trust_code or options.backbone == space.backbone, named_by="the store")
    known = Network.of(space).backbone
    given = options.weights.get(space.fingerprint) if isinstance(options.weights, Mapping) else options.weights
    asked = str(given or known["weights"])
    if asked == "file":
        label = known["description"]["weights"]
        raise UsageError(
            Message(f"the features are of weights of your own ({label}); give them: ", Option("weights", "FILE"))
        )
    network = load_backbone(known["name"], asked, seed=known["seed"])
    if network.weights_sha256 != space.fields["weights_sha256"]:
        raise UsageError(f"{asked} of {space.backbone} are other weights than those of the stored activations")
    return network, NetworkName.of(network, asked, known["seed"])


def chosen(found: FeatureSet, ids: Collection[str] | None) -> FeatureSet:
    """The rows of some images; all without ids.

    Raises:
        UsageError: An id is none of the dataset's.
    """
    if ids is None:
        return found
    wanted = pa.array(list(dict.fromkeys(ids)), pa.string())
    known = found.table["id"]
    strangers = wanted.filter(pc.invert(pc.is_in(wanted, value_set=known.combine_chunks())))
    if len(strangers):
        raise UsageError(
            f"{counted(len(strangers), 'id')} of ids {'is' if len(strangers) == 1 else 'are'} of no image of "
            f"{found.origin.dataset}, such as {strangers[0].as_py()!r}"
        )
    return found.take(np.asarray(pc.is_in(known, value_set=wanted)))


def check_validation(task: Task) -> None:
    """Refuses a task without images to validate on.

    Raises:
        UsageError: There are none, or of one class only.
    """
    division = task.division
    if len(division.validation) and (task.targets is not None or len(np.unique(task.codes[division.validation])) > 1):
        return
    raise UsageError(
        f"{len(division.train) + len(division.validation):,} training images are too few to set validation images aside, which "
        "decide when to stop; give more images, or a split val"
    )


def _published(
    work: TuningWork, model: Model, folder: Path, file: Path, about: dict[str, Any], *, seconds: float, say: Any
) -> dict[str, Any]:  # fmt: skip
    """Tests the tuned network, writes the bundle, and returns what was done."""
    options = work.options
    like = work.backbone.like
    tuned = load_backbone(work.backbone.name, str(file), like=like)
    fields = {**tuned.identity(), **work.settings.fields(), "numerics": NUMERICS}
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
    work.leave_out(work.fill_tuned(model.body, np.union1d(division.validation, division.test)), say)
    origin = replace(work.task.features.origin, fields=fields, fingerprint=network.fingerprint)
    task = replace(work.task, features=replace(work.task.features, origin=origin))
    weight, bias = work.objective.to_target(
        model.head.weight.detach().cpu().double().numpy(), model.head.bias.detach().cpu().double().numpy()
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
