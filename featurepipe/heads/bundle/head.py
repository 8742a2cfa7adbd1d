"""A head as files and back: scikit-learn's parts through skops, XGBoost's trees as UBJSON, and no pickle."""

from __future__ import annotations

import copy
import struct
import tokenize
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.audit import (
    FORMER,
    OURS,
    ForgedTrees,
    audit,
    check_bounds,
    check_trees,
    join_trees,
    split_trees,
)
from featurepipe.heads.bundle.files import BOOSTER, HEAD
from featurepipe.lazy_names import without_modules

# What skops, NumPy and the estimators' own ``__setstate__`` raise on content that is of the right kind but no sense.
_SENSELESS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,  # NumPy reads an array's header as Python does
    zipfile.BadZipFile,
)


def head_files(head: Any) -> dict[str, bytes]:
    """Turns a fitted estimator into the files that hold it.

    Returns:
        File name to content: ``head.skops``, and ``head.ubj`` for boosted trees.

    Raises:
        BundleError: It holds something that could not be loaded again without running code.
    """
    skops = _skops()
    files = {}
    trees = _last(head)
    if hasattr(trees, "booster_ubjson"):
        files[BOOSTER] = trees.booster_ubjson()
        head = _with_last(head, trees.without_booster())
    elif hasattr(trees, "boosters_ubjson"):
        files[BOOSTER] = join_trees(trees.boosters_ubjson())
        head = _with_last(head, trees.without_boosters())
    try:
        files[HEAD] = skops.dumps(head)
    except (skops.exceptions.UnsupportedTypeException, TypeError, RecursionError) as error:
        raise BundleError(
            f"a bundle cannot hold this {type(head).__name__}: {error}; use a head of make_head"
        ) from error
    return files


def load_head(files: Mapping[str, bytes], folder: Path) -> Any:
    """Builds the estimator from its files, after checking everything that they name.

    Args:
        files: As ``head_files`` made them.
        folder: For messages.

    Raises:
        BundleError: They hold anything but data and estimators of scikit-learn and featurepipe.
    """
    skops = _skops()
    content, name = files[HEAD], str(folder / HEAD)
    audit(content, name)
    try:
        untrusted = set(skops.get_untrusted_types(data=content)) - {*OURS, *FORMER}
        if untrusted:
            raise BundleError(
                f"{name} holds types that bundles do not: {', '.join(sorted(untrusted))}. Nothing of it was run. "
                "Do not use this bundle unless you know who made it; train again from your own features"
            )
        head = _loaded(content)
        check_bounds(head, name)
        return _with_booster(head, files.get(BOOSTER), folder)
    except _SENSELESS as error:
        raise BundleError(
            f"{name} does not hold a usable head ({type(error).__name__}: {error}); train again"
        ) from error


def _skops() -> Any:
    """``skops.io``; it looks for estimators in all of scikit-learn, and would find adapters there that load PyTorch and Dask."""
    adapters = "sklearn.externals.array_api_compat"
    with without_modules(f"{adapters}.torch", f"{adapters}.dask"):
        import skops.io
        import skops.io.exceptions
    return skops.io


def _loaded(content: bytes) -> Any:
    from sklearn.exceptions import InconsistentVersionWarning

    with warnings.catch_warnings():  # the bundle says it once for all parts, see bundle.py
        warnings.simplefilter("ignore", InconsistentVersionWarning)
        return _skops().loads(content, trusted=[*OURS, *FORMER])


def _last(head: Any) -> Any:
    """The classifier itself: of a pipeline the last step."""
    return head.steps[-1][1] if hasattr(head, "steps") else head


def _with_last(head: Any, last: Any) -> Any:
    """A copy of ``head`` with another classifier in it."""
    if not hasattr(head, "steps"):
        return last
    changed = copy.copy(head)
    changed.steps = [*head.steps[:-1], (head.steps[-1][0], last)]
    return changed


def _with_booster(head: Any, booster: bytes | None, folder: Path) -> Any:
    trees = _last(head)
    several = hasattr(trees, "with_boosters")
    if (several or hasattr(trees, "with_booster")) != (booster is not None):
        raise BundleError(f"{folder / HEAD} and {folder / BOOSTER} do not belong together; train again")
    if booster is None:
        return head
    try:
        if several:
            return _with_last(head, _with_boosters(trees, booster))
        classes = len(trees.classes_) if hasattr(trees, "classes_") else None
        check_trees(booster, width=trees.n_features_in_, classes=classes)
        return _with_last(head, trees.with_booster(booster))
    except (ForgedTrees, BundleError) as error:
        raise BundleError(
            f"{folder / BOOSTER} does not hold the trees of this head ({error}); do not use this bundle"
        ) from error


def _with_boosters(trees: Any, content: bytes) -> Any:
    """The head of several labels with the trees of each, which are those of a head of two classes."""
    from featurepipe.heads.trees.boosted import BoostedTrees  # which loads xgboost

    boosters, width = split_trees(content), trees.n_features_in_
    for head in trees.heads_:
        if type(head) is not BoostedTrees or len(head.classes_) != 2 or head.n_features_in_ != width:
            raise ForgedTrees("a label's head is none of two classes, or of another width")
    if len(trees.heads_) != len(trees.classes_):
        raise ForgedTrees(f"there are heads of {len(trees.heads_)} labels, but {len(trees.classes_)} names")
    for one in boosters:
        check_trees(one, width=width, classes=2)
    return trees.with_boosters(boosters)


def check_head(head: Any, classes: tuple[str, ...], name: str, *, width: int | None = None) -> None:
    """Checks that a head is a fitted classifier of these classes, and of ``width`` values if that is known.

    Without classes it must be a fitted regressor.

    Raises:
        BundleError: It is not.
    """
    found, kind = getattr(head, "classes_", None), "classifier" if classes else "regressor"
    if (
        (found is None) == bool(classes)
        or not hasattr(head, "predict")
        or not isinstance(getattr(head, "n_features_in_", None), int)
    ):
        raise BundleError(f"{name} is a {type(head).__name__}, not a fitted {kind}; train again")
    if width not in {None, head.n_features_in_}:
        raise BundleError(f"{name} takes {head.n_features_in_} values, the bundle says {width}; train again")
    if found is None:
        return
    names = list(found)
    if not all(isinstance(label, str) for label in names):
        raise BundleError(f"{name} has classes that are not text ({names[:3]}...); fit it with text labels")
    if names != list(classes):
        raise BundleError(f"{name} knows the classes {names[:5]}, the bundle names {list(classes[:5])}; train again")
