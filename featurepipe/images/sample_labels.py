"""Labels that lie beside their images in a tar, as WebDataset writes them: ``0001.cls`` or ``0001.json`` beside ``0001.jpg``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from featurepipe.errors import SourceError
from featurepipe.images.findings import Findings
from featurepipe.tables import counted

LABEL_SUFFIXES: Final = (".cls", ".json")


class SampleLabel(NamedTuple):
    """What a ``.cls`` or ``.json`` says of its sample.

    Attributes:
        text: The class.
        suffix: Of the file that says so.
        is_damaged: Whether a file of the sample cannot be read.
    """

    text: str | None
    suffix: str
    is_damaged: bool = False


class SampleLabels:
    """The labels of one archive by the stem of their names, wherever in the archive they lie.

    A label belongs to the image of its own stem: ``a 1.5.cls`` to ``a 1.5.png``, and not to ``a 1.0.png``. Where there is none
    of the whole stem, that of a shorter one counts, down to the first dot, so that ``0001.cls`` labels both ``0001.left.png`` and
    ``0001.right.png``.

    Args:
        where: What errors call the archive.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._by_stem: dict[str, SampleLabel] = {}
        self._shared: dict[SampleLabel, SampleLabel] = {}  # one object for each class, not for each image
        self._used: set[str] = set()

    def add(self, path: str, text: str | None, *, is_damaged: bool = False) -> None:
        """Takes up what the file at ``path`` says.

        Raises:
            SourceError: Another file says that the sample is of another class.
        """
        stem, _, suffix = path.rpartition(".")
        label, known = SampleLabel(text, f".{suffix}", is_damaged), self._by_stem.get(stem)
        if known is not None:
            if None not in (text, known.text) and text != known.text:
                both = (f"{stem}{known.suffix}", path)
                names = (
                    f"{both[0]!r} and {both[1]!r} say" if both[0] != both[1] else f"{path!r} is there twice, and says"
                )
                raise SourceError(
                    f"{self._where}: {names} {known.text!r} and {text!r}: an image has one label; leave one of them out"
                )
            label = SampleLabel(text or known.text, known.suffix, is_damaged or known.is_damaged)
        self._by_stem[stem] = self._shared.setdefault(label, label)

    def of(self, path: str) -> SampleLabel | None:
        """What is said of the image at ``path``."""
        if not self._by_stem:
            return None
        for stem in _stems(path):
            label = self._by_stem.get(stem)
            if label is not None:
                self._used.add(stem)
                return label
        return None

    def tell(self, findings: Findings) -> None:
        """Notes the labels that no image has asked for."""
        left = [stem for stem in self._by_stem if stem not in self._used]
        if left:
            first = left[0] + self._by_stem[left[0]].suffix
            findings.notes.append(
                f"{counted(len(left), 'label')} in {self._where} without an image of the same stem, such as {first!r}"
            )


def _stems(path: str) -> Iterator[str]:
    """A member's path, and what is left of it without one suffix after another."""
    yield path
    start = path.rfind("/") + 2  # a dot at the beginning begins no suffix
    end = path.rfind(".", start)
    while end >= 0:
        yield path[:end]
        end = path.rfind(".", start, end)
