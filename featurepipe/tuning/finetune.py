"""Tunes the layers above a node from stored activations: an exact head first, then the layers, then a mix of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from featurepipe.backbones.tail import Tail
from featurepipe.display import bytes_of, size
from featurepipe.errors import Interrupted, Message, Option, UsageError
from featurepipe.execution.local import executor_on
from featurepipe.features.session import NetworkName
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.interrupt import stop_on_signals
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore, Space
from featurepipe.store.choice import choose_space
from featurepipe.store.locks import starts_again
from featurepipe.store.options import columns_of
from featurepipe.store.rows import ArrayRows
from featurepipe.store.views import FeatureSet
from featurepipe.training.publish import bundle_target
from featurepipe.training.train import unchanged
from featurepipe.tuning.activations import (
    Activations,
    ExtractionOutlook,
    StoredActivations,
    cuts_of,
    described,
    stored_activations,
)
from featurepipe.tuning.from_images import finetune_images
from featurepipe.tuning.objective import Rows
from featurepipe.tuning.options import OF_IMAGES, TuneOptions, features_kept, one_or_several
from featurepipe.tuning.peers import refuse_processes
from featurepipe.tuning.stored_features import FeaturesToStore, columns_kept
from featurepipe.tuning.stored_features import store_features as store_features_of
from featurepipe.tuning.work import TuningWork, chosen, network_of, settled, tune_and_publish, why_tune


@shown_as("finetune")
@starts_again
def finetune(
    source: Any,
    store: FeatureStore | str | PathLike[str] | None = None,
    *,
    from_node: str | Sequence[str] | None = None,
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
    epochs: int | None = None,
    rate: float | None = None,
    lowest_rate: float | None = None,
    weight_decay: float | None = None,
    warmup: float = 0.1,
    batch_size: int | None = None,
    patience: int | None = None,
    augment: str | None = None,
    label_smoothing: float | None = None,
    mixup: float | None = None,
    batch_norm: str | None = None,
    mixed_precision: str | None = None,
    seeds: int = 1,
    interpolate: bool = True,
    head_start: str = "exact",
    min_class_size: int = 2,
    memory: int | str | None = None,
    seed: int = 0,
    store_features: bool | str | Sequence[str] = False,
    weights: str | PathLike[str] | Mapping[str, str] | None = None,
    trust_code: bool | Collection[str] = False,
    ids: Collection[str] | None = None,
    extraction: Mapping[str, Any] | None = None,
    if_changed: bool = False,
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
        from_node: where to cut the network; its activations must be in the store. Of several nodes the cut that is best on
            the validation images is kept. Left out, the error names the choices.
        out: folder of the bundle; a bundle that is there is replaced once the new one is complete.
        dataset: a dataset in the store, which may be left out if there is only one; or what to call the images there.
        backbone: as in `FeatureStore.features`, where the store holds several; of images as in
            ``extract``, by default ``auto``.
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
        augment: random changes of training images: ``none`` or ``flip``, and with ``from_node="images"`` also ``crop`` (there the
            default) and ``crop,flip``. Flips are wrong for text and digits. Above a node they need the activations of mirrored
            images (``extract`` with ``mirrored=True``), which are extracted where images are given, and double the space.
        label_smoothing: share of each answer that is spread over all classes (``CrossEntropyLoss`` of PyTorch); classes alone.
        mixup: alpha; mix the images of a step with each other in a share of Beta(alpha, alpha), and their answers alike (Zhang et
            al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018); above a node their activations (manifold mixup at one
            layer; Verma et al., ICML 2019). Labels and numbers are mixed, too. None or 0 for none.
        batch_norm: with ``from_node="images"``, statistics of BatchNorm: ``frozen``, or ``train`` (by default from scratch).
        mixed_precision: with ``from_node="images"``, ``fp32`` or ``bf16``; by default bf16 on CUDA.
        warmup: share of the steps in which rates rise.
        batch_size: images a step.
        patience: epochs without a better validation score after which to stop.
        seeds: how often to tune from each cut, in other orders and, where weights or a head are random, from others; the best on
            validation is kept. Run n has what ``seed + n`` draws.
        interpolate: mix tuned and frozen weights; else it is all of one or of the other.
        head_start: the head to begin with: ``exact``, or ``random``, to compare with: all is tuned at once, nothing mixed.
        min_class_size: classes with fewer images (where the dataset has splits: to train on) are left out, and said.
        memory: what activations may take; above it they are read from the store step by step.
        seed: of draws.
        store_features: at the end, keep the tuned network's bottleneck of all images of the dataset in the store, computed from
            the activations: a feature space of its own, that of ``extract`` with the bundle's weights, so that heads, ``drift``
            and ``evaluate`` work on it. Named nodes above the cut (``NODE`` or ``NODE:POOLING``), or ``all`` for every block, are
            kept beside it in the same pass, pooled as ``extract`` pools them, so that ``depth`` works on it, too. Images that
            have a column already are passed over, also where nothing is tuned since nothing changed.
        weights: the backbone's weights file, where the features are of one of your own, or a mapping of such files by the
            fingerprint of the feature space; of images as in ``extract``.
        trust_code: as in `featurepipe.train`.
        ids: only these images, as if the dataset had no others.
        extraction: further arguments of ``extract``, such as ``{"device": "cuda", "damaged": "keep"}``.
        if_changed: tune only if what is learned from is not what the bundle at ``out`` was tuned on: rows, labels or settings.
        cluster: where to extract and to tune instead of here, one run (a cut and a seed) on a worker at a time, as
            `featurepipe.execution.connect` takes it; workers must see the folder of the checkpoints. Layers that are tuned from
            images are tuned here.
        dry_run: say what would be extracted and tuned, how large that is and how long it takes; write nothing.
        silent: say nothing on the way.

    Returns:
        What was done, as plain JSON values: what `featurepipe.train` gives, and ``tuning``. With ``dry_run`` what would be:
        ``extraction`` and ``tuning`` where images are yet to be extracted. With ``if_changed`` also ``why``; if nothing
        changed, ``bundle`` and ``skipped``.

    Raises:
        UsageError: an argument is wrong, the network cannot be cut there, the labels cannot be learned from, or nothing was
            learned before the loss became infinite.
        StoreError: activations are missing; or as ``extract`` raises.
        DiskFull: the activations of the images do not fit on the disk.
        BundleError: the target is a folder of something else.
        Interrupted: a signal came; the next call goes on.
    """
    start = time.perf_counter()
    cuts = None if from_node is None else one_or_several(from_node)
    options = TuneOptions(
        from_node=cuts, dataset=dataset, backbone=backbone, labels=labels, weights=weights,
        trust_code=trust_code, label=label, group=group, target=target, multilabel=columns_of(multilabel), weight=weight,
        split_column=split_column, split=split, epochs=epochs,
        rate=rate, lowest_rate=lowest_rate, weight_decay=weight_decay, warmup=warmup, batch_size=batch_size, patience=patience,
        augment=augment, label_smoothing=label_smoothing, mixup=mixup, batch_norm=batch_norm, mixed_precision=mixed_precision,
        seeds=seeds, interpolate=interpolate, head_start=head_start, min_class_size=min_class_size, memory=memory, seed=seed,
        store_features=features_kept(store_features),
    )  # fmt: skip
    say = announcer(silent=silent)
    folder = bundle_target(out)
    if options.is_from_images:
        found = finetune_images(
            source, store, options, extraction or {}, snapshot=snapshot, ids=ids, folder=folder, cluster=cluster,
            if_changed=if_changed, dry_run=dry_run, silent=silent, say=say, start=start,
        )  # fmt: skip
        return {**found, "options": as_asked(options)} if "tuning" in found and not dry_run else found
    refuse_image_options(options)
    refuse_processes("a tail is tuned")
    with executor_on(None if dry_run else cluster, say=say) as executor:
        stored = stored_activations(
            source, store, options, extraction or {},
            beside=folder, executor=executor, dry_run=dry_run, silent=silent, say=say,
        )  # fmt: skip
        if isinstance(stored, ExtractionOutlook):
            return stored.as_dict(options)
        works = _prepared(stored, options, snapshot=snapshot, ids=ids, say=say)
        asked = {"why": why_tune(works[0], folder, say)} if if_changed else {}
        if asked == {"why": []}:
            kept = {} if dry_run else _stored_features(works, stored.store, folder, snapshot, say)
            return {**unchanged(folder, works[0].task, works[0].inputs()), **stored.about(), **kept}
        ahead = _to_store(works, stored.store)
        if dry_run:
            return {
                **works[0].task.as_dict(),
                "tuning": _planned(works),
                **({} if ahead is None else ahead.about()),
                **asked,
            }
        for work in works:
            say(work.text)
        if ahead is not None:
            say(ahead.text)
            ahead.check()
        executor.check(stored.store.path)
        with stop_on_signals() as stop:
            record = tune_and_publish(works, folder, stop, executor, start=start, silent=silent, say=say)
    kept = _stored_features(works, stored.store, folder, snapshot, say)
    return {**record, **stored.about(), **kept, "options": as_asked(options), **asked}


