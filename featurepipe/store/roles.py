"""Roles of columns: which column of a labels file or a manifest holds classes, numbers, labels, groups, splits and weights.

Columns join images by id when features are looked at, as labels do; nothing is computed again. They come from a labels file if
one is given and has them, else from the manifest, whose further columns the snapshot has kept
(`featurepipe.store.snapshots`).
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.annotations import KEPT_COLUMN, column_named, duplicate, names_in_doubt, several_names, split_of
from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, UsageError, nearest, unknown
from featurepipe.option_groups import declared
from featurepipe.progress import announcer
from featurepipe.store.labelled_images import UNUSED, LabelledImages, group_names
from featurepipe.store.labels import ColumnTable, LabelSource, LabelTable, places_of, read_columns
from featurepipe.store.options import (
    GROUP,
    LABEL,
    NO_GROUP,
    NO_SPLIT,
    RoleOptions,
    RowOptions,
    columns_of,
    is_file_of_groups,
)
from featurepipe.store.snapshots import REJECTED

if TYPE_CHECKING:
    from featurepipe.store.feature_store import FeatureStore
    from featurepipe.store.views import FeatureSet

NEAR = "near"
"""The kind of a group, in the file of `featurepipe.duplicates`, whose images are alike without being equal."""
_YES = frozenset({"1", "1.0", "true", "yes", "y", "t"})
_NO = frozenset({"0", "0.0", "false", "no", "n", "f"})
_UNKNOWN = frozenset({"", "-1", "-1.0", "nan", "na", "none", "null", "unknown", "?"})
_NO_LABEL = "none"
_NAMED = 6  # columns without a role that a message names
_LISTED = 20  # columns that an error lists
_NAMED_VALUES = 3
_MOST_SPLITS = 50


class Snapshots(Protocol):
    """What joining roles needs of a store: its snapshots, and the columns of manifests that these keep."""

    def further_columns(self, dataset: str, run_id: str | None = None) -> list[str]:
        """See ``FeatureStore``."""
        ...

    def snapshot_ids(self, dataset: str) -> list[str]:
        """See ``FeatureStore``."""
        ...

    def snapshot(
        self, dataset: str, run_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table | None:
        """See ``FeatureStore``."""
        ...

    def runs(self) -> list[dict[str, Any]]:
        """See ``FeatureStore``."""
        ...


class _Column(NamedTuple):
    """A column's text by row of the features, and where it is from."""

    name: str
    texts: pa.Array
    where: str
    is_numbered: bool = False  # whether its values are numbers that another file has for others

    @property
    def stable(self) -> str:
        """By what name its values are known elsewhere; empty if they are not."""
        return "" if self.is_numbered else self.name


