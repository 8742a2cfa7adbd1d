"""Everything that is settled before the first fit: rows, classes, who validates, and what it will cost."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.annotations import check_classes
from featurepipe.display import bytes_of, counted, first_names, has
from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.heads.families import refuse_weights
from featurepipe.heads.selection import kept_count
from featurepipe.heads.statistics.regression import least_units
from featurepipe.store import FeatureStore
from featurepipe.store.choice import choose_space
from featurepipe.store.options import RoleOptions
from featurepipe.store.roles import with_roles
from featurepipe.training.cost import Cost, available_memory, choose_on_cluster, choose_route, time_of
from featurepipe.training.fit import INTERVAL_LEVEL, device_called, fit
from featurepipe.training.options import CPU, SELECT_AUTO, SHARES, TrainOptions
from featurepipe.training.splits import (
    CROSSED_FOLDS,
    Division,
    divide,
    learned_rows,
    quantile_bins,
    rarest_labels,
    small_classes,
)
from featurepipe.training.task import Recipe, Task
from featurepipe.training.text import left_out_text
from featurepipe.training.tuning import few_fits, grid_size, steps_of

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


def settle(
    store: FeatureStore,
    recipe: Recipe,
    options: TrainOptions,
    *,
    snapshot: str | None = None,
    cluster: str | None = None,
    say: Callable[[str], None],
) -> Task:
    """Settles what is learned from and how, without fitting anything; see `featurepipe.train` for the arguments.

    Raises:
        UsageError: an argument is wrong, or the labels cannot be learned from.
    """
    _check(recipe)
    dataset, backbone = options.dataset or store.only_dataset(), options.backbone
    nodes: str | Sequence[str] = options.nodes
    comparison = last_comparison(store, dataset, backbone, say, options) if asks_for_it(nodes) else None
    if comparison is not None:
        nodes, backbone = comparison["recommended"]["column"], comparison["space"]["fingerprint"]
    if asks_for_all(nodes):
        nodes = all_columns(store, dataset, backbone, say)
    found = store.features(dataset, node=nodes, backbone=backbone, snapshot=snapshot)
    crossed = bool(options.multilabel) and options.needs_validation
    _say_which(store, found, options, say)
    task = settle_rows(store, found, recipe, options, snapshot=snapshot, cluster=cluster, crossed=crossed, say=say)
    if comparison is not None and not options.target:
        check_same_task(comparison, task.classes, options.labels, say)
    return task


def settle_rows(
    store: FeatureStore,
    found: FeatureSet,
    recipe: Recipe,
    options: TrainOptions,
    *,
    snapshot: str | None = None,
    cluster: str | None = None,
    crossed: bool = False,
    say: Callable[[str], None],
) -> Task:
    """Settles which rows of a feature set are learned from, what they should give, and how; see `settle`, and `divide`.

    Raises:
        UsageError: an argument is wrong, or the labels cannot be learned from.
    """
    if options.weight is not None and not recipe.family.weights:
        raise refuse_weights(recipe.head, "weight", recipe.target_type)
    found = with_roles(store, found, options.labels, RoleOptions.of(options), say, snapshot=snapshot)
    features = found.select(labelled=True) if found.unlabelled < len(found) else _refuse_unlabelled(found)
    targets: npt.NDArray[Any] | None = None
    left_out: dict[str, int] = {}
    if options.target is not None:
        targets = np.asarray(features.targets, np.float64)
        every = quantile_bins(targets)
    elif options.multilabel:
        targets = np.asarray(features.targets, np.float32)
        every = rarest_labels(targets)
    else:
        every = features.codes(features.classes)
        check_classes(features.classes, len(features), say, options.label or "label")
        left_out = small_classes(features, every, options.split, least=options.min_class_size)
        is_small = np.isin(every, [features.classes.index(name) for name in left_out])
        every = np.where(is_small & learned_rows(features, options.split), -1, every)
    division = divide(
        features,
        every,
        split=options.split,
        seed=recipe.seed,
        validate=options.needs_validation or options.tune or options.select == SELECT_AUTO,
        least=0 if options.target is None else least_units(INTERVAL_LEVEL),
        crossed=crossed,
        column=options.split_column,
    )
    classes: tuple[str, ...] = ()
    if targets is None:
        order = options.ordered and tuple(name for name in options.ordered if name not in left_out)
        known = [name for name in features.classes if name not in left_out]
        classes = _in_order(_learned_classes(features, division), known, order, say)
    elif options.multilabel:
        kept = _learnable_labels(targets[division.final], features.target_names, options.min_class_size, recipe, say)
        targets, classes = targets[:, kept], tuple(features.target_names[place] for place in kept)
    else:
        _check_numbers(targets[division.final], division, str(options.target))
    task = Task(
        features=features,
        classes=classes,
        codes=every if targets is not None else features.codes(classes),
        division=division,
        cost=route(
            recipe,
            len(division.final),
            least_width(options, features.shape[1]),
            options.memory,
            cluster,
            say,
            device=options.device,
        ),
        unlabelled=found.unlabelled,
        seed=recipe.seed,
        targets=targets,
        is_ordered=options.ordered is not None,
        left_out=left_out,
    )
    if left_out:
        say(left_out_text(left_out))
    say(f"{task.features.origin.dataset}: {_counted(task)}")
    if targets is None:
        _say_conflicts(features, say)
    if features.groups is not None and not (len(division.test) or features.split_names()):
        say("no group can be held out for the test: every one is the only one of a class; give images of more groups")
    return task


def _say_which(store: FeatureStore, found: FeatureSet, options: TrainOptions, say: Callable[[str], None]) -> None:
    """Says whose features are learned from, and why, where the store has more than one feature space."""
    taken, *others = sorted(store.spaces(), key=lambda space: space.fingerprint != found.space_fingerprint)
    if not others:
        return
    if options.backbone is not None:
        why = f"as {options.backbone} was asked for"
    elif asks_for_it(options.nodes):
        why = "which the last comparison of layers recommends"
    else:
        rest = first_names([space.name for space in others])
        why = f"the only one that the dataset has, or that is of trained weights and images as they are; not {rest}"
    columns = found.columns if len(found.columns) < 4 else [*found.columns[:3], "..."]
    say(f"learning from {', '.join(columns)} of {taken.backbone}, feature space {taken.name}: {why}")


def timed(task: Task, recipe: Recipe, options: TrainOptions, say: Callable[[str], None]) -> Task:
    """The task with an estimate of how long its fits will take, from small ones; without one where they run on a cluster."""
    fits = 1 + (CROSSED_FOLDS if task.division.is_crossed else options.needs_validation)
    tries = grid_size(recipe) * len(task.folds(recipe.folds)) if options.tune else 0
    if options.select is not None:  # of which fits, on how many values, is not known yet
        shares = len(SHARES) if options.select == SELECT_AUTO else 0
        task = replace(task, cost=replace(task.cost, fits=fits + tries + shares))
        say(f"values are selected first: the time is not estimated; {task.cost.text}")
        return task
    if task.cost.is_spread:
        task = replace(task, cost=replace(task.cost, fits=fits + tries))
    else:
        say("estimating the time from a few fits")
        task = replace(task, cost=_timed(task, recipe, fits=fits, tries=tries, jobs=options.jobs))
    say(task.cost.text)
    return task


def least_width(options: TrainOptions, width: int) -> int:
    """How many values an image has at least in a fit: all of them, or the share that is kept."""
    if options.select is None:
        return width
    return kept_count(SHARES[0] if options.select == SELECT_AUTO else float(options.select), width)


def route(
    recipe: Recipe,
    rows: int,
    width: int,
    memory: float | str | None,
    cluster: str | None,
    say: Callable[[str], None],
    *,
    device: str = CPU,
) -> Cost:
    """Here or on the cluster; and if here, in memory or from blocks, and on which device.

    Raises:
        UsageError: there is no such device, it is asked for on a cluster, or the head is not fitted there.
    """
    if device != CPU and cluster is not None:
        raise UsageError(
            Message(Option("device", device), " is of this machine, and a cluster fits elsewhere: give one of them")
        )
    if device != CPU:
        device_called(device)
    if cluster is not None:
        exact = getattr(steps_of(recipe.make(out_of_core=True))[-1][1], "exact_rows", 0)
        if recipe.family.out_of_core and rows > exact:
            limit = None if memory is None else bytes_of(memory)
            return choose_on_cluster(recipe.family, rows, width, limit, cluster)
        why = f"is exact up to {exact:,} images" if exact else "keeps all rows in one place"
        say(f"{recipe.head} {why}: it is fitted here, not on the cluster; only a search runs there")
    return choose_route(
        recipe.family, rows, width, bytes_of(memory or available_memory() // 2), recipe.target_type, device=device
    )


def _check(recipe: Recipe) -> None:
    """Refuses what can be refused before any work."""
    options = {"pca": "pca", "class_weight": "class_weight", "random_state": "seed", "memory": "memory"}
    taken = next((name for name in recipe.params if name in options), None)
    if taken:
        raise UsageError(
            Message(
                f"{taken} is no parameter of {recipe.head} to set; it has an option of its own: ",
                Option(options[taken]),
            )
        )
    try:
        json.dumps(dict(recipe.params), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the parameters {dict(recipe.params)} cannot be written down as JSON ({error}); give finite numbers"
        ) from error
    recipe.make()


def _refuse_unlabelled(features: FeatureSet) -> FeatureSet:
    raise UsageError(
        Message(
            f"none of the {len(features):,} images of dataset {features.origin.dataset} has a label; put them in "
            "folders named by class and extract again, or give a CSV with the columns id and label: ",
            Option("labels", "FILE.csv"),
        )
    )


def _learned_classes(features: FeatureSet, division: Division) -> tuple[str, ...]:
    """The classes of the training rows.

    Raises:
        UsageError: there is one class only.
    """
    train = features.take(division.final)
    classes = train.classes
    if len(classes) < 2:
        raise UsageError(
            f"all {len(train):,} training images are of class {classes[0]!r}; a head needs two or more. Check the labels, "
            f"and which split is trained on ({division.text})"
        )
    return tuple(classes)


def _say_conflicts(features: FeatureSet, say: Callable[[str], None]) -> None:
    """Names an image that is there more than once, as copies, with different classes."""
    _, image, copies = np.unique(features.keys64, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(copies[image] > 1)
    image, codes = image[rows], features.codes()[rows]
    order = np.lexsort((codes, image))
    pairs = np.flatnonzero((np.diff(image[order]) == 0) & (np.diff(codes[order]) != 0))
    if not len(pairs):
        return
    count = len(np.unique(image[order[pairs]]))
    two = features.take(rows[order[pairs[0] : pairs[0] + 2]])
    named = " = ".join(f"{id_} ({label})" for id_, label in zip(two.ids, two.labels, strict=True))
    say(
        f"{counted(count, 'image', 'is', 'are')} there more than once, with different labels, and learned with each: {named}"
        f"{', ...' * (count > 1)}; correct the labels, or remove the copies (featurepipe duplicates lists them)"
    )


def _in_order(
    learned: tuple[str, ...], known: Sequence[str], order: Sequence[str] | None, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The classes to learn in the order that was given, if one was.

    Raises:
        UsageError: The order and the images' classes are not the same.
    """
    if order is None:
        return learned
    for name in order:
        if name not in known:
            raise unknown("class", name, known, where=f"the order {' < '.join(order)}")
    lacking = [name for name in known if name not in order]
    if lacking:
        raise UsageError(
            Message(
                f"the order {' < '.join(order)} leaves out classes that images have: {first_names(lacking)}; name all in ",
                Option("ordered"), ", or take their labels away",
            )
        )  # fmt: skip
    unlearned = [name for name in order if name not in learned]
    if unlearned:
        say(f"no training image is of {', '.join(unlearned)}: the head learns the order of the others")
    return tuple(name for name in order if name in learned)


