"""The block-wise solvers beside scikit-learn's, and beside themselves with everything in memory.

``python -m benchmarks.bench_heads --store STORE``

- sweep: six values of C, 1e-3 to 1e2, of ``BlockLogisticRegression`` in shared passes (``fit_path``), beside six fits of
  scikit-learn's ``LogisticRegression`` (lbfgs), on the same float32 features. Every fit's objective is worked out in float64.
  A fit of scikit-learn counts only if its objective is the same (within 1e-5) or worse than ours; it gets what its ``tol`` and
  ``--max-iter`` say.
- standardised: C = 100 on the same features standardised, which nearly constant columns make the hardest of all, by itself: its
  passes, and how far above the optimum it can be at most, relative to the objective. That is half the squared gradient in
  float64, which needs no other solver to be known.
- out of core: 2,000,000 x 512 float16 features in a file, streamed by ``BlockLogisticRegression(memory="512MB")``, beside the
  same fits with the features in memory as float32. Peak memory is that of the process above what it held after its imports.
- imagenet: one head of ImageNet's size, 1,281,167 x 2,048 float16 features of 1,000 classes in a file (5.2 GB), fitted under
  ``--memory 6GB``; how far above the optimum it is at most, by the gradient in float64. The features are made up: rectified,
  with a spectrum that falls as that of real ones does, classes that overlap: the accuracy on rows it has not seen says how far.
  It says after each pass how far it is. ``--scale 0.1``: a tenth of the rows and classes.

Each solver runs in a process of its own. The store comes from ``featurepipe extract``: Fashion-MNIST's 70,000 images through
efficientnet_lite0, whose bottleneck is 1,280 wide. ``--arrays`` is a folder with features.npy and labels.npy instead. Without
either, and with ``--tiny``, features are made up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.alone import resident

CS = [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]
_APART = 0.2  # deviation of the made-up classes' centres: it decides how far 1,000 classes overlap


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what was asked for."""
    result: dict[str, Any] = {}
    parts = {"sweep": sweep, "standardised": standardised, "memory": out_of_core, "imagenet": imagenet}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for part in [args.only] if args.only else parts:
            result |= parts[part](args, Path(folder))
    return result


