"""``featurepipe forget``: images leave a store for good, and what elsewhere was made of them is named."""

from __future__ import annotations

import html
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.curation.options import ForgetOptions
from featurepipe.display import counted, first_names, size
from featurepipe.errors import FeaturepipeError, Message, Option, UsageError, unsearchable
from featurepipe.heads.bundle.bundle import seen_of
from featurepipe.heads.bundle.files import SEEN
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore, forget_images
from featurepipe.store.atomic import listed, read_file, read_json
from featurepipe.store.exports import ABOUT, TABLES, texts_in
from featurepipe.store.feature_store import is_store
from featurepipe.store.forget import held_elsewhere, held_ids, is_unfinished, without_blanks
from featurepipe.store.forgotten import Forgotten
from featurepipe.store.keys import Keys, as_keys, keys_from_arrow, prefixes_of
from featurepipe.store.labels import read_columns
from featurepipe.store.options import RemovalOptions
from featurepipe.store.parts import read_array
from featurepipe.store.snapshots import ids_and_keys
from featurepipe.store.space import Space
from featurepipe.store.traces import Removal, is_in_text

HOLDS_ROWS = frozenset({"knn", "rbf-svm", "kernel-ridge"})
"""Heads that keep feature rows of what they learned from."""
_TEXTS = frozenset({
    ".html", ".csv", ".tsv", ".jsonl", ".json", ".ipynb", ".txt", ".log", ".md", ".tex", ".svg", ".toml", ".yaml", ".yml", ".xml",
    ".prom",
})  # fmt: skip
_READ = _TEXTS | frozenset(TABLES)
_AT_ONCE = 1 << 24
"""Characters of a file of text that are searched at a time, and the rest of the line."""
_SOURCES = frozenset({"source", "host", "machine", "options", "plan"})
"""Entries of run records whose paths are no results."""