def _learnable_labels(
    targets: npt.NDArray[Any], names: Sequence[str], least: int, recipe: Recipe, say: Callable[[str], None]
) -> list[int]:
    """Places of the labels that enough training rows have, and enough have not.

    Raises:
        UsageError: there is a label with too few, unless the head's parameter ``one_sided="drop"`` leaves such labels out; or
            none is left.
    """
    counts = np.stack([(targets == 1).sum(axis=0), (targets == 0).sum(axis=0)])
    few = np.flatnonzero(counts.min(axis=0) < least)
    if not len(few):
        return list(range(len(names)))
    place = int(few[0])
    having, lacking = (f"{int(count):,}" for count in counts[:, place])
    what = (
        f"{len(few)} of {counted(len(names), 'label')} {has(len(few))} fewer than {least} training images on one side"
    )
    example = f"such as {names[place]!r}: {having} with it, {lacking} without"
    if recipe.params.get("one_sided") != "drop" or len(few) == len(names):
        allowed = int(counts.min(axis=0)[few].min())
        accept = Message(", accept them with ", Option("min_class_size", allowed)) if allowed else Message()
        raise UsageError(
            Message(
                f"{what}, {example}; give more images", accept, ", or leave such labels out with ",
                Option("params", "one_sided=drop"),
            )
        )  # fmt: skip
    dropped = few.tolist()
    say(f"left out: {what}: {_some([names[number] for number in dropped])}")
    return [number for number in range(len(names)) if number not in dropped]


