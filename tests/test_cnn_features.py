"""CNNFeatures in scikit-learn's hands: its conventions, its values, and the store as its cache."""

import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils import estimator_checks

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.cnn_features import NAME, CNNFeatures
from featurepipe.errors import UsageError
from featurepipe.extraction.extract import extract
from featurepipe.images.regions import region
from featurepipe.store import FeatureStore, compact_store, gc_store

COUNT = 24
LENET = {"backbone": "lenet5", "weights": "none", "workers": 2}


def pixels(seed):
    """A smooth picture, bright at the top or at the left: two classes."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, 40, dtype=np.float64)
    noise = np.asarray(Image.fromarray(rng.integers(0, 130, (5, 5), dtype=np.uint8)).resize((40, 40)))
    return np.clip(noise + (ramp[:, None] if seed % 2 else ramp[None, :]), 0, 255).astype(np.uint8)


LABELS = np.array(["left", "top"])[np.arange(COUNT) % 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "album"
    root.mkdir()
    for seed in range(COUNT):
        Image.fromarray(pixels(seed)).save(root / f"{seed:02d}.png")
    return root


@pytest.fixture(scope="module")
def paths(folder):
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def expected(paths):
    """What a plain fp32 extraction gives, (COUNT, 16) and (COUNT, 84)."""
    return CNNFeatures(**LENET, node=["c3", "bottleneck"]).fit_transform(paths)


@pytest.fixture
def forwards(monkeypatch):
    counted = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda engine, batch: counted.append(len(batch)) or submit(engine, batch))
    return counted


def computed(store):
    return [run["counts"]["computed"] for run in FeatureStore(store).runs()]


# Values


def test_regions_are_items_of_a_list(paths, tmp_path):
    boxes = [(0, 0, 20, 20), (10, 5, 30, 30), (0, 0, 20, 20)]
    regions = [region(paths[0], box) for box in boxes] + [region(pixels(1), (0.5, 0, 0.5, 1), unit="share"), paths[2]]
    crops = [pixels(0)[:20, :20], pixels(0)[5:35, 10:40], pixels(0)[:20, :20], pixels(1)[:, 20:], pixels(2)]
    expected = CNNFeatures(**LENET).fit_transform(crops)
    np.testing.assert_allclose(CNNFeatures(**LENET).fit_transform(regions), expected, rtol=1e-5, atol=1e-6)
    kept = CNNFeatures(**LENET, store=tmp_path / "store", precision="fp32", dtype="float32").fit(regions)
    np.testing.assert_allclose(kept.transform(regions), expected, rtol=1e-5, atol=1e-6)
    kept.transform(regions)
    assert computed(tmp_path / "store") == [4]  # two are the same box
    manifest = tmp_path / "boxes.csv"
    manifest.write_text("path,box\n" + "".join(f"{paths[0]},{' '.join(map(str, box))}\n" for box in boxes))
    options = {"backbone": "lenet5", "weights": "none", "silent": True}
    assert extract(manifest, tmp_path / "store", **options)["counts"]["computed"] == 0
    assert extract(regions, tmp_path / "store", dataset="list", **options)["counts"]["computed"] == 0
    ids = FeatureStore(tmp_path / "store").snapshot("list")["id"].to_pylist()
    assert ids == [f"{paths[0]}#1", f"{paths[0]}#2", f"{paths[0]}#3", "000003", paths[2]]


@pytest.mark.parametrize(("arguments", "said"), [
    (((1, 2, 3),), "box .1, 2, 3. is not four numbers"), (("abcd",), "is not four numbers"), ((None,), "is not four numbers"),
    (((1, 2, 3, 4), "inches"), "unknown unit 'inches' of a box; choices: pixels, share"),
    (((1, 2, 3, 4), "pixels", -1), "margin=-1: give a share"),
])  # fmt: skip
def test_regions_that_are_none(arguments, said):
    box, *others = arguments
    with pytest.raises(UsageError, match=said):
        region("a.png", box, **dict(zip(("unit", "margin"), others, strict=False)))


def test_a_region_without_pixels_is_named(paths):
    wrong = [paths[1], region(paths[0], (50, 0, 5, 5))]
    with pytest.raises(
        UsageError, match=r"image 1 \(.*00.png#50.0 0.0 5.0 5.0 pixels 0.0\) cannot be used: box: .*outside"
    ):
        CNNFeatures(**LENET).fit_transform(wrong)


def test_values_are_those_of_extract_and_the_store(folder, paths, expected, tmp_path):
    extract(folder, tmp_path, **LENET, nodes=["c3", "bottleneck"], precision="fp32", dtype="float32", silent=True)
    stored = [FeatureStore(tmp_path).features("album", node).read(np.float32) for node in ("c3", "bottleneck")]
    np.testing.assert_array_equal(expected, np.concatenate(stored, axis=1))
    assert expected.dtype == np.float32
    assert expected.std(axis=0).max() > 0.01


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_the_store_changes_no_value_but_by_its_dtype(folder, paths, expected, tmp_path, dtype):
    options = {**LENET, "node": ["c3", "bottleneck"], "precision": "fp32", "dtype": dtype}
    cached = CNNFeatures(**options, store=tmp_path / "mine").fit(paths)
    rounded = expected if dtype == "float32" else expected.astype(np.float16).astype(np.float32)
    for _ in range(2):  # computed, then looked up
        np.testing.assert_array_equal(cached.transform(paths), rounded)
    extract(
        folder, tmp_path / "theirs", **LENET, nodes=["c3", "bottleneck"], precision="fp32", dtype=dtype, silent=True
    )
    spaces = [FeatureStore(tmp_path / name).spaces()[0].fingerprint for name in ("mine", "theirs")]
    assert spaces[0] == spaces[1]


def test_paths_arrays_and_pil_images_give_the_same(paths, expected):
    images = [pixels(seed) for seed in range(COUNT)]
    for given in (images, np.stack(images), [Image.fromarray(image) for image in images], np.array(paths)[:, None]):
        found = CNNFeatures(**LENET, node=["c3", "bottleneck"]).fit_transform(given)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("store", [False, True])
def test_rows_are_in_the_order_given_with_copies(paths, expected, tmp_path, store):
    order = np.random.default_rng(0).integers(0, COUNT, 60)
    made = CNNFeatures(**LENET, node=["c3", "bottleneck"], store=tmp_path if store else None, precision="fp32").fit(
        paths
    )
    found = made.transform([paths[position] for position in order])
    np.testing.assert_allclose(found, expected[order], rtol=1e-3, atol=1e-5)
    some = made.transform([pixels(seed) for seed in (3, 1, 3)])
    np.testing.assert_allclose(some, expected[[3, 1, 3]], rtol=1e-3, atol=1e-5)
    assert made.transform([]).shape == (0, expected.shape[1])


# Conventions

CHECKS = [
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_mixin_order,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_scikit_learns_own_checks_that_need_no_table_of_numbers(check):
    check("CNNFeatures", CNNFeatures())


def test_fit_changes_no_argument_and_returns_itself(paths, tmp_path):
    made = CNNFeatures(**LENET, node=["c3"], store=tmp_path)
    before = {name: repr(value) for name, value in made.get_params().items()}
    given = list(paths)
    assert made.fit(given, LABELS) is made
    assert {name: repr(value) for name, value in made.get_params().items()} == before
    assert given == paths
    assert {name for name in vars(made) if not name.startswith("_")} - set(before) == {
        "columns_",
        "n_features_out_",
        "space_",
        "weights_note_",
    }
    assert made.columns_ == ("c3:gap",)
    assert made.n_features_out_ == 16
    assert made.space_["precision"] in ("fp32", "bf16")
    assert made.space_["dtype"] == "float16"


def test_an_unfitted_one_says_so(paths):
    with pytest.raises(NotFittedError):
        CNNFeatures().transform(paths)
    with pytest.raises(NotFittedError):
        CNNFeatures().get_feature_names_out()


def test_names_of_features_are_column_and_number(paths):
    names = CNNFeatures(**LENET, node=["c3", "c1:gmp"]).fit(paths).get_feature_names_out()
    assert names[[0, 15, 16, 21]].tolist() == ["c3:gap_0", "c3:gap_15", "c1:gmp_0", "c1:gmp_5"]
    assert len(names) == 22


def test_a_clone_is_unfitted_and_equal(paths, expected):
    made = CNNFeatures(**LENET, node=["c3", "bottleneck"]).fit(paths)
    other = clone(made)
    assert not hasattr(other, "space_")
    np.testing.assert_array_equal(other.fit_transform(paths), expected)


@pytest.mark.parametrize("store", [False, True])
def test_pickling_drops_the_network_and_keeps_the_space(paths, tmp_path, store):
    made = CNNFeatures(**LENET, node="c3", store=tmp_path if store else None).fit(paths)
    found = made.transform(paths)
    data = pickle.dumps(made)
    assert len(data) < 4000
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.transform(paths), found)
    assert again.space_ == made.space_
    assert again.get_feature_names_out().tolist() == made.get_feature_names_out().tolist()


def test_what_is_ignored_of_a_file_of_weights_is_an_attribute(paths, tmp_path):
    import torch

    state = load_backbone("lenet5", "none").module.state_dict()
    torch.save(
        {"state_dict": state, "state_dict_ema": {name: value + 1 for name, value in state.items()}}, tmp_path / "w.pt"
    )
    fitted = CNNFeatures("lenet5", weights=str(tmp_path / "w.pt")).fit(paths[:1])
    assert fitted.weights_note_ == "the file holds other tensors as well, which are ignored: ['state_dict_ema']"
    assert CNNFeatures(**LENET).fit(paths[:1]).weights_note_ == ""


def test_other_weights_than_those_of_fit_are_refused(paths, tmp_path):
    import torch

    from featurepipe.backbones import load_backbone

    state = load_backbone("lenet5", "none").module.state_dict()
    torch.save(state, tmp_path / "w.pt")
    made = pickle.dumps(CNNFeatures("lenet5", weights=str(tmp_path / "w.pt")).fit(paths))
    torch.save({name: value + 0.01 for name, value in state.items()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="not the one that was fitted: weights_sha256 differ; fit again"):
        pickle.loads(made).transform(paths)


def test_importing_it_loads_no_torch():
    code = "import sys; from featurepipe.cnn_features import CNNFeatures; CNNFeatures('resnet50'); "
    code += "print([name for name in ('torch', 'h5py', 'xgboost', 'dask') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# In pipelines


def test_a_pipeline_learns_from_paths_and_predicts(paths):
    model = make_pipeline(CNNFeatures(**LENET, node="s4:flatten"), StandardScaler(), LogisticRegression())
    model.fit(paths[:16], LABELS[:16])
    assert (model.predict(paths[16:]) == LABELS[16:]).mean() >= 0.75
    assert model[:-1].get_feature_names_out()[0] == "s4:flatten_0"


def test_pandas_output_keeps_index_and_names(paths, expected):
    pd = pytest.importorskip("pandas")
    index = np.random.default_rng(0).permutation(COUNT)
    made = CNNFeatures(**LENET, node=["c3", "bottleneck"]).set_output(transform="pandas")
    for given in (pd.Series(paths, index=index), pd.DataFrame({"path": paths}, index=index)):
        table = made.fit(given).transform(given)
        assert list(table.columns) == made.get_feature_names_out().tolist()
        assert table.index.tolist() == index.tolist()
        np.testing.assert_array_equal(table.to_numpy(), expected)


@pytest.mark.parametrize("columns", ["path", ["path"]], ids=["1-d", "2-d"])
def test_a_column_transformer_puts_features_beside_other_columns(paths, expected, columns):
    pd = pytest.importorskip("pandas")
    index = np.random.default_rng(1).permutation(COUNT) + 7
    table = pd.DataFrame({"colour": list("rgb") * (COUNT // 3), "path": paths}, index=index)
    both = ColumnTransformer(
        [
            ("image", CNNFeatures(**LENET, node=["c3", "bottleneck"]), columns),
            ("colour", OneHotEncoder(sparse_output=False), ["colour"]),
        ]
    ).set_output(transform="pandas")
    found = both.fit_transform(table)
    assert found.index.tolist() == index.tolist()
    assert found.columns[0] == "image__c3:gap_0"
    np.testing.assert_array_equal(found.to_numpy()[:, :100], expected)
    np.testing.assert_array_equal(found["colour__colour_r"], np.array([1.0, 0.0, 0.0] * (COUNT // 3)))


def test_a_column_transformer_on_an_array_of_objects(paths, expected):
    table = np.array([[path, number] for number, path in enumerate(paths)], dtype=object)
    both = ColumnTransformer([("image", CNNFeatures(**LENET, node=["c3", "bottleneck"]), [0])], remainder="passthrough")
    found = both.fit_transform(table)
    np.testing.assert_array_equal(found[:, :100].astype(np.float32), expected)
    assert found[:, 100].tolist() == list(range(COUNT))


# The store as a cache


def test_a_grid_search_over_heads_extracts_once(paths, tmp_path, forwards):
    store = tmp_path / "store"
    model = make_pipeline(CNNFeatures(**LENET, store=store, precision="fp32"), StandardScaler(), LogisticRegression())
    search = GridSearchCV(model, {"logisticregression__C": [0.01, 0.1, 1.0]}, cv=3).fit(paths, LABELS)
    assert sum(forwards) == COUNT == sum(computed(store))
    assert len(search.cv_results_["params"]) == 3
    (space,) = FeatureStore(store).spaces()
    assert sum(part.rows for part in space.parts()) == COUNT
    plain = make_pipeline(CNNFeatures(**LENET, dtype="float16"), StandardScaler(), LogisticRegression())
    assert GridSearchCV(plain, {"logisticregression__C": [0.01, 0.1, 1.0]}, cv=3).fit(paths, LABELS).best_score_ == (
        search.best_score_
    )


@pytest.mark.slow
def test_a_parallel_grid_search_shares_the_store(paths, tmp_path):
    store = tmp_path / "store"
    model = make_pipeline(CNNFeatures(**LENET, store=store, precision="fp32"), StandardScaler(), LogisticRegression())
    search = GridSearchCV(model, {"logisticregression__C": [0.01, 1.0]}, cv=3, n_jobs=2).fit(paths, LABELS)
    assert sum(computed(store)) == COUNT  # by all processes together
    assert search.best_score_ > 0.6


def test_images_that_extract_has_seen_cost_no_forward(folder, paths, tmp_path, forwards):
    extract(folder, tmp_path, **LENET, precision="fp32", silent=True)
    forwards.clear()
    found = CNNFeatures(**LENET, store=tmp_path).fit(paths).transform(paths)
    assert forwards == []
    np.testing.assert_array_equal(found, FeatureStore(tmp_path).features("album").read(np.float32))
    CNNFeatures(**LENET, store=tmp_path).fit(paths).transform([pixels(1), pixels(500)])
    assert sum(forwards) == 2  # arrays have keys of their own


def test_a_lacking_column_alone_is_computed(paths, tmp_path, forwards, expected):
    CNNFeatures(**LENET, node="c3", store=tmp_path, precision="fp32", dtype="float32").fit(paths).transform(paths)
    both = CNNFeatures(**LENET, node=["c3", "bottleneck"], store=tmp_path, precision="fp32", dtype="float32").fit(paths)
    np.testing.assert_array_equal(both.transform(paths), expected)
    columns = [run["computed_by_column"] for run in FeatureStore(tmp_path).runs()]
    assert columns == [{"c3:gap": COUNT}, {"c3:gap": 0, "f6.1:gap": COUNT}]


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(paths, tmp_path):
    root = tmp_path / "album"
    shutil.copytree(paths[0].rpartition("/")[0], root)
    copies = [str(path) for path in sorted(root.iterdir())]
    made = CNNFeatures(**LENET, node="c3", store=tmp_path / "store").fit(copies)
    before = made.transform(copies)
    Image.fromarray(pixels(99)).save(copies[4])
    after = made.transform(copies)
    assert (before != after).any(axis=1).tolist() == [number == 4 for number in range(COUNT)]
    assert computed(tmp_path / "store") == [COUNT, 1]
    reads = [run["counts"]["read"] for run in FeatureStore(tmp_path / "store").runs()]
    assert reads == [COUNT, 1]


def test_gc_and_compact_leave_the_cache(paths, tmp_path, forwards):
    made = CNNFeatures(**LENET, node="c3", store=tmp_path).fit(paths)
    found = np.concatenate([made.transform(paths[:10]), made.transform(paths[10:])])
    extract({"x": pixels(7)}, tmp_path, **LENET, nodes=["c3"], dataset="other", silent=True)
    forwards.clear()
    store = FeatureStore(tmp_path)
    assert store.datasets() == ["other"]
    assert gc_store(store).rows_dropped == 0
    assert compact_store(store).parts_after < 3
    assert gc_store(store).rows_dropped == 0
    np.testing.assert_array_equal(made.transform(paths), found)
    assert forwards == []
    assert {part.dataset for space in store.spaces() for part in space.parts()} == {NAME, "other"}


def test_fit_settles_one_space_for_good(paths, tmp_path):
    """Another process may start a space meanwhile; rows of one fitted transformer never come from two."""
    made = CNNFeatures(**LENET, node="c3", store=tmp_path, precision="fp32", dtype="auto").fit(paths)
    first = made.transform(paths[:5])
    CNNFeatures(**LENET, node="c3", store=tmp_path, precision="fp32", dtype="float32").fit(paths).transform(paths)
    second = made.transform(paths)
    np.testing.assert_array_equal(second[:5], first)
    np.testing.assert_array_equal(second, second.astype(np.float16).astype(np.float32))
    assert made.space_["dtype"] == "float16"
    assert len(FeatureStore(tmp_path).spaces()) == 2


def transform_in_a_process(store, given):
    return CNNFeatures(**LENET, node="c3", store=store, precision="fp32").fit(given).transform(given)


@pytest.mark.slow
def test_several_processes_may_fill_one_store(paths, tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(transform_in_a_process, tmp_path, paths[start : start + 16]) for start in (0, 8)]
        found = [run.result() for run in runs]
    alone = CNNFeatures(**LENET, node="c3", dtype="float16").fit_transform(paths)
    for start, features in zip((0, 8), found, strict=True):
        np.testing.assert_allclose(features, alone[start : start + 16], rtol=2e-3, atol=1e-5)
    (space,) = FeatureStore(tmp_path).spaces()
    assert sum(part.rows for part in space.parts()) == COUNT


def test_threads_that_lack_the_same_images_compute_them_once(paths, tmp_path, forwards, expected):
    options = {**LENET, "node": ["c3", "bottleneck"], "precision": "fp32", "dtype": "float32"}
    made = [CNNFeatures(**options, store=tmp_path).fit(paths) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one, start: one.transform(paths[start : start + 16]), made, (0, 4, 8)))
    for start, features in zip((0, 4, 8), found, strict=True):
        np.testing.assert_allclose(features, expected[start : start + 16], rtol=1e-4, atol=1e-6)
    assert sum(forwards) == COUNT


def test_a_bootstrap_of_images_computes_each_once(paths, forwards):
    given = [paths[0]] * 10 + [pixels(3)] * 10
    made = CNNFeatures(**LENET, node="c3").fit(given)
    found = made.transform(given)
    assert sum(forwards) == 2
    assert (found[:10] == found[0]).all()
    assert (found[10:] == found[10]).all()


# What goes wrong


@pytest.mark.parametrize("store", [False, True])
def test_an_unusable_image_is_named_with_its_position(paths, tmp_path, store):
    (tmp_path / "bad.png").write_bytes(b"no image")
    given = [*paths[:3], str(tmp_path / "bad.png"), *paths[3:], str(tmp_path / "missing.png")]
    made = CNNFeatures(**LENET, node="c3", store=tmp_path / "store" if store else None).fit(given)
    for _ in range(2):
        way_on = "Leave it out, and its label, or have nan for such images with on_reject='nan'"
        with pytest.raises(UsageError, match=rf"^image 3 \(.*bad\.png\) cannot be used: not-an-image: .* {way_on}$"):
            made.transform(given)
    with pytest.raises(UsageError, match=r"^image 1 \(.*missing\.png\) cannot be used: missing: no such file"):
        made.transform([paths[0], given[-1]])
    lenient = clone(made).set_params(on_reject="nan")
    found = lenient.fit(given).transform(given)
    assert np.flatnonzero(np.isnan(found).all(axis=1)).tolist() == [3, COUNT + 1]
    assert np.isnan(found).sum() == 2 * found.shape[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet51"}, "unknown backbone 'resnet51'"),
        ({"node": "layer9"}, "unknown node 'layer9' in lenet5"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"batch_size": 0}, "batch_size 0 must be"),
        ({"on_reject": "skip"}, "unknown on_reject 'skip'; choices: raise, nan"),
    ],
)
def test_wrong_arguments_are_refused_by_fit(paths, arguments, message):
    with pytest.raises(UsageError, match=message):
        CNNFeatures(**{**LENET, **arguments}).fit(paths)


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(UsageError, match="there are no images to fit on: X is empty"):
        CNNFeatures(**LENET).fit([])


def test_cross_validation_reports_the_bad_image(paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    model = make_pipeline(CNNFeatures(**LENET), LogisticRegression())
    with pytest.raises(ValueError, match="cannot be used: empty: 0 bytes"):
        cross_val_score(model, [*paths, str(tmp_path / "bad.png")], [*LABELS, "top"], cv=3, error_score="raise")


def test_a_batch_of_nothing_but_missing_files_gives_rows_of_nan(tmp_path):
    rows = CNNFeatures("lenet5", weights="none", on_reject="nan").fit_transform([str(tmp_path / "gone.png")])
    assert np.isnan(rows).all()
    assert len(rows) == 1
