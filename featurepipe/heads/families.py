"""The families of heads: what each is, how it is searched, and how one is made."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from featurepipe.errors import UsageError, unknown

_DECADES = tuple(10.0**power for power in range(-4, 3))


@dataclass(frozen=True)
class EstimatorPlace:
    """Where an estimator lives, and which of its parameters are set by default."""

    module: str
    name: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def load(self) -> Any:
        """Imports the class."""
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class HeadFamily:
    """One kind of head.

    Attributes:
        name: As ``make_head`` takes it.
        text: What it is, in one line.
        in_memory: The estimator for arrays.
        blocks: The estimator for features of any size.
        grid: What a search varies: values of each parameter of the final estimator.
        bytes_per_value: Peak memory of a fit in memory per value of X, measured with 20,000 x 1,280: X itself, the scaled copy,
            the solver's own.
        linear: Its scores are an affine map of the features (``linear_map``).
        weights: It takes ``class_weight`` (where there are classes) and ``sample_weight``.
        probabilities: It has ``predict_proba``; others only rank classes until they are calibrated.
        out_of_core: It learns in memory that does not grow with the rows.
        scaled: Features are standardised before it unless ``scale=False``.
        search_rows: Rows that a search uses at most, where its cost grows faster than the data; the parameters carry over.
        time_exponent: The power of the number of rows that the time of a fit, or of prediction where that takes the time, grows
            with at most.
    """

    name: str
    text: str
    in_memory: EstimatorPlace
    blocks: EstimatorPlace
    grid: Mapping[str, tuple[Any, ...]]
    bytes_per_value: int
    linear: bool = False
    weights: bool = True
    probabilities: bool = False
    out_of_core: bool = True
    scaled: bool = True
    search_rows: int | None = None
    time_exponent: float = 1.0


def _place(module: str, name: str, **defaults: Any) -> EstimatorPlace:
    return EstimatorPlace(module, name, MappingProxyType(defaults))


def _ours(module: str, name: str) -> EstimatorPlace:
    return _place(f"featurepipe.heads.{module}", name)


def _grid(**values: tuple[Any, ...]) -> Mapping[str, tuple[Any, ...]]:
    return MappingProxyType(values)


_TREES_GRID = _grid(
    max_depth=(4, 6),  # 8 was chosen no better, and took longest: docs/decisions/searches-share-passes.md
    min_child_weight=(1.0, 5.0),
    learning_rate=(0.1,),
    subsample=(0.8,),
    n_estimators=(1000,),
    early_stopping_rounds=(20,),
)
_NEIGHBOURS_GRID = _grid(n_neighbors=(1, 3, 5, 10, 20, 50), weights=("uniform", "distance"))

_MULTICLASS = (
    HeadFamily(
        "logistic",
        "multinomial logistic regression with an L2 penalty",
        _place("featurepipe.heads.weighted", "LogisticRegression", max_iter=5000),
        _ours("linear.classifiers", "BlockLogisticRegression"),
        _grid(C=_DECADES),
        bytes_per_value=12,
        linear=True,
        probabilities=True,
    ),
    HeadFamily(
        "linear-svm",
        "linear support vector machine, squared hinge, one class against the rest",
        # On 1,600 x 1,392 standardised features the default, the dual at 1e-4, took minutes; this takes 2 to 5 s.
        _place("featurepipe.heads.weighted", "LinearSVC", dual=False, tol=1e-2),
        _ours("linear.classifiers", "BlockLinearSVC"),
        _grid(C=_DECADES),
        bytes_per_value=16,
        linear=True,
    ),
    HeadFamily(
        "rbf-svm",
        "support vector machine with a Gaussian kernel; exact up to 20,000 rows, landmarks above",
        _ours("kernel", "RBFSVM"),
        _ours("kernel", "RBFSVM"),
        _grid(C=(1.0, 3.0, 10.0, 30.0), gamma_factor=(0.3, 1.0, 3.0)),
        bytes_per_value=16,
        search_rows=10_000,
        time_exponent=2.0,
    ),
    HeadFamily(
        "xgboost",
        "gradient-boosted trees",
        _ours("trees.boosted", "BoostedTrees"),
        _ours("trees.boosted", "BoostedTrees"),
        _TREES_GRID,
        bytes_per_value=12,
        probabilities=True,
        scaled=False,
        search_rows=50_000,
    ),
    HeadFamily(
        "ridge",
        "least squares on +1 and -1 with an L2 penalty",
        _ours("weighted", "RidgeClassifier"),
        _ours("linear.ridge", "BlockRidgeClassifier"),
        _grid(alpha=tuple(10.0**power for power in range(-2, 6))),
        bytes_per_value=16,
        linear=True,
    ),
    HeadFamily(
        "lda",
        "linear discriminant analysis: Gaussian classes with one covariance, shrunk as Ledoit and Wolf do",
        _place("featurepipe.heads.weighted", "LinearDiscriminantAnalysis", solver="lsqr", shrinkage="auto"),
        _place("featurepipe.heads.linear.lda", "BlockLinearDiscriminantAnalysis", shrinkage="auto"),
        _grid(shrinkage=(0.0, 0.001, 0.01, 0.1, 0.3, "auto")),
        bytes_per_value=32,
        linear=True,
        weights=False,
        probabilities=True,
    ),
    HeadFamily(
        "knn",
        "vote of the nearest training images; keeps all their features",
        _place("featurepipe.heads.weighted", "KNeighborsClassifier", algorithm="brute"),
        _ours("neighbours", "BlockNeighbours"),
        _NEIGHBOURS_GRID,
        bytes_per_value=8,
        weights=False,
        probabilities=True,
        out_of_core=False,
        search_rows=20_000,
        time_exponent=2.0,
    ),
    HeadFamily(
        "centroid",
        "the class whose mean is nearest",
        _ours("neighbours", "BlockCentroid"),  # NearestCentroid predicts by distance, and scores by variances besides
        _ours("neighbours", "BlockCentroid"),
        _grid(shrink_threshold=(None, 0.1, 0.3, 1.0, 3.0)),
        bytes_per_value=8,
        linear=True,
        weights=False,
    ),
)
_CONTINUOUS = (
    HeadFamily(
        "ridge",
        "least squares with an L2 penalty",
        _ours("weighted", "Ridge"),
        _ours("linear.ridge", "BlockRidge"),
        _grid(alpha=tuple(10.0**power for power in range(-2, 6))),
        bytes_per_value=16,
        linear=True,
    ),
    HeadFamily(
        "linear-svm",
        "linear support vector regression: squared errors beyond a tenth of a deviation",
        _place("featurepipe.heads.linear.ridge", "BlockLinearSVR", tol=1e-3),
        _place("featurepipe.heads.linear.ridge", "BlockLinearSVR", tol=1e-3),
        _grid(C=_DECADES),
        bytes_per_value=16,
        linear=True,
        out_of_core=False,
    ),
    HeadFamily(
        "kernel-ridge",
        "least squares in the space of a Gaussian kernel, exact, up to 20,000 rows",
        _ours("kernel", "BlockKernelRidge"),
        _ours("kernel", "BlockKernelRidge"),
        _grid(alpha=(0.01, 0.1, 1.0, 10.0), gamma_factor=(0.1, 0.3, 1.0, 3.0)),
        bytes_per_value=16,
        out_of_core=False,
        search_rows=10_000,
        time_exponent=3.0,
    ),
    HeadFamily(
        "xgboost",
        "gradient-boosted trees",
        _ours("trees.boosted", "BoostedRegressor"),
        _ours("trees.boosted", "BoostedRegressor"),
        _TREES_GRID,
        bytes_per_value=12,
        scaled=False,
        search_rows=50_000,
    ),
    HeadFamily(
        "knn",
        "mean of the nearest training images; keeps all their features",
        _place("featurepipe.heads.weighted", "KNeighborsRegressor", algorithm="brute"),
        _ours("neighbours", "BlockNeighboursRegressor"),
        _NEIGHBOURS_GRID,
        bytes_per_value=8,
        weights=False,
        out_of_core=False,
        search_rows=20_000,
        time_exponent=2.0,
    ),
)
_MULTILABEL = (
    HeadFamily(
        "logistic",
        "logistic regression with an L2 penalty, one label against the rest",
        _ours("linear.multilabel", "MultilabelLogisticRegression"),
        _ours("linear.multilabel", "MultilabelLogisticRegression"),
        _grid(C=_DECADES),
        bytes_per_value=12,
        linear=True,
        probabilities=True,
    ),
    HeadFamily(
        "linear-svm",
        "linear support vector machine, squared hinge, one label against the rest",
        _ours("linear.multilabel", "MultilabelLinearSVC"),
        _ours("linear.multilabel", "MultilabelLinearSVC"),
        _grid(C=_DECADES),
        bytes_per_value=16,
        linear=True,
    ),
    HeadFamily(
        "ridge",
        "least squares on +1 and -1 with an L2 penalty, one label against the rest",
        _ours("linear.ridge", "MultilabelRidge"),
        _ours("linear.ridge", "MultilabelRidge"),
        _grid(alpha=tuple(10.0**power for power in range(-2, 6))),
        bytes_per_value=16,
        linear=True,
    ),
    HeadFamily(
        "xgboost",
        "gradient-boosted trees, some for each label",
        _ours("multilabel", "MultilabelTrees"),
        _ours("multilabel", "MultilabelTrees"),
        _TREES_GRID,
        bytes_per_value=12,
        probabilities=True,
        scaled=False,
        search_rows=50_000,
    ),
    HeadFamily(
        "knn",
        "share of the nearest training images that have each label; keeps all their features",
        _ours("multilabel", "MultilabelNeighbours"),
        _ours("multilabel", "MultilabelNeighbours"),
        _NEIGHBOURS_GRID,
        bytes_per_value=8,
        weights=False,
        probabilities=True,
        out_of_core=False,
        search_rows=20_000,
        time_exponent=2.0,
    ),
)
_ORDINAL = (
    HeadFamily(
        "logistic",
        "logistic regression with an L2 penalty of each step between ordered classes",
        _ours("linear.ordinal", "OrdinalLogisticRegression"),
        _ours("linear.ordinal", "OrdinalLogisticRegression"),
        _grid(C=_DECADES),
        bytes_per_value=12,
        linear=True,
        probabilities=True,
    ),
)
SMALL_VALUES = 20_000_000
"""Values (rows times columns) up to which scikit-learn's own solvers take seconds; above, ours reach the same optimum sooner."""