class _Columns:
    """The columns that roles can be of, joined to rows by id when they are asked for."""

    def __init__(
        self,
        store: Snapshots,
        features: LabelledImages,
        table: ColumnTable | None,
        snapshot: str | None,
        *,
        dataset: str,
    ) -> None:
        self.features, self.table = features, table
        self._store, self._dataset, self._snapshot = store, dataset, snapshot
        self.kept = store.further_columns(self._dataset, snapshot)
        self.used: list[str] = []

    def has(self, name: str) -> bool:
        """Whether there is a column of that name, in any case."""
        places = [*([self.table.columns] if self.table else []), self.kept]
        return any(column_named(name, columns) is not None for columns in places)

    def find(self, name: str) -> _Column | None:
        """The column of that name, in any case; None if there is none.

        Raises:
            UsageError: Several are so called but for case and blanks.
        """
        if self.table is not None and (found := column_named(name, list(self.table.columns))) is not None:
            self.used.append(found)
            texts = self.table.texts(found).take(places_of(self.features.table["id"], self.table))
            return _Column(found, _one(texts), self.table.name)
        if (found := column_named(name, self.kept)) is not None:
            self.used.append(found)
            kept = self._store.snapshot(self._dataset, self._snapshot, columns=["id", KEPT_COLUMN + found])
            assert kept is not None  # noqa: S101 - features of it are open
            texts = kept[KEPT_COLUMN + found].take(pc.index_in(self.features.table["id"], value_set=_one(kept["id"])))
            return _Column(found, _one(texts), f"dataset {self._dataset}")
        if name.lower() == LABEL and self.has_labels:  # numbers may be where classes are by default
            return _Column(LABEL, _one(self.features.table["label"]), f"dataset {self._dataset}")
        return None

    @property
    def has_labels(self) -> bool:
        """Whether the features have labels of the dataset's own."""
        return bool(self.features.table["label"].null_count < len(self.features.table))

    def get(self, role: str, name: str) -> _Column:
        """The column of that name.

        Raises:
            UsageError: There is none; names those that there are.
        """
        found = self.find(name)
        if found is not None:
            return found
        there = list(dict.fromkeys([*(self.table.columns if self.table else ()), *self.kept]))
        asked = Option(role, name)
        lost = self._lost(name)
        if there:
            raise UsageError(Message(asked, f": unknown column {name!r}{lost}; there {_listed_columns(name, there)}"))
        none = f": dataset {self._dataset} was extracted without further columns{lost}. Give a file with it and id or path: "
        more = "; or extract a manifest that has it, which computes nothing again"
        raise UsageError(Message(asked, none, Option("labels", "FILE.csv"), more))

    def _lost(self, name: str) -> str:
        """Why a column of the manifest was not kept, if the run that made the snapshot says so."""
        ids = self._store.snapshot_ids(self._dataset)
        run = next((run for run in self._store.runs() if run.get("run_id") == (self._snapshot or ids[-1])), {})
        listing = run.get("listing") or {}
        found = column_named(name, list(listing.get("ignored") or ()))
        if found is None:
            return ""
        why = (listing.get("reasons") or {}).get(found, "it is there twice, or its values are too long")
        return f" (the manifest has {found!r}, which was not kept: {why})"

    def unused(self) -> dict[str, list[str]]:
        """Columns that have no role, of the labels file and of the manifest."""
        own = [] if self.table is None else [name for name in self.table.columns if name not in self.used]
        named = {name.strip().lower() for name in (*own, *self.used)}
        kept = [name for name in self.kept if name.strip().lower() not in named]
        return {where: names for where, names in (("labels", own), ("manifest", kept)) if names}

    def unused_text(self) -> list[str]:
        """What to say of them, a line for each."""
        found = self.unused()
        said = []
        if "labels" in found and self.table is not None:
            said.append(f"{self.table.name}: ignored columns: {first_names(found['labels'], _NAMED)}")
        if "manifest" in found:
            names = first_names(found["manifest"], _NAMED)
            said.append(f"dataset {self._dataset}: columns of its manifest without a role here: {names}")
        return said

    def rejects(self, name: str) -> dict[str | None, int]:
        """How many images could not be used, by the split that a column gives them."""
        kept = column_named(name, self.kept)
        own = None if self.table is None else column_named(name, list(self.table.columns))
        further = [] if own or kept is None else [KEPT_COLUMN + kept]
        lost = self._rejected(further)
        if own is not None and self.table is not None:
            texts = self.table.texts(own).take(pc.index_in(lost["id"], value_set=self.table.ids))
        else:
            texts = lost[further[0]]
        return dict(Counter(_splits_of(_one(texts)).to_pylist()))

    def rejected_ids(self) -> pa.Array:
        """The ids of images that could not be used."""
        return _one(self._rejected()["id"])

    def _rejected(self, further: Sequence[str] = ()) -> pa.Table:
        """The rows of the snapshot that were rejected: ids, and further columns."""
        every = self._store.snapshot(self._dataset, self._snapshot, columns=["id", "status", *further])
        assert every is not None  # noqa: S101 - features of it are open
        return every.filter(pc.equal(every["status"], REJECTED))


def _listed_columns(name: str, there: Sequence[str]) -> str:
    """All columns, nearest to a name first."""
    order = sorted(there, key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio())
    are = "is only" if len(there) == 1 else "are"
    return f"{are} {first_names(order, _LISTED)}"


