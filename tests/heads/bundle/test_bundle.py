"""What is written is what is read, on any machine; and features that are not the head's are refused."""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from featurepipe.errors import BundleError
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.heads.bundle.audit import OURS
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.text import bundle_text, describe_bundle
from featurepipe.heads.families import FAMILIES, HEADS, make_head

OTHERS = {  # estimators that are not ours, as a user may put into a bundle
    "logistic": lambda: LogisticRegression(max_iter=200, class_weight={"digit 0": 2.0}),
    "svc": lambda: SVC(gamma=0.001),
    "linear-svc": LinearSVC,
    "ridge": RidgeClassifier,
}


class Features(ArrayBlocks):
    """An array that knows where it is from."""

    def __init__(self, array, **known):
        super().__init__(array)
        self.__dict__.update(known)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", OTHERS)
def test_estimators_of_scikit_learn_predict_the_same_to_the_last_bit(tmp_path, digits, bundle_of, name, classes):
    x, y = digits
    rows = np.isin(y, np.unique(y)[:classes])
    head = make_pipeline(StandardScaler(), PCA(8, random_state=0), OTHERS[name]()).fit(x[rows], y[rows])
    made = bundle_of(head)
    read = read_bundle(write_bundle(tmp_path / "b", made))
    assert read.scores(x).shape == (500, classes)
    np.testing.assert_array_equal(read.scores(x), made.scores(x))
    np.testing.assert_array_equal(read.head.predict(x), head.predict(x))
    np.testing.assert_array_equal(read.head.decision_function(x), head.decision_function(x))


@pytest.mark.parametrize("out_of_core", [False, True], ids=["arrays", "blocks"])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", HEADS)
def test_every_family_predicts_the_same_to_the_last_bit(tmp_path, digits, bundle_of, name, classes, out_of_core):
    x, y = digits
    rows = np.isin(y, np.unique(y)[:classes])
    params = {"n_estimators": 4} if name == "xgboost" else {}
    head = make_head(name, pca=8, out_of_core=out_of_core, **params).fit(x[rows], y[rows])
    made = bundle_of(head)
    read = read_bundle(write_bundle(tmp_path / "b", made))
    np.testing.assert_array_equal(read.scores(x), made.scores(x))
    np.testing.assert_array_equal(read.predict(x), made.predict(x))
    for method in ("predict", "predict_proba", "decision_function"):
        if hasattr(head, method):
            np.testing.assert_array_equal(getattr(read.head, method)(x), getattr(head, method)(x))
    assert read.head.get_params().keys() == head.get_params().keys()
    assert (tmp_path / "b" / "head.ubj").exists() == (name == "xgboost")


def test_other_ways_of_the_same_families_come_back_too(tmp_path, digits, bundle_of):
    x, y = digits
    heads = {
        "landmarks": make_head("rbf-svm", exact_rows=0, n_components=20),
        "bare": make_head("xgboost", n_estimators=3),
        "weighted": make_head("logistic", class_weight={"digit 3": 2.0}),
        "votes": make_head("knn", weights="distance", n_neighbors=3),
        "shrunken": make_head("centroid", shrink_threshold=0.1, pca=8),
    }
    for name, head in heads.items():
        made = bundle_of(head.fit(x, y))
        read = read_bundle(write_bundle(tmp_path / name, made))
        np.testing.assert_array_equal(read.scores(x), made.scores(x), err_msg=name)


@pytest.mark.parametrize("name", FAMILIES["multilabel"])
def test_every_family_of_several_labels_predicts_the_same_to_the_last_bit(tmp_path, digits, bundle_of, name):
    x, y = digits
    truth = np.stack([y == "digit 0", y >= "digit 5", y < "digit 2"], axis=1).astype(np.float32)
    truth[np.random.default_rng(0).random(truth.shape) < 0.1] = np.nan
    params = {"n_estimators": 4, "n_jobs": 1} if name == "xgboost" else {}
    names = {"label_names": ["zero", "large", "small"]}
    head = make_head(name, target_type="multilabel", pca=8, **names, **params).fit(x, truth)
    target = {"type": "multilabel", "columns": ["tags"], "calibration": None}
    made = bundle_of(head, family=name, temperature=None, target=target)
    read = read_bundle(write_bundle(tmp_path / "b", made))
    np.testing.assert_array_equal(read.scores(x), made.scores(x))
    np.testing.assert_array_equal(read.predict(x), head.predict(x))
    assert read.head.get_params().keys() == head.get_params().keys()
    assert (tmp_path / "b" / "head.ubj").exists() == (name == "xgboost")