SHARED_PASSES = ("logistic", "linear-svm")
"""Families whose values of C and folds ``fit_path`` fits in the same passes."""

ROUGH: Mapping[str, Any] = MappingProxyType({"tol": 1e-3, "max_iter": 1000})
"""Of those, where parameters are only compared: the accuracies of two values of C differ by more than this leaves open."""

VOC07: Mapping[str, Any] = MappingProxyType(
    {
        "Cs": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
        "class_weight": MappingProxyType({0: 1.0, 1: 2.0}),
        "folds": 3,
    }
)
"""How frozen features are compared on PASCAL VOC 2007 (VISSL, ``voc07/eval_resnet_8gpu_transfer_voc07_svm``; Goyal et al. 2019,
"Scaling and benchmarking self-supervised visual representation learning"): linear SVMs with squared hinge, positives weighing
twice, on rows of length 1, with the C of each label that has the best mean average precision in three folds."""

PROTOCOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"voc07": VOC07})
"""Protocols of several labels by name."""


def _by_name(families: tuple[HeadFamily, ...]) -> Mapping[str, HeadFamily]:
    return MappingProxyType({family.name: family for family in families})


HEADS: Mapping[str, HeadFamily] = _by_name(_MULTICLASS)
"""The families for one class an image."""

FAMILIES: Mapping[str, Mapping[str, HeadFamily]] = MappingProxyType(
    {
        "multiclass": HEADS,
        "multilabel": _by_name(_MULTILABEL),
        "continuous": _by_name(_CONTINUOUS),
        "ordinal": _by_name(_ORDINAL),
    }
)
"""The families by the type of their target: one class an image, several labels, one number, or one class of an order."""


