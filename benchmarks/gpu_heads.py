"""A logistic head of ImageNet's size on a device: ours, and PyTorch's own L-BFGS; a part of bench_gpu."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from benchmarks import record
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.heads.devices import Device, OnDevice
from featurepipe.heads.linear.classifiers import BlockLogisticRegression
from featurepipe.heads.linear.passes import Passes

ROWS, CLASSES = 1_281_167, 1_000
PART = 8192  # rows that are made, and looked at in float64, at once
SCRIPT_PART = 1 << 16
LIKELY_PASSES = 300  # of the fit
MEMORY_SHARE = 0.4  # of what is free, for the features in main memory
SCRIPT_SECONDS = 60.0  # at most


def measured(scale: float, width: int, C: float, device: str, end: float, *, quick: bool) -> dict[str, Any]:
    """Fits, and times passes.

    Args:
        scale: Of ImageNet's rows and classes.
        width: Values of a row.
        C: Of the objective.
        device: By PyTorch's name.
        end: When all should be done, by ``time.perf_counter``.
        quick: Whether it only has to show that it works.
    """
    from featurepipe.training.cost import available_memory

    rows, classes = int(ROWS * scale), max(3, int(CLASSES * scale))
    fitting = min(rows, int(MEMORY_SHARE * available_memory() / (2 * width)))
    features, labels = made_up(fitting, width, classes, device)
    record.note(f"heads: made {fitting:,} x {width:,} features of {classes:,} classes")
    passes = {
        kind: seconds_of_a_pass(features, labels, C, device, kept=kind == "kept") for kind in ("kept", "streamed")
    }
    left = end - time.perf_counter() - SCRIPT_SECONDS
    share = 1.0 if quick else min(1.0, max(0.0, left / (LIKELY_PASSES * passes["kept"]["iteration_s"])))
    some = max(10 * classes, int(share * fitting))
    features, labels = features[:some], labels[:some]
    ours = fitted(features, labels, C, device)
    record.note(f"heads: {some:,} rows fitted in {ours['seconds']:.1f} s, {ours['passes']} passes")
    script = by_script(features, labels, C, device, min(ours["seconds"], SCRIPT_SECONDS))
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": some,
        "rows_wanted": rows,
        "width": width,
        "classes": classes,
        "C": C,
        "pass_rows": fitting,
        "passes": passes,
        "streamed_times_kept": round(passes["streamed"]["pass_s"] / passes["kept"]["pass_s"], 3),
        "ours": ours,
        "script": {**script, "above_ours": script["objective"] / ours["objective"] - 1},
    }


def made_up(rows: int, width: int, classes: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Features as a network's last block gives them, float16 in main memory, and class numbers; see ``bench_heads``."""
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rank = min(width, 512)
    strengths = torch.arange(1, rank + 1, device=device) ** -0.5
    mixing = normal(rank, width) * strengths[:, None] / torch.sqrt(torch.square(strengths).sum())
    centres = normal(classes, rank) * 0.5
    labels = torch.randint(0, classes, (rows,), generator=generator, device=device)
    features = np.empty((rows, width), np.float16)
    for start in range(0, rows, PART):
        part = labels[start : start + PART]
        latent = centres[part] + normal(len(part), rank)
        values = torch.clip(latent @ mixing + 0.1 * normal(len(part), width), 0, None)
        features[start : start + PART] = values.to(torch.float16).cpu().numpy()
    return features, labels.cpu().numpy()


def on(features: np.ndarray, device: str, *, kept: bool = True) -> OnDevice:
    """The features, to be multiplied on the device."""
    return OnDevice(ArrayBlocks(features), Device(torch.empty(0, device=device), features.nbytes if kept else 0))


@contextmanager
def timed_passes() -> Iterator[list[tuple[float, float]]]:
    """Collects when every pass of the block began, and its seconds."""
    call, passes = Passes.__call__, []

    def timed(self: Passes, numbers: Any, requests: Any) -> Any:
        start = time.perf_counter()
        found = call(self, numbers, requests)
        passes.append((start, time.perf_counter() - start))
        return found

    Passes.__call__ = timed  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        Passes.__call__ = call  # type: ignore[method-assign]


