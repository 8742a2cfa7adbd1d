"""The store as a whole: its spaces, snapshots, runs and lock."""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe import __version__
from featurepipe.display import named_columns
from featurepipe.errors import (
    Message,
    NoStore,
    Option,
    StoreError,
    UnknownSnapshot,
    UsageError,
    near_paths,
    unknown,
    unsearchable,
)
from featurepipe.results import card, optional
from featurepipe.store import documents, snapshots
from featurepipe.store.atomic import is_file, is_temporary, listed, made_folder, strangers, write_json
from featurepipe.store.choice import choose_space, open_features
from featurepipe.store.documents import DepthDocument, RunDocument, StoreDocument, read_document
from featurepipe.store.forgotten import FILE as FORGOTTEN
from featurepipe.store.forgotten import Forgotten
from featurepipe.store.indexes import described_indexes
from featurepipe.store.keys import count_distinct, keys_from_arrow
from featurepipe.store.locks import check_system, store_lock
from featurepipe.store.parts import Headers
from featurepipe.store.snapshots import OK, REJECTED, have_status
from featurepipe.store.space import Space, extract_command, read_space
from featurepipe.store.views import FeatureSet

if TYPE_CHECKING:
    import pandas as pd

STORE_VERSION = 1
_EMPTY_NOTES: Mapping[str, Any] = {}


def is_store(given: Any) -> bool:
    """Whether what a command is given is a feature store, not images."""
    if isinstance(given, FeatureStore):
        return True
    return isinstance(given, str | os.PathLike) and (Path(given) / "store.json").is_file()


