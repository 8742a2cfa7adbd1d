"""The names that people give to the splits of a dataset, and the three that they stand for."""

from __future__ import annotations

import re
from typing import Final

_NAMES: Final = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst"),
}
_SPLITS: Final = {name: split for split, names in _NAMES.items() for name in names}
_AROUND: Final = "set|sets|data|dataset|split|img|imgs|image|images"
_NAME: Final = re.compile(rf"(?:(?:seg|{_AROUND})_)?({'|'.join(_SPLITS)})(?:_?(?:{_AROUND}))?(?:_?(?:19|20)\d\d)?")


def split_of(name: str) -> str | None:
    """The split that the name of a folder, of an array, or in a manifest stands for: train, val, test, or None.

    Case does not matter, nor whether words are joined by ``_``, ``-`` or blanks; a word such as ``set`` or ``images``
    beside the split's name and a year after it are allowed: ``training_set``, ``seg_train``, ``Val-Images``, ``train2017``.

    Example:
        >>> split_of("validation"), split_of("Test-Set"), split_of("seg_train"), split_of("cats")
        ('val', 'test', 'train', None)
    """
    found = _NAME.fullmatch(re.sub(r"[-\s_]+", "_", name.strip().lower()))
    return _SPLITS[found[1]] if found else None