def sweep(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Six values of C, ours and scikit-learn's."""
    features, labels = some_features(args)
    np.save(folder / "features.npy", features)
    np.save(folder / "labels.npy", labels)
    load_before = os.getloadavg()
    ours = apart(fit_ours, folder)
    record.note(f"ours: {ours['seconds']:.1f} s")
    theirs = []
    for C in CS:
        theirs.append(apart(fit_theirs, folder, C, args.max_iter))
        record.note(f"scikit-learn, C={C:g}: {theirs[-1]['seconds']:.1f} s, {theirs[-1]['iterations']} iterations")
    fits = [
        {
            "C": C,
            "our_objective": ours["objectives"][number],
            "their_objective": found["objective"],
            "their_gap": found["objective"] / ours["objectives"][number] - 1,
            "their_seconds": round(found["seconds"], 2),
            "their_iterations": found["iterations"],
            "our_iterations": ours["iterations"][number],
            "equal_predictions": float(np.mean(found["predictions"] == ours["predictions"][number])),
        }
        for number, (C, found) in enumerate(zip(CS, theirs, strict=True))
    ]
    seconds = sum(found["seconds"] for found in theirs)
    return {
        "rows": len(features),
        "width": features.shape[1],
        "load_before": load_before,
        "our_seconds": round(ours["seconds"], 2),
        "their_seconds": round(seconds, 2),
        "our_passes": ours["passes"],
        "times_faster": round(seconds / ours["seconds"], 2),
        "theirs_same_or_worse": all(fit["their_gap"] >= -1e-5 for fit in fits),
        "fits": fits,
        "promised": {"times_faster": ">= 5", "theirs_same_or_worse": True},
    }


def standardised(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The largest C alone, on standardised features."""
    features, labels = some_features(args)
    deviations = features.std(axis=0, dtype=np.float64)
    features, deviations = features[:, deviations > 0], deviations[deviations > 0]
    features = ((features - features.mean(axis=0, dtype=np.float64)) / deviations).astype(np.float32)
    np.save(folder / "features.npy", features)
    np.save(folder / "labels.npy", labels)
    found = apart(fit_ours, folder, CS[-1:])
    record.note(f"standardised: {found['passes']} passes, {found['cpu_seconds']:.1f} s of processors")
    return {
        "standardised": {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": record.machine(),
            "rows": len(features),
            "width": features.shape[1],
            "C": CS[-1],
            "farthest_column": float(np.abs(features).max()),
            "passes": found["passes"],
            "objective": found["objectives"][0],
            "gap_at_most": found["gaps_at_most"][0],
            "cpu_seconds": round(found["cpu_seconds"], 1),
            "promised": {"passes": "<= 500", "gap_at_most": "<= 1e-5"},
        }
    }


def some_features(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Features, float32, and class numbers: real ones if there are some."""
    if args.tiny or not (args.store or args.arrays):
        return made_up(2_000, 40, 4)
    if args.arrays:
        return tuple(np.load(Path(args.arrays) / f"{name}.npy") for name in ("features", "labels"))
    return real_features(args)


def real_features(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Features of a store, float32, and class numbers."""
    from featurepipe.store import FeatureStore

    view = FeatureStore(args.store).features(args.dataset, node=args.node).select(split=args.split, labelled=True)
    features, labels = view.numpy(np.float32)
    return features, np.unique(labels.astype(str), return_inverse=True)[1]


def made_up(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes; columns correlated."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, width)).astype(np.float32)
    mixing = (np.eye(width) + 0.3 * rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
    labels = rng.integers(0, classes, rows)
    features = np.empty((rows, width), np.float32)
    for start in range(0, rows, 8192):
        part = slice(start, start + 8192)
        noise = rng.standard_normal((len(labels[part]), width), dtype=np.float32)
        features[part] = (centres[labels[part]] * 0.15 + noise) @ mixing
    return features, labels


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs ``work`` in a fresh process and returns what it returns."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Any, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    sender.send(work(*arguments))


def fit_ours(folder: Path, values: Sequence[float] = CS) -> dict[str, Any]:
    """Some values of C in shared passes."""
    from featurepipe.heads import BlockLogisticRegression, fit_path
    from featurepipe.heads.linear import passes

    features, labels = np.load(folder / "features.npy"), np.load(folder / "labels.npy")
    counts = count_passes(passes.Passes)
    start, cpu = time.perf_counter(), time.process_time()
    [heads] = fit_path(BlockLogisticRegression(), features, labels, Cs=values)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    pairs = list(zip(values, heads, strict=True))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "passes": len(counts),
        "iterations": [int(head.n_iter_[0]) for head in heads],
        "objectives": [objective(head, features, labels, C) for C, head in pairs],
        "gaps_at_most": [gap_at_most(head, features, labels, C) for C, head in pairs],
        "predictions": [head.predict(features) for head in heads],
    }


def fit_theirs(folder: Path, C: float, max_iter: int) -> dict[str, Any]:
    """One value of C."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, labels = np.load(folder / "features.npy"), np.load(folder / "labels.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = time.perf_counter()
        model = LogisticRegression(C=C, max_iter=max_iter).fit(features, labels)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "iterations": int(model.n_iter_[0]),
        "objective": objective(model, features, labels, C),
        "predictions": model.predict(features),
    }


def objective(head: Any, features: np.ndarray, labels: np.ndarray, C: float) -> float:
    """C times the sum of the multinomial losses, and half the squared coefficients, in float64."""
    coefficients = head.coef_.astype(np.float64)
    total = 0.0
    for start in range(0, len(features), 4096):
        part = slice(start, start + 4096)
        scores = features[part].astype(np.float64) @ coefficients.T + head.intercept_
        top = scores.max(axis=1)
        own = scores[np.arange(len(scores)), labels[part]]
        total += float((top + np.log(np.exp(scores - top[:, None]).sum(axis=1)) - own).sum())
    return C * total + float((coefficients**2).sum()) / 2


def gap_at_most(head: Any, features: np.ndarray, labels: np.ndarray, C: float) -> float:
    """What the objective is above its minimum at most, relative to it: half the squared gradient, as the penalty bends by 1."""
    from scipy.special import softmax

    gradient = head.coef_.astype(np.float64)
    for start in range(0, len(features), 4096):
        rows = features[start : start + 4096].astype(np.float64)
        pulls = softmax(rows @ head.coef_.T + head.intercept_, axis=1)
        pulls[np.arange(len(rows)), labels[start : start + 4096]] -= 1
        gradient += C * (pulls.T @ rows)
    return float((gradient**2).sum() / 2 / objective(head, features, labels, C))


def count_passes(kind: Any, *, told: bool = False) -> list[int]:
    """Notes every pass that is made from now on; ``told``: says how it ended, for fits of many minutes."""
    counts: list[int] = []
    call = kind.__call__

    begin = time.perf_counter()

    def counted(self: Any, numbers: list[int], requests: Any) -> Any:
        counts.append(len(numbers))
        found = call(self, numbers, requests)
        if told:
            objective = ", ".join(f"{evaluation.value:.8g}" for evaluation in found)
            record.note(f"pass {len(counts)} after {time.perf_counter() - begin:.0f} s: {objective}")
        return found

    kind.__call__ = counted
    return counts


class FileBlocks:
    """Float16 features in a bare file, read as ``FeatureSet`` reads its parts: with ``pread``, mapping nothing."""

    dtype = np.dtype(np.float16)

    def __init__(self, path: Path, rows: int, width: int) -> None:
        self.path, self.shape = path, (rows, width)

    def read(self, dtype: Any = None, *, rows: Any = None) -> np.ndarray:
        """Reads a stretch of rows."""
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        width = self.shape[1]
        values = np.fromfile(self.path, np.float16, (stop - start) * width, offset=start * width * 2)
        return values.reshape(-1, width).astype(dtype or np.float16, copy=False)


def out_of_core(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same fits streamed under a limit, and in memory."""
    rows, width, classes = (20_000, 32, 4) if args.tiny else (args.rows, 512, 10)
    path = folder / "features.f16"
    write_features(path, folder / "labels.npy", rows, width, classes)
    found = {}
    load_before = os.getloadavg()
    for name, memory in [("in_memory", None), ("streamed", "2MB" if args.tiny else "512MB")]:
        found[name] = apart(fit_file, path, rows, width, memory, CS[: args.values])
        record.note(f"{name}: {found[name]['seconds']:.1f} s, {found[name]['peak_mb']:.0f} MB above idle")
    return {
        "memory_rows": rows,
        "memory_width": width,
        "memory_load_before": load_before,
        "streamed_times_in_memory": round(found["streamed"]["seconds"] / found["in_memory"]["seconds"], 3),
        "streamed_peak_mb": found["streamed"]["peak_mb"],
        "memory_runs": found,
        "memory_promised": {"streamed_times_in_memory": "<= 1.5", "streamed_peak_mb": "<= 512"},
    }


def write_features(path: Path, labels_path: Path, rows: int, width: int, classes: int) -> None:
    """Writes made-up features a million values at a time."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((classes, width)).astype(np.float32)
    labels = rng.integers(0, classes, rows)
    np.save(labels_path, labels)
    with path.open("wb") as file:
        for start in range(0, rows, 8192):
            part = labels[start : start + 8192]
            noise = rng.standard_normal((len(part), width), dtype=np.float32)
            file.write((centres[part] * 0.12 + noise).astype(np.float16).tobytes())


def fit_file(path: Path, rows: int, width: int, memory: str | None, values: list[float]) -> dict[str, Any]:
    """Fits from a file: streamed under a limit, or read into memory as float32 first (which is not timed)."""
    from featurepipe.heads import BlockLogisticRegression, fit_path
    from featurepipe.heads.linear import passes

    counts = count_passes(passes.Passes)
    blocks: Any = FileBlocks(path, rows, width)
    fit_path(BlockLogisticRegression(), np.eye(4), [0, 1, 0, 1], Cs=[1.0])  # imports what is imported late
    idle = resident("VmRSS") / 1e6
    labels = np.load(path.with_name("labels.npy"))
    if memory is None:
        blocks = blocks.read(np.float32)
    counts.clear()
    start = time.perf_counter()
    cpu = time.process_time()
    [heads] = fit_path(BlockLogisticRegression(memory=memory), blocks, labels, Cs=values)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "passes": len(counts),
        "iterations": [int(head.n_iter_[0]) for head in heads],
        "coefficients": float(np.abs(heads[-1].coef_).sum()),
        "idle_mb": round(idle, 1),
        "peak_mb": round(resident("VmHWM") / 1e6 - idle, 1),
    }


def imagenet(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One head of ImageNet's size, out of core."""
    scale = 0.002 if args.tiny else args.scale
    rows, classes = int(1_281_167 * scale), max(3, int(1_000 * scale))
    new = max(100, rows // 128)
    width, memory = (64, "20MB") if args.tiny else (2_048, args.memory)
    path = folder / "features.f16"
    start = time.perf_counter()
    write_rectified(path, folder / "labels.npy", rows + new, width, classes)
    record.note(f"wrote {rows:,} x {width:,} features of {classes:,} classes in {time.perf_counter() - start:.0f} s")
    load_before = os.getloadavg()
    found = apart(fit_many_classes, path, rows, new, width, memory, args.C)
    record.note(f"fitted in {found['seconds']:.0f} s, {found['passes']} passes, {found['peak_mb']:.0f} MB above idle")
    return {
        "imagenet": {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": record.machine(),
            "rows": rows,
            "width": width,
            "classes": classes,
            "C": args.C,
            "memory": memory,
            "load_before": load_before,
            **found,
            "promised": {"seconds": "<= 3600", "gap_at_most": "<= 1e-5", "peak_mb": "<= 6000"},
        }
    }


def write_rectified(path: Path, labels_path: Path, rows: int, width: int, classes: int) -> None:
    """Writes made-up features as a network's last block gives them: at least 0, half of them 0, variance falling as 1 / rank."""
    rng = np.random.default_rng(2)
    rank = min(width, 512)
    strengths = (np.arange(1, rank + 1) ** -0.5).astype(np.float32)
    mixing = rng.standard_normal((rank, width)).astype(np.float32) * strengths[:, None] / np.sqrt((strengths**2).sum())
    centres = rng.standard_normal((classes, rank)).astype(np.float32) * _APART
    labels = rng.integers(0, classes, rows)
    np.save(labels_path, labels)
    with path.open("wb") as file:
        for start in range(0, rows, 8192):
            part = labels[start : start + 8192]
            latent = centres[part] + rng.standard_normal((len(part), rank), dtype=np.float32)
            noise = 0.1 * rng.standard_normal((len(part), width), dtype=np.float32)
            file.write(np.maximum(latent @ mixing + noise, 0).astype(np.float16).tobytes())


def fit_many_classes(path: Path, rows: int, new: int, width: int, memory: str, C: float) -> dict[str, Any]:
    """Fits one head from the first rows of a file, and bounds how far above the optimum it is; ``new`` more rows test it."""
    from featurepipe.heads import BlockLogisticRegression
    from featurepipe.heads.linear import passes

    counts = count_passes(passes.Passes, told=True)
    blocks: Any = FileBlocks(path, rows, width)
    BlockLogisticRegression().fit(np.eye(4), [0, 1, 0, 1])  # imports what is imported late
    idle = resident("VmRSS") / 1e6
    labels = np.load(path.with_name("labels.npy"))
    labels, unseen = labels[:rows], labels[rows:]
    counts.clear()
    start, cpu = time.perf_counter(), time.process_time()
    head = BlockLogisticRegression(C=C, memory=memory).fit(blocks, labels)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resident("VmHWM") / 1e6 - idle
    record.note(f"fitted in {seconds:.0f} s, {len(counts)} passes; bounding the gap in float64")
    value, gradient, right = 0.0, head.coef_.astype(np.float64), 0
    for first in range(0, rows, 4096):
        block = blocks.read(np.float64, rows=slice(first, min(first + 4096, rows)))
        own = np.arange(len(block)), np.searchsorted(head.classes_, labels[first : first + 4096])
        scores = block @ head.coef_.T + head.intercept_
        right += int((scores.argmax(axis=1) == own[1]).sum())
        scores -= scores.max(axis=1, keepdims=True)
        chances = np.exp(scores)
        totals = chances.sum(axis=1, keepdims=True)
        value += float((np.log(totals[:, 0]) - scores[own]).sum())
        chances /= totals
        chances[own] -= 1
        gradient += C * (chances.T @ block)
    value = C * value + float((head.coef_.astype(np.float64) ** 2).sum()) / 2
    answers = head.predict(FileBlocks(path, rows + new, width).read(np.float32, rows=slice(rows, rows + new)))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "passes": len(counts),
        "iterations": int(head.n_iter_[0]),
        "objective": value,
        "gap_at_most": float((gradient**2).sum() / 2 / value),
        "accuracy_on_its_rows": round(right / rows, 4),
        "accuracy_on_new_rows": round(float(np.mean(answers == unseen)), 4),
        "peak_mb": round(peak, 1),
    }


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--store", help="a store with features of Fashion-MNIST (see above)")
    parser.add_argument("--arrays", help="a folder with features.npy, float32, and labels.npy, class numbers")
    parser.add_argument("--dataset", default="fashion")
    parser.add_argument("--node", default="bottleneck")
    parser.add_argument("--split", default="train")
    parser.add_argument("--max-iter", type=int, default=10_000, help="of scikit-learn's fits")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the made-up features larger than memory")
    parser.add_argument("--values", type=int, default=6, help="how many values of C are fitted out of core")
    parser.add_argument("--dir", help="a folder with room for 2 GB (default: the system's temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="of ImageNet's rows and classes")
    parser.add_argument("--memory", default="6GB", help="what the head of ImageNet's size may take")
    parser.add_argument("--C", type=float, default=1.0, help="of the head of ImageNet's size")
    parser.add_argument("--only", choices=["sweep", "standardised", "memory", "imagenet"], help="one of the parts")


if __name__ == "__main__":
    record.main("bench_heads", __doc__ or "", add, run)
