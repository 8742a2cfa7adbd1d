"""One feature space of a store: its fields, its parts, what it knows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurepipe.errors import CorruptPart, StoreError, UsageError, unknown
from featurepipe.store.atomic import sync_folder, write_json
from featurepipe.store.documents import SpaceDocument, checked_dataset, checked_run_id, read_document
from featurepipe.store.identity import canonical_json, fingerprint
from featurepipe.store.inside import checked_folder, is_folder, listed
from featurepipe.store.keys import KNOWN_FILES, KeyIndex, append_rejects, known_files, read_rejects
from featurepipe.store.locks import locked
from featurepipe.store.parts import Headers, PartInfo, list_parts, read_part
from featurepipe.store.writer import DEFAULT_PART_BYTES, DEFAULT_PART_SECONDS, PartWriter, share_prefix


def extract_command(
    store: Path,
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    notes: Mapping[str, Any] | None = None,
    node: str | None = None,
) -> str:
    """Writes the ``featurepipe extract`` that would fill a gap; only SOURCE is left to the user.

    Args:
        store: The store's folder.
        dataset: Name of the dataset.
        backbone: Name of the network.
        notes: Of the network's feature space: a random control is asked for by its seed.
        node: The node or column to compute.

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
    def rejects_path(self) -> Path:
        """The file of rejects; may be missing."""
        return self.path / "rejects.jsonl"

    def __repr__(self) -> str:
        return f"<Space {self.name}>"

    def update_notes(self, notes: Mapping[str, Any]) -> None:
        """Adds to the notes, or replaces entries of the same name, atomically; other processes' changes are kept."""
        descriptor = os.open(checked_folder(self.path), os.O_RDONLY)
        try:
            locked(descriptor, fcntl.LOCK_EX)
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

    def parts_of_share(self, run_id: str, share: str) -> list[PartInfo]:
        """Reads the headers of what writers of one share of a run have committed; unreadable ones are left out.

        A run that several processes write shares its images out; a share whose process was killed goes on from here.
        """
        found = []
        for path in listed(self.path, f"parts/{share_prefix(checked_run_id(run_id), share)}*.h5"):
            with contextlib.suppress(CorruptPart):
                found.append(read_part(path))
        return found

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
        share: str = "",
        part_bytes: int = DEFAULT_PART_BYTES,
        part_seconds: float = DEFAULT_PART_SECONDS,
        on_overflow: Callable[[str], None] | None = None,
    ) -> PartWriter:
        """Opens a writer of new parts, to be used as a context manager.

        Args:
            run_id: From ``FeatureStore.new_run_id``.
            dataset: Which dataset the images' ids belong to.
            share: Which share of a run this writer has, letters and digits; see ``parts_of_share``.
            part_bytes: Commit when this much is waiting.
            part_seconds: Commit when a row has waited this long.
            on_overflow: Called once for each column that float16 cannot hold.
        """
        dtype = self.fields.get("dtype")
        if dtype not in {"float16", "float32"}:
            raise UsageError(f"the feature space's dtype must be 'float16' or 'float32', not {dtype!r}")
        return PartWriter(
            checked_folder(self.path / "parts"),
            fingerprint=self.fingerprint,
            run_id=checked_run_id(run_id),
            dataset=checked_dataset(dataset) if dataset else "",
            dtype=dtype,
            share=share,
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
        if record["fingerprint"] == identity:
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
