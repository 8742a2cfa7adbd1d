"""Every family by name: what it is made of, what it takes and refuses, and its affine map."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import LinearSVC

from featurepipe.errors import UsageError
from featurepipe.heads.calibration import class_scores, probabilities
from featurepipe.heads.families import FAMILIES, HEADS, HeadFamily, make_head, refuse_weights
from featurepipe.heads.linear.linear_map import linear_map

QUICK = {"xgboost": {"n_estimators": 30, "max_depth": 3, "n_jobs": 1}}
LINEAR = [name for name, family in HEADS.items() if family.linear]
WEIGHTED = [name for name, family in HEADS.items() if family.weights]


@pytest.fixture(scope="module", params=[2, 10], ids=["two classes", "ten classes"])
def sides(request):
    X, numbers = load_digits(return_X_y=True)
    kept = numbers < request.param
    labels = np.array([f"digit {number}" for number in numbers])[kept]
    X = X[kept] * 3 + 50 + np.random.default_rng(0).normal(0, 5, X[kept].shape)
    return X[::2], labels[::2], X[1::2], labels[1::2]


def quick(name, **options):
    return make_head(name, **QUICK.get(name, {}), **options)


def test_the_families_are_those_of_the_issue():
    assert list(HEADS) == ["logistic", "linear-svm", "rbf-svm", "xgboost", "ridge", "lda", "knn", "centroid"]
    assert LINEAR == ["logistic", "linear-svm", "ridge", "lda", "centroid"]
    assert [name for name, family in HEADS.items() if not family.out_of_core] == ["knn"]
    with pytest.raises(TypeError):
        HEADS["mine"] = HEADS["lda"]


@pytest.mark.parametrize("out_of_core", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_each_family_learns_and_keeps_text_labels(sides, name, out_of_core):
    X, y, others, truth = sides
    head = quick(name, out_of_core=out_of_core).fit(X, y)
    assert head.classes_.tolist() == sorted(set(y))
    assert np.mean(head.predict(others) == truth) > 0.85
    assert hasattr(head, "predict_proba") or hasattr(head, "decision_function")
    assert hasattr(head, "predict_proba") or not HEADS[name].probabilities


@pytest.mark.parametrize("name", HEADS)
def test_out_of_core_every_family_takes_blocks_with_their_labels(sides, stored, name):
    X, y, others, _ = sides
    options = {"random_state": 0, "out_of_core": True, "pca": 20}
    streamed = quick(name, memory="300kB", **options).fit(stored(X, y))
    whole = quick(name, **options).fit(X, y)
    assert streamed.predict(stored(others)).tolist() == whole.predict(others).tolist()


@pytest.mark.parametrize("name", [name for name in HEADS if name != "xgboost"])
def test_steps_are_named_scale_pca_and_head(name):
    assert list(make_head(name, pca=5).named_steps) == ["scale", "pca", "head"]
    assert list(make_head(name).named_steps) == ["scale", "head"]
    assert type(make_head(name, scale=False)).__name__ == HEADS[name].in_memory.name


def test_trees_are_not_given_scaled_features_unless_asked():
    assert type(make_head("xgboost")).__name__ == "BoostedTrees"
    assert list(make_head("xgboost", scale=True).named_steps) == ["scale", "head"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("logistic", LogisticRegression),
        ("linear-svm", LinearSVC),
        ("ridge", RidgeClassifier),
        ("lda", LinearDiscriminantAnalysis),
        ("knn", KNeighborsClassifier),
    ],
)
def test_in_memory_the_estimators_are_scikit_learns_own(name, kind):
    steps = [step for _, step in make_head(name, pca=3).steps]
    assert [type(step) for step in steps[:2]] == [StandardScaler, PCA]
    assert isinstance(steps[2], kind)


@pytest.mark.parametrize("name", HEADS)
def test_every_value_of_the_grid_is_one_that_the_estimator_takes(name):
    for out_of_core in (False, True):
        head = make_head(name, scale=False, out_of_core=out_of_core)
        for parameter, values in HEADS[name].grid.items():
            assert isinstance(values, tuple)
            for value in values:
                assert clone(head).set_params(**{parameter: value}).get_params()[parameter] == value


def test_a_grid_can_be_searched_as_it_is(sides):
    X, y, _, _ = sides
    grid = {f"head__{name}": values for name, values in HEADS["ridge"].grid.items()}
    search = GridSearchCV(make_head("ridge"), grid, cv=2).fit(X[::4], y[::4])
    assert search.best_params_["head__alpha"] in HEADS["ridge"].grid["alpha"]


def test_parameters_reach_the_final_estimator():
    head = make_head("logistic", C=0.25, class_weight="balanced", random_state=7, max_iter=9)[-1]
    assert (head.C, head.class_weight, head.random_state, head.max_iter) == (0.25, "balanced", 7, 9)
    assert make_head("rbf-svm", memory="1GB", gamma_factor=2)[-1].memory == "1GB"
    assert make_head("ridge", pca=0.9, out_of_core=True, memory="1GB").named_steps["pca"].memory == "1GB"


def test_unknown_names_and_parameters_name_the_choices():
    with pytest.raises(UsageError, match="unknown head 'logistics'; nearest: logistic"):
        make_head("logistics")
    with pytest.raises(UsageError, match="unknown head 'svm'; nearest: rbf-svm, linear-svm"):
        make_head("svm")
    with pytest.raises(UsageError, match="unknown parameter 'n_neighbours' in head 'knn'; nearest: n_neighbors"):
        make_head("knn", n_neighbours=3)
    with pytest.raises(UsageError, match="unknown parameter 'dual_coef'"):
        make_head("linear-svm", out_of_core=True, dual_coef=3)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in WEIGHTED])
def test_families_without_weights_name_those_that_have_them(name):
    with pytest.raises(UsageError, match=f"{name} takes no class_weight; heads that do: {', '.join(WEIGHTED)}$"):
        make_head(name, class_weight="balanced")
    assert f"{name} takes no sample_weight" in str(refuse_weights(name))


@pytest.mark.parametrize("out_of_core", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_families_with_weights_heed_them(name, out_of_core):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 3)), np.repeat(["often", "rare"], [170, 30])
    X[170:, 0] += 1.0
    rare = {
        weight: (quick(name, class_weight=weight, out_of_core=out_of_core).fit(X, y).predict(X) == "rare").sum()
        for weight in (None, "balanced")
    }
    assert rare["balanced"] > rare[None]
    weights = np.where(y == "rare", 170 / 30, 1.0)
    head = quick(name, scale=False, out_of_core=out_of_core).fit(X, y, sample_weight=weights)
    assert (head.predict(X) == "rare").sum() > rare[None]


@pytest.mark.parametrize("name", HEADS)
def test_the_same_seed_gives_the_same_head(sides, name):
    X, y, others, _ = sides
    options = {"subsample": 0.5} if name == "xgboost" else {}
    options |= {"exact_rows": 0, "n_components": 10} if name == "rbf-svm" else {}
    first, second = (class_scores(quick(name, random_state=5, **options).fit(X, y), others) for _ in range(2))
    np.testing.assert_array_equal(first, second)


class TestLinearMap:
    @pytest.mark.parametrize("pca", [None, 12, 0.9])
    @pytest.mark.parametrize("out_of_core", [False, True])
    @pytest.mark.parametrize("name", LINEAR)
    def test_its_outputs_are_the_decision_values_and_its_softmax_the_probabilities(self, sides, name, out_of_core, pca):
        X, y, others, _ = sides
        head = make_head(name, out_of_core=out_of_core, pca=pca).fit(X, y)
        weight, bias = linear_map(head)
        assert weight.dtype == bias.dtype == np.float64
        assert (weight.shape, bias.shape) == ((len(head.classes_), 64), (len(head.classes_),))
        outputs = others @ weight.T + bias
        np.testing.assert_allclose(probabilities(outputs), probabilities(class_scores(head, others)), atol=1e-9)
        assert head.classes_[outputs.argmax(axis=1)].tolist() == head.predict(others).tolist()
        if HEADS[name].probabilities:
            np.testing.assert_allclose(probabilities(outputs), head.predict_proba(others), atol=1e-9)
        if name != "centroid" or out_of_core:  # scikit-learn's decision values of centroids are not what it predicts by
            values = head.decision_function(others)
            found = outputs if len(head.classes_) > 2 else outputs[:, 1] - outputs[:, 0]
            np.testing.assert_allclose(found, values, rtol=0, atol=1e-9 * np.abs(values).max())

    @pytest.mark.parametrize("options", [{"with_mean": False}, {"with_std": False}])
    def test_halves_of_scaling_and_whitening_are_folded_in(self, sides, options):
        X, y, others, _ = sides
        head = make_pipeline(StandardScaler(**options), PCA(9, whiten=True), "passthrough", make_head("ridge")[-1])
        head.fit(X, y)
        weight, bias = linear_map(head)
        values, outputs = head.decision_function(others), others @ weight.T + bias
        np.testing.assert_allclose(outputs if values.ndim == 2 else outputs[:, 1] - outputs[:, 0], values, atol=1e-9)

    @pytest.mark.parametrize("name", [name for name in HEADS if name not in LINEAR])
    def test_heads_that_are_not_linear_are_refused(self, sides, name):
        X, y, _, _ = sides
        with pytest.raises(UsageError, match=r"is no fitted linear head; linear are: logistic, .*centroid"):
            linear_map(quick(name).fit(X, y))

    def test_what_is_not_fitted_or_not_affine_is_refused(self, sides):
        X, y, _, _ = sides
        with pytest.raises(UsageError, match="LogisticRegression is no fitted linear head"):
            linear_map(make_head("logistic"))
        with pytest.raises(UsageError, match="MinMaxScaler cannot be folded into a linear map"):
            linear_map(make_pipeline(MinMaxScaler(), make_head("ridge")[-1]).fit(X, y))
        with pytest.raises(UsageError, match="RandomForestClassifier is no fitted linear head"):
            linear_map(RandomForestClassifier(2).fit(X, y))


def test_a_family_is_described_without_loading_its_libraries():
    code = (
        "import sys; from featurepipe.heads.families import HEADS; import featurepipe.heads;"
        "print([name for name in ('sklearn', 'xgboost', 'scipy', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert all(isinstance(family, HeadFamily) and family.text for family in HEADS.values())


def test_a_pipeline_is_scikit_learns():
    assert isinstance(make_head("logistic"), Pipeline)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        __import__("featurepipe.heads").heads.nothing  # noqa: B018


def test_the_table_of_heads_says_what_the_families_do():
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text().partition("## Which head learns what")[2]
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    aims = {"one": "multiclass", "several": "multilabel", "a": "continuous", "ordered": "ordinal"}
    told = {
        (name.strip("`"), aims[aim.split()[0]]): (streamed[:2] != "no", module) for name, aim, streamed, module in found
    }
    assert told == {
        (name, kind): (family.out_of_core, "yes" if family.linear else "no")
        for kind, families in FAMILIES.items()
        for name, family in families.items()
    }
