"""What tuned layers learn: the loss that gradients are computed of, and the score by which epochs are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featurepipe.heads.statistics.multilabel import average_precisions
from featurepipe.training.tuning import error_of_a_share, error_of_r2

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
MEASURES = {"multiclass": "accuracy", "multilabel": "mAP", "continuous": "R2"}


@dataclass(frozen=True)
class TuningObjective:
    """What each of n rows should give, and how far off scores are.

    The loss is the mean over rows, weighted if there are weights: of classes the cross-entropy; of several labels the binary
    cross-entropy, averaged over the labels that are known; of numbers the squared error in units of their deviation.

    Attributes:
        target_type: ``"multiclass"``, ``"multilabel"`` or ``"continuous"``.
        answers: (n,) class numbers or numbers, or (n, K) labels: 1 present, 0 absent, NaN unknown.
        weights: (n,) how much each row counts in the loss, from 0; None if all count alike.
        centre: What numbers are measured from.
        scale: The unit that numbers are measured in.
    """

    target_type: str
    answers: npt.NDArray[Any]
    weights: Floats | None = None
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, target_type: str, answers: npt.NDArray[Any], weights: Floats | None, train: Rows) -> TuningObjective:
        """The objective of rows, with the unit of numbers from those that train."""
        if target_type != "continuous":
            return cls(target_type, answers, weights)
        known = answers[train]
        return cls(target_type, answers, weights, float(known.mean()), float(known.std()) or 1.0)

    @property
    def measure(self) -> str:
        """The name of the score."""
        return MEASURES[self.target_type]

    def error(self, score: float, rows: int) -> float:
        """The standard error of the score of so many rows."""
        return (error_of_r2 if self.target_type == "continuous" else error_of_a_share)(score, rows)

    def to_scores(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """A head in the unit of the target, as one whose outputs are the scores of `loss`."""
        return weight / self.scale, (bias - self.centre) / self.scale

    def to_target(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """The inverse of `to_scores`."""
        return weight * self.scale, bias * self.scale + self.centre

    def loss(self, scores: Tensor, rows: Rows, *, smoothing: float = 0.0) -> Tensor:
        """The mean loss of scores (m, K), (m, 1) for numbers.

        Args:
            scores: Of some rows.
            rows: (m,) which rows these are.
            smoothing: Share of the answer that is spread over all classes (Szegedy et al., "Rethinking the Inception
                Architecture for Computer Vision", CVPR 2016); of no effect on labels and numbers.
        """
        each = self._each(scores, rows, smoothing)
        if self.weights is None:
            return each.mean()
        weights = torch.from_numpy(self.weights[rows]).to(each)
        return (each * weights).sum() / weights.sum().clamp(min=1e-12)

    def mixed_loss(self, scores: Tensor, rows: Rows, share: float, *, smoothing: float = 0.0) -> Tensor:
        """The mean loss of scores of mixed inputs: of both answers, each by its share, which is that of the mixed answer.

        Of cross-entropies these are equal; squared errors differ by what no score changes, so gradients are equal.

        Args:
            scores: (m, K), of inputs that `mixed_inputs` made.
            rows: (m,) which rows the inputs were before.
            share: Of the input's own row; the rest is that of the row before it.
            smoothing: As for `loss`.
        """
        own, other = (self.loss(scores, each, smoothing=smoothing) for each in (rows, np.roll(rows, 1)))
        return torch.lerp(other, own, share)

    def total(self, rows: Rows) -> float:
        """How much some rows count in the loss."""
        return float(len(rows)) if self.weights is None else float(self.weights[rows].sum())

    def mean_loss(self, scores: npt.NDArray[np.float32], rows: Rows) -> float:
        """The mean loss of scores without gradients; all rows count alike."""
        return float(self._each(torch.from_numpy(scores), rows).mean())

    def sharpened_losses(self, scores: npt.NDArray[np.float32], rows: Rows) -> Floats:
        """The loss of each row, (m,), of that multiple of the scores, from 1/8 to 8, whose mean is least; numbers as is."""
        from scipy.optimize import minimize_scalar

        if self.target_type == "continuous":
            return self._losses(scores, rows)
        found = minimize_scalar(
            lambda power: self.mean_loss(np.float32(2.0**power) * scores, rows), bounds=(-3, 3), method="bounded"
        )
        return self._losses(np.float32(2.0**found.x) * scores, rows)

    def _losses(self, scores: npt.NDArray[np.float32], rows: Rows) -> Floats:
        return self._each(torch.from_numpy(scores), rows).numpy().astype(np.float64)

    def score(self, scores: npt.NDArray[np.float32], rows: Rows) -> float:
        """Accuracy, mean average precision over labels with both sides, or R2, of scores (m, K)."""
        answers = self.answers[rows]
        if self.target_type == "multiclass":
            return float((scores.argmax(axis=1) == answers).mean())
        if self.target_type == "multilabel":
            precisions = average_precisions(scores.astype(np.float64), answers)
            both = ((answers == 1).any(axis=0)) & ((answers == 0).any(axis=0))
            return float(precisions[both].mean()) if both.any() else 0.0
        guesses = scores[:, 0] * self.scale + self.centre
        spread = float(((answers - answers.mean()) ** 2).sum())
        return 1.0 - float(((answers - guesses) ** 2).sum()) / spread if spread else 0.0

    def _each(self, scores: Tensor, rows: Rows, smoothing: float = 0.0) -> Tensor:
        answers = self.answers[rows]
        if self.target_type == "multiclass":
            classes = torch.from_numpy(answers.astype(np.int64)).to(scores.device)
            return functional.cross_entropy(scores, classes, reduction="none", label_smoothing=smoothing)
        if self.target_type == "multilabel":
            known = torch.from_numpy(~np.isnan(answers)).to(scores)
            truth = torch.from_numpy(np.nan_to_num(answers)).to(scores)
            each = functional.binary_cross_entropy_with_logits(scores, truth, reduction="none") * known
            return each.sum(1) / known.sum(1).clamp(min=1)
        return (scores[:, 0] - torch.from_numpy((answers - self.centre) / self.scale).to(scores)) ** 2


def mixed_inputs(inputs: Tensor, share: float) -> Tensor:
    """Each input (m, ...) mixed with the one before it, the first with the last: float32, ``share`` of its own.

    Mixup (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018); of activations manifold mixup at one layer
    (Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States", ICML 2019).
    """
    own = inputs.float()
    return torch.lerp(own.roll(1, 0), own, share)


def mixing_share(alpha: float, draw: tuple[int, int, int]) -> float:
    """A draw of Beta(alpha, alpha), which follows from the seed of a run, the epoch and the step alone; 1 without alpha."""
    if not alpha:
        return 1.0
    return float(np.random.default_rng([*draw, _MIXES]).beta(alpha, alpha))


_MIXES = 1
"""Makes these draws others than those of images, which follow from three numbers."""
