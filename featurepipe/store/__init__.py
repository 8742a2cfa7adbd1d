"""What is kept: features in HDF5 parts, snapshots of datasets, records of runs. The only importer of h5py."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurepipe.store.feature_store import FeatureStore as FeatureStore
    from featurepipe.store.identity import differences as differences
    from featurepipe.store.identity import fingerprint as fingerprint
    from featurepipe.store.index import KeyIndex as KeyIndex
    from featurepipe.store.space import ColumnInfo as ColumnInfo
    from featurepipe.store.space import Space as Space
    from featurepipe.store.writer import PartWriter as PartWriter

_HOMES = {
    "FeatureStore": "feature_store",
    "Space": "space",
    "ColumnInfo": "space",
    "KeyIndex": "index",
    "PartWriter": "writer",
    "fingerprint": "identity",
    "differences": "identity",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads what is asked for (PEP 562), so that ``import featurepipe`` loads no h5py."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
