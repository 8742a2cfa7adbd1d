"""How well features will serve a set of labels or numbers, without fitting a head: LogME and H-score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy import linalg

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, as_blocks, iterate, targets_of
from featurepipe.heads.moments import gram_of, refuse_non_finite
from featurepipe.heads.sampling import SomeRows, sampled_positions

Floats = npt.NDArray[np.float64]


def second_moments(blocks: Blocks, codes: Array, classes: int, memory: int | str | None = None) -> SecondMoments:
    """Computes the smaller of both forms.

    Args:
        blocks: (n, D) features. Where D <= n they are read in blocks, else at once, which takes less than (D, D).
        codes: (n,) class of each image, from 0 to ``classes - 1``.
        classes: Number of classes.
        memory: What the blocks alive at one time may take.

    Raises:
        ValueError: A feature is NaN or infinite.
    """
    if blocks.shape[1] > blocks.shape[0]:
        return _Kernel(blocks, codes, classes)
    return _Scatter(blocks, codes, classes, memory)


class SecondMoments(Protocol):
    """What the scores need to know of features: from second moments (D, D), or from a Gram matrix (n, n)."""

    images: int
    width: int
    counts: Floats  # (K,) images of the classes that have any

    @property
    def centred(self) -> Floats:
        """Scatter of the features, or inner products between the images; of centred features."""

    def spectrum(self) -> tuple[Floats, Floats]:
        """(r,) squared singular values of the features as they are, (K, r) squared projections of 0/1 labels."""

    def between(self) -> tuple[Floats, Floats]:
        """Left and right (K, m) for which ``left (a centred + b I)^-1 right'`` is that of the class means."""

    def quartic(self) -> float:
        """Sum over the images of the centred features' norms to the fourth."""


class _Scatter:
    """For D <= n: mean, scatter and class means, in one pass."""

    def __init__(self, blocks: Blocks, codes: Array, classes: int, memory: int | str | None) -> None:
        self.images, self.width = blocks.shape
        gram = gram_of(blocks, codes, classes, memory=memory)
        present = gram.class_weights > 0
        self.counts: Floats = gram.class_weights[present]
        self.centred: Floats = gram.scatter
        self._mean, self._means = gram.mean, gram.class_means[present]
        self._blocks, self._memory = blocks, memory

    def spectrum(self) -> tuple[Floats, Floats]:
        plain = self.centred + self.images * np.outer(self._mean, self._mean)
        values, vectors = eigen(plain)
        return values, (self._means * self.counts[:, None] @ vectors) ** 2 / values

    def between(self) -> tuple[Floats, Floats]:
        offsets = (self._means - self._mean) * np.sqrt(self.counts / self.images)[:, None]
        return offsets, offsets

    def quartic(self) -> float:
        total = 0.0
        for _, block in iterate(self._blocks, memory=self._memory, dtype=np.float64):
            centred = block - self._mean
            total += float((np.einsum("ij,ij->i", centred, centred) ** 2).sum())
        return total


class _Kernel:
    """For D > n: inner products between images."""

    def __init__(self, blocks: Blocks, codes: Array, classes: int) -> None:
        self.images, self.width = blocks.shape
        features = blocks.read(np.float64)
        refuse_non_finite(features)
        mean = features.mean(axis=0)
        features = features - mean
        self.centred: Floats = features @ features.T
        along_mean = features @ mean
        self._shift: Floats = along_mean[:, None] + along_mean + mean @ mean
        members = np.zeros((classes, self.images))
        members[codes, np.arange(self.images)] = 1
        self._members = members[members.any(axis=1)]
        self.counts: Floats = self._members.sum(axis=1)

    def spectrum(self) -> tuple[Floats, Floats]:
        values, vectors = eigen(self.centred + self._shift)
        return values, (self._members @ vectors) ** 2

    def between(self) -> tuple[Floats, Floats]:
        weights = self._members / np.sqrt(self.counts * self.images)[:, None]
        return weights @ self.centred, weights

    def quartic(self) -> float:
        return float((np.diagonal(self.centred) ** 2).sum())


def eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues and vectors of a positive semi-definite matrix, without those that are only rounding."""
    values, vectors = linalg.eigh(matrix, driver="evd")
    real = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return values[real], vectors[:, real]


Shrinkage = float | Literal["ledoit-wolf"]

_STEPS = 500  # of the fixed point; it takes ten where there is something to learn
_TOLERANCE = 1e-6  # relative change of the ratio, which changes the evidence by its square
_DECADES = 12  # how far the ratio may leave the largest squared singular value, either way


@dataclass(frozen=True)
class TransferScores:
    """Both scores of one set of features; higher is better.

    Attributes:
        log_me: See ``log_me``.
        h_score: See ``h_score``.
        images: How many images they were computed from.
    """

    log_me: float
    h_score: float
    images: int


def log_me(
    X: Blocks | Array,
    codes: npt.ArrayLike,
    classes: int,
    *,
    rows: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
) -> float:
    """Computes the logarithm of the maximum evidence of labels given features, per image.

    You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning": each class's 0/1 label is
    a linear function of the features with a Gaussian prior of precision alpha on its weights and Gaussian noise of
    precision beta; the evidence is what remains when the weights are integrated out, at the alpha and beta that
    maximise it. Those are found by the fixed-point iteration of You et al. 2022 ("Ranking and Tuning Pre-trained
    Models", JMLR 23), which needs only squared singular values of the features and the labels' projections on the
    singular vectors. There is no intercept, as in the paper. The iteration starts from the best of a grid, not from
    alpha = beta = 1: there may be several maxima, and which one is found must not depend on the features' scale.

    The determinant has all D eigenvalues. The authors' program leaves out D - n of them where D > n (their issue 23),
    so there its values differ from these.

    Args:
        X: (n, D) features, array or ``Blocks``. Where D <= n they are read in blocks and only a (D, D) matrix is held;
            else they are read at once, which takes less than that.
        codes: (n,) class of each image, from 0 to ``classes - 1``.
        classes: Number of classes; those without images are left out of the mean.
        rows: Use at most so many images, drawn by ``seed``: bounds the time, which grows with min(n, D) cubed. Compare
            scores of the same images only.
        seed: Of the draw.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Returns:
        The mean over classes, in nats per image; comparable between features of the same images and labels.

    Raises:
        UsageError: Codes do not fit, or fewer than two classes have images.
        ValueError: A feature is NaN or infinite.
    """
    return _log_me(_summary(X, codes, classes, rows, seed, memory))


def log_me_of_numbers(
    X: Blocks | Array,
    targets: npt.ArrayLike,
    *,
    rows: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
) -> float:
    """Computes the logarithm of the maximum evidence of a continuous target given features, per image.

    LogME's regression form (You et al. 2021): ``log_me`` with the target in place of a class's 0/1 label. The target is
    standardised first (mean 0, deviation 1), so that the result does not depend on its unit; the paper takes it as it is,
    without an intercept.

    Args:
        X: (n, D) features, array or ``Blocks``; read as in ``log_me``.
        targets: (n,) numbers.
        rows: Use at most so many images, drawn by ``seed``.
        seed: Of the draw.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Returns:
        In nats per image; comparable between features of the same images and targets.

    Raises:
        UsageError: There is not one finite number for each image, or all are the same.
        ValueError: A feature is NaN or infinite.
    """
    blocks, numbers = as_blocks(X), targets_of(None, targets)
    if numbers.shape != (blocks.shape[0],):
        raise UsageError(
            f"targets must be one for each of the {blocks.shape[0]} images, these have shape {numbers.shape}"
        )
    chosen = sampled_positions(len(numbers), rows, seed)
    if chosen is not None:
        blocks, numbers = SomeRows(blocks, chosen), numbers[chosen]
    if not len(numbers) or numbers.min() == numbers.max():
        raise UsageError("images with one and the same number tell nothing about transfer; give at least two numbers")
    numbers = ((numbers - numbers.mean()) / numbers.std())[None]
    sigma, projected = _spectrum_of_numbers(blocks, numbers, memory)
    return _max_evidence(blocks.shape[0], sigma, projected, (numbers**2).sum(axis=1))


def log_me_of_labels(
    X: Blocks | Array,
    truth: npt.ArrayLike,
    *,
    rows: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
) -> float:
    """Computes LogME for several labels: the mean over labels of the evidence of their 0/1 column, on the images that know it.

    Where every image has one label and all are known, it is ``log_me`` of classes. Labels that are known of the same images share
    a decomposition; of P such sets of images each is bounded to ``rows / P**(1/3)`` of them (500 at least), so that the time does
    not grow with P.

    Args:
        X: (n, D) features, array or ``Blocks``; read as in ``log_me``.
        truth: (n, K): 1 present, 0 absent, NaN unknown.
        rows: Use at most so many images, drawn by ``seed``.
        seed: Of the draw.
        memory: What the blocks alive at one time may take (bytes or "512MB").

    Returns:
        In nats per image; comparable between features of the same images and labels.

    Raises:
        UsageError: There is no row of labels for each image, or no label with known images of both sides.
        ValueError: A feature is NaN or infinite.
    """
    blocks, wanted = as_blocks(X), np.asarray(truth, np.float64)
    if wanted.ndim != 2 or len(wanted) != blocks.shape[0]:
        raise UsageError(f"labels must be ({blocks.shape[0]}, K), these have shape {wanted.shape}")
    known, positive = ~np.isnan(wanted), wanted == 1
    both = positive.any(axis=0) & (known & ~positive).any(axis=0)
    if not both.any():
        raise UsageError("no label has known images of both sides; which features suit it cannot be said")
    sets, number = np.unique(known[:, both], axis=1, return_inverse=True)
    most = None if rows is None else max(min(rows, _LEAST_KNOWN), int(rows / sets.shape[1] ** (1 / 3)))
    found: list[float] = []
    for place, inside in enumerate(sets.T):
        images = np.flatnonzero(inside)
        some = sampled_positions(len(images), most, seed)
        images = images if some is None else images[some]
        own = positive[np.ix_(images, np.flatnonzero(both)[number.reshape(-1) == place])].T.astype(np.float64)
        sigma, projected = _spectrum_of_numbers(SomeRows(blocks, images), own, memory)
        counts = own.sum(axis=1)
        found += [_max_evidence(len(images), sigma, projected[[k]], counts[[k]]) for k in range(len(own)) if counts[k]]
    return float(np.mean(found))


_LEAST_KNOWN = 500  # images that know a label, from which its evidence is computed


def _spectrum_of_numbers(blocks: Blocks, targets: Floats, memory: int | str | None) -> tuple[Floats, Floats]:
    """(r,) squared singular values of the features, and (T, r) squared projections of (T, n) targets on their vectors."""
    images, width = blocks.shape
    if width > images:
        features = blocks.read(np.float64)
        refuse_non_finite(features)
        values, vectors = eigen(features @ features.T)
        return values, (targets @ vectors) ** 2
    gram = gram_of(blocks, targets=targets, memory=memory)
    values, vectors = eigen(gram.scatter + images * np.outer(gram.mean, gram.mean))
    products = gram.target_products + np.outer(gram.target_sums, gram.mean)
    return values, (products @ vectors) ** 2 / values


def h_score(
    X: Blocks | Array,
    codes: npt.ArrayLike,
    classes: int,
    *,
    shrinkage: Shrinkage = "ledoit-wolf",
    rows: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
) -> float:
    """Computes the H-score: the share of the features' variance that lies between classes, summed over directions.

    Bao et al. 2019 ("An Information-Theoretic Approach to Transferability in Task Transfer Learning"):
    ``trace(cov(X)^-1 cov(E[X | class]))``, between 0 and ``classes - 1``. With few images to many values it only grows
    with D, so by default both covariances are regularised as Ibrahim et al. 2021 do ("Newer is not always better:
    Rethinking transferability metrics, their peculiarities, stability and performance"):
    ``trace(S^-1 (1 - a) cov(E[X | class]))`` with ``S = (1 - a) cov(X) + a trace(cov(X)) / D I`` and the share a of
    Ledoit & Wolf 2004 ("A well-conditioned estimator for large-dimensional covariance matrices").

    ``shrinkage`` is the share a, from 0 to 1 or ``ledoit-wolf``; 0 gives Bao's score, with a pseudo-inverse. All other
    arguments are those of ``log_me``.

    Returns:
        The score; 0 for constant features.

    Raises:
        UsageError: Codes or shrinkage do not fit, or fewer than two classes have images.
        ValueError: A feature is NaN or infinite.
    """
    _check_shrinkage(shrinkage)
    return _h_score(_summary(X, codes, classes, rows, seed, memory), shrinkage)


def transfer_scores(
    X: Blocks | Array,
    codes: npt.ArrayLike,
    classes: int,
    *,
    shrinkage: Shrinkage = "ledoit-wolf",
    rows: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
) -> TransferScores:
    """Computes ``log_me`` and ``h_score`` from one Gram matrix; arguments and errors as there."""
    _check_shrinkage(shrinkage)
    summary = _summary(X, codes, classes, rows, seed, memory)
    return TransferScores(_log_me(summary), _h_score(summary, shrinkage), summary.images)


def _summary(
    X: Blocks | Array, codes: npt.ArrayLike, classes: int, rows: int | None, seed: int, memory: int | str | None
) -> SecondMoments:
    blocks = as_blocks(X)
    truth = _checked_codes(codes, classes, blocks.shape[0])
    chosen = sampled_positions(len(truth), rows, seed)
    if chosen is not None:
        blocks, truth = SomeRows(blocks, chosen), truth[chosen]
    if len(np.unique(truth)) < 2:
        raise UsageError("images of one class only tell nothing about transfer; two classes or more need images")
    return second_moments(blocks, truth, classes, memory)


def _checked_codes(codes: npt.ArrayLike, classes: int, count: int) -> npt.NDArray[np.int64]:
    truth = np.asarray(codes)
    if truth.shape != (count,):
        raise UsageError(f"codes must be one for each of the {count} images, these have shape {truth.shape}")
    if not np.issubdtype(truth.dtype, np.integer) or (count and (truth.min() < 0 or truth.max() >= classes)):
        raise UsageError(f"codes must be integers from 0 to {classes - 1}")
    return truth.astype(np.int64)


def _check_shrinkage(shrinkage: Any) -> None:
    if shrinkage != "ledoit-wolf" and not (isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1):
        raise UsageError(f"shrinkage={shrinkage!r} must be a number from 0 to 1, or 'ledoit-wolf'")


def _log_me(summary: SecondMoments) -> float:
    sigma, projected = summary.spectrum()
    return _max_evidence(summary.images, sigma, projected, summary.counts)


def _max_evidence(images: int, sigma: Floats, projected: Floats, squares: Floats) -> float:
    """The evidence, of targets with these sums of (K,) squares, at the ratio t = alpha / beta to which the fixed point leads.

    It may have several maxima and the iteration finds the one nearby, so it starts from the best of a grid.
    """
    labels = _Labels(images, sigma, projected, np.maximum(squares - projected.sum(axis=1), 0))
    if not len(sigma):
        return float(labels.evidence(np.ones((len(projected), 1))).mean())
    grid = sigma[-1] * np.logspace(-_DECADES, _DECADES, 4 * _DECADES + 1)
    tried = np.stack([labels.evidence(np.full((len(projected), 1), ratio)) for ratio in grid])
    ratio = grid[tried.argmax(axis=0)][:, None]
    for _ in range(_STEPS):
        new = np.clip(labels.next_ratio(ratio), grid[0], grid[-1])
        done = np.abs(new - ratio) <= _TOLERANCE * ratio
        ratio = new
        if done.all():
            break
    return float(labels.evidence(ratio).mean())


@dataclass(frozen=True)
class _Labels:
    """K targets (0/1 labels, or numbers) as linear functions of features with r singular values.

    Attributes:
        images: n.
        sigma: (r,) squared singular values.
        projected: (K, r) squared projections of the labels on the singular vectors.
        outside: (K,) what of their squares lies outside.
    """

    images: int
    sigma: Floats
    projected: Floats
    outside: Floats

    def evidence(self, ratio: Floats) -> Floats:
        """(K,) log evidence per image at the ratio (K, 1), with the best beta for it: n / (residual + t |weights|^2).

        Written so, eigenvalues that are 0 add nothing, however many they are, and neither alpha nor beta can overflow:
        t goes to infinity where features are useless, and to 0 where there is no noise.
        """
        n = self.images
        cost = self.outside + (self.projected * (ratio / (self.sigma + ratio))).sum(axis=1)
        likelihood = n * np.log(n / (2 * np.pi * cost)) - n
        found: Floats = (likelihood - np.log1p(self.sigma / ratio).sum(axis=1)) / (2 * n)
        return found

    def next_ratio(self, ratio: Floats) -> Floats:
        """(K, 1) gamma residual / (|weights|^2 (n - gamma)), the fixed point's step."""
        shrunk = ratio / (self.sigma + ratio)
        rest = self.images - len(self.sigma) + shrunk.sum(axis=1)  # n - gamma, without cancelling digits
        residual = self.outside + (self.projected * shrunk**2).sum(axis=1)
        weights = (self.projected * self.sigma / (self.sigma + ratio) ** 2).sum(axis=1)
        with np.errstate(divide="ignore", over="ignore"):
            step: Floats = (self.images - rest) * residual / (weights * rest)
        return step[:, None]


def _h_score(summary: SecondMoments, shrinkage: Shrinkage) -> float:
    share = _ledoit_wolf_share(summary) if shrinkage == "ledoit-wolf" else float(shrinkage)
    left, right = summary.between()
    mean_variance = float(np.trace(summary.centred)) / (summary.images * summary.width)
    solved = _solve(summary.centred * ((1 - share) / summary.images), share * mean_variance, right)
    return (1 - share) * float((left * solved).sum())


def _solve(matrix: Floats, ridge: float, right: Floats) -> Floats:
    """``right (matrix + ridge I)^-1``, with the pseudo-inverse where there is no ridge."""
    if ridge > 0:
        matrix[np.diag_indices_from(matrix)] += ridge
        solved: Floats = linalg.solve(matrix, right.T, assume_a="pos").T
        return solved
    values, vectors = eigen(matrix)
    inverted: Floats = (right @ vectors / values) @ vectors.T
    return inverted


def _ledoit_wolf_share(summary: SecondMoments) -> float:
    """The share of the identity that brings the covariance nearest to the true one (their lemmas 3.3 and 3.4)."""
    n, width = summary.images, summary.width
    if width == 1:
        return 0.0  # any multiple of the identity is the same matrix
    squared = float((summary.centred**2).sum()) / n**2  # of the covariance: scatter and Gram matrix have the same
    noise = (summary.quartic() / n - squared) / (width * n)
    distance = (squared - (float(np.trace(summary.centred)) / n) ** 2 / width) / width
    return 0.0 if noise <= 0 or distance <= 0 else min(1.0, noise / distance)
