"""A network as it is: its own classes on images, its probabilities, and what cannot be used so."""

import json
import pickle
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.datasets import load_sample_images
from torchvision.models import get_model

import featurepipe
from featurepipe.backbones import load_backbone
from featurepipe.backbones.families import Torchvision
from featurepipe.cli import main
from featurepipe.errors import UsageError
from featurepipe.prediction.from_store import predict_features
from featurepipe.prediction.own_classes import OwnClassifier, classifier_of, told_apart
from featurepipe.prediction.predict import predict, text

TINY = "shufflenet_v2_x0_5"


def random_state(name):
    """Weights under which logits spread over several units, so that probabilities tell layers apart."""
    torch.manual_seed(0)
    state = get_model(name, weights=None).state_dict()
    last = [key for key in state if key.endswith("weight")][-1]
    return {**state, last: state[last] * 30}


@pytest.fixture
def pretrained(monkeypatch):
    """torchvision's pretrained weights, made up here."""
    monkeypatch.setattr(Torchvision, "state", lambda self, _name: random_state(self.name))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        china, flower = load_sample_images().images
    for name, values in {"palace/china.png": china, "daisy/flower.png": flower}.items():
        (root / name).parent.mkdir()
        Image.fromarray(values).save(root / name)
    return root


@pytest.fixture(scope="module")
def lite0():
    return OwnClassifier.of_network(load_backbone("efficientnet_lite0"))


def own_probabilities(backbone, path):
    """The network's own softmax of one image."""
    p = backbone.preprocessing
    pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
    with torch.inference_mode():
        return softmax(backbone.module(p.normalise(p.resize_crop(pixels)[None])).double().numpy()[0])


def test_it_finds_a_palace_and_a_daisy_with_the_networks_own_probabilities(photos, lite0, tmp_path):
    record = predict(source=photos, to=tmp_path / "out.parquet", backbone="efficientnet_lite0", silent=True)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["id"], row["label"]) for row in rows] == [
        ("daisy/flower.png", "daisy"),
        ("palace/china.png", "palace"),
    ]
    assert list(rows[0])[:6] == ["id", "label", "confidence", "reason", "label_2", "confidence_2"]
    assert len(rows[0]) == 4 + 2 * 4
    close = 1e-3 if record["precision"] == "fp32" else 0.03  # bfloat16 is chosen where the processor has it
    for row in rows:
        own = own_probabilities(lite0.backbone, photos / row["id"])
        names = [row["label"], *(row[f"label_{place}"] for place in range(2, 6))]
        found = [row["confidence"], *(row[f"confidence_{place}"] for place in range(2, 6))]
        assert sorted(found, reverse=True) == found
        expected = [own[lite0.classes.index(name)] for name in names]
        assert found == pytest.approx(expected, abs=close)
    assert (record["bundle"], record["backbone"], record["top"]) == (None, "efficientnet_lite0", 5)
    assert record["labels"] == {"palace": 1, "daisy": 1}
    assert record["options"]["backbone"] == "efficientnet_lite0"
    assert "palace (1), daisy (1)" in text(record)


def test_probabilities_of_fp32_features_equal_the_softmax(photos, lite0):
    from featurepipe.backbones.engine import Engine

    paths = [photos / "palace/china.png", photos / "daisy/flower.png"]
    p = lite0.backbone.preprocessing
    pixels = [torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) for path in paths]
    features = Engine(lite0.backbone, [lite0.column])(torch.stack([p.resize_crop(one) for one in pixels]))
    bundle = lite0.bundle({"made": "up"})
    found = bundle.probabilities(features[str(lite0.column)])
    assert found == pytest.approx(np.stack([own_probabilities(lite0.backbone, path) for path in paths]), abs=1e-5)
    assert [bundle.classes[code] for code in found.argmax(axis=1)] == ["palace", "daisy"]
    assert (bundle.classes.index("palace"), bundle.classes.index("daisy")) == (698, 985)


