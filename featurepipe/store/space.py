"""One feature space of a store: its fields and fingerprint, its parts, what it knows, and what may stand beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import CorruptPart, StoreError, UsageError, unknown
from featurepipe.lazy_names import former_method
from featurepipe.store.atomic import checked_folder, is_folder, listed, sync_folder, write_json
from featurepipe.store.documents import SpaceDocument, checked_dataset, checked_run_id, read_document
from featurepipe.store.keys import KNOWN_FILES, KeyIndex, Keys, append_rejects, known_files, read_rejects
from featurepipe.store.locks import LOCK_EX, locked
from featurepipe.store.parts import Headers, PartInfo, list_parts, read_part
from featurepipe.store.writer import DEFAULT_PART_BYTES, DEFAULT_PART_SECONDS, PartWriter, shard_prefix


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
        bottleneck: The node that people ask for as the bottleneck; None if the space does not say.
    """

    store: str
    dataset: str
    backbone: str
    space: str
    fingerprint: str
    fields: Mapping[str, Any]
    bottleneck: str | None = None

    @classmethod
    def of(cls, space: Space, dataset: str) -> Origin:
        """Where features of a dataset in a space come from."""
        store = str(space.path.parent.parent)
        return cls(
            store, dataset, space.backbone, space.name, space.fingerprint, space.fields, bottleneck=space.bottleneck
        )


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


def extract_command(
    store: Path,
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    notes: Mapping[str, Any] | None = None,
    node: str | None = None,
    mirrored: bool = False,
) -> str:
    """Writes the ``featurepipe extract`` that would fill a gap; only SOURCE is left to the user.

    Args:
        store: The store's folder.
        dataset: Name of the dataset.
        backbone: Name of the network.
        notes: Of the network's feature space: a random control is asked for by its seed.
        node: The node or column to compute.
        mirrored: Of mirrored images.

    Example:
        >>> extract_command(Path("my store"), backbone="lenet5", notes={"backbone": {"random": True, "seed": 3}})
        "featurepipe extract SOURCE --store 'my store' --backbone lenet5 --weights none --seed 3"
    """
    words = ["featurepipe", "extract", "SOURCE", "--store", str(store)]
    for option, value in (("--dataset", dataset), ("--backbone", backbone)):
        words += [option, value] if value else []
    described = (notes or {}).get("backbone", {})
    if described.get("random"):
        words += ["--weights", "none", "--seed", str(described.get("seed") or 0)]
    words += ["--node", node] if node else []
    words += ["--mirrored"] if mirrored else []
    return shlex.join(words)


__all__ = ["KNOWN_FILES", "ColumnInfo", "Space"]
_HeadersByName = Mapping[str, Headers]


@dataclass(frozen=True)
class ColumnInfo:
    """What a space holds of one column."""

    dtype: str
    width: int
    rows: int
    bytes: int


