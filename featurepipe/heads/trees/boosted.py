"""Boosted trees: xgboost with labels of any kind or numbers, from memory or streamed, out to bytes and back."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any, Self

import numpy as np
import xgboost
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from featurepipe.errors import BundleError, UsageError
from featurepipe.heads.blocks import Array, labels_of, targets_of
from featurepipe.heads.calibration import log_softmax, two_columns
from featurepipe.heads.inputs import (
    BlockClassifier,
    BlockRegressor,
    Codes,
    Floats,
    labels_from,
    map_rows,
    prediction_blocks,
    regression_data,
    training_data,
)
from featurepipe.heads.row_shards import RowShards, remote_row_shards
from featurepipe.heads.trees.distributed import Grown, Growth, Piece, Rendezvous, RowBatches, grow


class _Boosting(BaseEstimator):  # type: ignore[misc]
    """What trees for classes and for numbers share: growing them here or where the rows are, and their bytes."""

    n_features_in_: int

    def __init__(
        self,
        n_estimators: int = 300,
        *,
        learning_rate: float = 0.1,
        max_depth: int = 6,
        min_child_weight: float = 1.0,
        subsample: float = 1.0,
        colsample_bytree: float = 0.2,
        reg_lambda: float = 1.0,
        gamma: float = 0.0,
        max_bin: int = 64,
        early_stopping_rounds: int | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        memory: int | str | None = None,
    ) -> None:
        self.n_estimators = n_estimators
        self.learning_rate = learning_rate
        self.max_depth = max_depth
        self.min_child_weight = min_child_weight
        self.subsample = subsample
        self.colsample_bytree = colsample_bytree
        self.reg_lambda = reg_lambda
        self.gamma = gamma
        self.max_bin = max_bin
        self.early_stopping_rounds = early_stopping_rounds
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.memory = memory

    def booster_ubjson(self) -> bytes:
        """Returns the trees as UBJSON, xgboost's own format."""
        return bytes(self._booster().save_raw("ubj"))

    def without_booster(self) -> Self:
        """Returns a copy that has everything but the trees, and no object of xgboost."""
        stripped = copy.copy(self)
        stripped.__dict__.pop("booster_", None)
        return stripped

    def with_booster(self, raw: bytes) -> Self:
        """Returns a copy with trees from ``booster_ubjson``.

        Raises:
            BundleError: The bytes are no booster, or one for other classes or features.
        """
        try:
            booster = _booster(raw, self.n_jobs)
        except xgboost.core.XGBoostError as error:
            raise BundleError(
                f"these {len(raw)} bytes are no booster in UBJSON: {str(error).splitlines()[0]}"
            ) from error
        found, own = _learned(booster), (self.n_features_in_, self._outputs())
        if found != own:
            raise BundleError(
                f"the booster takes {found[0]} features for {found[1]}, the head {own[0]} for {own[1]}: it belongs to another "
                "head"
            )
        complete = copy.copy(self)
        complete.booster_ = booster
        return complete

    def _booster(self) -> Any:
        check_is_fitted(self)
        if not hasattr(self, "booster_"):
            raise UsageError("this head has no trees: put them back with with_booster(raw)")
        return self.booster_

    def _objective(self) -> dict[str, Any]:
        """The parameters that say what is minimised."""
        raise NotImplementedError

    def _outputs(self) -> str:
        """What the trees predict, in words."""
        raise NotImplementedError

    def _checked_labels(self, features: Any, labels: Any) -> Codes | Floats:
        """Class numbers or numbers (n,) of validation rows."""
        raise NotImplementedError

    def _check_watched(self, eval_set: tuple[Any, Any] | None) -> None:
        if self.early_stopping_rounds is not None and eval_set is None:
            raise UsageError("early_stopping_rounds needs validation data: fit(X, y, eval_set=(X_val, y_val))")

    def _learn(self, piece: Piece, eval_set: tuple[Any, Any] | None) -> Self:
        """Grows trees on checked rows and keeps them."""
        watched = None if eval_set is None else self._validation(*eval_set)
        grown = self._grown(piece, watched)
        self.booster_ = _booster(grown.trees, self.n_jobs)
        self.best_iteration_ = self.n_estimators - 1 if grown.best is None else grown.best
        self.evaluation_ = list(grown.history)
        return self

    def _sums(self, X: Any) -> Array:
        """The sum of the leaves of each row."""
        margins = partial(_margins, booster=self._booster(), rounds=self.best_iteration_ + 1)
        return map_rows(prediction_blocks(self, X), margins, memory=self.memory, dtype=np.float32)

    def _grown(self, piece: Piece, watched: Piece | None) -> Grown:
        """Grows the trees: here, or where the rows are if these are spread."""
        growth = Growth(
            self._parameters(),
            self.n_estimators,
            self.early_stopping_rounds,
            width=self.n_features_in_,
            watched=watched is not None,
            memory=self.memory,
        )
        shards = remote_row_shards(piece.blocks)
        if shards is None:
            matrix = self._matrix(piece)
            return grow(growth, self.n_jobs or 0, matrix, watched and self._matrix(watched, matrix))
        own = shards.beside(piece.labels, piece.weights)
        everyone: list[Grown] = own.gang_run(growth, Rendezvous, *_spread(watched))
        return next(grown for grown in everyone if grown.trees)

    def _matrix(self, piece: Piece, ref: Any = None) -> Any:
        batches = RowBatches([piece], self.n_features_in_, self.memory)
        return xgboost.QuantileDMatrix(batches, max_bin=self.max_bin, nthread=self.n_jobs, ref=ref)

    def _validation(self, features: Any, labels: Any) -> Piece:
        found = self._checked_labels(features, labels)
        blocks = prediction_blocks(self, features, fitted=False)
        if len(found) != blocks.shape[0]:
            raise UsageError(f"eval_set has {blocks.shape[0]} rows of features but {len(found)} labels")
        return Piece(blocks, found)

    def _parameters(self) -> dict[str, Any]:
        seed = self.random_state
        if not isinstance(seed, int):
            seed = int(check_random_state(seed).randint(2**31 - 1))
        return {
            "tree_method": "hist",
            "eta": self.learning_rate,
            "max_depth": self.max_depth,
            "min_child_weight": self.min_child_weight,
            "subsample": self.subsample,
            "colsample_bytree": self.colsample_bytree,
            "lambda": self.reg_lambda,
            "gamma": self.gamma,
            "max_bin": self.max_bin,
            "seed": seed,
            **self._objective(),
        }


