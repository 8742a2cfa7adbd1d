"""A training with everything settled, and the recipe of its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

from featurepipe.display import counted
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor
from featurepipe.heads.families import PROTOCOLS, HeadFamily, family_for, make_head
from featurepipe.training.cost import Cost
from featurepipe.training.splits import Division, Fold, class_counts, folds_of

if TYPE_CHECKING:
    from featurepipe.execution import SpreadFeatures
    from featurepipe.store.views import FeatureSet

FOLDS = 5


@dataclass(frozen=True)
class Recipe:
    """Which head to fit.

    Attributes:
        head: name of the family.
        target_type: of what it learns, a key of `featurepipe.heads.families.FAMILIES`.
        params: of the final estimator.
        pca: components, or share of the variance, to keep; None for no PCA.
        class_weight: ``balanced`` or None.
        seed: of the estimator.
        protocol: a key of `featurepipe.heads.families.PROTOCOLS`, which says what is searched, how rows are scaled and weigh;
            None for none.
        scale: whether features are standardised, where no protocol says how; None as is usual for the family.
    """

    head: str
    params: Mapping[str, Any]
    pca: float | None = None
    class_weight: str | None = None
    seed: int = 0
    target_type: str = "multiclass"
    protocol: str | None = None
    scale: bool | None = None

    @property
    def grid(self) -> Mapping[str, Sequence[Any]]:
        """What a search varies."""
        return self.family.grid if self.protocol is None else {"C": PROTOCOLS[self.protocol]["Cs"]}

    @property
    def folds(self) -> int | None:
        """Of a search, where a protocol says how many."""
        return None if self.protocol is None else int(PROTOCOLS[self.protocol]["folds"])

    @property
    def family(self) -> HeadFamily:
        """The family of that name for that type of target."""
        return family_for(self.head, self.target_type)

    def with_params(self, params: Mapping[str, Any]) -> Recipe:
        """The same with other parameters on top."""
        return replace(self, params={**self.params, **params})

    def options(self, memory: int | None) -> dict[str, Any]:
        """What `make_head` takes besides the name and the final estimator's parameters."""
        weights = self.class_weight if self.protocol is None else dict(PROTOCOLS[self.protocol]["class_weight"])
        return {
            "target_type": self.target_type,
            "scale": self.scale if self.protocol is None else "rows",
            "pca": self.pca,
            "class_weight": weights,
            "random_state": self.seed,
            "memory": memory,
        }

    def make(self, *, out_of_core: bool = False, memory: int | None = None) -> BaseEstimator:
        """An unfitted estimator."""
        return make_head(self.head, out_of_core=out_of_core, **self.options(memory), **self.params)


def weighted(head: BaseEstimator, weights: npt.NDArray[np.float64] | None) -> dict[str, Any]:
    """The keyword arguments of ``head.fit`` that give its last step the rows' weights; none where there are none."""
    if weights is None:
        return {}
    return {f"{head.steps[-1][0]}__sample_weight" if hasattr(head, "steps") else "sample_weight": weights}