def with_roles(
    store: Snapshots,
    features: FeatureSet,
    labels: LabelSource | None,
    roles: RowOptions,
    say: Callable[[str], None],
    *,
    snapshot: str | None = None,
    trained: Mapping[str, Any] | None = None,
) -> FeatureSet:
    """Joins classes, numbers, labels, groups, splits and weights to features, and says what was found and what is not used.

    Args:
        store: Where the features are.
        features: n rows of one of its datasets.
        labels: A labels file and the like, as `FeatureSet.with_labels` takes it; None for what the snapshot has.
        roles: Which column is what.
        say: Told one line for each role, and one for columns that have none.
        snapshot: The run id of the features' snapshot; None for the current one.
        trained: The columns that a bundle was trained with, by role: where no other is asked for they are taken, if they are
            there.

    Raises:
        UsageError: There is no such column, or its values are none of the kind.
    """
    table = None if labels is None else read_columns(labels)
    columns = _Columns(store, features, table, snapshot, dataset=features.origin.dataset)
    roles = _as_trained(roles, columns, trained or {})
    if roles.split_column is not None:
        features = _with_splits(columns, features, roles.split_column, say)
    if not (roles.target or roles.multilabel):
        features = _with_classes(columns, features, roles, say)
    if roles.target:
        found = columns.get("target", roles.target)
        features = features.with_column("target", _numbers("target", found, features))
        say(f"numbers to estimate: column {found.name} of {found.where}")
    if roles.multilabel:
        names, matrix, where = _several(columns, roles.multilabel)
        features = features.with_column("target", matrix, names=names)
        say(f"several labels: {where}{_unknown_text(columns, roles.multilabel, matrix)}")
    features = _with_group(columns, features, roles.group, say)
    if roles.weight:
        found = columns.get("weight", roles.weight)
        features = features.with_column("weight", _weights(found, features))
        say(f"weights: column {found.name} of {found.where}")
    for line in columns.unused_text():
        say(line)
    metadata = {**(features.table.schema.metadata or {}), UNUSED: json.dumps(columns.unused())}
    return replace(features, table=features.table.replace_schema_metadata(metadata))


def join_roles(
    features: FeatureSet,
    labels: LabelSource | None = None,
    *,
    label: str | None = None,
    group: str | None = None,
    split_column: str | None = None,
    target: str | None = None,
    multilabel: str | Sequence[str] | None = None,
    weight: str | None = None,
    snapshot: str | None = None,
    silent: bool = False,
) -> FeatureSet:
    """Returns features with what columns say of their images, as `featurepipe.train` takes it; nothing is computed again.

    Args:
        features: Of a store; n images.
        labels: A mapping, table or file by id, as ``FeatureSet.with_labels`` takes it; columns that it lacks are those of the
            manifest that was extracted.
        label: The column of the class, by default ``label``.
        group: The column of what belongs together, such as a patient, or a file of groups; by default ``group``, where there is
            one; ``none`` for no groups.
        split_column: The column of the splits; ``none`` for no splits.
        target: The column of a number; then ``targets`` is (n,) float64, NaN where it is not known.
        multilabel: The columns of several labels; then ``targets`` is (n, K) of 1, 0 and NaN, and ``target_names`` names them.
        weight: The column of how much each image counts.
        snapshot: The run id of the snapshot that the features are of; by default the current one.
        silent: Say nothing of what was found, and of columns that are not used, on standard error.

    Raises:
        UsageError: There is no such column, or its values are none of the kind.
    """
    from featurepipe.store.feature_store import FeatureStore

    roles = RoleOptions(
        label=label,
        group=group,
        split_column=split_column,
        target=target,
        multilabel=columns_of(multilabel),
        weight=weight,
    )
    store = FeatureStore(features.origin.store, create=False)
    return with_roles(store, features, labels, roles, announcer(silent=silent), snapshot=snapshot)