class BoostedTrees(BlockClassifier, _Boosting):
    """Gradient-boosted trees (Chen & Guestrin 2016, "XGBoost: A scalable tree boosting system"), histogram method.

    What ``xgboost.XGBClassifier(tree_method="hist")`` learns, tree for tree, and besides:

    - Labels of any kind; ``classes_`` keeps them.
    - Features are handed over block by block (``QuantileDMatrix`` from a ``DataIter``), from an array and from ``Blocks``
      alike, and the trees do not depend on the blocks. What was read is never in memory as a whole; xgboost itself keeps its
      quantised features, measured at 2.2 bytes a value, and while it counts quantiles about 0.7 MB a feature.
    - Features that are spread over a cluster stay where they are: the workers grow the same trees concatenated, each with the
      quantised features of its own rows (``heads.boosted_together``). Quantiles are then joined from those of the workers, so
      trees differ from those grown in one place as they do between two draws of a sample.
    - The booster goes out as UBJSON and comes back: ``booster_ubjson()``, ``without_booster()`` (what is left: plain
      attributes, no xgboost object) and ``with_booster(raw)`` (a copy that predicts).

    Two defaults are not xgboost's: a network's features are many and say much the same, so a tree sees a fifth of them, in 64
    steps. On 10,000 x 1,280 features of Fashion-MNIST, 30 rounds so took a fifth of the time that half of the features in
    256 steps took, at higher accuracy.

    Args:
        n_estimators: Rounds; each adds one tree, or one for each of three or more classes.
        learning_rate: Weight of each tree.
        max_depth: Of a tree.
        min_child_weight: Least sum of Hessians in a leaf.
        subsample: Share of the rows that each round sees.
        colsample_bytree: Share of the features that each tree sees.
        reg_lambda: L2 penalty on leaves.
        gamma: Least gain of a split.
        max_bin: Steps that a feature's values are cut into, by quantiles.
        early_stopping_rounds: Stop after so many rounds without a better log-loss on ``eval_set``; None for never.
        class_weight: None, ``"balanced"`` or a dict from label to weight.
        random_state: Seed of the sampling.
        n_jobs: Threads; None for all.
        memory: What the blocks alive at one time may take (bytes or "512MB"); xgboost's own are extra.

    Attributes:
        classes_: (K,) labels.
        booster_: ``xgboost.Booster``.
        best_iteration_: The round (from 0) up to which trees are used.
        evaluation_: Log-loss on ``eval_set`` after each round; empty without one.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_estimators: int = 300,
        *,
        learning_rate: float = 0.1,
        max_depth: int = 6,
        min_child_weight: float = 1.0,
        subsample: float = 1.0,
        colsample_bytree: float = 0.2,
        reg_lambda: float = 1.0,
        gamma: float = 0.0,
        max_bin: int = 64,
        early_stopping_rounds: int | None = None,
        class_weight: Any = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        memory: int | str | None = None,
    ) -> None:
        super().__init__(
            n_estimators,
            learning_rate=learning_rate,
            max_depth=max_depth,
            min_child_weight=min_child_weight,
            subsample=subsample,
            colsample_bytree=colsample_bytree,
            reg_lambda=reg_lambda,
            gamma=gamma,
            max_bin=max_bin,
            early_stopping_rounds=early_stopping_rounds,
            random_state=random_state,
            n_jobs=n_jobs,
            memory=memory,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, eval_set: tuple[Any, Any] | None = None) -> Self:
        """Grows the trees.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.
            sample_weight: (n,) or one number.
            eval_set: Features and labels of validation images (labels None: those of the features); with
                ``early_stopping_rounds`` they decide how many rounds are used. In a pipeline they must be transformed
                already.

        Raises:
            UsageError: One class only, a value is not finite, or early stopping has no validation data.
        """
        self._check_watched(eval_set)
        data = training_data(self, X, y, sample_weight=sample_weight, class_weight=self.class_weight)
        self.classes_ = data.classes
        return self._learn(Piece(data.blocks, data.codes, data.weights), eval_set)

    def decision_function(self, X: Any) -> Array:
        """Returns the sum of the leaves: (n, K) log-odds up to a constant per row, or (n,) for two classes."""
        return self._sums(X)

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels."""
        return labels_from(self.decision_function(X), self.classes_)

    def predict_log_proba(self, X: Any) -> Floats:
        """Returns (n, K) log-probabilities, in the order of ``classes_``."""
        return log_softmax(two_columns(self.decision_function(X)))

    def predict_proba(self, X: Any) -> Floats:
        """Returns (n, K) probabilities, in the order of ``classes_``."""
        return np.asarray(np.exp(self.predict_log_proba(X)))

    def _objective(self) -> dict[str, Any]:
        if len(self.classes_) > 2:
            return {"objective": "multi:softprob", "eval_metric": "mlogloss", "num_class": len(self.classes_)}
        return {"objective": "binary:logistic", "eval_metric": "logloss"}

    def _outputs(self) -> str:
        return f"{len(self.classes_)} classes"

    def _checked_labels(self, features: Any, labels: Any) -> Codes:
        found = np.asarray(labels_of(features, labels))
        strange = sorted({str(label) for label in found[~np.isin(found, self.classes_)]})
        if strange:
            raise UsageError(
                f"eval_set has labels that the training rows lack: {', '.join(strange[:5])}; validate on the classes trained on"
            )
        return np.searchsorted(self.classes_, found)


