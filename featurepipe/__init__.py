"""featurepipe: a frozen ConvNet as a fixed feature extractor.

The public names load what they need when first used: ``import featurepipe`` alone imports neither torch nor h5py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurepipe.backbones import load_backbone
    from featurepipe.cnn_features import CNNFeatures
    from featurepipe.evaluation.evaluate import evaluate
    from featurepipe.extraction.extract import extract
    from featurepipe.heads.families import make_head
    from featurepipe.jobs.run import run_job
    from featurepipe.layer_depth.depth import depth
    from featurepipe.monitoring.drift import drift
    from featurepipe.monitoring.duplicates import duplicates
    from featurepipe.prediction.image_classifier import ImageClassifier
    from featurepipe.prediction.predict import predict
    from featurepipe.reporting.from_store import report
    from featurepipe.store import FeatureStore
    from featurepipe.training.train import train

__version__ = "0.1.0"
__all__ = [
    "CNNFeatures",
    "FeatureStore",
    "ImageClassifier",
    "__version__",
    "depth",
    "drift",
    "duplicates",
    "evaluate",
    "extract",
    "load_backbone",
    "make_head",
    "predict",
    "report",
    "run_job",
    "train",
]

_HOMES = {
    "CNNFeatures": "featurepipe.cnn_features",
    "FeatureStore": "featurepipe.store",
    "ImageClassifier": "featurepipe.prediction.image_classifier",
    "depth": "featurepipe.layer_depth.depth",
    "drift": "featurepipe.monitoring.drift",
    "duplicates": "featurepipe.monitoring.duplicates",
    "evaluate": "featurepipe.evaluation.evaluate",
    "extract": "featurepipe.extraction.extract",
    "load_backbone": "featurepipe.backbones",
    "make_head": "featurepipe.heads.families",
    "predict": "featurepipe.prediction.predict",
    "report": "featurepipe.reporting.from_store",
    "run_job": "featurepipe.jobs.run",
    "train": "featurepipe.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurepipe' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
