"""ImageClassifier: images in, the labels of the cached features out; and as one PyTorch module."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featurepipe.backbones import load_backbone
from featurepipe.errors import BundleError, FeaturepipeError, UsageError
from featurepipe.extraction.extract import extract
from featurepipe.heads.calibration import class_scores
from featurepipe.heads.families import HEADS, make_head
from featurepipe.images.decode import decode, decoding_fields
from featurepipe.prediction import image_classifier
from featurepipe.prediction.image_classifier import ImageClassifier, TorchClassifier
from featurepipe.store import FeatureStore


@pytest.fixture
def classifier(album):
    return ImageClassifier.load(album.bundle(), workers=2)


def check_probabilities(found, expected, score_moves):
    """Equal but for scores that moved: ``log p_k = s_k - log sum exp s`` moves by that of one class and that of the others."""
    assert (np.abs(np.log(found / expected)) <= 2 * score_moves).all()


def test_labels_and_probabilities_are_those_of_the_cached_features(album, classifier, score_moves):
    bundle, features = album.bundle(), album.features()
    check_probabilities(classifier.predict_proba(album.paths()), bundle.probabilities(features), score_moves(bundle))
    assert classifier.predict(album.paths()).tolist() == bundle.predict(features).tolist()
    assert classifier.classes_.tolist() == ["day", "night, late", "ümlaut"]
    assert len(set(classifier.predict(album.paths()))) == 3
    assert repr(classifier) == "<ImageClassifier logistic on c3:gap + f6.1:gap of lenet5, 3 classes>"


def test_what_is_damaged_is_refused_or_predicted_with_a_warning(album, tmp_path, noisy_jpeg):
    paths = [tmp_path / "whole.jpg", tmp_path / "broken.jpg"]
    for path in paths:
        path.write_bytes(noisy_jpeg(1, damaged=path.stem == "broken"))
    with pytest.raises(UsageError, match=r"image 1 \(.*broken\.jpg\) cannot be used: .* keep it with damaged='keep'"):
        ImageClassifier.load(album.bundle(), workers=1).predict(paths)
    keeping = ImageClassifier.load(album.bundle(), workers=1, damaged="keep")
    for classifier in (keeping, pickle.loads(pickle.dumps(keeping))):
        with pytest.warns(UserWarning, match=r"1 of 2 images are kept although they are damaged: image 1 \(.*broken"):
            found = classifier.predict_proba(paths)
        assert np.abs(found[0] - found[1]).max() > 1e-4  # its lower part is lost
    assert keeping.predict(paths[:1]).shape == (1,)


def test_one_unreadable_image_of_many_is_named_or_has_no_label(album, classifier, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    paths = list(album.paths())
    mixed = [paths[0], tmp_path / "text.png", *paths[1:]]
    way_on = r"cannot be used: not-an-image: .* Leave it out, or have nan for such images with on_reject='nan'$"
    with pytest.raises(UsageError, match=way_on):
        classifier.predict(mixed)
    lenient = ImageClassifier.load(album.bundle(), workers=2, on_reject="nan")
    expected = classifier.predict(paths).tolist()
    for one in (lenient, pickle.loads(pickle.dumps(lenient))):
        assert one.predict(mixed).tolist() == [expected[0], None, *expected[1:]]
    likely = lenient.to_pandas(mixed)
    assert likely["predicted"].dropna().tolist() == expected
    alone = [place == 1 for place in range(len(mixed))]
    assert likely["predicted"].isna().tolist() == likely[list(lenient.classes_)].isna().all(axis=1).tolist() == alone
    assert lenient.predict([tmp_path / "text.png"]).tolist() == [None]
    with pytest.raises(UsageError, match="unknown on_reject 'skip'; choices: raise, nan"):
        ImageClassifier.load("nowhere", on_reject="skip")


def test_what_rejects_do_is_checked_once_before_the_network_is_loaded(album, monkeypatch):
    order = []
    ready = image_classifier.make_ready
    monkeypatch.setattr(image_classifier, "check_on_reject", order.append)
    monkeypatch.setattr(image_classifier, "make_ready", lambda *given: (order.append("load"), ready(*given))[1])
    assert ImageClassifier.load(album.bundle(), workers=2, on_reject="nan").on_reject == "nan"
    assert order == ["nan", "load"]


def test_paths_pil_images_and_arrays_give_the_same_in_any_order(album, classifier, score_moves):
    paths = album.paths()
    expected = classifier.predict_proba(paths)
    moves = score_moves(album.bundle())
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in images]
    for given in (images, arrays, np.stack(arrays), np.array(paths)[:, None]):
        check_probabilities(classifier.predict_proba(given), expected, moves)
    order = np.random.default_rng(0).integers(0, len(paths), 50)
    found = classifier.predict_proba([paths[position] for position in order])
    check_probabilities(found, expected[order], moves[order])
    for image in images:
        image.close()


def test_no_images_give_no_rows(classifier):
    assert classifier.predict([]).shape == (0,)
    assert classifier.predict_proba([]).shape == (0, 3)


def test_a_bundle_is_loaded_from_its_folder(album, written, classifier):
    loaded = ImageClassifier.load(written(temperature=2.0), workers=1, batch_size=4)
    assert loaded.bundle.temperature == 2.0
    assert (loaded.predict_proba(album.paths()).max(axis=1) < classifier.predict_proba(album.paths()).max(axis=1)).all()
    assert loaded.predict(album.paths()).tolist() == classifier.predict(album.paths()).tolist()


def test_an_unusable_image_is_named_with_its_position(album, classifier, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"^image 1 \(.*bad\.png\) cannot be used: not-an-image"):
        classifier.predict([album.paths()[0], str(tmp_path / "bad.png")])
    with pytest.raises(UsageError, match="one str is no list of images"):
        classifier.predict("bad.png")


def test_images_of_more_than_eight_bits_are_scaled_as_the_bundle_says(album, classifier):
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in album.paths()]
    with pytest.raises(UsageError, match=r"^image 0 cannot be used: intensity: .*\(255 \* image\)\.astype\('uint8'\)"):
        classifier.predict_proba([pixels[0] / 255.0])
    bundle = album.bundle()
    space = {**bundle.space, "decoding": decoding_fields("window=0:1")}
    scaling = ImageClassifier.load(replace(bundle, space=space), workers=1)
    seen = scaling.predict_proba([image / 255.0 for image in pixels])
    np.testing.assert_array_equal(seen, scaling.predict_proba(pixels))
    of_version_1 = replace(bundle, space={**bundle.space, "decoding": decoding_fields("high-byte")})
    np.testing.assert_array_equal(ImageClassifier.load(of_version_1, workers=1).predict_proba(pixels), seen)
    unknown = replace(bundle, space={**bundle.space, "decoding": decoding_fields("percentiles")})
    with pytest.raises(BundleError, match="unknown intensity 'percentiles'; choices: declared"):
        ImageClassifier.load(unknown)


def test_another_network_is_refused(album):
    bundle = album.bundle()
    with pytest.raises(BundleError, match="numerics differs"):
        ImageClassifier.load(replace(bundle, space={**bundle.space, "numerics": -1}))


# As a module


def batch_of(paths, preprocessing):
    """uint8 (N, C, h, w), resized and cropped."""
    return torch.stack(
        [preprocessing.resize_crop(decode(Path(path).read_bytes(), colour=preprocessing.colour)) for path in paths]
    )


def logits_of(bundle, paths):
    module = ImageClassifier.load(bundle, workers=2).to_torch()
    preprocessing = load_backbone(bundle.backbone["name"], "none").preprocessing
    with torch.no_grad():
        return module(batch_of(paths, preprocessing)).double().numpy()


def check_scores(logits, scores, *, shifted=False, moves=0.0):
    """Equal to 1e-4 of their size; log-probabilities, and scores said to be ``shifted``, up to a constant per image.

    Beyond that they may differ by what ``moves`` of a score do, in its own and in the largest class.
    """
    if shifted or np.allclose(np.exp(scores).sum(axis=1), 1):
        logits = logits - logits.max(axis=1, keepdims=True)
        scores = scores - scores.max(axis=1, keepdims=True)
    assert scores.std() > 0.01
    allowed = 1e-4 * (np.abs(scores) + np.abs(scores).max()) + 2 * moves
    assert (np.abs(logits - scores) <= allowed).all()


LINEAR = [name for name, family in HEADS.items() if family.linear]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_ has at least 1 zero")  # a dead channel of the network
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("classes", [3, 2])
def test_logits_are_the_heads_scores(album, exact_album, score_moves, name, classes):
    labels = None if classes == 3 else {"day": "day", "night, late": "dark", "ümlaut": "dark"}
    for some in (album, exact_album):
        bundle = some.bundle(make_head(name), family=name, labels=labels)
        logits = logits_of(bundle, some.paths())
        assert logits.shape == (36, classes)
        # The module's layers are not folded and fused, so sums are rounded in other places than the engine's.
        moves = score_moves(bundle, moved=5e-6) if some is album else 0.0
        check_scores(logits, class_scores(bundle.head, some.features()), shifted=name == "centroid", moves=moves)
        assert bundle.predict(some.features()).tolist() == [bundle.classes[code] for code in logits.argmax(axis=1)]


@pytest.mark.parametrize("node", ["c3", ["bottleneck", "c1:gmp", "c3:flatten"], "s2:avg2x2", "s4:map"])
@pytest.mark.parametrize("pca", [False, True])
def test_logits_with_other_columns_poolings_and_pca(exact_album, node, pca):
    extract(exact_album.root, exact_album.store, backbone="lenet5", weights="none", precision="fp32", dtype="float32",
            nodes=[node] if isinstance(node, str) else node, workers=2, silent=True)  # fmt: skip
    steps = [StandardScaler(), *([PCA(5, whiten=True)] if pca else []), LogisticRegression(C=0.1)]
    bundle = exact_album.bundle(make_pipeline(*steps), node=node)
    check_scores(logits_of(bundle, exact_album.paths()), class_scores(bundle.head, exact_album.features(node)))


def test_softmax_of_the_logits_over_the_temperature_is_the_probability(exact_album):
    bundle = replace(exact_album.bundle(), temperature=3.0)
    module = ImageClassifier.load(bundle).to_torch()
    logits = torch.from_numpy(logits_of(bundle, exact_album.paths()))
    found = torch.softmax(logits / module.temperature, dim=1).numpy()
    np.testing.assert_allclose(found, bundle.probabilities(exact_album.features()), rtol=1e-4)
    assert module.classes == list(bundle.classes)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_module_of_ordered_classes_gives_their_probabilities(exact_album, classes):
    values = exact_album.features().read(np.float32)
    sums = values @ np.random.default_rng(0).standard_normal(values.shape[1])
    order = ["low", "mid", "high"][:classes]
    labels = np.array(order)[np.searchsorted(np.quantile(sums, [0.4, 0.7][: classes - 1]), sums)]
    head = make_head("logistic", target_type="ordinal", order=order).fit(values, labels)
    bundle = replace(exact_album.bundle(), head=head, classes=tuple(order), ordered=True, temperature=2.0)
    logits = torch.from_numpy(logits_of(bundle, exact_album.paths()))
    found = torch.softmax(logits / 2.0, dim=1).numpy()
    np.testing.assert_allclose(found, bundle.probabilities(exact_album.features()), rtol=2e-3, atol=1e-5)
    assert (
        list(ImageClassifier.load(bundle).predict(exact_album.paths()))
        == bundle.predict(exact_album.features()).tolist()
    )


def test_the_module_takes_normalised_floats_as_well(exact_album):
    module = ImageClassifier.load(exact_album.bundle()).to_torch()
    preprocessing = load_backbone("lenet5", "none").preprocessing
    images = batch_of(exact_album.paths()[:5], preprocessing)
    with torch.no_grad():
        torch.testing.assert_close(module(preprocessing.normalise(images)), module(images))
        assert not torch.allclose(module(images.float()), module(images))


def test_the_module_is_one_frozen_network_with_a_trainable_head(exact_album):
    classifier = ImageClassifier.load(exact_album.bundle())
    module = classifier.to_torch()
    assert isinstance(module, torch.nn.Module)
    assert not module.training
    assert {name for name, value in module.named_parameters() if value.requires_grad} == {"head.weight", "head.bias"}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert classifier.to_torch().head.weight.abs().sum() > 0  # a copy each time
    assert len(set(classifier.predict(exact_album.paths()))) == 3


def test_the_network_stays_in_eval_mode_whoever_calls_train(exact_album):
    module = ImageClassifier.load(exact_album.bundle()).to_torch()
    images = torch.randint(0, 256, (5, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        expected = module(images)
        assert module.train().training
        assert not any(layer.training for layer in module.network.modules())
        for change in (module.network.train, module.train, lambda: [layer.train() for layer in module.modules()]):
            change()
            torch.testing.assert_close(module(images), expected)
            assert not any(layer.training for layer in module.network.modules())
        torch.testing.assert_close(copy.deepcopy(module.train())(images), expected)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-3), (torch.float32, 1e-6)]
)
def test_the_module_in_another_dtype(exact_album, dtype, within):
    module = ImageClassifier.load(exact_album.bundle()).to_torch()
    images = torch.randint(0, 256, (5, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        expected = module(images)
        found = module.to(dtype)(images)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - expected).abs().max() < within * expected.abs().max()
    assert module.factor.dtype == torch.float32
    assert next(module.network.parameters()).dtype == dtype


def test_a_classifier_is_pickled_and_copied(written, album, tmp_path):
    joblib = pytest.importorskip("joblib")
    classifier = ImageClassifier.load(written(temperature=2.0), workers=1, batch_size=4)
    expected = classifier.predict_proba(album.paths())
    joblib.dump(classifier, tmp_path / "classifier.joblib")
    copies = (
        pickle.loads(pickle.dumps(classifier)),
        copy.deepcopy(classifier),
        joblib.load(tmp_path / "classifier.joblib"),
    )
    for other in copies:
        np.testing.assert_array_equal(other.predict_proba(album.paths()), expected)
        assert other._ready.options == classifier._ready.options


def test_the_module_is_saved_and_loaded_as_a_state(exact_album, tmp_path):
    classifier = ImageClassifier.load(exact_album.bundle())
    first, second = classifier.to_torch(), classifier.to_torch()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        second.head.weight.zero_()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    images = torch.zeros((2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(first(images), second(images))


@pytest.mark.slow
def test_the_module_can_be_exported(exact_album):
    module = ImageClassifier.load(exact_album.bundle()).to_torch()
    images = torch.randint(0, 256, (7, 1, 32, 32), dtype=torch.uint8)
    exported = torch.export.export(module, (images[:4],), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(images), module(images))


@pytest.mark.parametrize("name", ["rbf-svm", "knn", "xgboost"])
def test_a_head_that_is_not_linear_is_refused(exact_album, name):
    bundle = replace(exact_album.bundle(), family=name)
    with pytest.raises(UsageError, match=rf"a {name} head is no linear layer.*linear are: {', '.join(LINEAR)}"):
        ImageClassifier.load(bundle).to_torch()


def test_a_step_that_is_not_linear_is_refused(exact_album):
    from sklearn.preprocessing import QuantileTransformer

    bundle = exact_album.bundle(make_pipeline(QuantileTransformer(n_quantiles=10), LogisticRegression()), family="own")
    with pytest.raises(UsageError, match="QuantileTransformer cannot be folded"):
        ImageClassifier.load(bundle).to_torch()


def test_features_beyond_float16_are_not_rounded_to_infinity():
    network = load_backbone("lenet5", "none")
    columns = network.columns(["c3"])
    weight, bias = np.ones((2, 16)), np.zeros(2)
    half, full = (
        TorchClassifier(network, columns, weight, bias, classes=["a", "b"], half=half) for half in (True, False)
    )
    big = torch.full((1, 1, 32, 32), 1e7)
    with torch.no_grad():
        assert full.features(big).abs().max() > 65504
        found = half.features(big)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, full.features(big), rtol=1e-3, atol=1e-3)


def test_a_network_that_cannot_be_traced_works_too(tmp_path, monkeypatch):
    (tmp_path / "untraceable_net.py").write_text(
        "import torch\nfrom torch import nn\nfrom featurepipe.backbones import Preprocessing\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.flat, self.fc = nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 2)\n"
        "    def forward(self, x):\n"
        "        if x.sum() > 1e9: x = -x\n"
        "        return self.fc(self.flat(torch.relu(self.conv(x))))\n"
        "def make():\n"
        "    torch.manual_seed(3)\n"
        "    net = Net()\n"
        "    net.preprocessing = Preprocessing(resize=8, crop=(8, 8), mean=(0.5,), std=(0.5,), colour='grey')\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 12), dtype=np.uint8)
    extract(images, tmp_path / "store", backbone="untraceable_net:make", nodes=["conv:avg2x2"], dataset="d",
            precision="fp32", dtype="float32", silent=True)  # fmt: skip
    store = FeatureStore(tmp_path / "store")
    features = store.features("d", "conv:avg2x2")
    (space,) = store.spaces()
    head = LogisticRegression().fit(features.read(), np.array(["a", "b"] * 10, object))
    from featurepipe.heads.bundle.bundle import Bundle

    bundle = Bundle({"name": "untraceable_net:make", "weights": "DEFAULT", "seed": 0, "description": {}}, space.fields,
                    space.fingerprint, features.columns, "logistic", {}, head, ("a", "b"), None, {}, {},
                    np.zeros(0, np.uint64))  # fmt: skip
    with pytest.raises(
        BundleError, match=r"untraceable_net:make: loading it imports and runs that module.*trust_code=True"
    ):
        ImageClassifier.load(bundle)
    classifier = ImageClassifier.load(bundle, trust_code=True)
    np.testing.assert_allclose(classifier.predict_proba(images), head.predict_proba(features.read()), rtol=1e-4)
    batch = torch.stack(
        [classifier._ready.backbone.preprocessing.resize_crop(decode(i, colour="grey")) for i in images]
    )
    with torch.no_grad():
        check_scores(classifier.to_torch()(batch).double().numpy(), class_scores(head, features.read()))


def test_a_bundle_that_names_a_module_does_not_get_it_imported(album, tmp_path, monkeypatch):
    """Nothing runs before the user says that the bundle's maker is known."""
    (tmp_path / "evil_net.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    bundle = album.bundle()
    forged = replace(bundle, backbone={**bundle.backbone, "name": "evil_net:make"})
    with pytest.raises(BundleError, match="trust_code=True"):
        ImageClassifier.load(forged)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FeaturepipeError):  # the attack works where it is allowed to
        ImageClassifier.load(forged, trust_code=True)
    assert (tmp_path / "ran").exists()
