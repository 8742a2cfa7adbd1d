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
    if out_of_core and not HEADS[name].out_of_core:
        pytest.skip("in memory only")
    X = np.random.default_rng(0).normal(size=(20, 3))
    ours = r"1 of 20 rows have no label \(the first is row 3\); it is nan; leave"
    with pytest.raises(ValueError, match=f"{ours}|Input (y )?contains NaN"):  # the latter are scikit-learn's own words
        make_head(name, out_of_core=out_of_core).fit(X, with_(np.nan))


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
