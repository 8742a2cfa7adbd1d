"""What a bundle's files may hold before skops and xgboost get to see them, and which numbers in them compiled code would follow.

skops builds objects by looking up ``module.class`` names that the file gives, for those names that are on its list and
ours. Its loopholes so far (CVE-2024-37065, CVE-2025-54412, CVE-2025-54413; in 0.16 the name of a bit generator) were kinds of
nodes that call something while a name beside it is checked: methods, operators, constructors, random generators, and
older variants of nodes that a file can choose by its protocol number. Heads need none of these. So a file may hold only
data and estimators, in the current protocol, whatever skops would allow.

skops checks of which types a file is, not what it says. scikit-learn's libsvm and its nearest neighbours index by what the
head holds, so that a forged head could make them read or write elsewhere. (Trees, where the same holds, skops refuses.)

Of 120 files with one to three changed bytes, xgboost 3.2 refused 97, took 9, hung on 2 and crashed on 12.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from featurepipe.errors import BundleError

OURS = (
    "featurepipe.heads.trees.boosted.BoostedRegressor",
    "featurepipe.heads.trees.boosted.BoostedTrees",
    "featurepipe.heads.kernel.RBFSVM",
    "featurepipe.heads.kernel.BlockKernelRidge",
    "featurepipe.heads.linear.lda.BlockLinearDiscriminantAnalysis",
    "featurepipe.heads.linear.classifiers.BlockLinearSVC",
    "featurepipe.heads.linear.classifiers.BlockLogisticRegression",
    "featurepipe.heads.neighbours.BlockCentroid",
    "featurepipe.heads.linear.ridge.BlockLinearSVR",
    "featurepipe.heads.linear.multilabel.MultilabelLinearSVC",
    "featurepipe.heads.linear.multilabel.MultilabelLogisticRegression",
    "featurepipe.heads.linear.ordinal.OrdinalLogisticRegression",
    "featurepipe.heads.multilabel.MultilabelNeighbours",
    "featurepipe.heads.multilabel.MultilabelTrees",
    "featurepipe.heads.neighbours.BlockNeighbours",
    "featurepipe.heads.neighbours.BlockNeighboursRegressor",
    "featurepipe.heads.preprocessing.BlockPCA",
    "featurepipe.heads.linear.ridge.BlockRidge",
    "featurepipe.heads.linear.ridge.BlockRidgeClassifier",
    "featurepipe.heads.linear.ridge.MultilabelRidge",
    "featurepipe.heads.preprocessing.BlockScaler",
    "featurepipe.heads.preprocessing.UnitRows",
    "featurepipe.heads.selection.KeptColumns",
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
    "featurepipe.heads.kernel_ridge.BlockKernelRidge",
    "featurepipe.heads.lda.BlockLinearDiscriminantAnalysis",
    "featurepipe.heads.linear.multilabel.MultilabelRidge",
    "featurepipe.heads.linear.svr.BlockLinearSVR",
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
    if kind.__name__ == "KeptColumns":
        kept = _array(estimator.columns_, 1, "i")
        return bool(len(kept) and kept[0] >= 0 and kept[-1] < estimator.n_features_in_ and (np.diff(kept) > 0).all())
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


_NUMBERS = {b"i": ">i1", b"U": ">u1", b"I": ">i2", b"l": ">i4", b"L": ">i8", b"d": ">f4", b"D": ">f8"}
_WORDS = {b"T": True, b"F": False, b"Z": None}


def parse_ubjson(content: bytes) -> Any:
    """Reads one value; typed arrays become NumPy arrays.

    Raises:
        ValueError: It is anything else, cut short, or followed by more.
        RecursionError: It is nested too deep.
    """
    reader = _Reader(content)
    value = reader.value(reader.take(1))
    if reader.place != len(content):
        raise ValueError(f"{len(content) - reader.place} bytes too many")
    return value


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def take(self, count: int) -> bytes:
        end = self.place + count
        if count < 0 or end > len(self.content):
            raise ValueError(f"it ends too early, at {self.place}")
        taken = self.content[self.place : end]
        self.place = end
        return taken

    def value(self, marker: bytes) -> Any:
        if marker in _NUMBERS:
            kind = np.dtype(_NUMBERS[marker])
            return np.frombuffer(self.take(kind.itemsize), kind)[0].item()
        if marker in _WORDS:
            return _WORDS[marker]
        if marker == b"S":
            return self.text()
        if marker == b"{":
            return self.members()
        if marker == b"[":
            return self.elements()
        raise ValueError(f"unknown marker {marker!r} at {self.place - 1}")

    def length(self) -> int:
        if self.take(1) != b"L":
            raise ValueError(f"no length at {self.place - 1}")
        (count,) = struct.unpack(">q", self.take(8))
        return int(count)

    def text(self) -> str:
        return self.take(self.length()).decode()

    def members(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.content[self.place : self.place + 1] != b"}":
            name = self.text()
            if name in found:
                raise ValueError(f"{name!r} comes twice")
            found[name] = self.value(self.take(1))
        self.take(1)
        return found

    def elements(self) -> Any:
        marker = self.take(1)
        if marker == b"$":
            kind = np.dtype(_NUMBERS.get(self.take(1), "V0"))
            if kind.itemsize == 0 or self.take(1) != b"#":
                raise ValueError(f"an array of no known type at {self.place - 1}")
            return np.frombuffer(self.take(self.length() * kind.itemsize), kind)
        if marker != b"#":
            raise ValueError(f"a list without a count at {self.place - 1}")
        count = self.length()
        if count > len(self.content):
            raise ValueError(f"a list of {count} at {self.place}")
        return [self.value(self.take(1)) for _ in range(count)]


def join_trees(boosters: Sequence[bytes]) -> bytes:
    """Returns the boosters of several labels, each one value of UBJSON, as one array of them."""
    return b"[#L" + struct.pack(">q", len(boosters)) + b"".join(boosters)


def split_trees(content: bytes) -> list[bytes]:
    """Returns the boosters that ``join_trees`` put together.

    Raises:
        ForgedTrees: It is something else, cut short, or followed by more.
    """
    if content[:2] != b"[#":
        raise ForgedTrees("it is no array of the trees of several labels")
    reader, found = _Reader(content), []
    reader.take(2)
    try:
        for _ in range(min(reader.length(), len(content) + 1)):
            start = reader.place
            reader.value(reader.take(1))
            found.append(content[start : reader.place])
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise ForgedTrees(f"{type(error).__name__}: {error}") from error
    _need(reader.place == len(content), f"{len(content) - reader.place} bytes too many")
    return found


_NO_PARENT = 2**31 - 1
_KINDS = {
    "base_weights": "f4",
    "default_left": "u1",
    "left_children": "i4",
    "loss_changes": "f4",
    "parents": "i4",
    "right_children": "i4",
    "split_conditions": "f4",
    "split_type": "u1",
    "sum_hessian": "f4",
}
_CATEGORIES = ("categories", "categories_nodes", "categories_segments", "categories_sizes")


class ForgedTrees(ValueError):
    """The trees are not as xgboost writes them for a head of this width and number of classes."""


def check_trees(content: bytes, *, width: int, classes: int | None) -> None:
    """Checks that a booster in UBJSON stays within its own arrays, and those of (n, width) features and of K classes.

    Args:
        content: The booster.
        width: D.
        classes: K; None for trees that predict a number.

    Raises:
        ForgedTrees: It does not, or is no booster of plain trees.
    """
    try:
        _check_learner(parse_ubjson(content)["learner"], width, classes)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise ForgedTrees(f"{type(error).__name__}: {error}") from error


def _check_learner(learner: dict[str, Any], width: int, classes: int | None) -> None:
    groups = classes if classes is not None and classes > 2 else 1
    objective = "reg:squarederror" if classes is None else "multi:softprob" if groups > 1 else "binary:logistic"
    parameters = learner["learner_model_param"]
    booster = learner["gradient_booster"]
    model = booster["model"]
    trees, numbers = model["trees"], model["gbtree_model_param"]
    _need(booster["name"] == "gbtree", "it is no booster of plain trees")
    _need(learner["objective"]["name"] == objective, "it has another objective")
    _need(int(parameters["num_feature"]) == width, "it takes another number of features")
    _need(int(parameters["num_class"]) == (groups if groups > 1 else 0), "it has another number of classes")
    _need(int(parameters["num_target"]) == 1, "it has several targets")
    _need(parameters["base_score"].count(",") in {0, groups - 1}, "it has another number of base scores")
    for name in ("feature_names", "feature_types"):
        _need(len(learner[name]) in {0, width}, f"its {name} are for another width")
    categories = model.get("cats", {"enc": [], "feature_segments": [], "sorted_idx": []})
    _need(not any(len(values) for values in categories.values()), "it has categories")
    _need(int(numbers["num_trees"]) == len(trees) == len(model["tree_info"]), "it has another number of trees")
    _need(int(numbers["num_parallel_tree"]) == 1, "it has parallel trees")
    _need(all(0 <= group < groups for group in model["tree_info"]), "a tree is of no class")
    rounds = model["iteration_indptr"]
    _need(list(rounds) == list(range(0, len(trees) + 1, groups)), "its rounds do not fit its trees")
    for number, tree in enumerate(trees):
        _need(tree["id"] == number, "its trees are not in order")
        _check_tree(tree, width)


def _check_tree(tree: dict[str, Any], width: int) -> None:
    parameters = tree["tree_param"]
    count = int(parameters["num_nodes"])
    _need(count >= 1 and int(parameters["size_leaf_vector"]) in {0, 1}, "a tree has no nodes, or vectors for leaves")
    _need(int(parameters["num_deleted"]) == 0 and int(parameters["num_feature"]) == width, "a tree is of another width")
    for name, kind in _KINDS.items():
        _need(tree[name].dtype.str[1:] == kind and len(tree[name]) == count, f"{name} are not {count} of {kind}")
    features = tree["split_indices"]
    _need(features.dtype.str[1:] in {"i4", "i8"} and len(features) == count, "split_indices are of another kind")
    _need(not any(len(tree[name]) for name in _CATEGORIES) and not tree["split_type"].any(), "a tree has categories")
    left, right = tree["left_children"], tree["right_children"]
    parents = tree["parents"].astype(np.int64)
    inner = np.flatnonzero(left != -1)
    _need(bool((right[left == -1] == -1).all()), "a node has one child")
    children = np.concatenate([left[inner], right[inner]])
    # Every node but the root is the child of one node, which stands before it: so it is a tree.
    _need(bool((np.sort(children) == np.arange(1, count)).all()) and len(children) == count - 1, "it is no tree")
    _need(bool((children > np.concatenate([inner, inner])).all()), "a node stands before its parent")
    _need(
        bool((parents[children] == np.concatenate([inner, inner])).all()) and parents[0] == _NO_PARENT, "it is no tree"
    )
    _need(
        bool(((features[inner] >= 0) & (features[inner] < width)).all()), "a node asks for a feature that there is not"
    )


def _need(true: bool, otherwise: str) -> None:
    if not true:
        raise ForgedTrees(otherwise)
