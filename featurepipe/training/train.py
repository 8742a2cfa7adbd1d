"""Stage two: from cached features to a calibrated head in a bundle."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from featurepipe.execution.dask import cluster_name
from featurepipe.execution.local import executor_on
from featurepipe.heads.statistics.aims import Wish
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore
from featurepipe.store.locks import starts_again
from featurepipe.store.options import RoleOptions, columns_of, is_file_of_groups
from featurepipe.training.fit import (
    LARGEST_F1,
    calibrate,
    calibrate_labels,
    check_threshold,
    fit,
    fit_threshold,
    held_out,
    prediction_interval,
)
from featurepipe.training.options import DEFAULT_HEADS, PROTOCOL_HEAD, TrainOptions, components, order_of, share_of
from featurepipe.training.publish import Inputs, Network, bundle_target, inputs_of, publish, weights_copy, why_train
from featurepipe.training.selection import chosen_values
from featurepipe.training.settle import route, settle, timed
from featurepipe.training.task import Recipe, Task
from featurepipe.training.tuning import search

UNCHANGED = "the {images:,} images that it learns from, their labels and its settings are those that the bundle was trained with"


@shown_as("train")
@starts_again
def train(
    store: FeatureStore | str | PathLike[str],
    *,
    dataset: str | None = None,
    nodes: str | Sequence[str] = "bottleneck",
    head: str | None = None,
    ordered: str | Sequence[str] | None = None,
    out: str | PathLike[str],
    backbone: str | None = None,
    snapshot: str | None = None,
    labels: Any = None,
    label: str | None = None,
    group: str | None = None,
    split_column: str | None = None,
    target: str | None = None,
    multilabel: str | Sequence[str] | None = None,
    weight: str | None = None,
    split: str | None = None,
    params: Mapping[str, Any] | None = None,
    pca: float | None = None,
    select: str | float | None = None,
    class_weight: str | None = None,
    tune: bool = False,
    protocol: str | None = None,
    calibration: bool = True,
    threshold: str | None = None,
    positive: str | None = None,
    threshold_margin: bool = False,
    min_class_size: int = 2,
    memory: int | str | None = None,
    device: str = "cpu",
    jobs: int = 1,
    seed: int = 0,
    weights: str | PathLike[str] | Mapping[str, str] | None = None,
    trust_code: bool | Collection[str] = False,
    if_changed: bool = False,
    cluster: Any = None,
    dry_run: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Fits a head on cached features and writes a bundle that predicts on images.

    Rows: the dataset's splits are taken as they are (``train``, ``val``, ``test``); what is missing is set aside by class and
    by key, so that copies of one image, and images of one group, never land on both sides. Parameters and temperature are
    chosen on validation rows only, and the last fit is made on all rows that may train. The test rows are looked at once, at
    the end.

    Args:
        store: the feature store or its path.
        dataset: a dataset in it; may be left out if there is only one.
        nodes: the column, or several to put side by side; ``all`` for every one but maps; ``recommended`` for the
            one that `featurepipe.depth` recommends.
        head: a name of `featurepipe.heads.families.FAMILIES`, by default ``logistic``, or ``ridge`` for a ``target``.
        ordered: the classes in their order, the lowest first, as names or as ``"low<mid<high"``: the head is then a logistic
            regression of each step between them (`featurepipe.heads.linear.ordinal`), parameters are searched by quadratic
            weighted kappa, and that is measured.
        out: folder of the bundle; a bundle that is there is replaced once the new one is complete.
        backbone: as in `FeatureStore.features`, where the store holds several.
        snapshot: run id of an older snapshot of the dataset; by default the current one.
        labels: a CSV (``id,label``) or mapping to use instead of the dataset's labels.
        label: the column of the class, by default ``label``: of ``labels``, else of the manifest that was extracted.
        group: the column of what stays on one side of every split, such as a patient; by default ``group``, where there is
            one; ``none`` for no groups.
        split_column: the column of the splits, of ``labels``, else of the manifest; by default the dataset's own splits; ``none``
            for no splits.
        target: the column of a number to estimate, instead of a class: of ``labels``, else of the manifest that was extracted.
            Images without one are left out; folds hold small and large numbers evenly.
        multilabel: the columns of several labels an image, instead of a class: one of texts such as ``red|round`` or of JSON
            lists, or one of 0 and 1 for each label. Unknown entries are left out label by label; folds hold the rarest label of
            each image evenly. A label that nearly all or no training images have is refused; ``params={"one_sided": "drop"}``
            leaves such labels out.
        weight: the column of how much each image counts while heads are fitted, also those of a search; measures count all
            images alike.
        split: the split to train on, by default ``train``.
        params: of the final estimator, such as ``{"C": 0.1}``.
        pca: components (a number) or share of the variance to keep.
        select: fit on some values of the columns alone, those that tell most (`featurepipe.heads.selection.column_scores`, after
            Head2Toe, Evci et al. 2022): a share of them, such as 0.05, or ``"auto"`` to choose the share on validation rows. The
            bundle computes only columns that have one of them.
        class_weight: ``balanced`` to weigh classes equally.
        tune: search the family's grid.
        protocol: how ``multilabel`` is learned in published comparisons of features, which says head, search and weights:
            ``"voc07"``, `featurepipe.heads.families.VOC07`; its folds are of the training rows, also with a split ``val``.
        calibration: fit a temperature on validation rows; of a ``target``, measure there how wide intervals must be to hold
            90 % of new numbers (split conformal prediction, `featurepipe.heads.statistics.regression`).
        threshold: of two classes, choose on the validation rows from which probability on an image is labelled ``positive``:
            ``"recall=0.95"`` (the highest that reaches it), ``"precision=0.9"`` (the one with the most recall that reaches it),
            ``"cost=10:1"`` (the least cost, where a miss costs ten times what a false alarm does), or ``"f1"`` (the largest F1).
            The bundle keeps it, and labels by it; without, the more probable class is the label. Of ``multilabel`` it is chosen
            for each label, by default for the largest F1; that of a label with fewer than 5 validation images of a side is a
            probability of a half.
        positive: the class that a ``threshold`` looks for; of ``multilabel``, a label of which sensitivity, specificity, areas
            and (in `featurepipe.evaluation.evaluate.evaluate`) curves and reliability are measured, too.
        threshold_margin: let the lower 95 % limit of the recall or precision reach what is wanted, not the value alone.
        min_class_size: classes with fewer images (where the dataset has splits: to train on) are left out, and said.
        memory: what fitting may take, bytes or text such as ``"2GB"``; by default half of what is free.
        device: where logistic and linear-svm heads of classes or labels are fitted: ``cuda`` or ``cuda:N`` to multiply features
            there. They stay there where they fit, as they are stored, else they are copied in each pass, block by block.
        jobs: fits at once during a search.
        seed: of draws and of the estimators.
        weights: the backbone's weights file, where it has one of your own; it is copied into the bundle. Where it is not
            known yet which feature space that is, a mapping from fingerprints of spaces to files.
        trust_code: whether a network ``package.module:factory`` that the store names, and ``backbone`` does not, may be loaded
            to check ``weights``, which runs that module; or the names of the networks that may.
        if_changed: train only if the bundle at ``out`` was made from other images, labels, columns or settings, or is missing.
        cluster: where to fit instead of here, as `featurepipe.execution.connect` takes it. Features are spread over its workers,
            where the block solvers and xgboost learn; of a search, fits that a worker's memory is enough for run side by side.
        dry_run: say what would be done and what it would take; write nothing.
        silent: say nothing on the way.

    Returns:
        What was done, as plain JSON values; with ``dry_run`` what would be. With ``if_changed``, ``why`` it was trained, or
        ``skipped``: why not. Either has ``left_out``, classes of fewer images than ``min_class_size`` and how many each has,
        if there are any.

    Raises:
        UsageError: an argument is wrong, or the labels cannot be learned from.
        StoreError: features are missing.
        BundleError: the target is a folder of something else.
        ClusterError: there is no such cluster, none of its workers can be used, or too many of them were lost.
    """
    start = time.perf_counter()
    kind = "continuous" if target is not None else "multilabel" if multilabel else "multiclass"
    options = TrainOptions(
        dataset=dataset,
        backbone=backbone,
        labels=labels,
        nodes=(nodes,) if isinstance(nodes, str) else tuple(nodes),
        head=head or (PROTOCOL_HEAD if protocol else DEFAULT_HEADS["ordinal" if ordered is not None else kind]),
        protocol=protocol,
        ordered=order_of(ordered),
        label=label,
        group=group,
        split_column=split_column,
        target=target,
        multilabel=columns_of(multilabel),
        weight=weight,
        split=split,
        tune=tune or protocol is not None,
        pca=components(pca),
        select=share_of(select),
        class_weight=class_weight,
        calibration=calibration,
        threshold=threshold,
        positive=positive,
        threshold_margin=threshold_margin,
        min_class_size=min_class_size,
        memory=memory,
        device=device,
        jobs=jobs,
        seed=seed,
        params=params,
        weights=weights,
        trust_code=trust_code,
    )
    say = announcer(silent=silent)
    folder = bundle_target(out)
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    if cluster is not None:
        source = FeatureStore(source.path.absolute(), create=False)  # workers have other working folders
    order = {} if options.ordered is None else {"order": list(options.ordered)}
    recipe = Recipe(
        str(options.head), {**order, **(params or {})}, options.pca, class_weight, seed, options.target_type, protocol
    )
    task = settle(source, recipe, options, snapshot=snapshot, cluster=cluster_name(cluster), say=say)
    check_threshold(task, options)
    inputs = inputs_of(task, recipe, options)
    asked = {"why": why_train(folder, inputs)} if if_changed else {}
    if asked == {"why": []}:
        return unchanged(folder, task, inputs)
    for reason in asked.get("why", []):
        say(f"{folder.name} is trained: {reason}")
    task = timed(task, recipe, options, say)
    if dry_run:
        return {**task.as_dict(), "bottleneck": task.features.origin.bottleneck, **asked}
    space = source.space(task.features.space_fingerprint)
    file = weights.get(space.fingerprint) if isinstance(weights, Mapping) else weights
    elsewhere = options.tune or task.cost.is_spread
    trusted = trust_code or backbone == space.backbone  # which the user has named
    with (
        weights_copy(space, file, trust_code=trusted) as own_weights,
        executor_on(cluster if elsewhere else None, say=say) as executor,
    ):
        executor.check(source.path)
        task = replace(task, executor=executor)
        selection = None
        if options.select is not None:
            rows, where = len(task.division.final), cluster_name(cluster)
            task, selection = chosen_values(
                task, recipe, options.select,
                lambda width: route(recipe, rows, width, memory, where, _unsaid, device=device), say,
            )  # fmt: skip
        found = search(task, recipe, jobs=jobs, say=say) if options.tune else None
        chosen = recipe.with_params(found.params) if found else recipe
        calibrated: Any = None
        held = held_out(task, chosen) if task.targets is None and options.needs_validation else None
        if task.is_multilabel and options.needs_validation:
            wish = LARGEST_F1 if threshold is None else Wish.of(threshold)
            calibrated = calibrate_labels(task, chosen, say, wish=wish, margin=threshold_margin, sigmoids=calibration)
        elif calibration and held is not None:
            calibrated = calibrate(held, say)
        elif calibration:
            calibrated = prediction_interval(task, chosen, say)
        cut = None
        if held is not None and threshold is not None:
            cut = fit_threshold(task, held, calibrated.temperature if calibrated else None, options, say)
        fitted = fit(task, chosen, task.division.final, say)
        seconds = time.perf_counter() - start
        record = publish(
            folder, Network.of(space), task, chosen, fitted, inputs=inputs,
            search=found, calibration=calibrated, weights=own_weights, labels=labels_name(labels), column=target,
            multilabel=options.multilabel or (), threshold=cut, positive=positive if task.is_multilabel else None,
            roles=roles_asked(options), selection=selection,
            seconds=seconds, say=say,
        )  # fmt: skip
    return {**record, "options": as_asked(options), **asked}


def unchanged(folder: Path, task: Task, inputs: Inputs) -> dict[str, Any]:
    """What is returned where nothing has changed."""
    left_out = {"left_out": dict(task.left_out)} if task.left_out else {}
    return {"bundle": str(folder), "skipped": UNCHANGED.format(images=inputs.images), **left_out}


def _unsaid(_: str) -> None:
    """Takes what was said before, of where a head is fitted."""


def roles_asked(options: RoleOptions) -> dict[str, Any]:
    """The columns that a training was asked to take, by role, which an evaluation takes as well; a file of groups is none."""
    asked = as_asked(RoleOptions.of(options))
    is_file = asked["group"] is not None and is_file_of_groups(asked["group"])
    return {name: column for name, column in asked.items() if column and not (name == "group" and is_file)}


def labels_name(labels: Any) -> str | None:
    """What a bundle may say of the labels it was trained with: a file's name, not where it is."""
    if labels is None:
        return None
    return Path(labels).name if isinstance(labels, str | PathLike) else f"given as a {type(labels).__name__}"