class BoostedRegressor(BlockRegressor, _Boosting):
    """Gradient-boosted trees for a number: what ``xgboost.XGBRegressor(tree_method="hist")`` learns, tree for tree.

    Minimises ``sum_i(w_i * (f(x_i) - y_i)^2) / 2`` plus the penalties on leaves (``reg_lambda``, ``gamma``), where f is the
    targets' weighted mean and the sum of the trees. Everything else is as in ``BoostedTrees``. xgboost computes in float32, so
    targets are centred here and the mean is added to the predictions: of a large number with small differences, such as a
    time, the differences count.

    Args:
        n_estimators: Rounds; each adds one tree.
        learning_rate: Weight of each tree.
        max_depth: Of a tree.
        min_child_weight: Least sum of Hessians (here: of weights) in a leaf.
        subsample: Share of the rows that each round sees.
        colsample_bytree: Share of the features that each tree sees.
        reg_lambda: L2 penalty on leaves.
        gamma: Least gain of a split.
        max_bin: Steps that a feature's values are cut into, by quantiles.
        early_stopping_rounds: Stop after so many rounds without a smaller root mean squared error on ``eval_set``; None for
            never.
        random_state: Seed of the sampling.
        n_jobs: Threads; None for all.
        memory: What the blocks alive at one time may take (bytes or "512MB"); xgboost's own are extra.

    Attributes:
        offset_: Weighted mean of the targets, which the trees' sum is added to.
        booster_: ``xgboost.Booster``.
        best_iteration_: The round (from 0) up to which trees are used.
        evaluation_: Root mean squared error on ``eval_set`` after each round; empty without one.
        n_features_in_: D.
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, eval_set: tuple[Any, Any] | None = None) -> Self:
        """Grows the trees.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None takes the targets of a ``FeatureSet``.
            sample_weight: (n,) or one number.
            eval_set: Features and numbers of validation images; see ``BoostedTrees.fit``.

        Raises:
            UsageError: A target that is missing, infinite or no number, the same number in every row, a feature that is not
                finite, or early stopping without validation data.
        """
        self._check_watched(eval_set)
        data = regression_data(self, X, y, sample_weight=sample_weight)
        self.offset_ = data.mean
        return self._learn(Piece(data.blocks, data.targets - self.offset_, data.weights), eval_set)

    def predict(self, X: Any) -> Floats:
        """Returns (n,) float64 numbers."""
        return np.asarray(self._sums(X), np.float64) + self.offset_

    def _objective(self) -> dict[str, Any]:
        return {"objective": "reg:squarederror", "eval_metric": "rmse", "base_score": 0.0}

    def _outputs(self) -> str:
        return "a number"

    def _checked_labels(self, features: Any, labels: Any) -> Floats:
        return targets_of(features, labels) - self.offset_


def _margins(block: Array, *, booster: Any, rounds: int) -> Array:
    return np.asarray(booster.inplace_predict(block, iteration_range=(0, rounds), predict_type="margin"))


def _booster(raw: bytes, threads: int | None) -> Any:
    booster = xgboost.Booster()
    booster.load_model(bytearray(raw))
    booster.set_param({"nthread": threads or 0})
    return booster


def _spread(watched: Piece | None) -> list[RowShards]:
    """The row shards of validation rows, with their labels.

    Raises:
        UsageError: they are not spread as the training rows are.
    """
    if watched is None:
        return []
    shards = remote_row_shards(watched.blocks)
    if shards is None:
        raise UsageError("the training rows are spread over a cluster, those of eval_set are not: spread them, too")
    return [shards.beside(watched.labels)]


def _learned(booster: Any) -> tuple[int, str]:
    """Values a row that the trees take, and what they predict, in words."""
    learner = json.loads(booster.save_config())["learner"]
    classes = max(2, int(learner["learner_model_param"]["num_class"]))
    numeric = learner["learner_train_param"]["objective"].startswith("reg:squared")
    return booster.num_features(), "a number" if numeric else f"{classes} classes"