class Space:
    """A feature space on disk; get one from ``FeatureStore.open_space`` or ``.space``.

    Attributes:
        path: Its folder.
        fields: Everything that changes a feature's value.
        fingerprint: The hash of ``fields``.
        backbone: Name of the network.
        notes: What is good to know and changes no value, such as ``aliases``.

    Args:
        path: Its folder.
        headers: What is known of its parts already; kept up to date.
    """

    def __init__(self, path: Path, headers: Headers | None = None) -> None:
        record = read_space(checked_folder(path) / "space.json")
        self.fields: dict[str, Any] = record["fields"]
        self.fingerprint: str = record["fingerprint"]
        self.backbone: str = record["backbone"]
        self.notes: dict[str, Any] = record.get("notes", {})
        self.path = path
        self._headers = Headers() if headers is None else headers

    @classmethod
    def open(
        cls, folder: Path, fields: Mapping[str, Any], backbone: str, notes: Mapping[str, Any], headers: _HeadersByName
    ) -> Space:
        """Opens the space of these fields under ``folder``, making it if it is new; safe against racing processes."""
        identity = fingerprint(fields)
        path = folder / _folder_name(backbone, identity)
        if not (path / "space.json").exists():
            _refuse_other_folder(path, identity)
            record = {"fingerprint": identity, "fields": fields, "backbone": backbone, "notes": notes}
            canonical_json(record)  # refuses what JSON cannot hold before anything is written
            _publish_folder(path, record)
        space = cls(path, headers[path.name])
        if space.fingerprint != identity:
            raise StoreError(f"{path / 'space.json'} holds another feature space; run: featurepipe verify STORE")
        return space

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.path.name

    @property
    def bottleneck(self) -> str | None:
        """The node that people ask for as the bottleneck; None if the space does not say."""
        node: str | None = self.notes.get("aliases", {}).get("bottleneck")
        return node

    @property
    def rejects_path(self) -> Path:
        """The file of rejects; may be missing."""
        return self.path / "rejects.jsonl"

    def __repr__(self) -> str:
        return f"<Space {self.name}>"

    def update_notes(self, notes: Mapping[str, Any]) -> None:
        """Adds to the notes, or replaces entries of the same name, atomically; other processes' changes are kept."""
        descriptor = os.open(checked_folder(self.path), os.O_RDONLY)
        try:
            locked(descriptor, LOCK_EX)
            record = read_document(self.path / "space.json", SpaceDocument)
            record["notes"] = {**record.get("notes", {}), **notes}
            write_json(self.path / "space.json", record)
            self.notes = record["notes"]
        finally:
            os.close(descriptor)

    def part_paths(self) -> list[Path]:
        """Lists the part files, by name, which is by run."""
        return [self.path / "parts" / name for name in list_parts(self.path / "parts")]

    def parts(self) -> list[PartInfo]:
        """Reads the headers of all parts (each only once); unreadable ones are named in ``damaged``."""
        return self._headers.refresh(self.path / "parts", self.fingerprint)

    def parts_of_shard(self, run_id: str, shard: str) -> list[PartInfo]:
        """Reads the headers of what writers of one shard of a run have committed; unreadable ones are left out.

        A run that several processes write shares its images out; a shard whose process was killed goes on from here.
        """
        found = []
        for path in listed(self.path, f"parts/{shard_prefix(checked_run_id(run_id), shard)}*.h5"):
            with contextlib.suppress(CorruptPart):
                found.append(read_part(path))
        return found

    parts_of_share = former_method("parts_of_share", "parts_of_shard", share="shard")

    @property
    def damaged(self) -> dict[str, str]:
        """Parts that cannot be read, with the reason; their rows count as absent."""
        return {name: why for name, (_, why) in self._headers.damaged.items()}

    def columns(self) -> dict[str, ColumnInfo]:
        """Sums up the columns over all parts (copies of a row count as often as they are stored)."""
        result: dict[str, ColumnInfo] = {}
        for part in self.parts():
            for column, info in part.columns.items():
                before = result.get(column, ColumnInfo("float16", info.shape[1], 0, 0))
                dtype = np.promote_types(before.dtype, np.dtype(info.dtype)).name
                result[column] = ColumnInfo(dtype, info.shape[1], before.rows + part.rows, before.bytes + info.nbytes)
        return dict(sorted(result.items()))

    def index(self, columns: Sequence[str] | None = None) -> KeyIndex:
        """Builds the index of keys that have all ``columns`` (None: any). Damaged parts are left out."""
        return KeyIndex(columns or (), self.parts(), self._headers.mark_damaged)

    def known_files(
        self, *, dataset: str | None = None, ids: pa.ChunkedArray | None = None, since: str | None = None
    ) -> pa.Table:
        """Lists the files whose key is known from parts and rejects, so that they need not be read again.

        Rejects that could not be read at all have no key and are not listed.

        Args:
            dataset: Only files of this dataset. Ids are unique within a dataset only, so give it wherever
                another dataset could have an image of the same id, size and time.
            ids: Only files with one of these ids; then memory grows with them, and not with the store.
            since: A run id; look only into parts that later runs have written. Rejects are listed whatever run found them.

        Returns:
            ``id, size, mtime_ns, key``, one row per (id, size, mtime_ns), the last committed.
        """
        parts = [
            part
            for part in self.parts()
            if (dataset is None or part.dataset == dataset) and (since is None or part.run_id > since)
        ]
        return known_files(parts, self.rejects(dataset=dataset), ids, self._headers.mark_damaged)

    def rejects(self, *, dataset: str | None = None, first: bool = False) -> pa.Table:
        """Reads the rejects, the latest (or the ``first``) of each (id, key): ``key, id, size, mtime_ns, reason, run_id``."""
        return read_rejects(self.rejects_path, dataset=dataset, first=first)

    def add_rejects(self, rows: Iterable[Mapping[str, Any]], *, dataset: str = "") -> None:
        """Appends rejects; see ``rejects.append_rejects``."""
        append_rejects(self.rejects_path, rows, dataset=dataset)

    def writer(
        self,
        run_id: str,
        *,
        dataset: str = "",
        shard: str = "",
        part_bytes: int = DEFAULT_PART_BYTES,
        part_seconds: float = DEFAULT_PART_SECONDS,
        on_overflow: Callable[[str], None] | None = None,
        share: str | None = None,
    ) -> PartWriter:
        """Opens a writer of new parts, to be used as a context manager.

        Args:
            run_id: From ``FeatureStore.new_run_id``.
            dataset: Which dataset the images' ids belong to.
            shard: Which shard of a run this writer has, letters and digits; see ``parts_of_shard``.
            part_bytes: Commit when this much is waiting.
            part_seconds: Commit when a row has waited this long.
            on_overflow: Called once for each column that float16 cannot hold.
            share: The former name of ``shard``; warns.
        """
        if share is not None:
            warnings.warn("the argument share of Space.writer is now shard", DeprecationWarning, stacklevel=2)
            shard = share
        dtype = self.fields.get("dtype")
        if dtype not in {"float16", "float32"}:
            raise UsageError(f"the feature space's dtype must be 'float16' or 'float32', not {dtype!r}")
        return PartWriter(
            checked_folder(self.path / "parts"),
            fingerprint=self.fingerprint,
            run_id=checked_run_id(run_id),
            dataset=checked_dataset(dataset) if dataset else "",
            dtype=dtype,
            shard=shard,
            part_bytes=part_bytes,
            part_seconds=part_seconds,
            on_overflow=on_overflow,
        )

    def resolve_column(self, node: str) -> str:
        """Returns the column meant by ``node``, ``node:pooling`` or an alias from the notes; ``gap`` is the default.

        Raises:
            UsageError: This space has no such column.
        """
        columns = list(self.columns())
        found = self._find_column(node, columns)
        if found is not None:
            return found
        store = self.path.parent.parent
        command = extract_command(store, backbone=self.backbone, notes=self.notes, node="NODE")
        if not columns:
            raise UsageError(
                f"unknown column {node!r}: {self.name} holds no features yet; compute some with: {command}"
            )
        aliases = [alias for alias in self.notes.get("aliases", {}) if self._find_column(alias, columns)]
        see = f"featurepipe info {store}; to add one: {command}"
        raise unknown("column", node, [*aliases, *columns], where=self.name, see=see)

    def _find_column(self, node: str, columns: Sequence[str]) -> str | None:
        base, colon, pooling = node.partition(":")
        base = self.notes.get("aliases", {}).get(base, base)
        wanted = f"{base}:{pooling}" if colon else base if ":" in base else f"{base}:gap"
        return next((candidate for candidate in (node, wanted, base) if candidate in columns), None)


