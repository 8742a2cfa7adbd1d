"""A label that is missing is named as such by every head, in memory and out of core."""

import numpy as np
import pandas as pd
import pytest

from featurepipe.errors import UsageError
from featurepipe.heads.families import HEADS, make_head

TEXTS = np.array(list("abcd") * 5, object)


def with_(value, row=3):
    labels = TEXTS.copy()
    labels[row] = value
    return labels


@pytest.mark.parametrize("out_of_core", [False, True])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_names_the_row(name, out_of_core):
    X = np.random.default_rng(0).normal(size=(20, 3))
    head = make_head(name, out_of_core=out_of_core)
    numbers = np.array([0.0, 1.0] * 10)
    numbers[3] = np.nan
    rows = r"1 of 20 rows have no label \(the first is row 3\); "
    for labels in (with_(np.nan), with_(np.nan).tolist(), numbers):  # of a list, NumPy makes the text "nan"
        with pytest.raises(UsageError, match=rows + "it is nan; leave them out"):
            head.fit(X, labels)
    for labels in (with_(None), with_(None).tolist()):
        with pytest.raises(UsageError, match=rows + "leave them out"):
            head.fit(X, labels)


@pytest.mark.parametrize("name", sorted(name for name, family in HEADS.items() if family.weights))
def test_with_weights_too(name):
    X = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(UsageError, match=r"1 of 20 rows have no label"):
        make_head(name, scale=False).fit(X, with_(None), sample_weight=np.ones(20))


@pytest.mark.parametrize(
    "labels",
    [
        with_(None), with_(pd.NA), with_(pd.NaT), with_(float("nan")), pd.Series(with_(np.nan)), pd.Categorical(with_(None)),
        np.array([*"abc", np.nan, *("d" * 16)]), pd.array([*[0, 1, 0], None, *([1] * 16)], dtype="Int64"),
        np.ma.masked_array([0, 1] * 10, mask=[False] * 3 + [True] + [False] * 16), [*"abc", None, *("a" * 16)],
    ],
    ids=lambda labels: type(labels).__name__,
)  # fmt: skip
def test_every_kind_of_missing_label(labels):
    X = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(UsageError, match=r"1 of 20 rows have no label \(the first is row 3\)"):
        make_head("logistic", out_of_core=True).fit(X, labels)
