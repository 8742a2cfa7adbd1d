"""Paths on the command line: what is not there is refused before anything is loaded, and the nearest is named."""

import sys

import pytest

from featurepipe.cli import main
from featurepipe.errors import near_paths, unknown


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps-bundle").mkdir()
    (tmp_path / "stamps-bundle/bundle.json").write_text("{}")
    (tmp_path / "stamps-bundles").mkdir()
    (tmp_path / "features").mkdir()
    (tmp_path / "features/store.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extract", "stamp"], "stamp: no such file or folder (looked in {here}; nearest: stamps"),
        (["depth", "./stamp"], "./stamp: no such file or folder (looked in {here}; nearest: stamps"),
        (["routes", "stamp"], "nearest: stamps"),
        (["finetune", "stamp", "--out", "b"], "nearest: stamps"),
        (
            ["predict", "stamps-bundel", "stamps", "--to", "p.csv"],
            "there is no bundle at stamps-bundel (looked in {here}; nearest: stamps-bundle); give the folder",
        ),
        (["predict", "b_nothing", "stamps", "--to", "p.csv"], "(looked in {here}; nearest: stamps-bundle); give"),
        (["predict", "stamps-bundle", "xyz", "--to", "p.csv"], "xyz: no such file or folder (looked in {here})\n"),
        (["predict", "stamps", "stamps", "--to", "p.csv"], "stamps is not a bundle: it has no bundle.json"),
        (["evaluate", "stamps-bundel", "features"], "nearest: stamps-bundle); give"),
        (["report", "features", "--to", "p.html", "--bundle", "stamps-bundel"], "nearest: stamps-bundle); give"),
        (["report", "features", "--to", "p.html", "--source", "stamp"], "nearest: stamps"),
        (["depth", "features", "--test-source", "stamp"], "nearest: stamps"),
        (["similar", "features", "stamps", "stamp"], "nearest: stamps"),
        (["similar", "features", "stamps/1.png"], "stamps/1.png: no such file or folder"),
        (["labels", "features", "--source", "stamp"], "nearest: stamps"),
        (["outliers", "features", "--source", "stamp"], "nearest: stamps"),
        (["select", "features", "--budget", "3", "--source", "stamp"], "nearest: stamps"),
    ],
)
def test_a_misspelt_path_is_named_with_the_nearest_at_once(here, monkeypatch, capsys, words, said):
    monkeypatch.setitem(sys.modules, "featurepipe.features.loader", None)  # importing it would fail: nothing is loaded
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said.format(here=here) in told
    assert "no network is named" not in told
    assert not (here / "features/spaces").exists()


def test_a_misspelt_store_is_named_with_the_nearest(here, capsys):
    assert main(["info", "featurs"]) == 2
    assert "there is no feature store at featurs; nearest: features; make one with" in capsys.readouterr().err
    assert main(["train", "nostore", "--out", "b"]) == 2  # called by no name like it: all stores here are named
    assert "no feature store at nostore; nearest: features; make one with" in capsys.readouterr().err
    assert near_paths("nowhere/at/all") == near_paths("zzzz") == ""


def test_of_names_equally_near_the_better_ones_come_first():
    names = [f"efficientnet_lite{number}" for number in range(3)]
    found = unknown("backbone", "efficientnet_lite", names, is_better=lambda name: name == "efficientnet_lite0")
    assert "; nearest: efficientnet_lite0, efficientnet_lite2, efficientnet_lite1" in str(found)
