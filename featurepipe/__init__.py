"""featurepipe: a frozen ConvNet as a fixed feature extractor.

The public names load what they need when first used: ``import featurepipe`` alone imports neither torch nor h5py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurepipe.backbones import load_backbone
    from featurepipe.extraction.extract import extract
    from featurepipe.store import FeatureStore

__version__ = "0.1.0"
__all__ = ["FeatureStore", "__version__", "extract", "load_backbone"]

_HOMES = {
    "FeatureStore": "featurepipe.store",
    "extract": "featurepipe.extraction.extract",
    "load_backbone": "featurepipe.backbones",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurepipe' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
