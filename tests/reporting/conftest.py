"""Made-up documents with everything that a page can show, and images to go with them."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurepipe.reporting.report import Features

NODES = ("blocks.2", "blocks.4", "blocks.7", "blocks.10", "blocks.14", "blocks.15", "bottleneck")
POOLINGS = ("avg6x6", "avg6x6", "avg6x6", "avg5x5", "avg5x5", "avg5x5", "gap")
WIDTHS = (8064, 8640, 8640, 2800, 4800, 8000, 1280)
COLUMNS = tuple(f"{node}:{pooling}" for node, pooling in zip(NODES, POOLINGS, strict=True))
HEADS = ("logistic", "xgboost", "knn")
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CURVE = (0.842, 0.867, 0.889, 0.9134, 0.9182, 0.9127, 0.9051)
RECOMMENDED = 3
IMAGES = 600


def _results() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for head, below in zip(HEADS, (0.0, 0.011, 0.047), strict=True):
        for place, (column, top) in enumerate(zip(COLUMNS, CURVE, strict=True)):
            for network, tested_on, loss in (
                ("pretrained", "source", 0.0),
                ("random", "source", 0.06 + 0.03 * place),
                ("pretrained", "shifted", 0.25 - 0.02 * place),
            ):
                mean = top - below - loss
                cells = mean + rng.normal(0, 0.004, 15)
                cells += mean - cells.mean()
                se = float(cells.std(ddof=1) / np.sqrt(15))
                rows.append(
                    {
                        "column": column,
                        "head": head,
                        "network": network,
                        "tested_on": tested_on,
                        "accuracy": float(mean),
                        "low": float(mean - 2.14 * se),
                        "high": float(mean + 2.14 * se),
                        "se": se,
                        "cells": cells.tolist(),
                        "params": [{"C": 0.01}] * 9 + [{"C": 0.1}] * 6,
                        "train_accuracy": None if head == "knn" else float(mean + 0.03),
                        "seconds": 3.5 + place,
                    }
                )
    return rows


def _metrics() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    counts = np.full((10, 10), 1)
    np.fill_diagonal(counts, 109)
    counts[6, 0], counts[6, 2], counts[6, 6] = 8, 5, 98
    supports, predicted, hits = counts.sum(1), counts.sum(0), counts.diagonal()
    accuracy = float(hits.sum() / counts.sum())
    with_bounds = {"accuracy": accuracy, "balanced_accuracy": 0.9131, "macro_f1": 0.9128, "auc": 0.9951, "ece": 0.0123}
    return {
        "images": int(counts.sum()),
        **{name: {"value": v, "low": v - 0.004, "high": v + 0.004} for name, v in with_bounds.items()},
        "log_loss": {"value": 0.2519, "low": 0.24, "high": 0.263},
        "top_5": {"value": None, "low": None, "high": None, "reason": "not asked for"},
        "per_class": [
            {
                "class": name,
                "support": int(supports[k]),
                "predicted": int(predicted[k]),
                "precision": float(hits[k] / predicted[k]),
                "recall": float(hits[k] / supports[k]),
                "f1": float(2 * hits[k] / (supports[k] + predicted[k])),
                "auc": None if k == 9 else 0.99,
            }
            for k, name in enumerate(CLASSES)
        ],
        "confusion": {"classes": list(CLASSES), "counts": counts.tolist()},
        "confused": [{"true": "Shirt", "predicted": "T-shirt", "count": 8}],
        "mistakes": {
            "count": int(counts.sum() - hits.sum()),
            "most_confident": [
                {
                    "id": f"test/{17 * k}",
                    "true": CLASSES[k % 10],
                    "predicted": CLASSES[(k + 6) % 10],
                    "probability": float(0.999 - 0.004 * k + rng.uniform(0, 0.001)),
                    "probability_of_true": 0.0004,
                }
                for k in range(20)
            ],
        },
    }


def _similarity() -> list[list[float]]:
    places = np.arange(len(COLUMNS))
    return np.exp(-0.35 * np.abs(places[:, None] - places[None])).round(4).tolist()


DOCUMENT: dict[str, Any] = {
    "kind": "depth",
    "version": 1,
    "dataset": "fashion",
    "backbone": {"name": "efficientnet_lite0", "weights": "DEFAULT", "seed": None, "description": "EfficientNet-Lite0"},
    "space": {"name": "efficientnet_lite0-2bcc66b4129a", "fingerprint": "2bcc66b4129a" * 5},
    "control": {"space": "efficientnet_lite0-0f0f0f0f0f0f", "seed": 0},
    "test_dataset": "emoji-outlined",
    "settings": {
        "heads": list(HEADS),
        "folds": 5,
        "split": False,
        "seeds": [0, 1, 2],
        "pooling": None,
        "max_width": 9000,
    },
    "classes": list(CLASSES),
    "images": IMAGES,
    "counts": {"images": IMAGES, "labelled": IMAGES, "rejected": 0},
    "protocol": "Each head was fitted in five folds with three seeds; parameters were chosen on validation data only.",
    "columns": [
        {
            "column": column,
            "node": NODES[k],
            "pooling": POOLINGS[k],
            "depth": 10 * k,
            "cost": (0.21, 0.33, 0.47, 0.62, 0.86, 0.93, 1.0)[k],
            "width": WIDTHS[k],
            "bytes_per_image": 2 * WIDTHS[k],
            "ms_per_image": 4.1 * (k + 1),
            "saved": (0.79, 0.67, 0.53, 0.38, 0.14, 0.07, 0.0)[k],
        }
        for k, column in enumerate(COLUMNS)
    ],
    "results": _results(),
    "concatenations": [
        {
            "columns": [COLUMNS[3], COLUMNS[4]],
            "head": "logistic",
            "accuracy": 0.9211,
            "low": 0.9190,
            "high": 0.9232,
            "se": 0.001,
            "against": COLUMNS[4],
            "difference": 0.0029,
            "low_difference": 0.0008,
            "high_difference": 0.0050,
        },
        {
            "columns": [COLUMNS[3], COLUMNS[6]],
            "head": "logistic",
            "accuracy": 0.9170,
            "low": 0.9150,
            "high": 0.9190,
            "se": 0.001,
            "against": COLUMNS[4],
            "difference": -0.0012,
            "low_difference": -0.0030,
            "high_difference": 0.0006,
        },
    ],
    "differences": [
        {"head": head, "a": column, "b": COLUMNS[4], "difference": d, "low": d - 0.002, "high": d + 0.002, "p": 0.01}
        for head in HEADS
        for column, d in ((column, top - CURVE[4]) for column, top in zip(COLUMNS, CURVE, strict=True))
        if column != COLUMNS[4]
    ],
    "recommended": {
        "column": COLUMNS[RECOMMENDED],
        "head": "logistic",
        "accuracy": CURVE[RECOMMENDED],
        "low": 0.9112,
        "high": 0.9156,
        "se": 0.001,
        "best": COLUMNS[4],
        "best_accuracy": CURVE[4],
        "rule": "the cheapest node within one standard error of the best",
        "width": WIDTHS[RECOMMENDED],
        "bytes_per_image": 2 * WIDTHS[RECOMMENDED],
        "ms_per_image": 16.4,
        "saved": 0.38,
    },
    "similarity": {"columns": list(COLUMNS), "cka": _similarity(), "images": 512, "method": "linear CKA, unbiased"},
    "transferability": {
        "method": "LogME",
        "source": "You et al., 2021",
        "scores": dict(zip(COLUMNS, (0.41, 0.52, 0.63, 0.71, 0.79, 0.74, 0.69), strict=True)),
        "correlations": {head: {"spearman": 0.9643, "kendall": 0.9048} for head in HEADS},
        "h_scores": dict.fromkeys(COLUMNS, 5.0),
    },
    "details": {"column": COLUMNS[RECOMMENDED], "head": "logistic", "metrics": _metrics()},
    "provenance": {
        "command": "featurepipe depth photos --backbone efficientnet_lite0 --report page.html",
        "when": "2026-11-22T09:00:00+00:00",
        "software": {"python": "3.11.2", "featurepipe": "0.1.0"},
        "machine": {"name": "bench", "system": "Linux", "cpus": 2},
        "store": "features",
        "runs": ["20261122T052719369964Z-25a97a06"],
        "seconds": {"extract": 71.5, "fit": 300.25, "similarity": None},
        "snapshot": "20261122T052719369964Z-25a97a06",
    },
}


@pytest.fixture(scope="session")
def new_document() -> Callable[[], dict[str, Any]]:
    """Makes documents that a test may change."""
    return lambda: copy.deepcopy(DOCUMENT)


@pytest.fixture
def document(new_document) -> dict[str, Any]:
    return new_document()


@pytest.fixture
def bundle_document() -> dict[str, Any]:
    return {
        "kind": "bundle",
        "version": 1,
        "bundle": {
            "backbone": {"name": "efficientnet_lite0", "weights": "DEFAULT"},
            "columns": [COLUMNS[3]],
            "width": 2800,
            "family": "logistic",
            "params": {"C": 0.01},
            "classes": list(CLASSES),
            "temperature": 1.08,
            "metrics": {},
            "training": {"images": 5000},
            "software": {"scikit-learn": "1.9.1"},
            "seen": 5000,
            "own_weights": False,
        },
        "evaluation": {
            "bundle": {"head": "logistic"},
            "dataset": "fashion",
            "split": "test",
            "scope": "the split test",
            "counts": {"images": 600, "scored": 560},
            "metrics": _metrics(),
            "leakage": {
                "trained_on": {
                    "images": 7,
                    "share": 0.0125,
                    "ids": ["a"],
                    "accuracy_with": 0.9,
                    "accuracy_without": 0.8876,
                },
                "copies": 0,
                "across_splits": {"images": 0, "rows": 0, "examples": [], "pairs": []},
                "label_conflicts": {"images": 3, "rows": 6, "examples": []},
            },
            "seconds": 1.5,
        },
        "provenance": {"command": "featurepipe report store bundle"},
    }


@pytest.fixture(scope="session")
def read_image() -> Callable[[str], bytes]:
    """PNG files of 28 x 28, which differ from id to id."""

    def read(id_: str) -> bytes:
        shade = sum(id_.encode()) % 200
        pixels = np.full((28, 28), shade, np.uint8)
        pixels[8:20, 8:20] = shade + 55
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return read


@pytest.fixture(scope="session")
def features() -> Features:
    """Six hundred images in ten groups."""
    rng = np.random.default_rng(2)
    classes = rng.integers(0, len(CLASSES), IMAGES)
    centres = rng.normal(0, 4, (len(CLASSES), 32))
    values = (centres[classes] + rng.normal(0, 1, (IMAGES, 32))).astype(np.float32)
    return Features([f"test/{k}" for k in range(IMAGES)], values, [CLASSES[k] for k in classes])