def _check_numbers(numbers: npt.NDArray[np.float64], division: Division, column: str) -> None:
    """Refuses training rows that all have one number.

    Raises:
        UsageError: They do.
    """
    if numbers.min() == numbers.max():
        raise UsageError(
            Message(
                f"all {len(numbers):,} training images have the number {numbers[0]:g} in ",
                Option("target", column),
                f"; a head learns what differs between images. Check the column, and which split is trained on ({division.text})",
            )
        )


def _timed(task: Task, recipe: Recipe, *, fits: int, tries: int, jobs: int) -> Cost:
    """The cost with an estimate of the time of all fits."""
    cost = task.cost
    order = np.random.default_rng(task.seed).permutation(task.division.final)

    def pilot(rows: int) -> None:
        rows = max(rows, 2 * len(task.classes), int(recipe.pca or 0))
        enough = np.union1d(order[:rows], _one_per_class(task))
        fit(task, recipe, enough)

    one = partial(time_of, pilot, steepest=recipe.family.time_exponent)
    try:
        found = few_fits(task, recipe) if tries else None
        if found is not None:
            tried, count, rows = found
            each = time_of(tried, rows, steepest=recipe.family.time_exponent, whole=True) / count
            alike = cost.rows <= 2 * rows  # then the last fits are as those of the search
            last = each * (cost.rows / rows) ** recipe.family.time_exponent if alike else one(cost.rows)
            searched = tries * each / min(jobs, os.cpu_count() or 1)
        else:
            last = one(cost.rows)
            most = min(cost.rows, recipe.family.search_rows or cost.rows)
            searched = tries * (last if most == cost.rows else one(most)) if tries else 0.0
    except UsageError:  # the parameters ask for more rows than a sample has, or are wrong: the fit itself will tell
        return replace(cost, fits=fits + tries)
    return replace(cost, seconds=last * fits + searched, fits=fits + tries, search_seconds=searched if tries else None)