def test_the_list_of_our_types_is_that_of_our_families():
    families = [family for kind in FAMILIES.values() for family in kind.values()]
    places = [place for family in families for place in (family.in_memory, family.blocks)]
    ours = {f"{place.module}.{place.name}" for place in places if place.module.startswith("featurepipe.")}
    steps = {f"featurepipe.heads.preprocessing.{name}" for name in ("BlockPCA", "BlockScaler", "UnitRows")}
    assert ours | steps | {"featurepipe.heads.selection.KeptColumns"} == set(OURS)


def test_every_field_comes_back(bundle, folder):
    read = read_bundle(folder)
    for field in dataclasses.fields(bundle):
        if field.name not in {"head", "seen", "groups", "software"}:
            assert getattr(read, field.name) == getattr(bundle, field.name), field.name
    np.testing.assert_array_equal(read.seen, [1, 2**64 - 1, 2**63])
    assert read.seen.dtype == np.uint64
    assert read.software["scikit-learn"]
    assert read.width == 64
    assert read.weights_file is None


def test_probabilities_are_the_softmax_at_the_temperature(bundle, digits):
    x, y = digits
    scores = bundle.scores(x)
    expected = np.exp(scores / 1.7) / np.exp(scores / 1.7).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(bundle.probabilities(x), expected, rtol=1e-12)
    np.testing.assert_allclose(
        dataclasses.replace(bundle, temperature=None).probabilities(x), np.exp(scores), rtol=1e-9
    )
    np.testing.assert_array_equal(bundle.predict(x), bundle.head.predict(x))
    assert (bundle.predict(x) == y).mean() > 0.99


def test_predictions_from_blocks_are_those_from_arrays(bundle, digits):
    x, _ = digits
    np.testing.assert_array_equal(bundle.scores(ArrayBlocks(x)), bundle.scores(x))
    np.testing.assert_array_equal(bundle.predict(x.tolist()), bundle.predict(x.astype(np.float64)))


def test_the_card_calls_the_bottleneck_so(bundle):
    *others, last = bundle.columns
    known = {**bundle.backbone, "description": {"bottleneck": last.partition(":")[0]}}
    named = " + ".join([*others, f"bottleneck ({last})"])
    assert f">{named}<" in dataclasses.replace(bundle, backbone=known)._repr_html_()
    assert f">{' + '.join(bundle.columns)}<" in bundle._repr_html_()


def test_features_of_another_space_columns_or_width_are_refused(bundle, digits):
    x, _ = digits
    known = {"space_fingerprint": bundle.fingerprint, "columns": bundle.columns}
    bundle.check(Features(x, **known))
    np.testing.assert_array_equal(bundle.scores(Features(x, **known)), bundle.scores(x))
    with pytest.raises(BundleError, match=f"space {'f' * 12}, the bundle is for {bundle.fingerprint[:12]}") as refused:
        bundle.predict(Features(x, **{**known, "space_fingerprint": "f" * 64}))
    assert "featurepipe info" in str(refused.value)
    with pytest.raises(BundleError, match="columns flatten:gap, layer1:gap, the bundle is for layer1:gap, flatten:gap"):
        bundle.scores(Features(x, **{**known, "columns": ("flatten:gap", "layer1:gap")}))
    with pytest.raises(BundleError, match="columns layer2:gap, the bundle"):
        bundle.check(Features(x, column="layer2:gap"))
    with pytest.raises(
        BundleError, match=r"shape \(500, 63\), the bundle takes \(n, 64\): layer1:gap, flatten:gap of tiny"
    ):
        bundle.probabilities(x[:, 1:])
    with pytest.raises(BundleError, match=r"shape \(64,\)"):
        bundle.scores(x[0])


def test_a_bundle_moves_and_keeps_no_path_of_its_maker(bundle, tmp_path, digits):
    x, _ = digits
    made = write_bundle(tmp_path / "a distinctive folder" / "bundle", bundle)
    moved = tmp_path / "elsewhere"
    shutil.move(made, moved)
    for file in moved.iterdir():
        for trace in (b"a distinctive folder", bytes(tmp_path), bytes(Path.cwd()), bytes(Path.home())):
            assert trace not in file.read_bytes(), file.name
    np.testing.assert_array_equal(read_bundle(moved).scores(x), bundle.scores(x))


