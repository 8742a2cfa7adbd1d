"""Several labels of each row: nearest neighbours and boosted trees, and a value of C for each label by its average precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from sklearn.base import clone
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import check_is_fitted

from featurepipe.errors import BundleError, UsageError
from featurepipe.heads.blocks import Array, is_blocks
from featurepipe.heads.families import ROUGH, VOC07
from featurepipe.heads.inputs import Floats, map_rows, prediction_blocks
from featurepipe.heads.label_matrix import LabelMatrix, MultilabelClassifier, labels_given
from featurepipe.heads.linear.multilabel import MultilabelLinearClassifier, MultilabelLinearSVC, fit_label_path
from featurepipe.heads.neighbours import rows_kept
from featurepipe.heads.preprocessing import UnitRows
from featurepipe.heads.row_shards import remote_row_shards
from featurepipe.heads.sampling import SomeRows
from featurepipe.heads.statistics.multilabel import average_precisions
from featurepipe.heads.trees.boosted import BoostedTrees

_DISTANCE_BYTES = 64 << 20  # of the distances from some rows to all that are kept


class MultilabelNeighbours(MultilabelClassifier):
    """Share of the nearest training rows that have each label, by brute force; keeps all training rows.

    A label's share is ``sum_j(u_j * y_jk) / sum_j(u_j)`` over the ``n_neighbors`` nearest of the rows for which that label is
    known, with u 1 or the inverse distance: for each label scikit-learn's ``KNeighborsClassifier`` fitted to its known rows.
    Distances are worked out once for all labels.

    Args:
        n_neighbors: How many vote on a label.
        weights: ``"uniform"`` or ``"distance"``.
        metric: A metric that scikit-learn's brute force knows.
        p: Power of the Minkowski metric.
        label_names: (K,); by default the columns of a data frame, those of the features, or numbers from 0.
        one_sided: What to do with a label that every known row has, or none: "error", or "drop" to leave it out with a
            warning.
        n_jobs: Threads, as in scikit-learn.
        memory: What the kept rows, and the blocks predicted on, may take each (bytes or "2GB"); None for no bound.

    Attributes:
        classes_: (K,) names of the labels.
        rows_: (n, D) that are kept, float32 where features are float16 or float32.
        positive_: (K, n) int8, 1 where a row has the label.
        known_: (K, n) bool, or None if everything is known.
        dropped_labels_: Names of the labels left out.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: str = "uniform",
        metric: str = "minkowski",
        p: float = 2,
        label_names: Sequence[str] | None = None,
        one_sided: str = "error",
        n_jobs: int | None = None,
        memory: int | str | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.weights = weights
        self.metric = metric
        self.p = p
        self.label_names = label_names
        self.one_sided = one_sided
        self.n_jobs = n_jobs
        self.memory = memory

    def fit(self, X: Any, y: Any = None) -> Self:
        """Keeps the rows.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n, K) labels: 1 present, 0 absent, NaN unknown; None takes those of a ``FeatureSet``.

        Raises:
            UsageError: Features or labels that cannot be learned from, rows that do not fit into ``memory``, or a label known
                for fewer rows than there are to be neighbours.
        """
        if self.weights not in ("uniform", "distance"):
            raise UsageError(
                f"weights={self.weights!r} of knn for several labels: choices are 'uniform' and 'distance'"
            )
        data = self._learn(X, y, None)
        _check_neighbours(data, self.n_neighbors)
        self.rows_ = rows_kept(data.blocks, self.memory, "knn", "logistic, ridge")
        self.positive_, self.known_ = data.positive, data.known
        return self

    def predict_proba(self, X: Any) -> Floats:
        """Returns the (n, K) shares of the neighbours that have each label."""
        blocks = prediction_blocks(self, X)
        rows = max(1, min(2048, _DISTANCE_BYTES // (8 * len(self.rows_))))
        return np.asarray(map_rows(blocks, self._shares, rows=rows))

    def decision_function(self, X: Any) -> Floats:
        """Returns the (n, K) log-odds of the shares, with one neighbour more that is half of each side."""
        return neighbour_log_odds(self.predict_proba(X), self.n_neighbors)

    def _shares(self, block: Array) -> Floats:
        shares = np.empty((len(block), len(self.positive_)))
        if not len(block):
            return shares
        if self.known_ is None:
            search = NearestNeighbors(
                n_neighbors=self.n_neighbors, algorithm="brute", metric=self.metric, p=self.p, n_jobs=self.n_jobs
            ).fit(self.rows_)
            distances, chosen = search.kneighbors(block)
            return self._votes(distances, chosen, np.arange(len(self.positive_)))
        everything = self._distances(block)
        patterns, pattern = np.unique(self.known_, axis=0, return_inverse=True)
        for number, known in enumerate(patterns):
            columns, labels = np.flatnonzero(known), np.flatnonzero(pattern.reshape(-1) == number)
            distances = everything[:, columns]
            nearest = np.argpartition(distances, self.n_neighbors - 1, axis=1)[:, : self.n_neighbors]
            shares[:, labels] = self._votes(np.take_along_axis(distances, nearest, axis=1), columns[nearest], labels)
        return shares

    def _distances(self, block: Array) -> Floats:
        euclidean = self.metric == "minkowski" and self.p == 2
        more = {"p": self.p} if self.metric == "minkowski" and not euclidean else {}
        metric = "euclidean" if euclidean else self.metric
        return np.asarray(pairwise_distances(block, self.rows_, metric=metric, n_jobs=self.n_jobs, **more))

    def _votes(self, distances: Floats, chosen: npt.NDArray[np.intp], labels: npt.NDArray[np.intp]) -> Floats:
        """The shares (m, L) of labels among (m, k) neighbours; those at no distance outvote all others, as in scikit-learn."""
        votes = self.positive_[labels][:, chosen].astype(np.float64)  # (L, m, k)
        if self.weights == "uniform":
            return np.asarray(votes.mean(axis=2).T)
        same = distances == 0
        with np.errstate(divide="ignore"):
            weights = np.where(same.any(axis=1)[:, None], same, 1 / distances)
        return np.asarray(((votes * weights).sum(axis=2) / weights.sum(axis=1)).T)


def _check_neighbours(data: LabelMatrix, neighbours: int) -> None:
    rows = data.positive.shape[1]
    counts = np.full(len(data.names), rows) if data.known is None else data.known.sum(axis=1)
    if neighbours < 1 or neighbours > counts.min():
        few = int(counts.argmin())
        raise UsageError(
            f"n_neighbors={neighbours}: give a number from 1 to {counts.min()}, the rows for which label "
            f"{data.names.tolist()[few]!r} is known"
        )


def neighbour_log_odds(shares: Floats, neighbours: int) -> Floats:
    """Log-odds of shares of so many neighbours, with one more that is half of each side, so that none is infinite."""
    having = shares * neighbours + 0.5
    return np.asarray(np.log(having / (neighbours + 1 - having)))


class MultilabelTrees(MultilabelClassifier):
    """Gradient-boosted trees for several labels of each row: ``BoostedTrees`` for each label, on the rows where it is known.

    Rows of which a label is unknown have weight zero for its trees, so that features are streamed, or stay where they are
    spread, as they are. ``label_names`` and ``one_sided`` are as in ``MultilabelLogisticRegression``, all other parameters
    those of ``BoostedTrees``.

    Attributes:
        classes_: (K,) names of the labels.
        heads_: (K,) fitted ``BoostedTrees``.
        dropped_labels_: Names of the labels left out.
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
        label_names: Sequence[str] | None = None,
        one_sided: str = "error",
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
        self.class_weight = class_weight
        self.label_names = label_names
        self.one_sided = one_sided
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, eval_set: tuple[Any, Any] | None = None) -> Self:
        """Grows the trees of one label after another.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n, K) labels: 1 present, 0 absent, NaN unknown; None takes those of a ``FeatureSet``.
            sample_weight: (n,) or one number.
            eval_set: Features and (m, K) labels of validation images (None: those of the features); with
                ``early_stopping_rounds`` they decide how many rounds each label uses.

        Raises:
            UsageError: Features or labels that cannot be learned from, or early stopping has no validation data.
        """
        if self.early_stopping_rounds is not None and eval_set is None:
            raise UsageError("early_stopping_rounds needs validation data: fit(X, y, eval_set=(X_val, y_val))")
        data = self._learn(X, y, sample_weight)
        rows = data.row_weights(self.class_weight)
        weights = np.broadcast_to(rows, data.positive.shape)
        plain = sample_weight is None and self.class_weight is None and data.known is None
        watched = None if eval_set is None else self._watched(*eval_set)
        own = {"class_weight", "label_names", "one_sided"}
        params = {name: value for name, value in self.get_params().items() if name not in own}
        self.heads_ = []
        for label, positive in enumerate(data.positive):
            head = BoostedTrees(**params)
            weight = None if plain else weights[label]
            head.fit(X, positive, weight, eval_set=None if watched is None else watched[label])
            self.heads_.append(head)
        return self

    def decision_function(self, X: Any) -> Floats:
        """Returns the (n, K) sums of the leaves, the log-odds of each label."""
        check_is_fitted(self)
        return np.column_stack([head.decision_function(X) for head in self.heads_]).astype(np.float64)

    def predict_proba(self, X: Any) -> Floats:
        """Returns the (n, K) probability of each label; rows need not sum to 1."""
        return np.asarray(expit(self.decision_function(X)))

    @property
    def best_iteration_(self) -> int:
        """The round (from 0) that the labels' trees are used up to, on average."""
        return round(float(np.mean([head.best_iteration_ for head in self.heads_])))

    def boosters_ubjson(self) -> list[bytes]:
        """Returns the trees of each label as UBJSON, xgboost's own format."""
        return [head.booster_ubjson() for head in self.heads_]

    def without_boosters(self) -> Self:
        """Returns a copy that has everything but the trees, and no object of xgboost."""
        return self._with_heads([head.without_booster() for head in self.heads_])

    def with_boosters(self, raw: Sequence[bytes]) -> Self:
        """Returns a copy with trees from ``boosters_ubjson``, those of the labels in order.

        Raises:
            BundleError: There are not as many as labels, or some are no booster, or one for other features.
        """
        if len(raw) != len(self.heads_):
            raise BundleError(f"there are trees of {len(raw)} labels, the head has {len(self.heads_)}")
        return self._with_heads([head.with_booster(one) for head, one in zip(self.heads_, raw, strict=True)])

    def _with_heads(self, heads: list[BoostedTrees]) -> Self:
        changed = copy.copy(self)
        changed.heads_ = heads
        return changed

    def _watched(self, features: Any, labels: Any) -> list[tuple[Any, Array]]:
        """The validation rows of each label: those where it is known."""
        truth, names = labels_given(features, labels, self.label_names)
        learned = np.isin(names, self.classes_)
        if len(names) != len(self.classes_) + len(self.dropped_labels_):
            raise UsageError(
                f"eval_set has {len(names)} labels, the training rows {len(self.classes_) + len(self.dropped_labels_)}: "
                "validate on the labels trained on"
            )
        return [
            self._known(features, column, name) for name, column in zip(names[learned], truth.T[learned], strict=True)
        ]

    def _known(self, features: Any, column: Array, name: Any) -> tuple[Any, Array]:
        known = np.flatnonzero(~np.isnan(column))
        if not len(known):
            raise UsageError(
                f"label {name!r} is unknown for all validation images: leave it out, or validate on others"
            )
        if len(known) == len(column):
            return features, column.astype(np.int8)
        if not is_blocks(features):
            return np.asarray(features)[known], column[known].astype(np.int8)
        if remote_row_shards(features) is not None:
            raise UsageError(
                f"label {name!r} is unknown for some validation images, which are spread over a cluster: choose rounds by "
                "images whose labels are all known"
            )
        return SomeRows(features, known), column[known].astype(np.int8)


Precisions = npt.NDArray[np.float64]
Estimator = TypeVar("Estimator", bound=MultilabelLinearClassifier)


@dataclass(frozen=True)
class LabelTuning:
    """What a search found.

    Attributes:
        C: (of all labels given) best value for each; the median of the values tried where no fold could tell.
        Cs: The values tried.
        average_precision: (len(Cs), K) mean over the folds; NaN where no fold had both sides of a label.
    """

    C: Precisions
    Cs: tuple[float, ...]
    average_precision: Precisions


def tune_labels(
    estimator: Estimator,
    X: Any,
    y: Any = None,
    *,
    Cs: Sequence[float],
    folds: Sequence[tuple[Any, Any]],
    sample_weight: Any = None,
) -> LabelTuning:
    """Finds a C for each label: the one with the best mean average precision over folds, all fitted in shared passes.

    Of equally good values the smallest is taken. A fold in which a label has no known rows of both sides, to learn from or to
    measure on, is left out for that label.

    Args:
        estimator: A ``MultilabelLogisticRegression`` or ``MultilabelLinearSVC``; it is not changed.
        X: (n, D) array or ``Blocks``.
        y: (n, K) labels; None for those that ``X`` carries.
        Cs: Values to try.
        folds: Positions to train on and to measure on, of each fold, as scikit-learn's splitters give them.
        sample_weight: (n,) weights; None for one each.

    Raises:
        UsageError: Features or labels that cannot be learned from, no fold, or no value.
    """
    if not len(Cs) or not len(folds):
        raise UsageError(f"{len(Cs)} values of C and {len(folds)} folds: give at least one of each")
    truth, names = labels_given(X, y, estimator.label_names)
    values = tuple(sorted(float(C) for C in Cs))
    quick = clone(estimator).set_params(tol=max(estimator.tol, ROUGH["tol"]))
    paths = fit_label_path(quick, X, y, Cs=values, folds=[train for train, _ in folds], sample_weight=sample_weight)
    learned = np.isin(names, paths[0][0].classes_)
    found = np.full((len(folds), len(values), int(learned.sum())), np.nan)
    for scores, path, (_, test) in zip(found, paths, folds, strict=True):
        rows = np.flatnonzero(test) if np.asarray(test).dtype == bool else np.asarray(test)
        for number, head in enumerate(path):
            scores[number] = average_precisions(_scores(head, X, rows), truth[rows][:, learned])
    counted = (~np.isnan(found)).sum(axis=0)
    mean = np.where(counted > 0, np.nansum(found, axis=0) / np.maximum(counted, 1), np.nan)
    best = np.where(np.isnan(mean).all(axis=0), len(values) // 2, np.argmax(np.nan_to_num(mean, nan=-1.0), axis=0))
    chosen = np.full(len(names), values[len(values) // 2])
    chosen[learned] = np.array(values)[best]
    return LabelTuning(chosen, values, mean)


def _scores(head: Any, X: Any, rows: Any) -> Precisions:
    """Scores of some rows; of features that are spread over a cluster all are scored where they are."""
    if not is_blocks(X):
        return np.asarray(head.decision_function(np.asarray(X)[rows]))
    if remote_row_shards(X) is not None:
        return np.asarray(head.decision_function(X)[rows])
    return np.asarray(head.decision_function(SomeRows(X, rows)))


def voc07_head(X: Any, y: Any = None, *, folds: Sequence[tuple[Any, Any]], **params: Any) -> MultilabelLinearSVC:
    """Fits linear SVMs by the protocol of ``VOC07``; features are scaled to rows of length 1 as they are read.

    Args:
        X: (n, D) array or ``Blocks``; what is predicted on must be given through ``unit_rows`` as well.
        y: (n, K) labels; None for those that ``X`` carries.
        folds: Positions to train on and to measure on; the protocol has three.
        **params: Of ``MultilabelLinearSVC``.
    """
    head = MultilabelLinearSVC(class_weight=dict(VOC07["class_weight"]), **params)
    features = unit_rows(X)
    tuned = tune_labels(head, features, y, Cs=VOC07["Cs"], folds=folds)
    return head.set_params(C=tuned.C).fit(features, y)  # type: ignore[no-any-return]


def unit_rows(features: Any) -> Any:
    """Features whose rows are divided by their Euclidean lengths (plus 1e-5): an array, or ``Blocks`` of ``Blocks``."""
    return UnitRows().fit(features).transform(features)