class FeatureStore:
    """A folder of features that were computed once; see ``FORMAT.md`` beside this file.

    Args:
        path: The folder.
        create: Whether it may be missing or empty. It is then made when something is first written; until then it has
            no spaces, datasets or runs, and ``features`` and ``space`` say that there is no store.

    Raises:
        NoStore: The folder is something else, or missing while ``create`` is false.
        StoreError: It is of a newer format; or the system is one that stores do not work on.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        check_system()
        self.path = Path(path)
        self._headers: defaultdict[str, Headers] = defaultdict(Headers)  # of each space, by its name
        if self.exists:
            self._check_version()
            return
        if not create:
            self.check_exists()
        self._refuse_others()

    @property
    def exists(self) -> bool:
        """Whether the store has been made; see ``create``."""
        return is_file(self.path / "store.json")

    def check_exists(self) -> None:
        """Raises `NoStore` if there is no store at the path yet, and `StoreError` if nobody can tell."""
        if not self.exists:
            if why := unsearchable(self.path / "store.json"):
                raise StoreError(f"cannot tell whether there is a feature store at {self.path}: {why}")
            if is_file(self.path / "bundle.json"):
                raise NoStore(
                    f"{self.path} is a bundle, what featurepipe train writes, and no feature store; give the store first, and "
                    "the bundle as the command's help says (featurepipe report STORE --bundle BUNDLE)"
                )
            near = near_paths(str(self.path), "store.json")
            near = f"nearest: {near}; " if near else ""
            raise NoStore(
                f"there is no feature store at {self.path}; {near}make one with: {extract_command(self.path)}"
            )

    def _check_version(self) -> None:
        version = read_document(self.path / "store.json", StoreDocument)["version"]
        if version > STORE_VERSION:
            raise StoreError(
                f"{self.path} has store format version {version}, this featurepipe {__version__} reads up to "
                f"{STORE_VERSION}: upgrade featurepipe"
            )

    def _refuse_others(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise NoStore(f"{self.path} is a file, not a feature store")
        others = [p.name for p in self.path.iterdir() if not is_temporary(p.name)] if self.path.exists() else []
        if others and not self.exists:  # looked at again: another process may have made it
            raise NoStore(
                f"{self.path} is neither empty nor a feature store (it has no store.json, but {min(others)}); "
                "name an empty or a new folder"
            )

    def _make(self) -> None:
        """Makes the store if it is not there yet; several processes may do so at once, the first one's stays."""
        if self.exists:
            return
        self._refuse_others()  # the folder may have been filled since the constructor looked
        self.path.mkdir(parents=True, exist_ok=True)
        record = {
            "format": "featurepipe-store",
            "version": STORE_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "software": f"featurepipe {__version__}",
        }
        write_json(self.path / "store.json", record, replace=False)
        self._check_version()  # someone else's may be the one that stayed

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        if not self.exists:
            note = f"there is no store here yet; make one with: {extract_command(self.path)}"
            return card("FeatureStore", {"path": str(self.path)}, note=note)
        return _card_of(describe(self))

    def to_pandas(self, dataset: str | None = None, *, snapshot: str | None = None) -> pd.DataFrame:
        """The images of a dataset as a DataFrame: ``id``, ``label``, ``split``, ``status``, ``reason`` and ``size`` of each.

        Args:
            dataset: Its name; by default the store's only one.
            snapshot: By default the current one.

        Raises:
            UsageError: pandas is not installed, or the dataset is unknown or left out where there are several.
            StoreError: There is no store.
        """
        pandas = optional("pandas", "to_pandas()")
        name = dataset or self.only_dataset()
        if name not in self.datasets():
            raise unknown("dataset", name, self.datasets(), where=str(self.path))
        columns = ["id", "label", "split", "status", "reason", "size"]
        table = self.snapshot(name, snapshot, columns)
        frame: pd.DataFrame = pandas.DataFrame({} if table is None else table.to_pydict(), columns=columns)
        return frame

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self.path.absolute(),)  # elsewhere are other working folders; parts are read again

    def _made(self, name: str) -> Path:
        """Makes the store and a folder in it, to write into; readers must not come here."""
        self._make()
        return made_folder(self.path / name)

    # Feature spaces

    def spaces(self) -> list[Space]:
        """Lists the feature spaces whose description is as it should be, by name; see ``set_aside``."""
        found = []
        for path in listed(self.path, "spaces/*/space.json"):
            with suppress(StoreError):
                found.append(Space(path.parent, self._headers[path.parent.name]))
        return found

    def set_aside(self) -> dict[str, str]:
        """Names the documents that are damaged, or not what they should be, and says why.

        They count as absent: a space without its description, the record of a run, what a comparison of layers found. Links,
        pipes and devices are named as well.

        Returns:
            Why, by path inside the store.
        """
        kinds = (
            ("spaces/*/space.json", read_space),
            ("runs/*.json", _read_run),
            ("depth/*/*.json", partial(read_document, kind=DepthDocument)),
        )
        found = {path: f"it is {kind}, and nothing is read through one" for path, kind in strangers(self.path)}
        for pattern, read in kinds:
            for path in listed(self.path, pattern):
                try:
                    read(path)
                except StoreError as error:
                    found.setdefault(path, str(error))
        return {str(path.relative_to(self.path)): why for path, why in sorted(found.items())}

    def open_space(self, fields: Mapping[str, Any], *, backbone: str, notes: Mapping[str, Any] = _EMPTY_NOTES) -> Space:
        """Opens the feature space with exactly these fields, making it if it is new.

        Args:
            fields: Everything that changes a feature's value, as JSON values; ``dtype`` is the stored dtype.
            backbone: Name of the network.
            notes: What is good to know and changes no value; only used if the space is new.
        """
        return Space.open(self._made("spaces"), fields, backbone, notes, self._headers)

    def space(self, name_or_backbone_or_fingerprint: str, *, dataset: str | None = None) -> Space:
        """Finds one feature space by its name, its backbone, or the start of its fingerprint.

        Args:
            name_or_backbone_or_fingerprint: What to look for; of a fingerprint at least 4 characters.
            dataset: If several spaces fit, take the one that holds features of this dataset.

        If a backbone has several spaces and one of them alone has trained weights, it is that one: random controls
        must be named.

        Raises:
            StoreError: The store is empty.
            UsageError: None fits, or several do; the message says which and what differs.
        """
        return choose_space(self, name_or_backbone_or_fingerprint, dataset)

    def features(
        self,
        dataset: str,
        node: str | Sequence[str] = "bottleneck",
        backbone: str | None = None,
        split: str | None = None,
        snapshot: str | None = None,
    ) -> FeatureSet:
        """Opens the features of a dataset's current snapshot, or of an older one.

        Args:
            dataset: Its name.
            node: A node (pooled by ``gap``), ``node:pooling``, or an alias such as ``bottleneck``; or several of them,
                whose columns stand side by side in that order, as one feature vector.
            backbone: Name of the network, of the space, or the start of a fingerprint (at least 4 characters); may be
                left out if only one space, or only one with trained weights, holds features of this dataset.
            split: Only rows of this split.
            snapshot: One of ``snapshot_ids(dataset)``, or the id of a job's run; by default the current one.

        Raises:
            UsageError: The dataset, column, space, split or snapshot is unknown or ambiguous.
            StoreError: Features of some images are missing in this space.
        """
        return open_features(self, dataset, node, backbone, split, snapshot)

    # Datasets

    def datasets(self) -> list[str]:
        """Lists the datasets that have a snapshot."""
        return snapshots.dataset_names(self.path / "snapshots")

    def only_dataset(self) -> str:
        """Returns the name of the store's one dataset, for whoever leaves it out.

        Raises:
            StoreError: There is no store.
            UsageError: There are several datasets, or none; the message says which.
        """
        self.check_exists()
        names = self.datasets()
        if len(names) != 1:
            if not names:
                raise UsageError(
                    f"{self.path} holds no dataset yet: featurepipe extract makes one when it completes. Its runs so far: "
                    f"featurepipe runs {shlex.quote(str(self.path))}; to make one: {extract_command(self.path)}"
                )
            several = f"{self.path} holds {len(names)} datasets ({', '.join(names)}); choose one with "
            raise UsageError(Message(several, Option("dataset")))
        return names[0]

    def snapshot_ids(self, dataset: str) -> list[str]:
        """Lists the run ids of a dataset's snapshots, oldest first."""
        return snapshots.snapshot_ids(self.path / "snapshots", dataset)

    def snapshot(
        self, dataset: str, run_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table | None:
        """Reads a snapshot (``snapshots.SCHEMA`` or some columns of it), by default the current one; None without one.

        Args:
            dataset: Its name.
            run_id: Of the snapshot, or of a job's run: then it is that of the run's last extraction.
            columns: Only these, in this order.

        Raises:
            UnknownSnapshot: There is none of that id; says what the id is of, if it is of something else.
            StoreError: The file is damaged.
        """
        if run_id is not None:
            known = self.snapshot_ids(dataset)
            found = snapshots.snapshot_of_run(run_id, dataset, known, self._records())
            others = [] if found else [name for name in self.datasets() if run_id in self.snapshot_ids(name)]
            if others:
                raise UnknownSnapshot(
                    f"{run_id} is a snapshot of dataset {others[0]}, not of {dataset}, which has: "
                    f"{', '.join(known[-5:]) or 'none'}",
                    run_id,
                )
            run_id = found or run_id
        return snapshots.read_snapshot(self.path / "snapshots", dataset, run_id, columns)

    def further_columns(self, dataset: str, run_id: str | None = None) -> list[str]:
        """The names of the columns that a snapshot keeps of a manifest, beside ours; by default of the current one."""
        known = self.snapshot_ids(dataset)
        found = None if run_id is None else snapshots.snapshot_of_run(run_id, dataset, known, self._records())
        folder = self.path / "snapshots"
        return snapshots.further_columns(folder, dataset, found or known[-1]) if found or known else []

    def write_snapshot(self, dataset: str, run_id: str, table: pa.Table) -> Path:
        """Writes a snapshot atomically; it is current from then on, unless a later run has written one."""
        return snapshots.write_snapshot(self._made("snapshots"), dataset, run_id, table)

    # Runs

    def new_run_id(self) -> str:
        """Makes a run id that sorts after every one in the store, even if the clock was set back."""
        return documents.next_run_id(self._run_names())

    def _run_names(self) -> Iterator[str]:
        folders = (
            "runs/*.json",
            "snapshots/*/*.parquet",
            "spaces/*/parts/*.h5",
            "spaces/*/quarantine/*.h5",
            "depth/*/*.json",
        )
        for pattern in folders:
            yield from (path.name for path in listed(self.path, pattern))

    def write_run(self, record: dict[str, Any]) -> Path:
        """Writes the record of a run, named by its ``run_id``, atomically."""
        return documents.write_run(self._made("runs"), record)

    def runs(self) -> list[dict[str, Any]]:
        """Reads the records of all runs, oldest first."""
        return [
            documents.settled(record, self.path / "snapshots") for record in documents.read_runs(self.path / "runs")
        ]

    def _records(self) -> Iterator[dict[str, Any]]:
        yield from self.runs()  # read when the first is asked for

    # Which layer transfers best

    def depth_journal(self, dataset: str) -> Path:
        """Where comparisons of a dataset's layers keep what they have measured; may not be there yet."""
        return documents.depth_journal(self.path / "depth", dataset)

    def write_depth(self, document: Mapping[str, Any]) -> Path:
        """Writes what a comparison of layers found, atomically; it is the dataset's newest from then on."""
        return documents.write_depth(self._made("depth"), document, self.new_run_id())

    def depth_documents(self, dataset: str) -> list[dict[str, Any]]:
        """Reads what comparisons of a dataset's layers found, oldest first."""
        return documents.read_depths(self.path / "depth", dataset)

    def lock(self, shared: bool) -> AbstractContextManager[None]:
        """Holds the store's lock: shared by those that add, alone by those that rewrite.

        Raises:
            StoreLocked: Someone else holds it.
        """
        self._make()
        return store_lock(self.path, shared=shared)


def _read_run(path: Path) -> None:
    record = read_document(path, RunDocument)
    if record["run_id"] != path.stem:
        raise StoreError(f"it says that it is of run {record['run_id']!r}")


def describe(store: FeatureStore) -> dict[str, Any]:
    """Sums up a store for ``featurepipe info``: its spaces, datasets and runs, as JSON values.

    Raises:
        StoreError: There is no store at its path.
    """
    store.check_exists()
    datasets, set_aside = [], store.set_aside()
    for name in store.datasets():
        try:
            datasets.append(_describe_dataset(store, name))
        except StoreError as error:
            set_aside[f"snapshots/{name}/{store.snapshot_ids(name)[-1]}.parquet"] = str(error)
    return {
        "path": str(store.path),
        "version": STORE_VERSION,
        "spaces": [_describe_space(space) for space in store.spaces()],
        "datasets": datasets,
        "indexes": described_indexes(store.path),
        "runs": store.runs(),
        "forgotten": _count_forgotten(store.path, set_aside),
        "set_aside": dict(sorted(set_aside.items())),
    }


def _count_forgotten(store: Path, set_aside: dict[str, str]) -> int:
    """How many images extractions refuse, since they were forgotten."""
    try:
        return len(Forgotten.of(store))
    except StoreError as error:
        set_aside[FORGOTTEN] = str(error)
        return 0


def _card_of(found: Mapping[str, Any]) -> str:
    """What ``describe`` found, as a card."""
    runs, last = found["runs"], (found["runs"] or [{}])[-1]
    facts = {"path": found["path"], "runs": len(runs), "last run": last.get("status"), "ended": last.get("ended")}
    datasets = [
        {**{n: v for n, v in one.items() if n != "splits"}, "classes": len(one.get("labels", ())) or None}
        for one in found["datasets"]
    ]
    columns = [
        {
            "backbone": space["backbone"],
            "space": space["name"],
            "column": named_columns(name, space["bottleneck"]),
            **info,
        }
        for space in found["spaces"]
        for name, info in space["columns"].items()
    ]
    note = f"set aside: {', '.join(found['set_aside'])}" if found["set_aside"] else ""
    note = note or ("" if datasets else "no dataset yet: featurepipe extract makes one when it completes")
    return card(
        "FeatureStore", facts, tables={n: t for n, t in (("datasets", datasets), ("columns", columns)) if t}, note=note
    )


def _describe_space(space: Space) -> dict[str, Any]:
    parts = space.parts()
    return {
        "name": space.name,
        "backbone": space.backbone,
        "fingerprint": space.fingerprint,
        "fields": space.fields,
        "notes": space.notes,
        "bottleneck": space.bottleneck,
        "columns": {name: asdict(info) for name, info in space.columns().items()},
        "parts": len(parts),
        "rows": sum(part.rows for part in parts),
        "bytes": sum(part.file_bytes for part in parts),
        "damaged": dict(space.damaged),
        "quarantined": [path.stem for path in listed(space.path, "quarantine/*.h5")],
    }


def _describe_dataset(store: FeatureStore, name: str) -> dict[str, Any]:
    run_ids = store.snapshot_ids(name)
    table = store.snapshot(name, columns=["key", "label", "split", "size", "status"])
    if table is None:
        return {"name": name, "snapshots": 0}
    usable = table.select(["key", "label", "split"]).filter(have_status(table, OK))
    return {
        "name": name,
        "snapshots": len(run_ids),
        "current": run_ids[-1],
        "listed": len(table),
        "images": len(usable),
        "distinct": count_distinct(keys_from_arrow(usable["key"])),
        "rejects": pc.sum(have_status(table, REJECTED)).as_py() or 0,
        "labels": _counts(usable["label"]),
        "splits": _counts(usable["split"]),
        "columns": store.further_columns(name),
        "bytes": pc.sum(table["size"]).as_py() or 0,
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = {entry["values"]: entry["counts"] for entry in pc.value_counts(column.drop_null()).to_pylist()}
    return dict(sorted(counted.items()))