def families_for(target_type: str) -> Mapping[str, HeadFamily]:
    """The families that learn a type of target.

    Raises:
        UsageError: There is no such type.
    """
    if target_type not in FAMILIES:
        raise unknown("target type", str(target_type), FAMILIES)
    return FAMILIES[target_type]


def family_for(name: str, target_type: str = "multiclass") -> HeadFamily:
    """The family of a name for a type of target.

    Raises:
        UsageError: There is no such type or family, or the family learns other targets only.
    """
    families = families_for(target_type)
    if name in families:
        return families[name]
    others = [kind for kind, named in FAMILIES.items() if name in named]
    if not others:
        raise unknown("head", name, families)
    raise UsageError(
        f"head {name!r} learns {' and '.join(others)} targets, not {target_type} ones; heads that do: {', '.join(families)}"
    )


def make_head(
    name: str,
    *,
    target_type: str = "multiclass",
    scale: bool | str | None = None,
    pca: float | None = None,
    class_weight: Any = None,
    random_state: Any = 0,
    out_of_core: bool = False,
    memory: int | str | None = None,
    **params: Any,
) -> Any:
    """Makes an unfitted head: an ordinary scikit-learn estimator, or a ``Pipeline`` of steps scale, pca and head.

    In a pipeline, arguments of ``fit`` are addressed as usual: ``fit(X, y, head__sample_weight=weights)``.

    Args:
        name: One of the families of the target type, ``FAMILIES[target_type]``.
        target_type: ``"multiclass"``: one class an image; ``"multilabel"``: several labels an image, present, absent or unknown;
            ``"continuous"``: one number an image, in any unit; ``"ordinal"``: one class of an order (its parameter ``order``).
        scale: Standardise features first; by default for every family but xgboost, whose trees do not see the scale.
            ``"rows"``: divide each row by its length instead.
        pca: Project onto so many principal components (a whole number), or onto as many as explain this share of the variance
            (below 1); None for none.
        class_weight: None, ``"balanced"`` or a dict from label to weight; for several labels from 0 (absent) and 1 to weight.
        random_state: Seed of whatever is random.
        out_of_core: Every step takes a ``FeatureSet`` or other ``Blocks`` (and arrays), and keeps to ``memory``; else arrays
            only, with scikit-learn's own estimators where it has one.
        memory: What the blocks alive at one time may take in an estimator that works in blocks (bytes or "512MB").
        **params: Of the final estimator.

    Raises:
        UsageError: An unknown name, target type or parameter, or class weights for a family that has none.

    Example:
        >>> make_head("logistic", C=0.01).named_steps["head"]
        LogisticRegression(C=0.01, max_iter=5000, random_state=0)
        >>> make_head("ridge", target_type="continuous", alpha=10.0).named_steps["head"]
        Ridge(alpha=10.0, random_state=0)
        >>> make_head("logistic", target_type="multilabel", label_names=["cat", "dog"]).named_steps["head"]
        MultilabelLogisticRegression(label_names=['cat', 'dog'])
    """
    family = family_for(name, target_type)
    if class_weight is not None and target_type == "continuous":
        raise UsageError(
            f"class_weight={class_weight!r} is for classes, and a continuous target has none; weigh rows instead: "
            "fit(X, y, head__sample_weight=weights)"
        )
    head = _final(family, params, class_weight, random_state, out_of_core=out_of_core, memory=memory)
    steps = _steps(family, scale, pca, random_state, out_of_core=out_of_core, memory=memory)
    if not steps:
        return head
    from sklearn.pipeline import Pipeline

    return Pipeline([*steps, ("head", head)])


