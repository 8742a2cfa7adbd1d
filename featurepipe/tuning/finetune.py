"""Tunes the layers above a node from stored activations: an exact head first, then the layers, then a mix of both."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.engine import NUMERICS
from featurepipe.backbones.from_user import check_trusted
from featurepipe.backbones.tail import Tail
from featurepipe.display import bytes_of, size
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.dask import executor_on
from featurepipe.features.settings import Settings
from featurepipe.heads.linear.linear_map import head_of_map, linear_map
from featurepipe.interrupt import StopRequest, stop_on_signals
from featurepipe.option_groups import as_asked, declared
from featurepipe.progress import announcer, show
from featurepipe.store import FeatureStore, Space, fingerprint
from featurepipe.store.choice import choose_space
from featurepipe.store.locks import starts_again
from featurepipe.store.options import LabelsOption, RoleOptions, columns_of
from featurepipe.store.rows import ArrayRows
from featurepipe.store.views import FeatureSet
from featurepipe.training.cost import available_memory
from featurepipe.training.fit import HeldOut, calibrate, fit, interval_of, labels_calibrated
from featurepipe.training.options import DEFAULT_HEADS, TrainOptions
from featurepipe.training.publish import Inputs, Network, bundle_target, digest_of, publish
from featurepipe.training.settle import settle_rows
from featurepipe.training.task import Recipe, Task
from featurepipe.training.text import mix_text
from featurepipe.training.train import labels_name, roles_asked
from featurepipe.training.tuning import search
from featurepipe.tuning.activations import (
    Activations,
    ExtractionOutlook,
    StoredActivations,
    cut_of,
    described,
    step_seconds,
    stored_activations,
)
from featurepipe.tuning.loop import (
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

_WHERE = declared(LabelsOption).keys() | {"weights", "trust_code", "dataset", "backbone", "memory"}
"""Options that say where things are, not what comes out."""
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the tuned weights that are tried on the validation images; the rest is the frozen network's."""