@dataclass(frozen=True)
class Task:
    """A training with everything settled.

    Attributes:
        features: the labelled rows of the dataset.
        classes: names of the classes of the training rows, sorted; of several labels their names; none where numbers are learned.
        codes: (n,) number of each row's class, -1 for a class that no training row has; of numbers that of the quantile bin, of
            several labels that of the rarest that the row has.
        division: which rows train, validate and test.
        cost: memory and time, and so how the fits run.
        unlabelled: images left out because they have no label.
        seed: of all draws.
        executor: does what can be done elsewhere.
        targets: (n,) numbers to learn, or (n, K) labels: 1 present, 0 absent, NaN unknown; None for classes.
        is_ordered: whether the classes are in an order, the lowest first.
        left_out: classes of too few images to be learned, and how many each has.
    """

    features: FeatureSet
    classes: tuple[str, ...]
    codes: npt.NDArray[np.int64]
    division: Division
    cost: Cost
    unlabelled: int
    seed: int
    executor: Executor = field(default_factory=LocalExecutor)
    targets: npt.NDArray[Any] | None = None
    is_ordered: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_numeric(self) -> bool:
        """Whether numbers are learned, not classes."""
        return self.targets is not None and self.targets.ndim == 1

    @property
    def is_multilabel(self) -> bool:
        """Whether each image has several labels."""
        return self.targets is not None and self.targets.ndim == 2

    def answers(self, positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What is learned of some rows: (m,) labels or numbers, or (m, K) several labels."""
        return self.features.take(positions).labels if self.targets is None else self.targets[positions]

    def weights(self, positions: npt.NDArray[Any]) -> npt.NDArray[np.float64] | None:
        """How much each of some rows counts while a head is fitted, (m,); None if all count alike."""
        return self.features.take(positions).weights

    def rows(self, positions: npt.NDArray[Any]) -> FeatureSet | SpreadFeatures:
        """Some rows, to be learned from or scored: spread over the workers if that is how the fits run."""
        chosen = self.features.take(positions)
        rows: FeatureSet | SpreadFeatures = self.executor.rows(chosen) if self.cost.is_spread else chosen
        return rows

    def folds(self, count: int | None = None) -> Sequence[Fold]:
        """(training, validation) positions for a search: the dataset's own validation split, or folds by class and key.

        Args:
            count: folds to make of the training rows whatever the splits are; None to take a validation split, or 5.
        """
        division = self.division
        if count is None and len(division.validation) and not division.is_carved:
            folds: Sequence[Fold] = [(division.train, division.validation)]
        else:
            folds = folds_of(self.features, self.codes, division.final, folds=count or FOLDS, seed=self.seed)
        usable = [(train, check[np.isin(self.codes[check], self.codes[train])]) for train, check in folds]
        if self.is_multilabel:
            usable = list(folds)  # of each label those folds count that have both sides of it
        usable = [fold for fold in usable if len(fold[1]) and len(np.unique(self.answers(fold[0]))) > 1]
        if not usable:
            images = counted(len(division.final), "training image")
            raise UsageError(
                Message(
                    f"{images} {'is' if images.startswith('1 ') else 'are'} too few to tune on: no part can be set aside that "
                    f"leaves two {'different numbers' if self.is_numeric else 'classes'}; leave ",
                    Option("tune"),
                    " out, or give more images",
                )
            )
        return usable

    def counts(self) -> dict[str, int]:
        """How many images take which part."""
        division = self.division
        return {
            "train": len(division.final),
            "validation": len(division.validation),
            "test": len(division.test),
            "unlabelled": self.unlabelled,
            "rejected": self.features.rejected,
            "duplicates": self.features.take(division.final).duplicates,
        }

    def _learned(self) -> dict[str, Any]:
        rows = self.division.final
        if self.targets is None:
            counts = class_counts(self.codes[rows], self.classes)
            return {"classes": counts, **({"ordered": list(self.classes)} if self.is_ordered else {})}
        if self.is_multilabel:
            return {"classes": {}, "multilabel": counts_of_labels(self.targets[rows], self.classes)}
        return {"classes": {}, "target": spread_of(self.targets[rows])}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: what a dry run prints."""
        return {
            "dataset": self.features.origin.dataset,
            "columns": list(self.features.columns),
            **self._learned(),
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
            "counts": self.counts(),
            **({} if self.features.groups is None else {"groups": self.division.groups(self.features.groups)}),
            "split": self.division.text,
            "cost": {**self.cost.as_dict(), "text": self.cost.text},
        }


def counts_of_labels(targets: npt.NDArray[Any], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """How many images have each label, have it not, or are not known to."""
    return {
        name: {
            "positive": int((column == 1).sum()),
            "negative": int((column == 0).sum()),
            "unknown": int(np.isnan(column).sum()),
        }
        for name, column in zip(names, targets.T, strict=True)
    }


def spread_of(numbers: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean, deviation, least and greatest of some numbers."""
    return {
        "mean": float(numbers.mean()),
        "deviation": float(numbers.std()),
        "least": float(numbers.min()),
        "greatest": float(numbers.max()),
    }
