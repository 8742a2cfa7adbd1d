"""What is left of forgotten images in a store: names struck from its documents, and a search that reads everything back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import StoreError
from featurepipe.progress import show
from featurepipe.store.atomic import atomic_file, listed, read_file, read_lines, walked, write_json
from featurepipe.store.forgotten import EarlierTraces
from featurepipe.store.keys import KEY_BYTES, SortedKeys, as_keys, reject_of
from featurepipe.store.parts import PartInfo, is_feature, read_array, read_blocks, read_ids, read_part
from featurepipe.store.snapshots import ids_and_keys

STRUCK = "(forgotten)"
"""What stands in a record's text where a name stood."""
_SHORTEST = 5
"""Characters of a name that text is searched for; and it needs a letter: 7 or 0012 are counts as well."""
_BLOCK = 16 << 20
_WORDS = 1 << 17
_LEVELS = 4
_VARIED = 12
"""Different bytes among 32 of a row by which it is looked for; zeros are everywhere."""
_TRIED = 32
"""Places in a row that are tried for them."""
Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Removal:
    """What is to go.

    Attributes:
        datasets: Whose ids; each id is looked for in each of them.
        ids: The images.
        keys: Hex of the keys whose rows go.
        kept: Hex of the keys whose rows stay for another id, without id, size and time.
        refused: What the next extractions refuse: dataset, id, and a key (hex, or an empty text).
        shared: Dataset and id of those keys that stay for another id, and the key (hex).
        come_back: Whether the images may come back.
        earlier: What is kept of those images that were forgotten before; not kept for who finishes a killed call.
        known: How many of the images the store had something of when it was asked; not kept for who finishes a killed call.
    """

    datasets: tuple[str, ...]
    ids: tuple[str, ...]
    keys: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[tuple[str, str, str], ...] = ()
    shared: tuple[tuple[str, str, str], ...] = ()
    come_back: bool = False
    earlier: EarlierTraces = EarlierTraces()  # noqa: RUF009 - it never changes
    known: int = 0

    @cached_property
    def names(self) -> frozenset[str]:
        """The ids."""
        return frozenset(self.ids)

    @cached_property
    def searchable(self) -> tuple[str, ...]:
        """Those ids that text is searched for."""
        return tuple(id_ for id_ in self.ids if len(id_) >= _SHORTEST and any(map(str.isalpha, id_)))

    @cached_property
    def hex_keys(self) -> frozenset[str]:
        """The keys whose rows go."""
        return frozenset(self.keys)

    @cached_property
    def going(self) -> SortedKeys:
        """The keys whose rows go."""
        return SortedKeys(as_keys([bytes.fromhex(key) for key in self.keys]))

    def is_of(self, dataset: str) -> bool:
        """Whether the ids of a part, reject or record may be those of the order; old ones say no dataset."""
        return dataset in ("", *self.datasets)

    def are_named(self, ids: pa.Array | pa.ChunkedArray) -> Mask:
        """Which ids are those of the order."""
        found = pc.is_in(ids, value_set=pa.array(self.ids, pa.string()))
        return np.asarray(
            found.to_numpy() if isinstance(found, pa.ChunkedArray) else found.to_numpy(zero_copy_only=False)
        )

    def masks(self, part: PartInfo) -> tuple[Mask, Mask]:
        """Which rows of a part go, and which of the others lose their name.

        Raises:
            CorruptPart: Its keys or ids are damaged.
        """
        gone = self.going.contains(as_keys(read_array(part, "key")))
        if not self.is_of(part.dataset):
            return gone, np.zeros(part.rows, np.bool_)
        return gone, self.are_named(read_ids(part)) & ~gone

    def has_reject(self, line: bytes) -> bool:
        """Whether a line of rejects is of one of the images; a torn one, whether it has a name of theirs."""
        reject = reject_of(line)
        if reject is None:
            text = line.decode("utf-8", "replace")
            return any(id_ in text or json.dumps(id_)[1:-1] in text for id_ in self.ids)
        if self.is_of(reject.get("dataset", "")) and reject["id"] in self.names:
            return True
        return reject["key"] is not None and reject["key"].hex() in self.hex_keys