def _as_trained(roles: RowOptions, columns: _Columns, trained: Mapping[str, Any]) -> RoleOptions:
    """All roles, where those that are not asked for may be those of a training."""
    full = {**dict.fromkeys(declared(RoleOptions)), **roles.arguments()}
    asked = {name: full[name] for name in declared(RoleOptions)}
    for name in ("label", "group", "split_column"):
        column = trained.get(name)
        if asked[name] is not None or column is None:
            continue
        if name == "label" and (asked["target"] or asked["multilabel"]):
            continue
        own = [] if columns.table is None else columns.table.columns
        hidden = name == "label" and column_named(LABEL, own) is not None and column_named(column, own) is None
        if column in (NO_GROUP, NO_SPLIT) or (columns.has(column) and not hidden):
            asked[name] = column
    return RoleOptions(**asked)


def _with_splits(columns: _Columns, features: FeatureSet, asked: str, say: Callable[[str], None]) -> FeatureSet:
    """The splits of a column, by their usual names; of rejects, too."""
    if asked == NO_SPLIT:
        if features.split_names():
            say(f"splits of dataset {features.origin.dataset} are not taken: {', '.join(features.split_names())}")
        nothing = pa.nulls(len(features), pa.string())
        return replace(
            features.with_column("split", nothing), rejects={None: features.rejected} if features.rejected else {}
        )
    found = columns.get("split_column", asked)
    splits = _splits_of(found.texts)
    counts = sorted(pc.value_counts(splits.drop_null()).to_pylist(), key=lambda one: (-one["counts"], one["values"]))
    if not counts:
        raise _wrong("split_column", found, "is empty for all images")
    if len(counts) > _MOST_SPLITS:
        some = first_names([repr(one["values"]) for one in counts])
        raise _wrong(
            "split_column", found, f"has {len(counts):,} different values, such as {some}: name a column of splits"
        )
    names = [one["values"] for one in counts]
    renamed = sorted({(text, split_of(text)) for text in pc.unique(_trimmed(found.texts).drop_null()).to_pylist()})
    said = [f"{one['values']} {one['counts']:,}" for one in counts]
    said += [f"none {splits.null_count:,}"] if splits.null_count else []
    taken = [f"{text} as {split}" for text, split in renamed if split not in (None, text)]
    say(f"splits: column {found.name} of {found.where}: {', '.join(said)}{f' ({first_names(taken)})' if taken else ''}")
    if not {"train", "test"} & set(names):
        say(f"none of these splits is train, val or test: name the one to train on or to test with --split {names[0]}")
    rejects = columns.rejects(asked) if features.rejected else {}
    return replace(features.with_column("split", splits), rejects=rejects)