def test_json_lines_have_as_many_classes_as_asked_for(photos, pretrained, tmp_path, capsys):
    words = ["predict", str(photos), "--backbone", TINY, "--quiet", "--top", "2", "--to"]
    assert main([*words, str(tmp_path / "a.jsonl"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["top"], record["counts"]["predicted"]) == (2, 2)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert list(rows[0]) == ["id", "label", "confidence", "reason", "label_2", "confidence_2"]
    assert rows[0]["confidence"] >= rows[0]["confidence_2"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [TINY, "mobilenet_v3_small"])
def test_the_classifier_is_the_networks_own(name, pretrained):
    backbone = load_backbone(name)
    own = OwnClassifier.of_network(backbone)
    last = [module for module in backbone.module.modules() if isinstance(module, torch.nn.Linear)][-1]
    assert np.array_equal(own.weight, last.weight.double().numpy())
    assert np.array_equal(own.bias, last.bias.double().numpy())
    assert len(set(own.classes)) == 1000


def test_a_relu_after_the_last_convolution_is_no_linear_head(pretrained):
    with pytest.raises(UsageError, match=r"squeezenet1_1 cannot be used as it is: .*a ReLU follows"):
        OwnClassifier.of_network(load_backbone("squeezenet1_1"))


def test_a_convolution_before_the_pooling_is_exact():
    class Convolutional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Conv2d(3, 8, 3, stride=4)
            self.classifier = torch.nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.classifier(self.body(x).relu()).mean((2, 3))

    backbone = load_backbone("lenet5", "none")
    torch.manual_seed(0)
    module = Convolutional().eval()
    backbone.__dict__["_random_module"] = module
    backbone.__dict__["_skeleton"] = module
    backbone.__dict__["preprocessing"] = load_backbone("efficientnet_lite0").preprocessing
    (column,) = backbone.columns(["bottleneck"])
    weight, bias = classifier_of(backbone, column, 5)
    assert np.array_equal(weight, module.classifier.weight.detach().double().flatten(1).numpy())
    assert bias.shape == (5,)


@pytest.mark.parametrize(("name", "weights"), [("lenet5", "none"), (TINY, "none"), ("vgg16", "IMAGENET1K_FEATURES")])
def test_a_network_without_names_is_refused(name, weights, photos, tmp_path):
    with pytest.raises(UsageError, match=r"no class names of its own.*featurepipe train") as caught:
        predict(source=photos, to=tmp_path / "x.csv", backbone=name, weights=weights, silent=True)
    assert caught.value.option == "backbone"
    assert not (tmp_path / "x.csv").exists()


def test_names_that_occur_twice_get_their_number():
    assert told_apart(["crane", "daisy", "crane"]) == ("crane (0)", "daisy", "crane (2)")


@pytest.mark.parametrize("words", ["b s --backbone n", "--backbone n b s", "b --backbone n --to y.csv s"])
def test_a_bundle_and_a_network_are_one_too_many(words, capsys):
    assert main(["predict", *words.split(), "--to", "x.csv"]) == 2
    assert "b and s: with --backbone n give SOURCE alone, and no BUNDLE" in capsys.readouterr().err


def test_in_python_too_one_of_both_is_needed(photos):
    for given in ({}, {"bundle": "b", "backbone": TINY}):
        with pytest.raises(UsageError, match="either a bundle or a network as it is, with backbone"):
            featurepipe.predict(source=photos, **given)


def test_the_bundle_travels_to_workers(lite0):
    bundle = lite0.bundle({"made": "up"})
    there = pickle.loads(pickle.dumps(bundle))
    features = np.random.default_rng(0).normal(size=(3, 1280))
    assert np.array_equal(there.probabilities(features), bundle.probabilities(features))


def test_top_of_a_bundle_with_all_formats(album, written, tmp_path):
    bundle = written()
    predict(bundle, album.root, tmp_path / "all.parquet", silent=True)
    predict(bundle, album.root, tmp_path / "top.parquet", top=3, silent=True)
    predict_features(bundle, album.store, tmp_path / "stored.parquet", top=2, silent=True)
    predict_features(bundle, album.store, tmp_path / "stored.csv", top=2, silent=True)
    every, top, stored = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("all", "top", "stored"))
    for row, best, kept in zip(every, top, stored, strict=True):
        classes = {name[2:-1]: value for name, value in row.items() if name.startswith("p(")}
        ranked = sorted(classes, key=lambda name: -classes[name])
        assert [best["label"], best["label_2"], best["label_3"]] == ranked
        assert [best["confidence"], best["confidence_2"], best["confidence_3"]] == [classes[name] for name in ranked]
        assert [kept["label"], kept["label_2"]] == ranked[:2]
    header, first = (tmp_path / "stored.csv").read_text(encoding="utf-8").splitlines()[:2]
    assert header == '"id","label","confidence","reason","label_2","confidence_2"'
    row = stored[0]
    assert first == (
        f'"{row["id"]}","{row["label"]}",{row["confidence"]:.6g},,"{row["label_2"]}",{row["confidence_2"]:.6g}'
    )
    with pytest.raises(UsageError, match="top=4 is more than the 3 classes"):
        predict(bundle, album.root, top=4, silent=True)
