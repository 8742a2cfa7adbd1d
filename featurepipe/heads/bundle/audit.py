"""What a skops file may hold before skops itself gets to see it, and which numbers in it compiled code would follow.

skops builds objects by looking up ``module.class`` names that the file gives, for those names that are on its list and
ours. Its loopholes so far (CVE-2024-37065, CVE-2025-54412, CVE-2025-54413; in 0.16 the name of a bit generator) were kinds of
nodes that call something while a name beside it is checked: methods, operators, constructors, random generators, and
older variants of nodes that a file can choose by its protocol number. Heads need none of these. So a file may hold only
data and estimators, in the current protocol, whatever skops would allow.

skops checks of which types a file is, not what it says. scikit-learn's libsvm and its nearest neighbours index by what the
head holds, so that a forged head could make them read or write elsewhere. (Trees, where the same holds, skops refuses.)
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from featurepipe.errors import BundleError

OURS = (
    "featurepipe.heads.trees.boosted.BoostedRegressor",
    "featurepipe.heads.trees.boosted.BoostedTrees",
    "featurepipe.heads.kernel.RBFSVM",
    "featurepipe.heads.kernel_ridge.BlockKernelRidge",
    "featurepipe.heads.linear.lda.BlockLinearDiscriminantAnalysis",
    "featurepipe.heads.linear.classifiers.BlockLinearSVC",
    "featurepipe.heads.linear.classifiers.BlockLogisticRegression",
    "featurepipe.heads.neighbours.BlockCentroid",
    "featurepipe.heads.linear.svr.BlockLinearSVR",
    "featurepipe.heads.linear.multilabel.MultilabelLinearSVC",
    "featurepipe.heads.linear.multilabel.MultilabelLogisticRegression",
    "featurepipe.heads.linear.multilabel.MultilabelRidge",
    "featurepipe.heads.linear.ordinal.OrdinalLogisticRegression",
    "featurepipe.heads.multilabel.MultilabelNeighbours",
    "featurepipe.heads.multilabel.MultilabelTrees",
    "featurepipe.heads.neighbours.BlockNeighbours",
    "featurepipe.heads.neighbours.BlockNeighboursRegressor",
    "featurepipe.heads.preprocessing.BlockPCA",
    "featurepipe.heads.linear.ridge.BlockRidge",
    "featurepipe.heads.linear.ridge.BlockRidgeClassifier",
    "featurepipe.heads.preprocessing.BlockScaler",
    "featurepipe.heads.preprocessing.UnitRows",
    "featurepipe.heads.weighted.KNeighborsClassifier",
    "featurepipe.heads.weighted.KNeighborsRegressor",
    "featurepipe.heads.weighted.LinearDiscriminantAnalysis",
    "featurepipe.heads.weighted.LinearSVC",
    "featurepipe.heads.weighted.LogisticRegression",
    "featurepipe.heads.weighted.Ridge",
    "featurepipe.heads.weighted.RidgeClassifier",
)
FORMER = (
    "featurepipe.heads.boosted.BoostedTrees",
    "featurepipe.heads.lda.BlockLinearDiscriminantAnalysis",
    "featurepipe.heads.linear_svc.BlockLinearSVC",
    "featurepipe.heads.logistic.BlockLogisticRegression",
    "featurepipe.heads.pca.BlockPCA",
    "featurepipe.heads.ridge.BlockRidgeClassifier",
    "featurepipe.heads.scaling.BlockScaler",
)
"""Where estimators were when older bundles were written; ``featurepipe.heads`` tells Python where they are now."""

_SCALAR_NAMES = "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 str_"
_SCALARS = frozenset(f"numpy.{name}" for name in _SCALAR_NAMES.split())
_KEY_TYPES = frozenset({"builtins.bool", "builtins.float", "builtins.int", "builtins.str"})
# Each kind of node that may be in the file, with what it may be; ObjectNode is settled in ``_may_be``.
_NODES = {
    "DictNode": frozenset({"builtins.dict"}),
    "JsonNode": frozenset({"builtins.str"}),
    "ListNode": frozenset({"builtins.list"}),
    "NdArrayNode": _SCALARS | {"numpy.ndarray"},
    "TupleNode": frozenset({"builtins.tuple"}),
    "TypeNode": _SCALARS | _KEY_TYPES,
}
_LEAST_PROTOCOL = 2


def audit(content: bytes, name: str) -> None:
    """Checks a skops file without importing or building anything that it names.

    Args:
        content: The file.
        name: For messages.

    Raises:
        BundleError: It is no skops file, or holds more than data and estimators; names what, and the next step.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            _check_members(members, len(content), name)
            schema = json.loads(archive.read("schema.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError, NotImplementedError, EOFError) as error:
        raise BundleError(f"{name} is not a file of skops ({error}); {_hint(content)}") from error
    if not isinstance(schema, dict) or "__loader__" not in schema:
        raise BundleError(f"{name} holds no object; do not use this bundle")
    protocol = schema.get("protocol")
    if not isinstance(protocol, int) or isinstance(protocol, bool) or protocol < _LEAST_PROTOCOL:
        raise BundleError(f"{name} is of skops protocol {protocol!r}, bundles have 2 or later; do not use this bundle")
    nodes = list(_nodes(schema))
    found = sorted({_described(node) for node in nodes if not _may_be(node)})
    if found:
        raise BundleError(
            f"{name} holds what no head needs: {', '.join(found[:5])}. Nothing of it was run or imported. "
            "Do not use this bundle unless you know who made it; train again from your own features"
        )
    _check_reads(nodes, {member.filename for member in members}, name)
    try:
        _measure(schema, {})
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} refers to itself ({error}), ours never do; do not use this bundle") from error


def _check_members(members: list[zipfile.ZipInfo], total: int, name: str) -> None:
    """Everything is stored as it is, once: what is read can never be more than the file itself."""
    names = {member.filename for member in members}
    stored = all(member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1 for member in members)
    if len(names) < len(members) or not stored or sum(member.file_size for member in members) > total:
        raise BundleError(
            f"{name} holds compressed, encrypted or overlapping entries, ours never do; do not use this bundle"
        )


def _check_reads(nodes: list[dict[str, Any]], members: set[str], name: str) -> None:
    """Each array's bytes are read for one object only, so that a small file cannot fill the memory."""
    owners: dict[str, int] = {}
    for node in nodes:
        if node["__loader__"] == "NdArrayNode" and "file" in node:
            file, owner = node["file"], node.get("__id__")
            known = isinstance(file, str) and file in members
            if not (known and isinstance(owner, int) and owner > 0 and owners.setdefault(file, owner) == owner):
                raise BundleError(f"{name} has an array without bytes of its own ({file!r}); do not use this bundle")


def _measure(value: Any, sizes: dict[int, int]) -> int:
    """Counts the nodes in a part of the schema, those of an object that comes again as often as it comes.

    skops takes a node whose ``__id__`` it knows for the one it read before. If all nodes of one id are of one size, what
    it will walk through is no more than what is written, and nothing contains itself.

    Raises:
        ValueError: They are not.
    """
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    count = sum(_measure(child, sizes) for child in inner)
    if not isinstance(value, dict) or not {"__loader__", "__id__"} & value.keys():
        return count
    identity = value.get("__id__")
    if "__loader__" not in value or (identity is not None and not isinstance(identity, int)):
        raise ValueError(f"object {identity!r} is not written out")
    if identity is not None and sizes.setdefault(identity, count) != count:
        raise ValueError(f"object {identity} has two forms")
    return count + 1


def _nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every dict that skops could take for a node, wherever it lies."""
    pending: list[Any] = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "__loader__" in value:
                yield value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _may_be(node: dict[str, Any]) -> bool:
    loader, module, kind = node["__loader__"], node.get("__module__"), node.get("__class__")
    if not (isinstance(loader, str) and isinstance(module, str) and isinstance(kind, str)):
        return False
    full = f"{module}.{kind}"
    if loader == "ObjectNode":  # which of scikit-learn's, skops decides next
        return "." not in kind and (module.startswith("sklearn.") or full in {*OURS, *FORMER})
    return "." not in kind and full in _NODES.get(loader, frozenset())


def _described(node: dict[str, Any]) -> str:
    return f"{node.get('__module__')}.{node.get('__class__')} as {node['__loader__']}"


def _hint(content: bytes) -> str:
    if content[:1] == b"\x80":
        return "it looks like a pickle, which can run any code, and was not opened: do not use this bundle"
    return "copy the whole folder again from where it was made, or train again"


_KERNELS = {"linear", "poly", "rbf", "sigmoid"}
_CHECKED_NEIGHBOURS = {"KNeighborsClassifier", "KNeighborsRegressor", "NearestCentroid"}


def check_bounds(head: Any, name: str) -> None:
    """Checks every estimator inside a head.

    Raises:
        BundleError: One would read outside its own arrays, or is of a kind for which that cannot be told.
    """
    from sklearn.base import BaseEstimator

    pending, met = [head], set()
    while pending:
        value = pending.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        if isinstance(value, BaseEstimator):
            if not _within_bounds(value):
                raise BundleError(
                    f"{name} holds a {type(value).__name__} that does not fit together; do not use this bundle"
                )
            pending.extend(vars(value).values())
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)


def _within_bounds(estimator: Any) -> bool:
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.svm._base import BaseLibSVM

    if isinstance(estimator, BaseLibSVM):
        return not hasattr(estimator, "support_vectors_") or _support_fits(estimator)
    if isinstance(estimator, KNeighborsClassifier | KNeighborsRegressor):
        return not hasattr(estimator, "_fit_X") or _neighbours_fit(estimator)
    kind = type(estimator)
    return not kind.__module__.startswith("sklearn.neighbors.") or kind.__name__ in _CHECKED_NEIGHBOURS


def _support_fits(svm: Any) -> bool:
    """As scikit-learn's C code reads them: support vectors by class, coefficients for K - 1 of K, an intercept a pair."""
    held = vars(svm)
    vectors, counts = _array(held["support_vectors_"], 2, "f"), _array(held["_n_support"], 1, "i")
    classes, pairs = len(counts), len(counts) * (len(counts) - 1) // 2
    return (
        svm.kernel in _KERNELS
        and held["_sparse"] is False
        and len(svm.classes_) == classes >= 2
        and bool((counts >= 0).all())
        and int(counts.sum()) == len(vectors)
        and vectors.shape[1] == svm.n_features_in_
        and _array(svm.support_, 1, "i").shape == (len(vectors),)
        and _array(held["_dual_coef_"], 2, "f").shape == (classes - 1, len(vectors))
        and _array(held["_intercept_"], 1, "f").shape == (pairs,)
        and all(_array(values, 1, "f").size in {0, pairs} for values in (held["_probA"], held["_probB"]))
    )


def _neighbours_fit(neighbours: Any) -> bool:
    held = vars(neighbours)
    numeric = not hasattr(neighbours, "predict_proba")
    rows, answers = _array(held["_fit_X"], 2, "f"), _array(held["_y"], 1, "f" if numeric else "i")
    return (
        held["_fit_method"] == "brute"
        and (numeric or neighbours.outputs_2d_ is False)
        and isinstance(neighbours.metric, str)
        and len(rows) == neighbours.n_samples_fit_ == len(answers) >= 1
        and rows.shape[1] == neighbours.n_features_in_
        and (numeric or bool((answers >= 0).all() and (answers < len(neighbours.classes_)).all()))
    )


def _array(value: Any, dimensions: int, kind: str) -> Any:
    if not isinstance(value, np.ndarray) or value.ndim != dimensions or value.dtype.kind != kind:
        raise TypeError("an array is of another kind")
    return value