def _planned(works: Sequence[TailWork]) -> dict[str, Any]:
    """What a dry run says of the tuning: of the first cut, and of each where there are several."""
    told = [{**work.about(), "seconds_per_epoch": work.epoch_seconds()} for work in works]
    return {**told[0], **({"cuts": told} if len(told) > 1 else {})}


def _to_store(works: Sequence[TailWork], store: FeatureStore) -> FeaturesToStore | None:
    """What is to be stored of the tuned network, of the cut of which that is most; None if nothing was asked for.

    Raises:
        UsageError: A node that was asked for is unknown, or lies below a cut.
    """
    plans = [
        FeaturesToStore.of(
            store, work.backbone, columns_kept(work.backbone, work.body.node, work.options.store_features), work.every
        )
        for work in works
    ]
    largest = max(plans, key=lambda plan: plan.bytes)
    return largest if largest.columns else None


def _stored_features(
    works: Sequence[TailWork], store: FeatureStore, folder: Path, snapshot: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Stores the tuned features, if that was asked for, from activations at the bundle's cut; returns what was done."""
    if not works[0].options.store_features:
        return {}
    bundle = read_bundle(folder)
    work = next(work for work in works if work.body.node == bundle.training["tuning"]["from"])
    with stop_on_signals() as stop:
        found = store_features_of(store, bundle, work.every, work.options.store_features, snapshot, stop)
        say(found.text)
        if stop():
            raise Interrupted(
                f"stopped by {stop.name} while tuned features were stored ({found.images:,} images are); the bundle is complete, "
                "and the same command goes on",
                stop.signal_number or 2,
            )
    return found.about()


@dataclass
class TailWork(TuningWork):
    """The layers above a node, tuned from stored activations.

    Attributes:
        every: The activations of all images of the dataset.
        activations: Those of the task's rows; those that are learned from are held in memory, if there is room.
        bottleneck: The frozen network's features of these rows; None where the store lacks some.
        name: How other processes load the network.
        all_columns: The columns of the activations at all cuts that are tried.
    """

    every: FeatureSet
    activations: Activations
    bottleneck: FeatureSet | None
    name: NetworkName
    all_columns: tuple[str, ...]

    @property
    def column(self) -> str:
        """The column of the activations."""
        return self.every.column

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of all cuts."""
        return self.all_columns

    @property
    def network_name(self) -> NetworkName:
        """How other processes load the network."""
        return self.name

    @property
    def text(self) -> str:
        """What is tuned on what."""
        parameters = sum(value.numel() for value in self.body.parameters())
        how = "read once" if self.activations.is_held else "read from the store in every epoch"
        flips = ", half of them of mirrored images" if self.activations.mirrored else ""
        blocks, division = list(self.body.blocks()), self.task.division
        return (
            f"tuning {self.backbone.name} above {self.body.node}: {parameters:,} weights in {len(blocks)} blocks ({blocks[0]} to "
            f"{blocks[-1]}) on {len(division.train):,} images, {len(division.validation):,} to choose by; "
            f"activations of {size(self.activations.bytes)}{flips}, {how}{_listed(self.schedule.text)}"
        )

    def about(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            **described(self.backbone, self.body),
            "activations": self.activations.bytes,
            **({"mirrored": self.activations.mirrored.space_fingerprint} if self.activations.mirrored else {}),
            **self.schedule.about(),
            "measure": self.objective.measure,
            "tested": f"from activations stored in {self.every.dtype}, in {self.settings.precision} as the bundle computes",
        }

    def fill_frozen(self, rows: Rows) -> Rows:
        """Reads the bottleneck features that the store holds, else computes them from the activations."""
        if self.bottleneck is None:
            return super().fill_frozen(rows)
        self.set_features(rows, self.bottleneck.read(np.float32, rows=rows))
        return rows[:0]

    def fill_tuned(self, body: Any, rows: Rows) -> Rows:
        """Computes bottleneck features in the precision in which the bundle computes them from images."""
        return self.fill(body.as_engine(self.space.fields["precision"]), rows)

    def examples_of(self, rows: Rows) -> Activations:  # noqa: ARG002 - it has all, and reads what is wanted
        """The activations by row."""
        return self.activations


def _listed(text: str) -> str:
    return f"; {text}" if text else ""


def _prepared(
    stored: StoredActivations, options: TuneOptions, *, snapshot: str | None, ids: Collection[str] | None, say: Any
) -> list[TailWork]:
    """What is tuned above each cut: all from the same rows, and with one array of bottleneck features."""
    source = stored.store
    dataset = stored.dataset or source.only_dataset()
    space = choose_space(source, stored.space, dataset)
    network, name = network_of(space, options)
    tails = {cut: Tail(network, cut) for cut in cuts_of(options, network)}
    for tail in tails.values():
        stored.check_column(space, dataset, tail.column)

    def read(column: str, of: Space = space) -> FeatureSet:
        return chosen(source.features(dataset, node=column, backbone=of.fingerprint, snapshot=snapshot), ids)

    maps = {cut: read(tail.column) for cut, tail in tails.items()}
    flipped: dict[str, FeatureSet] = {}
    if options.flips:
        mirrored = stored.mirrored(space, dataset, [tail.column for tail in tails.values()])
        flipped = {cut: read(tail.column, mirrored) for cut, tail in tails.items()}
    (first, tail), *_ = tails.items()
    task, recipe, objective = settled(source, maps[first], tail, options, snapshot=snapshot, say=say)
    rows = task.features.rows
    assert isinstance(rows, ArrayRows)  # noqa: S101 - made by `settled`
    held = (
        space.columns().keys() >= {tail.bottleneck} and space.index([tail.bottleneck]).contains(maps[first].keys).all()
    )
    frozen = read(tail.bottleneck).take(rows.positions) if held else None
    learned_from = np.union1d(task.division.train, task.division.validation)
    memory = None if options.memory is None else bytes_of(options.memory)
    columns = tuple(tail.column for tail in tails.values())
    return [
        TailWork(
            space, network, tails[cut], task, recipe, objective, options, cut, every,
            Activations(
                every.take(rows.positions), learned_from, memory,
                mirrored=flipped[cut].take(rows.positions) if cut in flipped else None,
            ),
            frozen, name, columns,
        )
        for cut, every in maps.items()
    ]  # fmt: skip


def refuse_image_options(options: TuneOptions) -> None:
    """Refuses what only images can be learned from with.

    Raises:
        UsageError: Such an option is given.
    """
    given = [name for name in OF_IMAGES if getattr(options, name) is not None]
    given += ["augment"] * ("crop" in (options.augment or ""))
    if given:
        raise UsageError(
            Message(
                Option(given[0], str(getattr(options, given[0]))), " is of images, not of stored activations: leave it out"
                f"{', or give flip alone' if given[0] == 'augment' else ''}, or tune all layers with ",
                Option("from_node", "images"),
            )
        )  # fmt: skip