def refuse_weights(name: str, argument: str = "sample_weight", target_type: str = "multiclass") -> UsageError:
    """Builds the error for class or sample weights given to a family that takes none."""
    takers = ", ".join(family.name for family in FAMILIES[target_type].values() if family.weights)
    return UsageError(f"{name} takes no {argument}; heads that do: {takers}")


def _final(
    family: HeadFamily,
    params: Mapping[str, Any],
    class_weight: Any,
    random_state: Any,
    *,
    out_of_core: bool,
    memory: int | str | None,
) -> Any:
    place = family.blocks if out_of_core else family.in_memory
    if class_weight is not None and not family.weights:
        raise refuse_weights(family.name, "class_weight")
    kind = place.load()
    accepted = kind().get_params()
    for name in params:
        if name not in accepted:
            raise unknown("parameter", name, accepted, where=f"head {family.name!r}")
    common = {"class_weight": class_weight, "random_state": random_state, "memory": memory}
    settings = {name: value for name, value in common.items() if name in accepted}
    return kind(**{**settings, **place.defaults, **params})


def _steps(
    family: HeadFamily,
    scale: bool | str | None,
    pca: float | None,
    random_state: Any,
    *,
    out_of_core: bool,
    memory: int | str | None,
) -> list[tuple[str, Any]]:
    steps: list[tuple[str, Any]] = []
    if scale == "rows":
        steps.append(("scale", _unit_rows()))
    elif family.scaled if scale is None else scale:
        steps.append(("scale", _scaler(memory) if out_of_core else _array_scaler()))
    if pca is not None:
        steps.append(("pca", _pca(pca, memory) if out_of_core else _array_pca(pca, random_state)))
    return steps


def _scaler(memory: int | str | None) -> Any:
    from featurepipe.heads.preprocessing import BlockScaler

    return BlockScaler(memory=memory)


def _unit_rows() -> Any:
    from featurepipe.heads.preprocessing import UnitRows

    return UnitRows()


def _pca(components: float, memory: int | str | None) -> Any:
    from featurepipe.heads.preprocessing import BlockPCA

    return BlockPCA(components, memory=memory)


def _array_scaler() -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler()


def _array_pca(components: float, random_state: Any) -> Any:
    from sklearn.decomposition import PCA

    return PCA(components, random_state=random_state)
