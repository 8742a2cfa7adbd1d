"""featurepipe: a frozen ConvNet as a fixed feature extractor.

The public names load what they need when first used: ``import featurepipe`` alone imports neither torch nor h5py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurepipe.lazy_names import lazy_names

if TYPE_CHECKING:
    from featurepipe.backbones import list_backbones, load_backbone
    from featurepipe.cnn_features import CNNFeatures
    from featurepipe.curation.forget import forget
    from featurepipe.curation.next_to_label import select
    from featurepipe.curation.outliers import outliers
    from featurepipe.curation.similar import SimilarImages, similar
    from featurepipe.curation.suspects import labels
    from featurepipe.demo import run_demo
    from featurepipe.doctor import examine
    from featurepipe.evaluation.evaluate import evaluate
    from featurepipe.extraction.extract import extract
    from featurepipe.functions import compact, export, gc, info, nodes, runs, verify
    from featurepipe.heads.families import make_head
    from featurepipe.images.regions import region
    from featurepipe.jobs.run import run_job
    from featurepipe.layer_depth.depth import depth
    from featurepipe.monitoring.drift import drift
    from featurepipe.monitoring.duplicates import duplicates
    from featurepipe.prediction.image_classifier import ImageClassifier
    from featurepipe.prediction.predict import predict
    from featurepipe.reporting.from_store import report
    from featurepipe.store import FeatureStore
    from featurepipe.training.train import train
    from featurepipe.transfer_routes.routes import routes
    from featurepipe.tuning.finetune import finetune

__version__ = "0.2.0"
__all__ = [
    "CNNFeatures",
    "FeatureStore",
    "ImageClassifier",
    "SimilarImages",
    "__version__",
    "compact",
    "depth",
    "drift",
    "duplicates",
    "evaluate",
    "examine",
    "export",
    "extract",
    "finetune",
    "forget",
    "gc",
    "info",
    "labels",
    "list_backbones",
    "load_backbone",
    "make_head",
    "nodes",
    "outliers",
    "predict",
    "region",
    "report",
    "routes",
    "run_demo",
    "run_job",
    "runs",
    "select",
    "similar",
    "train",
    "verify",
]

_HOMES = {
    "CNNFeatures": "cnn_features",
    "FeatureStore": "store",
    "ImageClassifier": "prediction.image_classifier",
    "SimilarImages": "curation.similar",
    "compact": "functions",
    "depth": "layer_depth.depth",
    "drift": "monitoring.drift",
    "duplicates": "monitoring.duplicates",
    "evaluate": "evaluation.evaluate",
    "examine": "doctor",
    "export": "functions",
    "extract": "extraction.extract",
    "finetune": "tuning.finetune",
    "forget": "curation.forget",
    "gc": "functions",
    "info": "functions",
    "labels": "curation.suspects",
    "list_backbones": "backbones",
    "load_backbone": "backbones",
    "make_head": "heads.families",
    "nodes": "functions",
    "outliers": "curation.outliers",
    "predict": "prediction.predict",
    "region": "images.regions",
    "report": "reporting.from_store",
    "routes": "transfer_routes.routes",
    "run_demo": "demo",
    "run_job": "jobs.run",
    "runs": "functions",
    "select": "curation.next_to_label",
    "similar": "curation.similar",
    "train": "training.train",
    "verify": "functions",
}


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