# Names in documents


def strike_documents(root: Path, order: Removal, *, dry_run: bool) -> int:
    """Strikes names and keys from run records and findings; all else in them stays. Returns how many changed.

    Raises:
        StoreError: A document cannot be read.
    """
    count = 0
    for path, struck in _struck_documents(root, order):
        count += 1
        if not dry_run:
            write_json(path, struck)
    for path in listed(root, "depth/*/journal.jsonl"):
        lines = [line for _, line in read_lines(path)]
        kept = [line for line in lines if not is_in_text(line.decode("utf-8", "replace"), order)]
        count += int(len(kept) < len(lines))
        if len(kept) < len(lines) and not dry_run:
            with atomic_file(path) as file:
                file.writelines(kept)
    return count


def _struck_documents(root: Path, order: Removal) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The documents that would change, as they would be."""
    for path in [*listed(root, "runs/*.json"), *listed(root, "depth/*/*.json")]:
        try:
            record = json.loads(read_file(path))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"cannot read {path}, so nobody can tell whether it names an image: {error}; mend it, or move it out of the store"
            ) from error
        if isinstance(record, dict):
            struck = strike(record, order, ids=order.is_of(str(record.get("dataset") or "")))
            if struck != record:
                yield path, struck


_GONE = object()


def strike(value: Any, order: Removal, *, ids: bool = True) -> Any:
    """JSON values without the names and keys of an order's images.

    An entry of a list that is one of them, or an object with its ``id``, is dropped; in texts ``(forgotten)`` stands for it.

    Args:
        value: JSON values.
        order: The images.
        ids: Whether ids there are those of the order's datasets; else only keys count.
    """
    found = _strike(value, order, ids=ids)
    return {} if found is _GONE else found


def _strike(value: Any, order: Removal, *, ids: bool) -> Any:
    if isinstance(value, dict):
        if ids and isinstance(value.get("id"), str) and value["id"] in order.names:
            return _GONE
        entries = {
            name: _strike(entry, order, ids=ids)
            for name, entry in value.items()
            if not (name in order.hex_keys or (ids and name in order.searchable))
        }
        return {name: entry for name, entry in entries.items() if entry is not _GONE}
    if isinstance(value, list):
        found = (_strike(entry, order, ids=ids) for entry in value)
        return [entry for entry in found if entry is not _GONE]
    return _struck_text(value, order, ids=ids) if isinstance(value, str) else value


def _struck_text(text: str, order: Removal, *, ids: bool) -> Any:
    if text in order.hex_keys or (ids and text in order.names):
        return _GONE
    if not ids:
        return text
    if " " in text:
        for id_ in (id_ for id_ in order.searchable if id_ in text):
            text = _standing_alone(id_).sub(STRUCK, text)
    elif (text.startswith("/") or "://" in text) and any(text.endswith(f"/{id_}") for id_ in order.searchable):
        return STRUCK  # a path or URL of the image
    return text


def _standing_alone(id_: str) -> re.Pattern[str]:
    """A name in a sentence, perhaps as the end of a path, but not as a part of a longer name."""
    return re.compile(rf"(?<![\w.-])(?:(?:/|\w+://)[^\s'\"]*/)?{re.escape(id_)}(?![\w-]|[./]\w)")


def is_in_text(text: str, order: Removal) -> bool:
    """Whether a text names one of the images, or has one of their keys in hex."""
    found = (id_ for id_ in order.searchable if id_ in text or json.dumps(id_)[1:-1] in text)
    return any(_quoted(id_).search(text) for id_ in found) or any(key in text for key in order.keys)


def _quoted(id_: str) -> re.Pattern[str]:
    """A name by itself in a file, or at the end of a whole path or URL; as it is or as JSON writes it."""
    names = f"{re.escape(id_)}|{re.escape(json.dumps(id_)[1:-1])}"
    return re.compile(rf"(?<![\w./-])(?:(?:/|\w+://)[^\s'\"<>]*/)?(?:{names})(?![\w-]|[./]\w)")


# The search


@dataclass
class TracesFound:
    """What a search found.

    Attributes:
        files: Read.
        bytes: In them.
        places: Files that still hold something, and what.
        alike: Rows of other images with the same values, such as the same picture saved anew.
    """

    files: int = 0
    bytes: int = 0
    places: list[str] = field(default_factory=list)
    alike: int = 0


class Needles:
    """Pieces of 32 bytes that are looked for: keys, the beginning of keys in hex, and pieces of feature rows."""

    def __init__(self, order: Removal) -> None:
        texts = [text[:KEY_BYTES].encode() for key in order.keys for text in (key, key.upper())]
        self._keys = as_keys([bytes.fromhex(key) for key in order.keys] + texts)
        self._values: list[Bytes] = []

    def add_rows(self, part: PartInfo, mask: Mask) -> None:
        """Takes a piece of each row of a part that goes, of each column."""
        if not mask.any():
            return
        for name in part.arrays:
            start = 0
            for block in read_blocks(part, name) if is_feature(name) else ():
                rows = block[mask[start : start + len(block)]]
                start += len(block)
                if len(rows):
                    self._values.append(_pieces(np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)))

    def __bool__(self) -> bool:
        return bool(len(self._keys) or self._values)

    @cached_property
    def search(self) -> _Search:
        """The search for all of them."""
        return _Search(self._keys, np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *self._values]))


def _pieces(rows: Bytes) -> Bytes:
    """Of each row (n, bytes) the 32 bytes that are the least likely to be another's; rows without any are left out."""
    starts = np.arange(0, rows.shape[1] - KEY_BYTES + 1, 4)
    starts = starts[:: max(1, len(starts) // _TRIED)][:_TRIED]
    if not len(starts):
        return np.empty((0, KEY_BYTES), np.uint8)
    tried = rows[:, starts[:, None] + np.arange(KEY_BYTES)]  # (n, places, 32)
    ordered = np.sort(tried, axis=2)
    different = 1 + (ordered[:, :, 1:] != ordered[:, :, :-1]).sum(axis=2)
    different[(tried[:, :, :2] == 0).all(axis=2)] = 0  # what begins with zeros begins in too many places
    best = different.argmax(axis=1)
    pieces = tried[np.arange(len(rows)), best]
    return np.asarray(pieces[different[np.arange(len(rows)), best] >= _VARIED])


class _Search:
    """Finds pieces of 32 bytes at any place of a file: two bytes after the other by tables of 65,536, then all of them.

    Halves of floats have a few thousand values, so that one table alone would let through a tenth of a store.
    """

    def __init__(self, keys: Bytes, values: Bytes) -> None:
        pieces = np.concatenate([keys, values])
        self._pieces, self._keys = SortedKeys(pieces), len(keys)
        words = np.ascontiguousarray(pieces).view("<u2")  # (n, 16)
        self._tables = np.zeros((_LEVELS, 1 << 16), np.bool_)
        for level in range(_LEVELS):
            self._tables[level, words[:, level]] = True

    def count(self, block: Bytes) -> tuple[int, int]:
        """How many keys, and how many values, are in a block of bytes."""
        keys = values = 0
        for shift in (0, 1):
            for places in self._places(block, shift):
                if len(places):
                    found = self._pieces.find(block[places[:, None] + np.arange(KEY_BYTES)])
                    keys += int(((found >= 0) & (found < self._keys)).sum())
                    values += int((found >= self._keys).sum())
        return keys, values

    def _places(self, block: Bytes, shift: int) -> Iterator[npt.NDArray[np.int64]]:
        """Where one of them may begin, at even or odd places, some at a time."""
        words = block[shift : shift + (len(block) - shift) // 2 * 2].view("<u2")
        last = (len(block) - shift - KEY_BYTES) // 2
        for start in range(0, last + 1, _WORDS):
            places = start + np.flatnonzero(self._tables[0][words[start : min(start + _WORDS, last + 1)]])
            for level in range(1, _LEVELS):
                places = places[self._tables[level][words[places + level]]]
            yield places * 2 + shift


def traces(
    root: Path, order: Removal, needles: Needles, *, passed_over: Sequence[str] = (), silent: bool = True
) -> TracesFound:
    """Reads a store back: its parts, snapshots, rejects and records as what they are, and every file byte by byte.

    Args:
        root: The store.
        order: What was removed.
        needles: Keys and values that are looked for in every file.
        passed_over: Files of the store that may name the images still.
        silent: Show no progress.
    """
    found = TracesFound()
    found.places += [f"{_inside(path, root)}: {what}" for path, what in _named(root, order)]
    paths = [Path(entry.path) for entry in walked(root)] if needles else []
    paths = [path for path in paths if str(path.relative_to(root)) not in passed_over]
    with show(len(paths), "read back", unit="files", silent=silent) as progress:
        for path in paths:
            keys, values, size = in_bytes(path, needles)
            found.files, found.bytes = found.files + 1, found.bytes + size
            if keys:
                found.places.append(f"{_inside(path, root)}: a key")
            if values and path.parent.name in {"parts", "quarantine"}:  # none has their keys: it is another image's
                found.alike += values
            elif values:
                found.places.append(f"{_inside(path, root)}: features")
            progress.advance(1)
    found.places = sorted(set(found.places))
    return found


def _inside(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _named(root: Path, order: Removal) -> Iterator[tuple[Path, str]]:
    """Where the images are still named, or their rows still are."""
    yield from _in_tables(root, order)
    for path in listed(root, "spaces/*/rejects.jsonl"):
        if any(order.has_reject(line) for _, line in read_lines(path)):
            yield path, "a reject"
    for path, _ in _struck_documents(root, order):
        yield path, "a name"
    for entry in walked(root):
        path = Path(entry.path)
        is_text = path.suffix not in _TABLES and path.name != "rejects.jsonl"
        if is_text and path.relative_to(root).parts[0] not in _DOCUMENTS and _is_in_file(path, order):
            yield path, "a name"


_TABLES = frozenset({".h5", ".parquet", ".npz"})
_DOCUMENTS = frozenset({"runs", "depth", "store.json", ".lock", "forgotten.json", "forgetting.json"})
"""Folders and files of the store in which names are looked for as values, or that never have any."""


def _in_tables(root: Path, order: Removal) -> Iterator[tuple[Path, str]]:
    for path in listed(root, "snapshots/*/*.parquet"):
        table = ids_and_keys(path)
        if order.is_of(path.parent.name) and order.are_named(table["id"]).any():
            yield path, "an id"
        if order.going.contains(as_keys(table["key"].drop_null().to_pylist())).any():
            yield path, "a key"
    for path in [*listed(root, "spaces/*/parts/*.h5"), *listed(root, "spaces/*/quarantine/*.h5")]:
        gone, nameless = order.masks(read_part(path))
        if gone.any() or nameless.any():
            yield path, "a row" if gone.any() else "an id"


def _is_in_file(path: Path, order: Removal) -> bool:
    return is_in_text(read_file(path).decode("utf-8", "replace"), order)


def in_bytes(path: Path, needles: Needles) -> tuple[int, int, int]:
    """How many keys, and pieces of rows, are in a file, and its size."""
    keys = values = size = 0
    rest = b""
    with path.open("rb") as file:
        while content := file.read(_BLOCK):
            size += len(content)
            block = np.frombuffer(rest + content, np.uint8)
            more = needles.search.count(block)
            keys, values = keys + more[0], values + more[1]
            rest = (rest + content)[-(KEY_BYTES - 1) :]
    return keys, values, size