def _one_per_class(task: Task) -> npt.NDArray[np.int64]:
    rows = task.division.final
    _, first = np.unique(task.codes[rows], return_index=True)
    return rows[first]


def _counted(task: Task) -> str:
    counts = task.counts()
    what = "with a number" if task.is_numeric else f"of {len(task.classes)} classes"
    what = f"with {counted(len(task.classes), 'label')}" if task.is_multilabel else what
    copies = counts["duplicates"]
    again = f" ({copies:,} of them {'a copy' if copies == 1 else 'copies'} of others of these)" if copies else ""
    parts = [f"{counted(counts['train'], 'image')} {what} to train on{again}"]
    parts += [f"{counts['test']:,} to test"] if counts["test"] else []
    parts += [f"{counts[name]:,} {name}" for name in ("unlabelled", "rejected") if counts[name]]
    return ", ".join(parts)


RECOMMENDED = "recommended"
"""Instead of a node: the column that the last comparison of layers (``featurepipe depth``) recommends."""


def asks_for_it(nodes: str | Sequence[str]) -> bool:
    """Whether the recommended column is wanted, not one of that name."""
    return nodes in (RECOMMENDED, [RECOMMENDED], (RECOMMENDED,))


ALL = "all"
"""Instead of a node: every column of the store, but activations as they are and what is wider than `MOST_VALUES`."""
MOST_VALUES = 9000
"""Values of a column of ``all``: those of the protocol by which layers are compared."""


def asks_for_all(nodes: str | Sequence[str]) -> bool:
    """Whether every column is wanted."""
    return nodes in (ALL, [ALL], (ALL,))