def read_space(path: Path) -> dict[str, Any]:
    """Reads a ``space.json`` and checks that its folder is named after it.

    Raises:
        StoreError: It cannot be read or is no description of a space, or is in a folder of another name, where
            the next extraction would not find it.
    """
    record = read_document(path, SpaceDocument)
    if not path.parent.name.endswith(f"-{record['fingerprint'][:12]}"):
        raise StoreError(
            f"{path} is of the feature space {record['fingerprint'][:12]}, but its folder is {path.parent.name}; rename the "
            f"folder to {_folder_name(record['backbone'], record['fingerprint'])}, or move it out of the store if that is there"
        )
    return record


def _refuse_other_folder(path: Path, identity: str) -> None:
    """Before a space is made: one that was renamed by hand has its features, which would all be computed again."""
    for other in listed(path.parent.parent, "spaces/*/space.json"):
        try:
            record = read_document(other, SpaceDocument)
        except StoreError:
            continue  # set aside, as `info` says
        if record["fingerprint"] == identity and other.parent != path:  # that one was made by another since we looked
            raise StoreError(f"{other.parent} holds this feature space; rename the folder to {path.name}")


def _publish_folder(path: Path, record: dict[str, Any]) -> None:
    """Makes a space's folder whole or not at all: a kill or a full disk in between leaves no half of one."""
    made = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        (made / "parts").mkdir(parents=True)
        write_json(made / "space.json", record)
        made.rename(path)
        sync_folder(path.parent)
    except OSError:
        if not is_folder(path):
            raise
        write_json(path / "space.json", record, replace=False)  # unless another process was first
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _folder_name(backbone: str, identity: str) -> str:
    return f"{_slug(backbone)}-{identity[:12]}"


def _slug(backbone: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", backbone).strip("-.")[:80] or "backbone"