@shown_as("forget")
def forget(
    store: FeatureStore | str | PathLike[str],
    ids: Iterable[str] | str | PathLike[str] = (),
    *,
    dataset: str | None = None,
    look_in: Iterable[str | PathLike[str]] | None = None,
    may_come_back: bool = False,
    dry_run: bool = False,
    request: str | PathLike[str] | None = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Removes images from a store, proves it by reading the store back, and lists what elsewhere was made of them.

    See `featurepipe.store.forget_images` for what is removed, and how it may be killed.

    Args:
        store: The store or its path.
        ids: The images, or a file of them: .txt with one a line, or .csv, .parquet, .jsonl with a column ``id``. None to finish
            what a killed call began.
        dataset: Whose ids they are; by default an image goes from each dataset that has something of it.
        look_in: Folders and files to search for bundles, stores, pages and tables that depend on the images, besides those that
            the store's run records name, and bundles and stores beside the store or in the current folder.
        may_come_back: Let the next extraction compute the images if the source still has them.
        dry_run: Only say what would go, and what depends on it.
        request: The file that the ids were read from, which is not among what depends on them; by default ``ids``, if that is
            one.
        silent: Say nothing on the way.

    Returns:
        The fields of `featurepipe.store.ForgetReport`; ``blanks``: from how many ids blanks around were taken, since the store
        knew them only without; ``dependents``: ``path``, ``kind`` (``bundle``, ``store``, ``page`` or ``table``), ``images`` (how
        many it is of; None if not counted), and ``why``; ``free_bundles``: paths of the bundles that were looked at and hold none
        of the images; ``unread``: ``path`` of what could not be read or compared, and ``why``; ``other_files``: how many files
        of other kinds there are, by suffix, which were not looked into; ``looked_in``.

    Raises:
        UsageError: An id is nowhere, or the file or a folder to look in cannot be read; nothing is changed.
        StoreLocked: Someone is writing into the store.
        StoreError: A snapshot or record cannot be read; nothing is changed.
    """
    asked = ForgetOptions(
        dataset=dataset, may_come_back=may_come_back, dry_run=dry_run,
        look_in=None if look_in is None else tuple(os.fspath(place) for place in look_in),
    )  # fmt: skip
    target = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    asked_by = ids if request is None and isinstance(ids, str | PathLike) else request
    return _forgotten(target, ids_of(ids), asked, asked_by, silent=silent)


def _forgotten(
    store: FeatureStore,
    given: Iterable[str],
    asked: ForgetOptions,
    request: str | PathLike[str] | None,
    *,
    check: Callable[[Removal], object] = bool,
    unknown_ok: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Removes images, after ``check`` was told what would go, and ``dependents`` looked for what depends on it."""
    places = [Path(place) for place in asked.look_in or ()]
    for place in places:
        if not place.exists():
            raise UsageError(f"cannot look in {place}: {unsearchable(place) or 'it is not there'}", option="look_in")
    seen = _Looked()
    ids, blanks = without_blanks(store, list(given), asked.dataset)

    def look(order: Removal) -> None:
        check(order)
        dependents(store, order, places, seen, None if request is None else Path(request).resolve())

    report = forget_images(
        store, ids, **RemovalOptions.of(asked).arguments(), unknown_ok=unknown_ok, before=look, silent=silent
    )
    told = {**asdict(report), "dry_run": asked.dry_run, "blanks": blanks, "looked_in": [str(place) for place in places]}
    return {**told, **seen.told()}


def ids_of(given: Iterable[str] | str | PathLike[str]) -> list[str]:
    """Ids, or those in a file.

    Raises:
        UsageError: It cannot be read, or has none.
    """
    if not isinstance(given, str | PathLike):
        return [str(id_) for id_ in given]
    if ids := _ids_in(Path(given)):
        return ids
    raise UsageError(f"{given} has no ids")


def _ids_in(path: Path) -> list[str]:
    if path.suffix.lower() in {".csv", ".parquet", ".jsonl"}:
        try:
            return [str(id_) for id_ in read_columns(path).ids.to_pylist()]
        except UsageError as error:
            why = str(error).removeprefix(f"cannot read labels from {path}: ")
            raise UsageError(f"cannot read ids of {path}: {why}") from error
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read ids of {path}: {error}; give one a line, or a .csv with a column id") from error


# A list that stays where it is


@dataclass(frozen=True)
class StandingList:
    """The ids of a file that is read every night, and what a dataset of a store knows of them.

    Attributes:
        file: The file.
        dataset: Whose ids they are.
        ids: All of them, each once.
        fresh: Those that were not forgotten before.
        blanks: From how many blanks around them were taken, since the store does not know them with these.
    """

    file: Path
    dataset: str
    ids: tuple[str, ...]
    fresh: tuple[str, ...]
    blanks: int = 0

    @classmethod
    def read(cls, file: Path, store: FeatureStore | None, dataset: str) -> StandingList:
        """Reads a file of ids, as `forget` takes it; one without any, or without a byte, is a list of none.

        Args:
            file: The file.
            store: Where the images are; None where there is no store yet.
            dataset: Whose ids they are.

        Raises:
            UsageError: The file is not there or cannot be read.
            StoreError: Nobody can tell what was forgotten before.
        """
        if not os.path.isfile(file):  # noqa: PTH113  # no PermissionError, whatever the version of Python
            why = unsearchable(file) or "the list of images to forget is not there; an empty file is a list of none"
            raise UsageError(f"{file}: {why}", option="ids")
        given, blanks = without_blanks(store, _ids_in(file) if file.stat().st_size else (), dataset)
        ids = tuple(dict.fromkeys(given))
        before = Forgotten() if store is None else Forgotten.of(store.path)
        known = before.has_ids(dataset, ids)
        fresh = tuple(id_ for id_, is_known in zip(ids, known, strict=True) if not is_known)
        return cls(file, dataset, ids, fresh, blanks)

    def told(self) -> dict[str, int]:
        """How many ids there are, and how many of them were forgotten before."""
        return {"listed": len(self.ids), "forgotten_before": len(self.ids) - len(self.fresh)}


def would_forget(listed: StandingList, store: FeatureStore | None) -> dict[str, Any]:
    """What `forget_listed` would do with a list; takes no lock and changes nothing.

    Returns:
        ``listed`` (ids), ``forgotten_before``, ``known`` (to the dataset, and so would go), ``unknown``, ``elsewhere`` (how many
        each other dataset has, where they stay), ``unfinished`` (whether a killed call would be finished first).
    """
    known, elsewhere = 0, {}
    if store is not None and listed.fresh:
        known = len(held_ids(store, listed.fresh, listed.dataset))
        elsewhere = held_elsewhere(store, listed.fresh, listed.dataset)
    counts = {**listed.told(), "known": known, "unknown": len(listed.fresh) - known, "elsewhere": elsewhere}
    return {**counts, "unfinished": store is not None and is_unfinished(store)}


def forget_listed(
    listed: StandingList, store: FeatureStore, *, at_most: int, look_in: Iterable[str] = (), silent: bool = False
) -> dict[str, Any]:
    """Removes the images of a list that were not forgotten before, unless these are more than a bound.

    Ids that are nowhere in the store are refused from now on, as the others are. What a killed call began is finished first.

    Args:
        listed: The list.
        store: The store.
        at_most: The most images of what the store holds that may go.
        look_in: Where to look for what depends on the images, besides what run records name.
        silent: Show no progress.

    Returns:
        What `forget` returns, ``listed`` (ids) and ``forgotten_before``.

    Raises:
        UsageError: More would go; nothing of the list did. Its ``record`` has the counts.
        StoreLocked: Someone is writing into the store.
        StoreError: A snapshot or record cannot be read; nothing is changed.
    """
    asked = ForgetOptions(dataset=listed.dataset, look_in=tuple(look_in) or None)

    def check(order: Removal) -> None:
        if order.known > at_most:
            counts = {**listed.told(), "known": order.known, "unknown": len(order.ids) - order.known}
            raise UsageError(_too_many(listed, store, order.known, at_most), record=counts)

    found = _forgotten(store, listed.fresh, asked, listed.file, check=check, unknown_ok=True, silent=silent)
    return {**found, **listed.told()}


def _too_many(listed: StandingList, store: FeatureStore, known: int, at_most: int) -> Message:
    told = listed.told()
    before = (
        f" ({told['forgotten_before']:,} of its {counted(told['listed'], 'id')} were before)"
        if told["forgotten_before"]
        else ""
    )
    words = ["featurepipe", "forget", str(store.path), "--ids", str(listed.file), "--dataset", listed.dataset]
    return Message(
        f"{listed.file.name} names {counted(known, 'image')} that the store holds, more than ", Option("at_most", at_most),
        f" allows: nothing was forgotten{before}. See what would go: {shlex.join([*words, '--dry-run'])}; if that is right, the "
        "same without --dry-run, or allow more",
    )  # fmt: skip


# What was made of them


@dataclass
class _Looked:
    """What was looked at, by resolved path.

    Attributes:
        holding: What depends on images, as the result says it.
        free: Bundles that do not.
        unread: What nobody could read, and why.
        others: Files of other kinds, which nobody looks into.
    """

    holding: dict[str, dict[str, Any]] = field(default_factory=dict)
    free: dict[str, str] = field(default_factory=dict)
    unread: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """JSON values of the result."""
        return {
            "dependents": sorted(self.holding.values(), key=lambda entry: (entry["kind"], entry["path"])),
            "free_bundles": sorted(path for key, path in self.free.items() if key not in self.holding),
            "unread": sorted(self.unread.values(), key=lambda entry: entry["path"]),
            "other_files": dict(sorted(Counter(self.others.values()).items())),
        }


def dependents(
    store: FeatureStore, order: Removal, places: Iterable[Path], seen: _Looked, request: Path | None = None
) -> None:
    """Looks for bundles, stores, pages and tables that hold or name images.

    Args:
        store: The store that they are removed from.
        order: The images.
        places: Where to look; besides, where run records say that something was written, and for bundles and stores
            directly beside the store and in the current folder.
        seen: Told what was found.
        request: The resolved path of the file that lists the images, which is not among what depends on them.
    """
    done: set[Path] = set() if request is None else {request}
    for path in _candidates([*places, *_named_in_records(store), *_beside(store)], store.path.resolve()):
        key = path.resolve()
        if key in done:
            continue
        done.add(key)
        if path.is_file() and path.suffix.lower() not in _READ:
            seen.others[str(key)] = path.suffix.lower()
            continue
        try:
            entry = _depends(path, order)
        except (FeaturepipeError, OSError, ValueError, KeyError, TypeError) as error:
            seen.unread[str(key)] = {"path": str(path), "why": str(error)}
            continue
        if entry is not None:
            seen.holding[str(key)] = {"path": str(path), **entry}
        elif path.is_dir() and not is_store(path):
            seen.free[str(key)] = str(path)


def _named_in_records(store: FeatureStore) -> Iterator[Path]:
    """Files, bundles and exported folders that run records say were written."""
    for record in store.runs():
        for text in _texts({name: value for name, value in record.items() if name not in _SOURCES}):
            if text.startswith("/") and len(text) < 4096:
                path = Path(text)
                with suppress(OSError, ValueError):
                    if (
                        path.is_file()
                        or any((path / name).is_file() for name in ("bundle.json", ABOUT))
                        or is_store(path)
                    ):
                        yield path


def _beside(store: FeatureStore) -> Iterator[Path]:
    """Bundles and stores in the store's own folder and in the current one, where commands write them unless told otherwise."""
    for folder in dict.fromkeys((store.path.resolve().parent, Path.cwd())):
        with suppress(OSError), os.scandir(folder) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
            yield from (Path(one) for one in folders if (Path(one) / "bundle.json").is_file() or is_store(Path(one)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _texts(entry) if name not in _SOURCES else ()
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _candidates(roots: Iterable[Path], own: Path) -> Iterator[Path]:
    """Bundles and stores as folders, other files one by one; nothing in the store itself."""
    for root in roots:
        waiting = [root.resolve() if root.is_symlink() else root]
        while waiting:
            path = waiting.pop()
            if path.resolve().is_relative_to(own) or path.is_symlink():
                continue
            if path.is_file() or (path / "bundle.json").is_file() or is_store(path):
                yield path
            elif path.is_dir():
                with suppress(PermissionError):
                    waiting += sorted(path.iterdir())


def _depends(path: Path, order: Removal) -> dict[str, Any] | None:
    """What a bundle, store or file has of the images; None if nothing."""
    if path.is_file():
        return _file(path, order)
    return _store(path, order) if is_store(path) else _bundle(path, order)


def _bundle(path: Path, order: Removal) -> dict[str, Any] | None:
    about = read_json(path / "bundle.json")
    seen = seen_of(read_file(path / SEEN), path / SEEN)
    keys = np.concatenate([order.going.keys, as_keys([bytes.fromhex(key) for key in order.kept])])
    ours = np.isin(seen, prefixes_of(keys))
    ours[~ours] = order.earlier.are_prefixes(seen[~ours])
    count, names = len(np.unique(seen[ours])), _is_named(json.dumps(about), order)
    if not (count or names):
        _refuse_untold(order)
        return None
    family = str(about.get("family", about.get("head", "")))
    why = f"trained, tuned or calibrated on {counted(count, 'image')} of them" if count else "its figures name them"
    if count and family in HOLDS_ROWS:
        why += f"; a {family} head keeps feature rows"
    return {"kind": "bundle", "images": count, "why": f"{why}: train it again, then remove this one"}


def _refuse_untold(order: Removal) -> None:
    """Refuses to call a bundle free of images whose keys nobody has any more.

    Raises:
        UsageError: There are such images.
    """
    if order.earlier.untold:
        raise UsageError(
            f"the keys are gone of {counted(order.earlier.untold, 'image')} that an earlier version has forgotten, which kept "
            "nothing to compare bundles with"
        )


def _is_named(text: str, order: Removal) -> bool:
    """Whether a text names one of the images, or has a key of theirs, also of those that were forgotten before."""
    return is_in_text(text, order) or order.earlier.are_in(text)


def _store(path: Path, order: Removal) -> dict[str, Any] | None:
    count = 0
    for file in listed(path, "snapshots/*/*.parquet"):
        count = max(count, int(_are_going(keys_from_arrow(ids_and_keys(file)["key"].drop_null()), order).sum()))
    if not count and not any(_has_rows(space, order) for space in FeatureStore(path, create=False).spaces()):
        return None
    return {
        "kind": "store",
        "images": count or None,
        "why": f"holds their features: featurepipe forget {shlex.quote(str(path))}",
    }


def _are_going(keys: Keys, order: Removal) -> npt.NDArray[np.bool_]:
    """Which keys (n, 32) are of the images, also of those that were forgotten before."""
    found = order.going.contains(keys)
    found[~found] = order.earlier.are_keys(keys[~found])
    return found


def _has_rows(space: Space, order: Removal) -> bool:
    """Whether a space has rows of the images."""
    if space.index().contains(order.going.keys).any():
        return True
    parts = space.parts() if order.earlier.keys else ()
    return any(order.earlier.are_keys(as_keys(read_array(part, "key"))).any() for part in parts)


def _file(path: Path, order: Removal) -> dict[str, Any] | None:
    suffix = path.suffix.lower()
    if suffix in TABLES:
        named = {
            name for texts in texts_in(path) for name in texts.filter(pa.array(order.are_named(texts))).to_pylist()
        }
        return {"kind": "table", "images": len(named), "why": "names them"} if named else None
    pages = (html.unescape(text) if suffix == ".html" else text for text in _text_of(path))
    if not any(_is_named(text, order) for text in pages):
        return None
    return {
        "kind": "page" if suffix == ".html" else "table",
        "images": None,
        "why": "names them, perhaps with pictures: write it again",
    }


def _text_of(path: Path) -> Iterator[str]:
    """The text of a file, whole lines, some at a time."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while text := file.read(_AT_ONCE):
            yield text + file.readline()


def forget_text(told: Mapping[str, Any]) -> str:
    """What ``featurepipe forget`` prints of ``forget``."""
    lines = [*_earlier(told), *(_removed(told) if told["images"] else ())]
    if told["blanks"]:
        lines.append(f"{counted(told['blanks'], 'id')} had blanks around, which were left out")
    if told["searched_files"]:
        lines.append(
            f"read back: {counted(told['searched_files'], 'file')}, {size(told['searched_bytes'])}: {_verdict(told)}"
        )
    elif told["images"] and not told["dry_run"]:
        lines.append("no row went; their names were looked for in snapshots, parts, rejects and records: none is left")
    if told["linked"]:
        lines.append(
            f"STILL THERE: {counted(told['linked'], 'part')} had another name (a hard link), perhaps in a backup: remove it"
        )
    lines += [f"STILL THERE: {place}; no file of the store's own: remove it" for place in told["left"]]
    if told["alike"]:
        lines.append(
            f"{counted(told['alike'], 'row')} of other images have the same values, such as the same picture saved anew; see "
            "featurepipe duplicates --near"
        )
    lines += [f"depends on them: {entry['kind']} {entry['path']}: {entry['why']}" for entry in told["dependents"]]
    lines += [f"looked at, holds none of them: bundle {path}" for path in told["free_bundles"]]
    lines += [f"cannot tell whether {entry['path']} depends on them: {entry['why']}" for entry in told["unread"]]
    if told["other_files"]:
        kinds = [f"{suffix or 'without a suffix'} ({count:,})" for suffix, count in told["other_files"].items()]
        lines.append(f"not looked into, as files of another kind: {first_names(kinds, 8)}")
    if told["images"] and not told["dependents"]:
        lines.append(
            f"depends on them: nothing{' else' if told['unread'] else ''} that run records name, no bundle or store beside this "
            f"one{_where_else(told)}"
        )
    return "\n".join(lines)


def _where_else(told: Mapping[str, Any]) -> str:
    return ", and nothing that was looked in" if told["looked_in"] else "; --look-in FOLDER searches further"


def _earlier(told: Mapping[str, Any]) -> Iterator[str]:
    """What an earlier call has left."""
    if told["finished"]:
        yield f"finished an earlier call that was killed: {counted(told['finished'], 'image')}"
    if told["unfinished"]:
        yield f"would first finish an earlier call that was killed: {counted(told['unfinished'], 'image')}"


def _removed(told: Mapping[str, Any]) -> Iterator[str]:
    """What went, what stays, and what becomes of the images."""
    before = told["images"] - told["known"]
    again = f" ({before:,} of them forgotten before)" if before else ""
    went = {"row": "rows_dropped", "reject": "rejects_removed", "index file": "indexes_removed"}
    changed = {"part": "parts_rewritten", "snapshot": "snapshots_rewritten", "record": "documents_rewritten"}
    would = "would be " if told["dry_run"] else ""
    whose = f" of dataset {told['dataset']}" if told["dataset"] else ""
    yield f"{counted(told['images'], 'image')}{whose}{again}"
    if len(told["datasets"]) > 1:
        yield f"{would}removed from: {', '.join(f'{name} ({count:,})' for name, count in told['datasets'].items())}"
    if told["several"]:
        yield (
            f"{counted(told['several'], 'id')} in several datasets, and {would}removed from each, though it may be another image "
            f"there: {first_names(told['several_ids'], 5)}; --dataset NAME takes those of one"
        )
    for name, count in told["elsewhere"].items():
        yield f"dataset {name} has {count:,} of these ids, too, where they stay; --dataset {name}, or no --dataset, removes them"
    yield f"{would}removed: {_counts(told, went)}; {would}rewritten: {_counts(told, changed)}"
    for name in told["parts_removed"]:
        yield f"{would}removed as a whole, damaged: {name}; featurepipe extract computes its other rows again"
    if told["kept_keys"]:
        others = [f"{place['id']} (dataset {place['dataset']})" for place in told["kept_for"]]
        yield (
            f"the bytes of {counted(told['kept_keys'], 'image')} are those of other ids as well, for which the features stay, "
            f"without the name: {first_names(others, 5)}; forget these ids, too, to remove them"
        )
    if not told["dry_run"]:
        refused = "leave them out" if told["refused"] else "may compute them again"
        yield f"the next extractions {refused}; delete them where the images are, too"


def _counts(told: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return ", ".join(counted(told[field], noun) for noun, field in names.items() if told[field]) or "nothing"


def _verdict(told: Mapping[str, Any]) -> str:
    short = f"; {first_names(told['unsearched'])}: looked for only where names stand" if told["unsearched"] else ""
    return (
        f"none of their keys, features or names{short}" if not told["left"] else f"{len(told['left'])} still hold them"
    )