def all_columns(store: FeatureStore, dataset: str, backbone: str | None, say: Callable[[str], None]) -> list[str]:
    """The columns of a dataset's feature space that can stand side by side, in the order of the numbers in their names.

    The order is that of the network where blocks are numbered; it does not depend on which were extracted first.

    Raises:
        UsageError: There is none.
    """
    space = choose_space(store, backbone, dataset)
    held = space.columns()
    bottleneck = space.bottleneck

    def place(column: str) -> tuple[bool, list[tuple[int, str]]]:
        pieces = re.findall(r"\d+|\D+", column)
        return column.partition(":")[0] == bottleneck, [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]

    kept = [column for column in held if not column.endswith(":map") and held[column].width <= MOST_VALUES]
    left_out = [column for column in held if column not in kept]
    if not kept:
        raise UsageError(
            Message(
                f"{space.name} has no column of at most {MOST_VALUES:,} values an image that is no map; run featurepipe extract "
                "SOURCE with ",
                Option("nodes", ALL),
            )
        )
    if left_out:
        say(f"left out, as maps or wider than {MOST_VALUES:,} values: {first_names(sorted(left_out))}")
    return sorted(kept, key=place)


def last_comparison(
    store: FeatureStore, dataset: str, backbone: str | None, say: Callable[[str], None], options: TrainOptions
) -> Any:
    """The document of the last comparison of a dataset's layers for what is learned, of any network or of ``backbone``.

    Raises:
        UsageError: they have not been compared for it.
    """
    target, kind = options.target, "multiclass" if options.target_type == "ordinal" else options.target_type
    every = store.depth_documents(dataset)
    documents = [document for document in every if document.get("target_type", "multiclass") == kind]
    if target is not None:
        documents = [document for document in documents if _asked(document).get("target") == target]
    if backbone is not None:
        spaces = {store.space(backbone, dataset=dataset).fingerprint}
        documents = [document for document in documents if document["space"]["fingerprint"] in spaces]
    if not documents:
        of = f" of {backbone}" if backbone else ""
        if every:
            of += {"multiclass": " for classes", "multilabel": " for several labels"}.get(
                kind, f" for the number {target}"
            )
        raise UsageError(
            Message(
                f"the layers{of} have not been compared on dataset {dataset}, so none is recommended; run: featurepipe depth "
                f"SOURCE --store {store.path} --dataset {dataset}, or name a column with ",
                Option("nodes"),
            )
        )
    found, own = documents[-1]["recommended"], _with_labels_of(documents[-1])
    value = found[documents[-1].get("measure", "accuracy")]
    say(
        f"recommended on {documents[-1]['provenance']['when'][:10]}{own}: {found['column']} (there {value:.4f}: "
        f"{found['head']}, its parameters chosen in each fold)"
    )
    return documents[-1]


def _asked(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a comparison that were given."""
    found: Mapping[str, Any] = comparison["provenance"].get("options") or {}
    return found


def check_same_task(
    comparison: Mapping[str, Any], classes: Sequence[str], labels: Any, say: Callable[[str], None]
) -> None:
    """Says what the comparison was made for, where that is not quite what is trained; which layer is best may differ.

    Args:
        comparison: the document.
        classes: of the images to train on.
        labels: given instead of the dataset's, or None.
        say: told what differs.

    Raises:
        UsageError: no class is the same, so that the recommendation says nothing about this task.
    """
    compared = list(comparison["classes"])
    again = Message("compare again with featurepipe depth, or name a column with ", Option("nodes"))
    if not set(classes) & set(compared):
        raise UsageError(
            Message(
                f"layers were compared on other classes{_with_labels_of(comparison)}: {_some(compared)}; to train are "
                f"{_some(classes)}. Which layer is best for those may be none for these: ",
                again,
            )
        )
    differ = [f"{_some(names)} {what}" for names, what in (
        ([name for name in classes if name not in compared], "were not there then"),
        ([name for name in compared if name not in classes], "are not here now"),
    ) if names]  # fmt: skip
    if differ:
        say(f"the recommendation is of other classes: {', '.join(differ)}; if that matters, {again}")
    own = compared_labels(labels)
    if own != comparison.get("labels"):
        say(
            f"the recommendation was made with the labels of {comparison.get('labels') or 'the dataset'}, not of "
            f"{own or 'the dataset'}; if these are others, {again}"
        )


def _some(names: Sequence[str]) -> str:
    return first_names([repr(name) for name in names])


def _with_labels_of(comparison: Mapping[str, Any]) -> str:
    return f" with the labels of {comparison['labels']}" if comparison.get("labels") else ""


def compared_labels(labels: Any) -> str | None:
    """What the document of a comparison of layers says of labels of the user's own."""
    if labels is None:
        return None
    return Path(labels).name if isinstance(labels, str | PathLike) else type(labels).__name__