def test_own_weights_travel_with_the_bundle(bundle, tmp_path):
    import safetensors.numpy

    weights = tmp_path / "mine.safetensors"
    safetensors.numpy.save_file({"conv.weight": np.arange(6, dtype=np.float32)}, weights)
    own = dataclasses.replace(bundle, backbone={**bundle.backbone, "weights": "file"})
    first = read_bundle(write_bundle(tmp_path / "first", own, weights_file=weights))
    assert first.weights_file == tmp_path / "first" / "weights.safetensors"
    assert first.software["torch"] == version("torch")
    assert "torch" not in read_bundle(write_bundle(tmp_path / "without", bundle)).software
    again = read_bundle(write_bundle(tmp_path / "again", first))
    assert again.weights_file.read_bytes() == weights.read_bytes()
    (tmp_path / "mine.pth").write_bytes(b"\x80\x04N.")
    with pytest.raises(
        BundleError, match=r"mine.pth is not a safetensors file, and a bundle holds no pickle; convert it"
    ):
        write_bundle(tmp_path / "third", own, weights_file=tmp_path / "mine.pth")
    with pytest.raises(BundleError, match="cannot read the weights file"):
        write_bundle(tmp_path / "third", own, weights_file=tmp_path / "none.safetensors")
    assert not (tmp_path / "third").exists()


def test_another_minor_version_of_scikit_learn_warns_in_one_line(folder, forge, bundle, digits):
    def aged(release):
        return lambda manifest: manifest["software"].update({"scikit-learn": release})

    now = read_bundle(folder).software["scikit-learn"]
    forge(folder, record=aged(f"{now.rsplit('.', 1)[0]}.99"))
    read_bundle(folder)  # warnings are errors here
    forge(folder, record=aged("1.1.3"))
    with pytest.warns(
        UserWarning, match=rf"bundle was written with scikit-learn 1.1.3, this is {now}: compare"
    ) as told:
        old = read_bundle(folder)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    np.testing.assert_array_equal(old.scores(digits[0]), bundle.scores(digits[0]))


def test_numpy_values_are_recorded_and_nonsense_is_refused(bundle, tmp_path):
    metrics = {"accuracy": np.float32(0.5), "counts": np.arange(3), "pair": (1, None), "done": np.bool_(1)}
    read = read_bundle(write_bundle(tmp_path / "b", dataclasses.replace(bundle, metrics=metrics)))
    assert read.metrics == {"accuracy": 0.5, "counts": [0, 1, 2], "pair": [1, None], "done": True}
    wrong = {
        r"metrics.auc\[1\] is nan": {"metrics": {"auc": [1.0, float("nan")]}},
        r"params.weights is a function": {"params": {"weights": lambda: 0}},
        r"metrics has the key 3": {"metrics": {3: 4}},
        r"training.source is '/', a path of this machine": {"training": {"source": "/"}},
        r"temperature is 0.0": {"temperature": 0.0},
        r"temperature is inf": {"temperature": float("inf")},
        r"is not the fingerprint": {"fingerprint": "0" * 64},
        r"the bundle names \['cat'\]": {"classes": ("cat",)},
        r"seen must be \(n,\) uint64": {"seen": np.arange(3)},
    }
    for message, change in wrong.items():
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path / "c", dataclasses.replace(bundle, **change))
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_heads_that_could_not_be_loaded_again_are_not_written(bundle_of, digits, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    x, y = digits
    for head, message in {
        LogisticRegression(max_iter=200).fit(x, np.unique(y, return_inverse=True)[1]): "classes that are not text",
        DecisionTreeClassifier().fit(x, y): "sklearn.tree._tree.Tree",
        KNeighborsClassifier(algorithm="kd_tree").fit(x, y): "KDTree",
        KNeighborsClassifier(algorithm="brute", weights=np.exp).fit(x, y): r"numpy\S*\.exp as FunctionNode",
    }.items():
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path / "b", bundle_of(head))
    with pytest.raises(BundleError, match="not a fitted classifier"):
        write_bundle(tmp_path / "b", dataclasses.replace(bundle_of(head), head=LogisticRegression()))
    assert not list(tmp_path.iterdir())


def test_description_and_text(folder, bundle):
    read = read_bundle(folder)
    found = describe_bundle(read)
    assert json.loads(json.dumps(found)) == found
    assert found["columns"] == ["layer1:gap", "flatten:gap"]
    assert (found["seen"], found["width"], found["own_weights"]) == (3, 64, False)
    text = bundle_text(read)
    for line in (
        "backbone  tiny, weights none",
        f"features  layer1:gap + flatten:gap: 64 values, stored as float16, space {bundle.fingerprint[:12]}",
        "head      logistic (C=0.5), calibrated (temperature 1.7)",
        "classes   10: digit 0, digit 1, digit 2, digit 3, digit 4, digit 5, digit 6, digit 7, ...",
        "trained   on dataset digits, 3 different images; train",
        "on the 100 test images when it was trained:",
        "accuracy  0.9000  0.8000 to 0.9500",
    ):
        assert line in text.splitlines()
    assert "not calibrated" in bundle_text(dataclasses.replace(read, temperature=None))
