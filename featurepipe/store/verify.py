"""Checking a whole store: every checksum, every document, every file name, and that no image lacks its features."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurepipe.annotations import KEPT_COLUMN
from featurepipe.display import first_names
from featurepipe.errors import CorruptPart, FeaturepipeError, StoreError, UsageError
from featurepipe.results import ShownReport
from featurepipe.store.atomic import entries, is_file, is_temporary, listed, made_folder, read_json, sync_folder, walked
from featurepipe.store.choice import usable_keys
from featurepipe.store.documents import is_dataset, is_run_id
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.forgotten import FILE as FORGOTTEN
from featurepipe.store.forgotten import JOURNAL as FORGETTING
from featurepipe.store.forgotten import Forgotten
from featurepipe.store.indexes import broken_indexes
from featurepipe.store.keys import Keys, faulty_lines
from featurepipe.store.parts import FEATURES, Headers, PartInfo, array_faults, read_part
from featurepipe.store.space import Space, fingerprint

_OURS = (
    "store.json",
    "forgotten.json",
    "forgetting.json",
    ".lock",
    "spaces/*/space.json",
    "spaces/*/rejects.jsonl",
    "spaces/*/parts/*.h5",
    "spaces/*/quarantine/*.h5",
    "snapshots/*/*.parquet",
    "runs/*.json",
    "depth/*/*.json",
    "depth/*/journal.jsonl",
    "indexes/*/*.npz",
    "jobs/*.lock",
    "jobs/*.lease.*",
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: What is wrong, in words.
        part: The part's id, or the path of another file inside the store; empty if it is about no one file.
        space: Name of the feature space, if it is inside one.
        dataset: The HDF5 dataset concerned, or ``header``; empty for other files.
        quarantined: Where the part was moved, inside the store.
    """

    what: str
    part: str
    space: str = ""
    dataset: str = ""
    quarantined: str = ""


@dataclass
class VerifyReport(ShownReport):
    """What ``verify_store`` found.

    Attributes:
        parts: Parts checked.
        rows: Rows in them.
        bytes: Their size.
        problems: What is wrong.
        leftovers: Files inside the store that do not belong to it or were left by a dead writer.
    """

    parts: int = 0
    rows: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong; leftovers do no harm."""
        return not self.problems


def verify_store(
    store: FeatureStore, *, quarantine: bool = True, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Recomputes every checksum, reads every document, and looks for images that lack the features a run gave them.

    A damaged part that was quarantined stays a problem until ``extract`` has computed its rows again. A store that has
    not been made yet is clean.

    Args:
        store: The store; it may be in use.
        quarantine: Move damaged parts to ``quarantine/`` in their space, so that the next ``extract`` computes their
            rows again. Nothing is ever deleted.
        progress: Called after each part with the parts done and the parts in all.
    """
    report = VerifyReport()
    paths = listed(store.path, "spaces/*/parts/*.h5")
    headers = {path: _header(path) for path in paths}
    widths = _widths(headers)
    for done, (path, header) in enumerate(headers.items(), 1):
        _verify_part(store, path, header, report, widths[path.parent.parent], quarantine=quarantine)
        if progress is not None:
            progress(done, len(paths))
    report.problems += [Problem(what, name) for name, what in _broken_documents(store)]
    report.problems += [Problem(str(shortage), "", shortage.space) for shortage in shortages(store)]
    report.leftovers = sorted(_leftovers(store.path))
    return report


_Widths = Mapping[str, int]
"""Values a row of each column."""


def _header(path: Path) -> PartInfo | StoreError | OSError:
    """Reads what a part says of itself, or returns why it cannot."""
    try:
        return read_part(path)
    except (StoreError, OSError) as error:
        return error


