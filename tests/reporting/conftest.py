"""Made-up documents with everything that a page can show, and images to go with them."""

import copy
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurepipe.reporting.report import Features
from featurepipe.store import FeatureStore

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
                "label_conflicts": {
                    "images": 3,
                    "rows": 6,
                    "examples": [
                        [
                            {"id": "a.png", "split": None, "label": "Bag"},
                            {"id": "b.png", "split": None, "label": "Coat"},
                        ]
                    ],
                },
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


def run_ids(first: int, count: int) -> list[str]:
    """Ids of runs, one a night from the second of November on."""
    return [f"202611{2 + night:02d}T020000{night:06d}Z-{night:08x}" for night in range(first, first + count)]


def records_of(nights: int = 28) -> list[dict[str, Any]]:
    """Run records of a job ``nightly``, one a night and its extraction, as ``featurepipe run`` writes them.

    The first night computes 5,000 images, later ones 100 and their number each; night 9 fails at drift, night 13 finds no
    source, night 17 is interrupted, nights 20 and 21 run out of time, the last warns of drift and has three rejects.
    """
    found, listed = [], 5000
    for night, run_id in enumerate(run_ids(0, nights)):
        new = 5000 if night == 0 else 100 + night
        listed += new if night else 0
        part = f"{run_id[:-8]}{night:07x}f"
        record = _good_night(night, run_id, part, listed, new)
        extraction = {
            "run_id": part,
            "command": "extract",
            "status": "done",
            "exit_code": 3,
            "dataset": "photos",
            "started": record["started"],
            "counts": record["counts"],
            "reject_reasons": {"truncated": 2, "not-an-image": 1},
            "rejects": [{"id": f"bad/{k}.jpg", "reason": "truncated: 3 of 9 kB"} for k in range(3)],
        }
        record |= _bad_night(night, record)
        found += [extraction] * bool(record["extractions"]) + [record]
    found[-1]["warnings"] = ["this run's images may not be like those of before: bottleneck:gap differs most"]
    return found


def _good_night(night: int, run_id: str, part: str, listed: int, new: int) -> dict[str, Any]:
    day, last = f"2026-11-{2 + night:02d}", night == 27
    share = 0.2 + 0.01 * night
    p = 0.003 if last else 0.5
    tests = [
        {"column": name, "space": "resnet50-1", "p_value": p / 2, "adjusted": p, "effect": 0.1 + 0.3 * last + 0.01 * k,
         "auc": 0.6, "compared": {}, "farthest": [f"new/{night}-{k}.jpg"], "typical": []}
        for k, name in enumerate(("layer3:gap", "bottleneck:gap"))
    ]  # fmt: skip
    drift = {
        "verdict": "warning" if last else "no drift",
        "reference": "R",
        "images": {"reference": listed - new, "new": new},
        "columns": tests,
        "classes": {"adjusted": 0.7, "total_variation": 0.05, "classes": []},
        "thresholds": {"warn": 0.01, "fail": 0.0001},
        "text": "bottleneck:gap differs most",
    }
    counts = {"listed": listed, "computed": new, "known": listed - new, "rejected": 3 * last, "read": new}
    labels = {"cat": round(new * share), "dog": new - round(new * share)}
    steps = [
        _step("list", 1.5, listed=listed),
        _step("extract", new / 50, "resnet50", counts=counts),
        _step("train", 20.0, "heads", text=f"trained on {listed:,} images"),
        _step("predict", 2.0, "heads", labels=labels, counts={"predicted": new}, text=f"{new} images labelled"),
        _step("drift", 3.0, **drift) if night else _step("drift", 0.0, skipped="the first night"),
    ]
    return {
        "run_id": run_id,
        "command": "run",
        "job": "nightly",
        "job_file": "jobs/my nightly.toml",
        "dataset": "photos",
        "status": "done",
        "exit_code": 3 if last else 0,
        "started": f"{day}T02:00:00+00:00",
        "ended": f"{day}T02:{3 + night % 7:02d}:20+00:00",
        "plan": {"store": "features", "steps": ["train heads", "predict heads", "drift"]},
        "counts": counts,
        "changes": {"unchanged": listed - new, "new": new, "deleted": night % 4, "touched": 10 * (night == 5), "moved": 0},
        "steps": steps,
        "extractions": [part],
        "seconds": {"scan": 1.5, "read": 9.0, "decode": 40.0, "forward": new / 60, "write": 1.0, "waiting": 4.0,
                    "extract": new / 50, "wall": 30 + new / 50},
        "images_per_second": 50.0 - night / 10,
        "store_bytes": 2_000_000 + 400 * listed,
        "verdict": "forward-bound: the network was busy 92 % of the time",
        "warnings": [],
        "versions": {"python": "3.11.2", "torch": "2.15.0" if night < 15 else "2.16.0"},
        "host": {"name": "vm", "cpus": 2, "pid": 100 + night},
        "git": None,
    }  # fmt: skip


