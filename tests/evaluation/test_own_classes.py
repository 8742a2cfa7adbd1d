"""A network's own classes against the user's labels: by name, by a mapping, and with classes that mean no label."""

import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import featurepipe
from featurepipe.cli import main
from featurepipe.errors import UsageError
from featurepipe.evaluation.evaluate import WITHOUT_LABEL
from featurepipe.evaluation.text import text
from featurepipe.prediction.own_classes import LabelsOfClasses

CLASSES = ("daisy", "sea lion", "crane (2)", "crane (3)", "mail-box")
SCORES = np.log([[0.3, 0.1, 0.25, 0.25, 0.1], [0.1, 0.4, 0.05, 0.05, 0.4], [0.05, 0.1, 0.1, 0.05, 0.7]])
NAME = "efficientnet_lite0"


def test_labels_are_matched_by_name():
    found = LabelsOfClasses.by_name(CLASSES, ["Daisy", "SEA_LION", "cranes", "Mail Box", "crane"])
    assert found.labels == ("Daisy", "Mail Box", "SEA_LION", "crane")
    assert found.places.tolist() == [0, 2, 3, 3, 1]
    assert found.classes_of("crane", CLASSES) == ["crane (2)", "crane (3)"]
    one = LabelsOfClasses.by_name(CLASSES, ["Crane (3)"])
    assert (one.labels, one.places.tolist()) == (("Crane (3)",), [-1, -1, -1, 0, -1])
    with pytest.raises(UsageError, match="'sea lion' and 'Sea-Lion' both match the class 'sea lion'"):
        LabelsOfClasses.by_name(CLASSES, ["sea lion", "Sea-Lion"])


def test_probabilities_of_several_classes_add_up():
    found = LabelsOfClasses.given({"daisy": "flower", "crane": "bird"}, CLASSES)
    assert found.labels == ("bird", "flower")
    probabilities, answers = found.probabilities(SCORES, among_labels=False)
    assert probabilities == pytest.approx(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.15, 0.05, 0.8]]))
    assert answers.tolist() == [0, 2, 2]
    probabilities, answers = found.probabilities(SCORES, among_labels=True)
    assert probabilities == pytest.approx(np.array([[5 / 8, 3 / 8], [0.5, 0.5], [0.75, 0.25]]))
    assert answers[[0, 2]].tolist() == [0, 0]


def test_all_other_classes_together_are_no_answer():
    """A label is compared with each class that has none, not with their sum."""
    found = LabelsOfClasses.given({"daisy": "flower"}, CLASSES)
    probabilities, answers = found.probabilities(SCORES[:1], among_labels=False)
    assert probabilities == pytest.approx(np.array([[0.3, 0.7]]))
    assert answers.tolist() == [0]


def test_a_mapping_is_read_and_checked(tmp_path):
    file = tmp_path / "m.csv"
    file.write_text("label;class\nflower;Daisy\n;sea lion\nbird;crane\n")
    assert LabelsOfClasses.given(file, CLASSES).places.tolist() == [1, -1, 0, 0, -1]
    for content, said in (
        ("class,label\ndasy,flower\n", "unknown class 'dasy' in the network's own; nearest: daisy"),
        ("class,label\ndaisy,flower\ndaisy,weed\n", "gives the class 'daisy' two labels, 'flower' and 'weed'"),
        ("name,label\ndaisy,flower\n", "has the columns name, label; a mapping has class and label"),
        ("class,label\n,flower\n", "line 2 names no class"),
        ('class,label\n"daisy,flower\n', "cannot read the mapping"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=said):
            LabelsOfClasses.given(file, CLASSES)
    with pytest.raises(UsageError, match="cannot read the mapping"):
        LabelsOfClasses.given(tmp_path / "none.csv", CLASSES)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A palace, a daisy and noise, with bottleneck features."""
    root = tmp_path_factory.mktemp("photos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        china, flower = load_sample_images().images
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name, values in {"Palace/a.png": china, "daisy/b.png": flower, "daisy/c.png": noise}.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(root / name)
    featurepipe.extract(root, root / "store", dataset="d", backbone=NAME, precision="fp32", silent=True)
    return root / "store"


@pytest.mark.slow
def test_labels_that_are_called_like_classes(store):
    found = featurepipe.evaluate(store=store, backbone=NAME, bootstrap=0, silent=True)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    own = found["own_classes"]
    assert (own["matched"], own["unmatched"]) == ({"Palace": ["palace"], "daisy": ["daisy"]}, [])
    assert (own["classes"], sum(own["answers"].values())) == (998, 1)
    assert found["metrics"]["mistakes"]["most_confident"][0]["predicted"] == WITHOUT_LABEL
    assert "1 image got one of the 998 classes without a label, a wrong answer: " in text(found)
    assert (found["bundle"]["path"], found["options"]["backbone"]) == (None, NAME)
    among = featurepipe.evaluate(store=store, backbone=NAME, among_labels=True, bootstrap=0, silent=True)
    assert among["metrics"]["confusion"]["classes"] == ["Palace", "daisy"]
    assert "the other 998 classes are left out of the choice" in text(among)


def test_a_mapping_on_the_command_line(store, tmp_path, capsys):
    file = tmp_path / "m.csv"
    file.write_text("class,label\npalace,Palace\nbell cote,Palace\nbee,insect\n")
    words = ["evaluate", str(store), "--backbone", NAME, "--mapping", str(file), "--bootstrap", "0", "--quiet"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "2 have labels that mean no class of efficientnet_lite0: 'daisy' (2). Say which classes mean them" in said
    assert main([*words, "--ignore-unknown-classes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["own_classes"]["matched"] == {"Palace": ["bell cote", "palace"]}
    assert found["own_classes"]["unmatched"] == ["daisy"]
    assert found["own_classes"]["without_images"] == ["insect"]
    assert (found["counts"]["scored"], found["metrics"]["accuracy"]["value"]) == (1, 1.0)
    assert found["options"]["mapping"] == str(file)


@pytest.mark.slow
def test_what_is_missing_is_said(store, tmp_path):
    with pytest.raises(UsageError, match=r"none of the labels \(Palace, daisy\) is in the mapping"):
        featurepipe.evaluate(store=store, backbone=NAME, mapping={"bee": "insect"}, silent=True)
    with pytest.raises(UsageError, match=r"mapping=.* is of a network as it is"):
        featurepipe.evaluate("bundle", store, mapping={"bee": "insect"}, silent=True)
    with pytest.raises(UsageError, match="either a bundle or a network as it is"):
        featurepipe.evaluate("bundle", store, backbone=NAME, silent=True)
    shutil.copytree(store.parent / "daisy", tmp_path / "daisy")
    featurepipe.extract(tmp_path, tmp_path / "other", dataset="d", backbone=NAME, nodes="stem", silent=True)
    with pytest.raises(UsageError, match=r"no features of the bottleneck \(flatten:gap\).*--node bottleneck"):
        featurepipe.evaluate(store=tmp_path / "other", backbone=NAME, silent=True)