def _splits_of(texts: pa.Array) -> pa.Array:
    """The usual names of splits where texts stand for one, else the texts."""
    encoded = _trimmed(texts).dictionary_encode()
    names = pa.array([split_of(text) or text for text in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _with_classes(
    columns: _Columns, features: FeatureSet, roles: RoleOptions, say: Callable[[str], None]
) -> FeatureSet:
    """The classes of the labels file, if it has them; a file of groups alone leaves those that are there."""
    from featurepipe.store.views import with_told_labels

    table, asked = columns.table, roles.label
    own = None if table is None else column_named(asked or "label", table.columns)
    roles_of_file = (GROUP, roles.group, roles.weight, roles.split_column)
    others = [] if table is None else [column_named(name, table.columns) for name in roles_of_file if name]
    if table is not None and (own is not None or (asked is None and not any(others))):
        columns.used += [own] if own is not None else []
        return with_told_labels(features, replace(_classes_of(table, asked), ignored=()), say, columns.rejected_ids)
    if asked is None:
        return features
    found = columns.get("label", asked)
    features = features.with_labels(pa.table({"id": features.table["id"], "label": found.texts}))
    said = [counted(len(features.classes), "label"), *names_in_doubt(features.classes)]
    say(f"classes: column {found.name} of {found.where}, {'; '.join(said)}")
    return features


def _classes_of(table: ColumnTable, asked: str | None) -> LabelTable:
    """The labels of a file.

    Raises:
        UsageError: It has no column ``label`` and no other was asked for; proposes those that it has.
    """
    if asked is None and table.columns and column_named(LABEL, table.columns) is None:
        near = nearest(LABEL, table.columns) or table.columns
        options = [part for name in near[:_NAMED] for part in (" or ", Option("label", name))][1:]
        has = (
            f"{table.name}: no column `{LABEL}` among {first_names(table.columns, _LISTED)}; if another is the class: "
        )
        raise UsageError(Message(has, *options))
    return table.labels(asked)


def _with_group(columns: _Columns, features: FeatureSet, asked: str | None, say: Callable[[str], None]) -> FeatureSet:
    found = _groups(columns, asked)
    if found is None:
        return features
    column, texts = found
    names = pc.unique(texts.drop_null()).to_pylist()
    if not names:
        say(
            f"column {column.name} of {column.where} is empty for all images: there are no groups, each image is for itself"
        )
        return features
    alone = f" ({counted(texts.null_count, 'image')} without one, each for itself)" if texts.null_count else ""
    said = [f"{counted(len(names), 'group')}{alone}, each on one side of every split"]
    said += names_in_doubt(names, "group", "groups")
    say(f"groups: column {column.name} of {column.where}, {'; '.join(said)}")
    return features.with_column("group", texts, column=column.stable)


def _groups(columns: _Columns, asked: str | None) -> tuple[_Column, pa.Array] | None:
    """The column or file of groups, and (n,) their names, null for an image for itself; None if there are to be none.

    Raises:
        UsageError: What is asked for is not there, or empty for all images.
    """
    if asked == NO_GROUP:
        return None
    if asked is not None and is_file_of_groups(asked):
        found: _Column | None = _of_file(asked, columns.features)
    else:
        found = columns.find(GROUP) if asked is None else columns.get("group", asked)
    if found is None:
        return None
    texts = group_names(found.texts)
    if asked is not None and texts.null_count == len(texts):
        raise _wrong("group", found, "is empty for all images")
    return found, texts


def with_groups(
    store: FeatureStore, images: LabelledImages, group: str | None, *, dataset: str, snapshot: str
) -> tuple[LabelledImages, str]:
    """Joins groups to images of a snapshot that need have no features.

    Args:
        store: Where the snapshot is.
        images: Some of its images.
        group: The column or file of groups; None for ``group``, if there is one, ``none`` for no groups.
        dataset: The dataset's name.
        snapshot: The snapshot's run id.

    Returns:
        The images, and what their groups are called; empty where they have none.

    Raises:
        UsageError: What is asked for is not there, or empty for all images.
    """
    found = _groups(_Columns(store, images, None, snapshot, dataset=dataset), group)
    if found is None or found[1].null_count == len(images.table):
        return images, ""
    return replace(images, table=images.table.append_column(GROUP, found[1])), found[0].name


def _of_file(path: str, features: LabelledImages) -> _Column:
    """The groups in a file of groups; of one that `featurepipe.duplicates` wrote the near copies, since exact ones are known."""
    table = read_columns(path)
    column = column_named(GROUP, table.columns)
    if column is None:
        raise UsageError(
            Message(Option("group", path), f": {unknown('column', GROUP, table.columns, where=table.name)}")
        )
    ids, texts = table.ids, table.texts(column, several="kind" in table.columns)
    if "kind" in table.columns:
        near = pc.equal(table.texts("kind", several=True), NEAR)
        ids, texts = ids.filter(near), texts.filter(near)
    if "kind" not in table.columns:
        return _Column(column, _one(texts.take(places_of(features.table["id"], table))), table.name)
    near = _one(texts.take(pc.index_in(features.table["id"], value_set=ids)))
    return _Column(column, near, table.name, is_numbered=True)


_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_THOUSANDS = r"^[+-]?[0-9]{1,3},[0-9]{3}$"
_DECIMAL_COMMA = r"^[+-]?[0-9]+,[0-9]+$"


def _numbers(role: str, column: _Column, features: LabelledImages) -> pa.Array:
    """(n,) float64, null where the column is empty."""
    texts = _trimmed(column.texts)
    is_number = pc.match_substring_regex(texts, _NUMBER)
    wrong = texts.filter(pc.invert(is_number))  # a text that is null is in neither
    if len(wrong):
        rows = np.flatnonzero(pc.fill_null(pc.invert(is_number), fill_value=False).to_numpy(zero_copy_only=False))
        some = [f"{texts[row].as_py()!r} for {_image(features, row)}" for row in rows[:_NAMED_VALUES]]
        more = f" and {len(rows) - _NAMED_VALUES:,} more" if len(rows) > _NAMED_VALUES else ""
        comma = pc.all(pc.match_substring_regex(wrong, _DECIMAL_COMMA)).as_py()
        what = "is no finite number" if len(rows) == 1 else "are no finite numbers"
        hint = "every image needs one from 0" if role == "weight" else "leave it empty where it is not known"
        hint = "write a decimal point" if comma else hint
        if comma and pc.all(pc.match_substring_regex(wrong, _THOUSANDS)).as_py():
            hint = "write no separator of thousands, or a decimal point: either may be meant"
        ways: Sequence[str | Option] = (
            ["; or learn classes from it with ", Option("label", column.name)] if role == "target" and not comma else []
        )
        raise _wrong(role, column, f"has {', '.join(some)}{more}, which {what}; {hint}", *ways)
    values = pc.cast(texts, pa.float64())
    row = _first(pc.invert(pc.is_finite(values)))
    if row is not None:
        raise _wrong(role, column, f"has {texts[row].as_py()!r} for {_image(features, row)}, which is no finite number")
    if values.null_count == len(values):
        raise _wrong(role, column, "is empty for all images")
    return values


def _weights(column: _Column, features: LabelledImages) -> pa.Array:
    values = _numbers("weight", column, features)
    bad = _first(pc.or_kleene(values.is_null(), pc.less(values, 0)))
    if bad is not None:
        given = "no weight" if values[bad].as_py() is None else f"the weight {values[bad].as_py():g}"
        raise _wrong("weight", column, f"has {given} for {_image(features, bad)}; every image needs one from 0")
    if len(values) and pc.max(values).as_py() == 0:
        raise _wrong("weight", column, "is 0 for all images: none would count; give some of them more")
    return values


def _several(columns: _Columns, names: Sequence[str]) -> tuple[list[str], npt.NDArray[np.float32], str]:
    """Names of labels, (n, K) with 1 for yes, 0 for no and NaN for unknown, and both as text with their place."""
    found = [columns.get("multilabel", name) for name in names]
    if (twice := duplicate([column.name for column in found], [column.name for column in found])) is not None:
        raise UsageError(
            Message(Option("multilabel", ",".join(names)), f": column {twice} is named twice; name each once")
        )
    if len(found) == 1 and not _is_yes_or_no(found[0].texts):
        labels, matrix = _listed(found[0], columns.features)
        return labels, matrix, f"{_named(labels)}, of {_columns_text(found)}"
    matrix = np.stack([_yes_or_no(column, columns.features) for column in found], axis=1)
    return [column.name for column in found], matrix, _columns_text(found)


def _columns_text(found: Sequence[_Column]) -> str:
    """Columns, with each place that they are of named once: ``columns a, b of l.csv and column c of dataset d``."""
    places = list(dict.fromkeys(column.where for column in found))
    names = [[column.name for column in found if column.where == where] for where in places]
    return " and ".join(
        f"column{'s' * (len(some) > 1)} {_named(some)} of {where}" for some, where in zip(names, places, strict=True)
    )


def _named(names: Sequence[str]) -> str:
    return first_names([repr(name) if "," in name else name for name in names])


def _is_yes_or_no(texts: pa.Array) -> bool:
    distinct = {str(text).strip().lower() for text in pc.unique(texts.drop_null()).to_pylist()}
    return distinct <= _YES | _NO | _UNKNOWN and bool(distinct & (_YES | _NO))


def _yes_or_no(column: _Column, features: LabelledImages) -> npt.NDArray[np.float32]:
    encoded = pc.fill_null(column.texts, "").dictionary_encode()
    values = np.empty(len(encoded.dictionary), np.float32)
    for place, text in enumerate(encoded.dictionary.to_pylist()):
        plain = text.strip().lower()
        if plain not in _YES | _NO | _UNKNOWN:
            row = int(np.flatnonzero(encoded.indices.to_numpy() == place)[0])
            raise _wrong(
                "multilabel", column, f"holds {text!r} for {_image(features, row)}; a column for each label holds 1 or 0 (or yes "
                "and no), and is empty or -1 where it is not known",
            )  # fmt: skip
        values[place] = 1 if plain in _YES else 0 if plain in _NO else np.nan
    return np.asarray(values[encoded.indices.to_numpy()])


def _listed(column: _Column, features: LabelledImages) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Labels separated by ``|`` or as JSON lists; of an empty text nothing is known, ``[]`` and ``none`` are no label at all."""
    encoded = column.texts.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    lists = [_labels_in(text) for text in texts]
    if None in lists:
        text = texts[lists.index(None)]
        image = _image(features, pc.index(column.texts, text).as_py())
        raise _wrong(
            "multilabel", column, f'holds {text!r} for {image}; write labels as red|round, or as ["red", "round"]'
        )
    names = sorted({name for labels in lists for name in labels or ()})
    if not names:
        what = "has no label for any image" if any(text.strip() for text in texts) else "is empty for all images"
        raise _wrong("multilabel", column, what)
    _refuse_two_forms(names, column)
    if not any(text.strip().startswith("[") for text in texts) and several_names(names) is not None:
        some = first_names([repr(name) for name in names if any(mark in name for mark in ";,")])
        raise _wrong(
            "multilabel", column, f"has labels such as {some}, which look like several; write them as red|round, or, if that is "
            'one label, as JSON lists: ["red, round"]',
        )  # fmt: skip
    places = {name: place for place, name in enumerate(names)}
    known = np.full(
        (len(lists) + 1, len(names)), np.nan, np.float32
    )  # its last row is for images of which nothing is known
    for row, (text, labels) in enumerate(zip(texts, lists, strict=True)):
        if text.strip():
            known[row] = 0
            known[row, [places[name] for name in labels or ()]] = 1
    rows = pc.fill_null(encoded.indices.cast(pa.int64()), len(lists)).to_numpy()
    return names, known[rows]


def _unknown_text(columns: _Columns, names: Sequence[str], matrix: npt.NDArray[np.float32]) -> str:
    """Says how much is not known, and how that would be negative instead."""
    unknown = np.isnan(matrix)
    rows, entries = int(unknown.all(axis=1).sum()), int(unknown.sum())
    if not entries:
        return ""
    listed = len(names) == 1 and rows * matrix.shape[1] == entries
    found = columns.find(names[0]) if listed else None
    if found is not None and not _is_yes_or_no(found.texts):
        return (
            f"; {counted(rows, 'image')} without any: unknown, and left out, not negative; write [] or none where an image has "
            "no label"
        )
    some = f"{entries:,} of {matrix.size:,} entries are empty"
    whole = f", {counted(rows, 'image')} without any" if rows else ""
    return (
        f"; {some}{whole}: unknown, and left out label by label, not negative; write 0 where an image has not the label"
    )


def _labels_in(text: str) -> list[str] | None:
    """The labels in a text; None if it is no such list."""
    if not text.strip().startswith("["):
        if text.strip().lower() == _NO_LABEL:
            return []
        return [name.strip() for name in text.split("|") if name.strip()]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [str(name).strip() for name in found] if all(isinstance(name, str | int) for name in found) else None


def _refuse_two_forms(names: Sequence[str], column: _Column) -> None:
    forms: dict[str, str] = {}
    for name in names:
        other = forms.setdefault(" ".join(unicodedata.normalize("NFC", name).casefold().split()), name)
        if other != name:
            raise _wrong("multilabel", column, f"has one label in two forms, {other!r} and {name!r}; write one of them")


def _wrong(role: str, column: _Column, said: str, *more: str | Option) -> UsageError:
    return UsageError(Message(Option(role, column.name), f": column {column.name} of {column.where} {said}", *more))


def _image(features: LabelledImages, row: int) -> str:
    return f"image {features.table['id'][row].as_py()!r}"


def _trimmed(texts: pa.Array) -> pa.Array:
    """Without blanks around; null where nothing is left."""
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _first(condition: pa.Array) -> int | None:
    row = pc.index(condition, value=True).as_py()
    return None if row < 0 else int(row)


def _one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