@starts_again
def finetune(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None = None,
    *,
    from_node: str | None = None,
    out: str | PathLike[str],
    dataset: str | None = None,
    backbone: str | None = None,
    snapshot: str | None = None,
    labels: Any = None,
    label: str | None = None,
    group: str | None = None,
    target: str | None = None,
    multilabel: str | tuple[str, ...] | None = None,
    weight: str | None = None,
    split_column: str | None = None,
    split: str | None = None,
    epochs: int = 10,
    rate: float = 3e-4,
    lowest_rate: float = 0.1,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    batch_size: int = 64,
    patience: int = 3,
    seeds: int = 1,
    interpolate: bool = True,
    min_class_size: int = 2,
    memory: int | str | None = None,
    seed: int = 0,
    weights: str | PathLike[str] | None = None,
    trust_code: bool | Collection[str] = False,
    extraction: Mapping[str, Any] | None = None,
    cluster: Any = None,
    dry_run: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Tunes the layers above a node to a dataset's images, and writes a bundle with the tuned network.

    The activations at the node come from a store (column ``NODE:map``), so an epoch computes only what lies above it; those of
    images that are given instead are extracted into one first, once, with the bottleneck. The head is fitted first, exactly, on
    the frozen bottleneck; then it and the layers are tuned together at small rates, lower layers at lower ones, so that features
    are not distorted by a random head (LP-FT; Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", ICLR 2022). BatchNorm keeps its statistics. Last, tuned and frozen weights are mixed in the share that
    is best on the validation images (WiSE-FT; Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022), 0 among
    them: what comes out is never worse there than the frozen network.

    Rows are divided as `featurepipe.train` divides them; where the dataset has no split ``val``, validation images are set aside
    from the training images and are not learned from. Checkpoints beside the bundle (``OUT.tuning``) are written at least once a
    minute; the same call goes on from there after a kill.

    Args:
        source: a feature store or its path, which has the activations; or images, anything ``extract`` takes.
        store: where the activations of images go, by default ``OUT.features`` beside the bundle; what is there is not computed
            again. How much space they take is said before, and refused where the disk has less.
        from_node: where to cut the network; its activations must be in the store. Left out, the error names the choices.
        out: folder of the bundle; a bundle that is there is replaced once the new one is complete.
        dataset: a dataset in the store, which may be left out if there is only one; or what to call the images there.
        backbone: as in `FeatureStore.features`, where the store holds several; of images the network, by default ``resnet50``.
        snapshot: run id of an older snapshot of the dataset; by default the current one.
        labels: as in `featurepipe.train`, like all further columns.
        label: the column of the class.
        group: the column of what stays on one side of every split.
        target: the column of a number to estimate.
        multilabel: the columns of several labels.
        weight: the column of how much each image counts in the loss.
        split_column: the column of the split.
        split: the split to train on, by default ``train``.
        epochs: passes over the training images.
        rate: learning rate of the head and the highest block.
        lowest_rate: that of the lowest tuned block, as a share of ``rate``.
        weight_decay: of AdamW.
        warmup: share of the steps in which rates rise.
        batch_size: images a step.
        patience: epochs without a better validation score after which to stop.
        seeds: how often to tune, in other orders; the best on validation is kept.
        interpolate: mix tuned and frozen weights; else it is all of one or of the other.
        min_class_size: classes with fewer images are refused.
        memory: what activations may take; above it they are read from the store step by step.
        seed: of draws.
        weights: the backbone's weights file, where the features are of one of your own; of images as in ``extract``.
        trust_code: as in `featurepipe.train`.
        extraction: further arguments of ``extract``, such as ``{"device": "cuda", "damaged": "keep"}``.
        cluster: where to extract instead of here, as `featurepipe.execution.connect` takes it.
        dry_run: say what would be extracted and tuned, how large that is and how long it takes; write nothing.
        silent: say nothing on the way.

    Returns:
        What was done, as plain JSON values: what `featurepipe.train` gives, and ``tuning``. With ``dry_run`` what would be:
        ``extraction`` and ``tuning`` where images are yet to be extracted.

    Raises:
        UsageError: an argument is wrong, the network cannot be cut there, the labels cannot be learned from, or nothing was
            learned before the loss became infinite.
        StoreError: activations are missing; or as ``extract`` raises.
        DiskFull: the activations of the images do not fit on the disk.
        BundleError: the target is a folder of something else.
        Interrupted: a signal came; the next call goes on.
    """
    start = time.perf_counter()
    options = TuneOptions(
        from_node=from_node, dataset=dataset, backbone=backbone, labels=labels, weights=weights,
        trust_code=trust_code, label=label, group=group, target=target, multilabel=columns_of(multilabel), weight=weight,
        split_column=split_column, split=split, epochs=epochs,
        rate=rate, lowest_rate=lowest_rate, weight_decay=weight_decay, warmup=warmup, batch_size=batch_size, patience=patience,
        seeds=seeds, interpolate=interpolate, min_class_size=min_class_size, memory=memory, seed=seed,
    )  # fmt: skip
    say = announcer(silent=silent)
    folder = bundle_target(out)
    with executor_on(None if dry_run else cluster, say=say) as executor:
        stored = stored_activations(
            source, store, options, extraction or {},
            beside=folder, executor=executor, dry_run=dry_run, silent=silent, say=say,
        )  # fmt: skip
    if isinstance(stored, ExtractionOutlook):
        return stored.as_dict(options)
    work = _prepared(stored, options, snapshot=snapshot, say=say)
    say(work.text)
    if dry_run:
        return {**work.task.as_dict(), "tuning": {**work.about(), "seconds_per_epoch": work.epoch_seconds()}}
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        head_weight, head_bias = work.exact_head(say)
        model = Model(work.tail, *work.objective.to_scores(head_weight, head_bias))
        frozen = model.weights()
        runs = _tuned(work, model, frozen, options, folder, stop, silent=silent)
        best = max(runs, key=lambda run: run.score)
        mixes = _mixes(work, model, frozen, best.best, MIXES if options.interpolate else MIXES[:: len(MIXES) - 1])
        share = max(mixes, key=lambda mix: (mixes[mix], -mix))  # of equal ones the one nearer to the frozen network
        model.adopt(_mixed(frozen, best.best, share))
        say(mix_text(mixes, share, work.objective.measure))
        scores = {f"{mix:g}": score for mix, score in mixes.items()}
        about = {**work.about(), **_history(runs, best), "mixes": scores, "mix": share}
        with TemporaryDirectory() as scratch:
            file = _weights_file(work.backbone, work.tail, Path(scratch))
            record = _published(work, model, options, folder, file, about, seconds=time.perf_counter() - start, say=say)
    for number in range(options.seeds):
        _checkpoint(folder, number, "").remove()
    return {**record, **stored.about(), "options": as_asked(options)}


@dataclass
class _Work:
    """What is tuned on what.

    Attributes:
        space: The feature space of the activations.
        backbone: The network.
        tail: Its layers above the cut.
        maps: The activations of the task's rows.
        task: The rows, with bottleneck features that `features_of` fills in.
        recipe: Of the exact head.
        objective: What is learned.
        in_memory: Whether the activations are read once.
        batch_size: Images a step.
    """

    space: Space
    backbone: Backbone
    tail: Tail
    maps: FeatureSet
    task: Task
    recipe: Recipe
    objective: TuningObjective
    in_memory: bool
    batch_size: int

    @property
    def bytes(self) -> int:
        """Of the activations that train and validate."""
        rows = len(self.task.division.train) + len(self.task.division.validation)
        return rows * self.maps.shape[1] * self.maps.dtype.itemsize

    @property
    def text(self) -> str:
        """What is tuned on what."""
        parameters = sum(value.numel() for value in self.tail.parameters())
        how = "read once" if self.in_memory else "read from the store in every epoch"
        blocks = list(self.tail.blocks())
        return (
            f"tuning {self.backbone.name} above {self.tail.node}: {parameters:,} weights in {len(blocks)} blocks ({blocks[0]} to "
            f"{blocks[-1]}) on {len(self.task.division.train):,} images, {len(self.task.division.validation):,} to choose by; "
            f"activations of {size(self.bytes)}, {how}"
        )

    def about(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            **described(self.backbone, self.tail),
            "activations": self.bytes,
            "measure": self.objective.measure,
        }

    def epoch_seconds(self) -> float:
        """How long an epoch takes, from a few steps; validation, which takes no gradients, counts a third."""
        division = self.task.division
        images = len(division.train) + len(division.validation) / 3
        return images / self.batch_size * step_seconds(self.tail, self.batch_size)

    @cached_property
    def examples(self) -> Activations:
        """The activations by row."""
        rows = np.union1d(self.task.division.train, self.task.division.validation)
        return Activations(self.maps, self.maps.read(rows=rows) if self.in_memory else None, rows)

    def exact_head(self, say: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The head on the frozen bottleneck, its penalty chosen on the validation rows, as an affine map."""
        division = self.task.division
        self.fill(self.tail, np.union1d(division.train, division.validation))
        self.recipe = self.recipe.with_params(search(self.task, self.recipe, jobs=1, say=say).params)
        return linear_map(fit(self.task, self.recipe, division.train, say))

    def fill(self, body: torch.nn.Module, rows: Rows) -> None:
        """Computes bottleneck features of some rows of the task."""
        held = self.task.features.rows
        assert isinstance(held, ArrayRows)  # noqa: S101 - made by `_prepared`
        examples = self.examples if np.isin(rows, self.examples.rows).all() else Activations(self.maps, None, rows)
        held.values[held.positions[rows]] = score_rows(body, examples, rows)


def _prepared(stored: StoredActivations, options: TuneOptions, *, snapshot: str | None, say: Any) -> _Work:
    source = stored.store
    dataset = stored.dataset or source.only_dataset()
    space = choose_space(source, stored.space, dataset)
    network = _network(space, options)
    tail = Tail(network, cut_of(options, network))
    stored.check_column(space, dataset, tail.column)
    maps = source.features(dataset, node=tail.column, backbone=space.fingerprint, snapshot=snapshot)
    bottleneck = replace(
        maps,
        rows=ArrayRows((tail.bottleneck,), np.zeros((len(maps), tail.width), np.float32), np.arange(len(maps))),
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
    task = settle_rows(source, bottleneck, recipe, training, snapshot=snapshot, say=say)
    division = replace(task.division, is_carved=False)  # the layers do not get their validation images back
    task = replace(task, division=division)
    _check_validation(task)
    rows = task.features.rows
    assert isinstance(rows, ArrayRows)  # noqa: S101 - made above
    chosen = maps.take(rows.positions)
    answers = task.codes if task.targets is None else task.targets
    objective = TuningObjective.of(target_type, answers, task.weights(np.arange(len(task.features))), division.train)
    need = (len(division.train) + len(division.validation)) * maps.shape[1] * maps.dtype.itemsize
    allowed = bytes_of(options.memory) if options.memory is not None else available_memory() // 2
    return _Work(space, network, tail, chosen, task, recipe, objective, need <= allowed, options.batch_size)


def _network(space: Space, options: TuneOptions) -> Backbone:
    """The network of a feature space.

    Raises:
        UsageError: Its weights are a file that is not given, or are others; or its code is not trusted.
    """
    check_trusted(space.backbone, options.trust_code or options.backbone == space.backbone, named_by="the store")
    known = Network.of(space).backbone
    asked = str(options.weights or known["weights"])
    if asked == "file":
        label = known["description"]["weights"]
        raise UsageError(
            Message(f"the features are of weights of your own ({label}); give them: ", Option("weights", "FILE"))
        )
    network = load_backbone(known["name"], asked, seed=known["seed"])
    if network.weights_sha256 != space.fields["weights_sha256"]:
        raise UsageError(f"{asked} of {space.backbone} are other weights than those of the stored activations")
    return network


def _check_validation(task: Task) -> None:
    division = task.division
    if len(division.validation) and (task.targets is not None or len(np.unique(task.codes[division.validation])) > 1):
        return
    raise UsageError(
        f"{len(division.train) + len(division.validation):,} training images are too few to set validation images aside, which "
        "decide when to stop; give more images, or a split val"
    )


def _tuned(
    work: _Work, model: Model, frozen: State, options: TuneOptions, folder: Path, stop: StopRequest, *, silent: bool
) -> list[Tuning]:
    """One run of the loop for each seed."""
    division, blocks = work.task.division, work.tail.blocks()
    facts = {
        "space": work.space.fingerprint,
        "from": work.tail.node,
        "rows": _inputs(work, options).as_dict(),
        "torch": torch.__version__,
    }
    runs = []
    for number in range(options.seeds):
        what = "tuning" if options.seeds == 1 else f"tuning {number + 1} of {options.seeds}"
        identity = identity_of({**facts, "run": number})
        model.adopt(frozen)
        run = TuningRun(
            model,
            work.examples,
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


def _mixed(frozen: State, tuned: Mapping[str, Tensor], share: float) -> State:
    """Weights between the frozen (0) and the tuned ones (1)."""
    if share in (0.0, 1.0):
        return dict(tuned if share else frozen)
    return {name: torch.lerp(value, tuned[name], share) for name, value in frozen.items()}


def _mixes(
    work: _Work, model: Model, frozen: State, tuned: Mapping[str, Tensor], shares: Sequence[float]
) -> dict[float, float]:
    """The validation score by share of the tuned weights."""
    rows, found = work.task.division.validation, {}
    for share in shares:
        model.adopt(_mixed(frozen, tuned, share))
        found[share] = work.objective.score(score_rows(model, work.examples, rows), rows)
    return found


def _history(runs: list[Tuning], best: Tuning) -> dict[str, Any]:
    entries = [
        {"history": run.history, "best_epoch": run.epoch, "score": run.score, "ended": run.ended} for run in runs
    ]
    return {"runs": entries, "kept_run": runs.index(best)}


def _weights_file(backbone: Backbone, tail: Tail, folder: Path) -> Path:
    """All weights of the network with the tuned ones in place, as a .safetensors file."""
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in backbone.state().items()}
    for name, value in tail.network.named_parameters():
        state[name] = value.detach().to(state[name].dtype)
    path = folder / "tuned.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def _inputs(work: _Work, options: TuneOptions) -> Inputs:
    """What decides the outcome, in the form of a trained head's."""
    division, task = work.task.division, work.task
    rows = np.union1d(division.train, division.validation)
    images = task.features.take(rows)
    targets = None if task.targets is None else task.targets[rows]
    return Inputs(
        fingerprint=work.space.fingerprint,
        columns=(work.tail.column,),
        rows=digest_of(images, np.isin(rows, division.validation), targets),
        images=len(rows),
        settings={name: value for name, value in as_asked(options).items() if name not in _WHERE},
    )


def _published(
    work: _Work, model: Model, options: TuneOptions, folder: Path, file: Path, about: dict[str, Any], *,
    seconds: float, say: Any,
) -> dict[str, Any]:  # fmt: skip
    """Tests the tuned network, writes the bundle, and returns what was done."""
    like = None if work.backbone.is_random or work.backbone.weights.startswith("file:") else work.backbone.weights
    tuned = load_backbone(work.backbone.name, str(file), like=like)
    settings = Settings.of_space(work.space.fields, why="as the activations")
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
    work.fill(model.body, np.union1d(division.validation, division.test))
    origin = replace(work.task.features.origin, fields=fields, fingerprint=network.fingerprint)
    task = replace(work.task, features=replace(work.task.features, origin=origin))
    weight, bias = work.objective.to_target(
        model.head.weight.detach().double().numpy(), model.head.bias.detach().double().numpy()
    )
    head = head_of_map(work.objective.target_type, task.classes, weight, bias)
    return publish(
        folder, network, task, work.recipe, head, inputs=_inputs(work, options), search=None,
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
