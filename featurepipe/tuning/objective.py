"""What is learned while layers are tuned: the loss and the score of classes, of several labels, and of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featurepipe.heads.statistics.multilabel import average_precisions

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

    def to_scores(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """A head in the unit of the target, as one whose outputs are the scores of `loss`."""
        return weight / self.scale, (bias - self.centre) / self.scale

    def to_target(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """The inverse of `to_scores`."""
        return weight * self.scale, bias * self.scale + self.centre

    def loss(self, scores: Tensor, rows: Rows) -> Tensor:
        """The mean loss of scores (m, K), (m, 1) for numbers."""
        each = self._each(scores, rows)
        if self.weights is None:
            return each.mean()
        weights = torch.from_numpy(self.weights[rows]).to(each)
        return (each * weights).sum() / weights.sum().clamp(min=1e-12)

    def mean_loss(self, scores: npt.NDArray[np.float32], rows: Rows) -> float:
        """The mean loss of scores without gradients; all rows count alike."""
        return float(self._each(torch.from_numpy(scores), rows).mean())

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

    def _each(self, scores: Tensor, rows: Rows) -> Tensor:
        answers = self.answers[rows]
        if self.target_type == "multiclass":
            return functional.cross_entropy(scores, torch.from_numpy(answers.astype(np.int64)), reduction="none")
        if self.target_type == "multilabel":
            known = torch.from_numpy(~np.isnan(answers)).to(scores)
            truth = torch.from_numpy(np.nan_to_num(answers)).to(scores)
            each = functional.binary_cross_entropy_with_logits(scores, truth, reduction="none") * known
            return each.sum(1) / known.sum(1).clamp(min=1)
        return (scores[:, 0] - torch.from_numpy((answers - self.centre) / self.scale).to(scores)) ** 2
