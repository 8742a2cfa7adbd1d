"""What has been measured so far, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.layer_depth.probes import Cell
from featurepipe.store.atomic import append_lines, made_folder, parsed_object, read_lines, reporting_full_disk


def key_of(**settings: Any) -> str:
    """A name for a measurement: equal settings, equal name."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Journal:
    """Cells by the column and fold that they were measured on, and other findings, one JSON line each.

    A line is written and synced when all heads asked for are measured on a fold; a torn last line is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells: dict[tuple[str, str, int, int], Cell] = {}
        self._findings: dict[str, Any] = {}
        for _, line in read_lines(path):
            try:
                self._remember(parsed_object(line))
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill, or not what we write: measured again

    def get(self, key: str, head: str, seed: int, fold: int) -> Cell | None:
        """The cell of a column (by ``key_of``), head and fold, if it has been measured."""
        return self._cells.get((key, head, seed, fold))

    def add(self, key: str, cells: Iterable[Cell]) -> None:
        """Keeps cells.

        Raises:
            DiskFull: no space is left.
        """
        self._append([_entry(key, cell) for cell in cells])

    def finding(self, key: str, find: Callable[[], Any]) -> Any:
        """What ``find`` returned when it was called under this key (by ``key_of``); it is called if it never was.

        Args:
            key: names all that the finding depends on.
            find: returns JSON values.

        Raises:
            DiskFull: no space is left.
        """
        if key not in self._findings:
            self.keep(key, find())
        return self._findings[key]

    def known(self, key: str) -> Any:
        """What was last kept under this key, or None."""
        return self._findings.get(key)

    def keep(self, key: str, found: Any) -> None:
        """Keeps a finding; the last one under a key counts.

        Raises:
            DiskFull: no space is left.
        """
        self._append([{"key": key, "finding": found}])

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(entry, allow_nan=False) for entry in entries]
        with reporting_full_disk(self.path):
            made_folder(made_folder(self.path.parent.parent) / self.path.parent.name)
        append_lines(self.path, "".join(f"{line}\n" for line in lines).encode())
        for line in lines:
            self._remember(json.loads(line))  # as whoever reads it later

    def _remember(self, entry: Mapping[str, Any]) -> None:
        if not isinstance(entry["key"], str):
            raise TypeError(f"not a key: {entry['key']!r}")
        if "finding" in entry:
            self._findings[entry["key"]] = entry["finding"]
        else:
            cell = _cell(entry)
            self._cells[entry["key"], cell.head, cell.seed, cell.fold] = cell


def _entry(key: str, cell: Cell) -> dict[str, Any]:
    return {
        "key": key,
        "head": cell.head,
        "seed": cell.seed,
        "fold": cell.fold,
        "params": dict(cell.params),
        "correct": _packed(cell.contributions),
        "shifted": None if cell.shifted is None else _packed(cell.shifted),
        "train_accuracy": cell.train_value,
        "seconds": round(cell.seconds, 3),
        **({"besides": dict(cell.besides)} if cell.besides else {}),
    }


def _cell(entry: Mapping[str, Any]) -> Cell:
    """The cell of a line.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    shifted = entry["shifted"]
    types: dict[str, type | tuple[type, ...]] = {
        "head": str,
        "seed": int,
        "fold": int,
        "params": dict,
        "train_accuracy": (int, float),
        "seconds": (int, float),
    }
    wrong = [name for name, kind in types.items() if not isinstance(entry[name], kind) or isinstance(entry[name], bool)]
    if wrong:
        raise TypeError(f"of another type: {', '.join(wrong)}")
    return Cell(
        entry["head"],
        entry["seed"],
        entry["fold"],
        entry["params"],
        _unpacked(entry["correct"]),
        None if shifted is None else _unpacked(shifted),
        entry["train_accuracy"],
        entry["seconds"],
        {str(name): float(value) for name, value in entry.get("besides", {}).items()},
    )


_NUMBERS = "<f8"


def _packed(values: npt.NDArray[Any]) -> list[Any]:
    """A count and eight images a byte; of contributions that are numbers besides that they are, each in eight bytes."""
    if values.dtype == np.bool_:
        return [len(values), base64.b64encode(np.packbits(values).tobytes()).decode()]
    return [len(values), base64.b64encode(values.astype(_NUMBERS).tobytes()).decode(), _NUMBERS]


def _unpacked(packed: list[Any]) -> npt.NDArray[Any]:
    count, text, *kind = packed
    raw = base64.b64decode(text)
    if kind:
        numbers = np.frombuffer(raw, _NUMBERS).astype(np.float64)
        if kind != [_NUMBERS] or len(numbers) != count:
            raise ValueError(f"{count} numbers in {len(raw)} bytes of {kind[0]}")
        return numbers
    packed_bits = np.frombuffer(raw, np.uint8)
    if not 0 <= count <= 8 * len(packed_bits):
        raise ValueError(f"{count} bits in {len(packed_bits)} bytes")
    return np.unpackbits(packed_bits, count=count).astype(bool)