def seconds_of_a_pass(
    features: np.ndarray, labels: np.ndarray, C: float, device: str, *, kept: bool
) -> dict[str, float]:
    """The least of a few passes, and of their beginnings' distances, between which the optimiser works in this process."""
    with timed_passes() as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        BlockLogisticRegression(C=C, max_iter=4).fit(on(features, device, kept=kept), labels)
    starts = [start for start, _ in passes]
    between = [later - sooner for sooner, later in pairwise(starts)]
    return {"pass_s": round(min(took for _, took in passes), 5), "iteration_s": round(min(between), 5)}


def fitted(features: np.ndarray, labels: np.ndarray, C: float, device: str) -> dict[str, Any]:
    """One fit, and how good it is."""
    with timed_passes() as passes:
        start = time.perf_counter()
        head = BlockLogisticRegression(C=C).fit(on(features, device), labels)
        whole = time.perf_counter() - start
    return {
        "seconds": round(whole, 2),
        "passes": len(passes),
        "pass_seconds": round(sum(took for _, took in passes), 2),
        "iterations": int(head.n_iter_[0]),
        **quality(head.coef_, head.intercept_, features, labels, C, device),
    }


def quality(
    coefficients: np.ndarray, intercepts: np.ndarray, features: np.ndarray, labels: np.ndarray, C: float, device: str
) -> dict[str, float]:
    """The objective in float64, what it is above its minimum at most relative to it, and the accuracy on the rows.

    The bound is half the squared gradient by the coefficients, as the penalty bends by 1.
    """
    weights = torch.from_numpy(np.array(coefficients, np.float64)).to(device)
    bias = torch.from_numpy(np.array(intercepts, np.float64)).to(device)
    gradient, total, right = weights.clone(), 0.0, 0
    for start in range(0, len(features), PART):
        block = torch.from_numpy(features[start : start + PART]).to(device).to(torch.float64)
        own = torch.from_numpy(labels[start : start + PART]).to(device)
        scores = block @ weights.T + bias
        right += int((scores.argmax(1) == own).sum())
        total += float(nn.functional.cross_entropy(scores, own, reduction="sum"))
        pulls = torch.softmax(scores, 1)
        pulls[torch.arange(len(own), device=device), own] -= 1
        gradient += C * (pulls.T @ block)
    objective = C * total + float(torch.square(weights).sum()) / 2
    return {
        "objective": objective,
        "gap_at_most": float(torch.square(gradient).sum()) / 2 / objective,
        "accuracy_on_its_rows": round(right / len(features), 4),
    }


def by_script(features: np.ndarray, labels: np.ndarray, C: float, device: str, seconds: float) -> dict[str, Any]:
    """PyTorch's L-BFGS on features that lie on the device, in float32, for so many seconds."""
    x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)
    linear = nn.Linear(x.shape[1], int(y.max()) + 1, device=device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimiser = torch.optim.LBFGS(
        linear.parameters(), max_iter=5, history_size=10, tolerance_grad=0, line_search_fn="strong_wolfe"
    )
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        value = torch.square(linear.weight).sum() / (2 * C * len(x))  # the objective by the row
        value.backward()
        value = value.detach()
        for start in range(0, len(x), SCRIPT_PART):
            scores = linear(x[start : start + SCRIPT_PART].float())
            loss = nn.functional.cross_entropy(scores, y[start : start + SCRIPT_PART], reduction="sum") / len(x)
            loss.backward()
            value += loss.detach()
        return value

    start = time.perf_counter()
    while not evaluations or time.perf_counter() - start < seconds:
        before = evaluations
        optimiser.step(closure)
        if evaluations == before + 1:  # it goes no further
            break
    took = time.perf_counter() - start
    found = (one.detach().cpu().numpy() for one in (linear.weight, linear.bias))
    return {"seconds": round(took, 2), "evaluations": evaluations, **quality(*found, features, labels, C, device)}


__all__ = ["measured"]