def _widths(headers: Mapping[Path, PartInfo | Exception]) -> Mapping[Path, _Widths]:
    """Says for each space how wide its columns are: as in most rows, since a column has one width."""
    rows: defaultdict[Path, defaultdict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for path, part in headers.items():
        of_space = rows[path.parent.parent]
        if not isinstance(part, Exception):
            for column, info in part.columns.items():
                of_space[column][info.shape[1]] += part.rows
    return {
        space: {column: counts.most_common(1)[0][0] for column, counts in columns.items()}
        for space, columns in rows.items()
    }


def _verify_part(
    store: FeatureStore,
    path: Path,
    part: PartInfo | StoreError | OSError,
    report: VerifyReport,
    widths: _Widths,
    *,
    quarantine: bool,
) -> None:
    space = path.parent.parent
    try:
        if isinstance(part, Exception):
            raise part
        damage = _damage(part, space, widths)
    except CorruptPart as error:
        damage = [("header", str(error))]
    except (StoreError, OSError) as error:
        if os.path.lexists(path):  # else: compacted away meanwhile
            report.problems.append(Problem(str(error), path.stem, space.name, "header"))
        return
    else:
        report.rows += part.rows
    report.parts += 1
    report.bytes += path.lstat().st_size
    if damage:
        moved = str(_quarantine(path).relative_to(store.path)) if quarantine else ""
        report.problems += [Problem(what, path.stem, space.name, name, moved) for name, what in damage]


def _damage(part: PartInfo, space: Path, widths: _Widths) -> list[tuple[str, str]]:
    try:
        expected = str(read_json(space / "space.json").get("fingerprint"))
    except StoreError:
        expected = part.fingerprint  # said once, of space.json
    if part.fingerprint != expected:
        return [("header", f"it belongs to another feature space ({part.fingerprint[:12]})")]
    others = [
        (f"{FEATURES}{column}", f"it has {info.shape[1]} values a row, and {widths[column]} in most rows of this space")
        for column, info in part.columns.items()
        if info.shape[1] != widths.get(column, info.shape[1])
    ]
    return [*others, *array_faults(part).items()]


def _quarantine(path: Path) -> Path:
    folder = made_folder(path.parent.parent / "quarantine")
    target, number = folder / path.name, 0
    while os.path.lexists(target):
        number += 1
        target = folder / f"{path.stem}~{number}.h5"
    path.rename(target)
    sync_folder(folder)
    sync_folder(path.parent)
    return target


def _broken_documents(store: FeatureStore) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of documents that cannot be read or contradict themselves."""
    aside = store.set_aside()
    yield from aside.items()
    for folder in entries(store.path / "spaces"):
        path = Path(folder.path)
        is_space = folder.is_dir(follow_symlinks=False) and not folder.name.startswith(".")
        if is_space and f"spaces/{path.name}/space.json" not in aside:
            yield from _named(store, path / "space.json", partial(_check_space, path))
    yield from _broken_snapshots(store)
    if is_file(store.path / FORGETTING):
        yield FORGETTING, "a featurepipe forget was killed before its end; to finish it: featurepipe forget STORE"
    yield from _named(store, store.path / FORGOTTEN, partial(Forgotten.of, store.path))
    for path, what in broken_indexes(store.path, {space.fingerprint for space in store.spaces()}):
        yield str(path.relative_to(store.path)), what
    for path in listed(store.path, "spaces/*/rejects.jsonl"):
        if is_file(path):
            yield from _named(store, path, partial(_check_rejects, path))


def _broken_snapshots(store: FeatureStore) -> Iterator[tuple[str, str]]:
    """Reads every snapshot; a file that several nights share, once."""
    sound: set[int] = set()
    for dataset in store.datasets():
        for run_id in store.snapshot_ids(dataset):
            path = store.path / "snapshots" / dataset / f"{run_id}.parquet"
            try:
                file = path.lstat().st_ino
            except FileNotFoundError:  # removed since it was listed
                continue
            if file not in sound and is_file(path):  # else it was named already
                broken = list(_named(store, path, partial(_read_snapshot, store, dataset, run_id)))
                yield from broken
                sound |= set() if broken else {file}


def _read_snapshot(store: FeatureStore, dataset: str, run_id: str) -> None:
    """Reads a snapshot with a manifest's further columns, one after the other: they may be larger than all others."""
    store.snapshot(dataset, run_id)
    for name in store.further_columns(dataset, run_id):
        store.snapshot(dataset, run_id, columns=[KEPT_COLUMN + name])


def _named(store: FeatureStore, path: Path, check: Callable[[], object]) -> Iterator[tuple[str, str]]:
    try:
        check()
    except FeaturepipeError as error:
        yield str(path.relative_to(store.path)), str(error)


def _check_rejects(path: Path) -> None:
    """Reads rejects as ``extract`` does; lines that are no JSON may have been torn by a kill, and are no damage."""
    wrong = [f"line {number}: {fault}" for number, fault, torn in faulty_lines(path) if not torn]
    if wrong:
        raise StoreError(f"lines that are passed over: {first_names(wrong, apart='; ')}; remove them, or let them be")


def _check_space(folder: Path) -> None:
    record = read_json(folder / "space.json")
    try:
        actual = fingerprint(record["fields"])
    except (KeyError, UsageError, UnicodeEncodeError) as error:
        raise StoreError(f"its fields cannot be read: {error}") from error
    if record.get("fingerprint") != actual:
        raise StoreError(f"its fields hash to {actual[:12]}, but it says {str(record.get('fingerprint'))[:12]}")
    if not folder.name.endswith(f"-{actual[:12]}"):
        raise StoreError(f"its fields hash to {actual[:12]}, but its folder is {folder.name}")


def _leftovers(root: Path) -> Iterator[str]:
    for entry in walked(root):
        if entry.is_file(follow_symlinks=False):
            inside = Path(entry.path).relative_to(root)
            if any(map(is_temporary, inside.parts)) or not any(inside.match(p) and _depth(inside, p) for p in _OURS):
                yield str(inside)
            elif inside.suffix == ".parquet" and not (is_run_id(inside.stem) and is_dataset(inside.parts[1])):
                yield str(inside)  # a copy of a snapshot, say


def _depth(path: Path, pattern: str) -> bool:
    return len(path.parts) == pattern.count("/") + 1  # Path.match looks only at the end of the path


_Place = tuple[str, str]
"""A dataset and a column."""


@dataclass(frozen=True)
class Shortage:
    """Images of a dataset's snapshot that lack a column."""

    space: str
    dataset: str
    column: str
    lacking: int
    images: int

    def __str__(self) -> str:
        return (
            f"{self.lacking:,} of {self.images:,} images of dataset {self.dataset!r} lack {self.column} in this space; "
            "re-run featurepipe extract"
        )


def shortages(store: FeatureStore) -> Iterator[Shortage]:
    """Compares the snapshots of finished runs with what the parts hold; reads the keys only.

    For each dataset, space and column the latest run with status ``done`` counts, if its snapshot is still there and
    readable. A space whose folder was removed is passed over: someone wanted it gone. Memory: 48 bytes a row of one
    space, and one snapshot.
    """
    expected = _expected(store.runs())
    for path in (file.parent for file in listed(store.path, "spaces/*/space.json")):
        headers = Headers()
        try:
            space = Space(path, headers)
        except StoreError:
            continue  # its description is broken, which verify says anyway
        wanted = expected.get(space.fingerprint, {})
        if wanted and _count(store, space, wanted) != []:
            # Looked at again: a part may have been compacted away while it was being read.
            yield from _count(store, Space(path, headers), wanted) or []


def _expected(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[_Place, str]]:
    """Says for each fingerprint which run was the last to finish each dataset and column; ``runs`` are oldest first."""
    latest: dict[str, dict[_Place, str]] = {}
    for run in runs:
        if run.get("status") == "done" and {"fingerprint", "dataset", "columns"} <= run.keys():
            places = latest.setdefault(run["fingerprint"], {})
            places.update({(run["dataset"], column): run["run_id"] for column in run["columns"]})
    return latest


def _count(store: FeatureStore, space: Space, wanted: Mapping[_Place, str]) -> list[Shortage] | None:
    """Counts what is lacking; None if a part vanished meanwhile."""
    try:
        index = space.index(sorted({column for _, column in wanted}))
    except StoreError:
        return None
    found: list[Shortage] = []
    snapshots = sorted({(dataset, run_id) for (dataset, _), run_id in wanted.items()})
    for dataset, run_id in snapshots:
        keys = _keys_of(store, dataset, run_id)
        for column in sorted(name for (of, name), run in wanted.items() if (of, run) == (dataset, run_id)):
            lacking = int(np.count_nonzero(~index.locate(keys, column)[2]))
            if lacking:
                found.append(Shortage(space.name, dataset, column, lacking, len(keys)))
    return found


def _keys_of(store: FeatureStore, dataset: str, run_id: str) -> Keys:
    """Returns the keys of a snapshot's usable images, none if it was removed or is damaged (verify says so)."""
    try:
        table = store.snapshot(dataset, run_id, columns=["key", "status"])
    except FeaturepipeError:
        table = None
    return np.empty((0, 32), np.uint8) if table is None else usable_keys(table)
