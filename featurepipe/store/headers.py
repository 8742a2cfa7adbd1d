"""The headers of a space's parts, each read once for as long as its file stays as it is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from featurepipe.errors import CorruptPart, StoreError
from featurepipe.store.inside import entries
from featurepipe.store.parts import PartInfo, read_part

_Signature = tuple[int, int, int]  # inode, size and time of change: what a part that is put back has another of


def list_parts(folder: Path) -> dict[str, _Signature]:
    """Lists the part files in a folder, which may be missing, by name, which is by run."""
    found = [entry for entry in entries(folder) if entry.name.endswith(".h5") and not entry.name.startswith(".")]
    return {entry.name: signature for entry in found if (signature := _signature(entry))}


def _signature(entry: os.DirEntry[str]) -> _Signature | None:
    try:
        stat = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # compacted away since the folder was listed
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(slots=True)
class Headers:
    """What is known of one space's parts; shared by all that read them in a process, since a part never changes.

    Attributes:
        read: The header of each part that can be read, with the file it was read from.
        damaged: Why each of the others cannot, with its file.
    """

    read: dict[str, tuple[_Signature, PartInfo]] = field(default_factory=dict)
    damaged: dict[str, tuple[_Signature, str]] = field(default_factory=dict)

    def refresh(self, folder: Path, fingerprint: str) -> list[PartInfo]:
        """Reads the headers of parts that are new in the folder, and returns all that can be read, by name."""
        present = list_parts(folder)
        self._forget(present)
        for name, signature in present.items():
            if name not in self.read and name not in self.damaged:
                self._read(folder / name, signature, fingerprint)
        return [self.read[name][1] for name in present if name in self.read]

    def mark_damaged(self, part: PartInfo, error: CorruptPart) -> None:
        """Counts a part as damaged from now on."""
        name = Path(part.path).name
        if name in self.read:
            self.damaged[name] = (self.read.pop(name)[0], str(error))

    def _forget(self, present: dict[str, _Signature]) -> None:
        """Drops what is known of files that are gone, or are others by now."""
        for known in (self.read, self.damaged):
            for name in [name for name, (signature, _) in known.items() if present.get(name) != signature]:
                del known[name]

    def _read(self, path: Path, signature: _Signature, fingerprint: str) -> None:
        try:
            header = read_part(path)
        except CorruptPart as error:
            self.damaged[path.name] = signature, str(error)
        except StoreError:
            if path.exists():  # else: compacted away since the folder was listed
                raise
        else:
            if header.fingerprint == fingerprint:
                self.read[path.name] = signature, header
            else:
                why = f"part {path.name} is of another feature space ({header.fingerprint[:12]})"
                self.damaged[path.name] = signature, why
