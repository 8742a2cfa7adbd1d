"""Feature spaces: canonical JSON and fingerprint, what differs between two, and whether their rows may stand side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import UsageError
from featurepipe.store.keys import Keys


def canonical_json(fields: Mapping[str, Any]) -> str:
    """Writes ``fields`` in the one form that is hashed: sorted keys, no spaces, shortest exact floats, no NaN.

    Raises:
        UsageError: A value is not a JSON value, or a float is NaN or infinite.

    Example:
        >>> canonical_json({"b": 0.1, "a": [1, None]})
        '{"a":[1,null],"b":0.1}'
    """
    try:
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the fields of a feature space must be finite JSON values with text keys: {error}") from error


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hashes a feature space: SHA-256 (hex) of its canonical JSON in UTF-8."""
    return hashlib.sha256(canonical_json(fields).encode("utf-8")).hexdigest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names the fields in which two feature spaces differ, dotted and sorted.

    Example:
        >>> differences({"net": {"name": "vgg16", "seed": 1}, "dtype": "float16"}, {"net": {"name": "vgg16"}})
        ['dtype', 'net.seed']
    """
    left, right = dict(_leaves(a, "")), dict(_leaves(b, ""))
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(inner, sort_keys=True)


_FIELDS_NAMED = 6


@dataclass(frozen=True)
class Origin:
    """Where the features of a view come from, as plain values.

    Attributes:
        store: The store's folder.
        dataset: The dataset's name.
        backbone: Name of the network.
        space: Name of the feature space.
        fingerprint: Of the feature space.
        fields: The feature space: everything that changes a value.
    """

    store: str
    dataset: str
    backbone: str
    space: str
    fingerprint: str
    fields: Mapping[str, Any]


def check_spaces(a: Origin, b: Origin) -> None:
    """Refuses to put features of two feature spaces, or of two datasets, side by side.

    Raises:
        UsageError: Says what differs, and what to do.
    """
    if a.fingerprint != b.fingerprint:
        names = differences(a.fields, b.fields)
        more = ", ..." if len(names) > _FIELDS_NAMED else ""
        raise UsageError(
            f"cannot put features of {a.space} and {b.space} side by side: two feature spaces, which differ in "
            f"{', '.join(names[:_FIELDS_NAMED])}{more}. Take all columns from one: store.features({a.dataset!r}, "
            f"node=[...], backbone={a.space!r})"
        )
    if a.dataset != b.dataset:
        raise UsageError(
            f"cannot put features of dataset {a.dataset!r} and of dataset {b.dataset!r} side by side: a feature vector is "
            f"of one image. Take all columns from one: store.features({a.dataset!r}, node=[...])"
        )


def check_rows(a: tuple[pa.Table, Keys], b: tuple[pa.Table, Keys]) -> None:
    """Refuses to put rows of other images, in another order, or with other labels or splits, side by side.

    Args:
        a: Its ``id, label, split``, and its keys.
        b: The same of the other view.

    Raises:
        UsageError: Says how many rows differ, names one, and says what to do.
    """
    (left, left_keys), (right, right_keys) = a, b
    advice = "put the columns side by side first, then select, take or relabel"
    if not left["id"].equals(right["id"]):
        raise UsageError(f"cannot put these features side by side: {_other_ids(left['id'], right['id'])}; {advice}")
    if left_keys is not right_keys and not np.array_equal(left_keys, right_keys):
        changed = np.flatnonzero((left_keys != right_keys).any(axis=1))
        raise UsageError(
            f"cannot put these features side by side: {len(changed)} images have changed in between, such as "
            f"{left['id'][int(changed[0])].as_py()!r}; open both again with store.features(...)"
        )
    for name in dict.fromkeys([*left.column_names[1:], *right.column_names[1:]]):
        if name not in left.column_names or name not in right.column_names:
            without = "left" if name in right.column_names else "right"
            raise UsageError(f"cannot put these features side by side: those on the {without} have no {name}; {advice}")
        if not _same_values(left[name], right[name]):
            raise UsageError(f"cannot put these features side by side: {_other_values(name, left, right)}; {advice}")


def _same_values(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    """Whether columns are equal, several labels (K a row, NaN for unknown) among them."""
    if left.type != right.type or not pa.types.is_fixed_size_list(left.type):
        return bool(left.equals(right))
    a, b = (pc.list_flatten(column).to_numpy() for column in (left, right))
    return np.array_equal(a, b, equal_nan=True)


def _other_ids(left: pa.ChunkedArray, right: pa.ChunkedArray) -> str:
    only_left = left.filter(pc.invert(pc.is_in(left, value_set=right)))
    only_right = right.filter(pc.invert(pc.is_in(right, value_set=left)))
    if len(only_left) or len(only_right):
        first = (only_left if len(only_left) else only_right)[0].as_py()
        return (
            f"the images differ ({len(left)} and {len(right)} rows; {len(only_left)} ids only on the left, "
            f"{len(only_right)} only on the right, such as {first!r})"
        )
    if len(left) != len(right):
        return f"the same images occur differently often ({len(left)} and {len(right)} rows)"
    moved = np.flatnonzero(pc.not_equal(left, right).to_numpy())
    return f"the rows are in another order ({len(moved)} rows differ, the first is {left[int(moved[0])].as_py()!r})"


def _other_values(name: str, left: pa.Table, right: pa.Table) -> str:
    a, b = left[name].to_pylist(), right[name].to_pylist()
    rows = [row for row, (x, y) in enumerate(zip(a, b, strict=True)) if str(x) != str(y)]
    first = rows[0]
    return (
        f"{len(rows)} images have another {name}, such as {left['id'][first].as_py()!r}: {a[first]!r} and {b[first]!r}"
    )