def _bad_night(night: int, good: dict[str, Any]) -> dict[str, Any]:
    """What a night that does not end well has instead."""
    *earlier, last = good["steps"]
    if night == 9:
        why = "this run's images are not like those of R: p = 1e-05"
        failed = last | {"status": "failed", "error": why, "error_type": "Drifted", "exit_code": 1}
        return {"status": "failed", "exit_code": 1, "steps": [*earlier, failed]}
    if night == 13:
        failed = {"step": "list", "name": "", "status": "failed", "error": "photos/: no such folder",
                  "error_type": "SourceError", "exit_code": 1, "seconds": 0.1}  # fmt: skip
        nothing = {
            "counts": dict.fromkeys(good["counts"], 0),
            "changes": {},
            "extractions": [],
            "images_per_second": None,
        }
        return {"status": "failed", "exit_code": 1, "steps": [failed], **nothing}
    if night == 17:
        stopped = earlier[1] | {"status": "interrupted", "error": "stopped by SIGTERM", "exit_code": 143}
        return {"status": "interrupted", "exit_code": 143, "steps": [earlier[0], stopped]}
    if night in {20, 21}:
        late = _step("train", 0.0, "heads") | {"status": "not reached", "result": {"why": "no time was left"}}
        return {"status": "out of time", "steps": [*earlier[:2], late]}
    return {}


def _step(step: str, seconds: float, name: str = "", **result: Any) -> dict[str, Any]:
    status = "skipped" if "skipped" in result else "done"
    return {"step": step, "name": name, "status": status, "seconds": seconds, "result": result}


@pytest.fixture(scope="session")
def night_records() -> Callable[..., list[dict[str, Any]]]:
    """Makes records that a test may change."""
    return records_of


@pytest.fixture
def recorded(tmp_path) -> Callable[[list[dict[str, Any]]], FeatureStore]:
    """Makes a store that holds run records and nothing else."""

    def write(records: list[dict[str, Any]]) -> FeatureStore:
        store = FeatureStore(tmp_path / "store")
        for record in records:
            store.write_run(record)
        return store

    return write


VOID = {"meta", "link", "img", "br", "wbr", "hr", "input", "path"}


class Page(HTMLParser):
    """A page as elements; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in {"h1", "h2", "h3", "p", "caption", "summary", "th", "td", "title", "dd", "dt", "li"}:
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.cells.append([])
        if tag in {"th", "td"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in self._open:
            if tag in self.texts:
                self.texts[tag][-1] += data
        if self.cells and {"th", "td"} & set(self._open):
            self.cells[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, start):
        return next([" ".join(cell.split()) for cell in row] for row in self.cells if row[0].split()[:1] == [start])

    def headings(self):
        return [int(name[1]) for name, _ in self.elements if re.fullmatch(r"h[1-6]", name)]


@pytest.fixture(scope="session")
def parsed() -> type[Page]:
    """Parses a page; fails where tags do not nest."""
    return Page
