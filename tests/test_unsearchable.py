"""What lies below a folder that may not be searched is not called missing: the error names the folder."""

import os
import re
from pathlib import Path

import pytest

from featurepipe.backbones.weights import read_checkpoint
from featurepipe.cli import main
from featurepipe.errors import BundleError, SourceError, StoreError, UsageError, unsearchable
from featurepipe.heads.bundle.files import read_manifest
from featurepipe.images import open_source
from featurepipe.jobs.sources import check_labels
from featurepipe.store import FeatureStore


@pytest.fixture
def shut(tmp_path, monkeypatch) -> Path:
    """A folder in which nothing can be looked at, whoever runs the tests; what it holds can be listed."""
    folder = tmp_path / "shut"
    (folder / "in").mkdir(parents=True)
    for name in ("a.png", "in/b.png", "weights.pth", "labels.csv", "job.toml"):
        (folder / name).write_bytes(b"x")

    def refusing(function):
        def call(path, *args, **options):
            below = not isinstance(path, int) and folder in Path(os.path.abspath(os.fsdecode(path))).parents  # noqa: PTH100  # follows no links
            if below:
                raise PermissionError(13, "Permission denied", path)
            return function(path, *args, **options)

        return call

    for name in ("stat", "lstat", "open", "mkdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return folder


def reason(folder: Path) -> str:
    return f"the folder {folder} cannot be searched: its permission x is missing for this user"


def test_the_outermost_folder_that_cannot_be_searched_is_named(shut, tmp_path, monkeypatch) -> None:
    for path in (shut / "a.png", shut / "no" / "where", str(shut / "in"), shut / ".." / "shut" / "x"):
        assert unsearchable(path) == reason(shut)
    (tmp_path / "link").symlink_to(shut / "in")
    assert unsearchable(tmp_path / "link" / "b.png") == reason(shut)
    monkeypatch.chdir(tmp_path)
    assert unsearchable("shut/a.png") == reason(shut)
    for path in (shut, tmp_path / "no" / "where", tmp_path / "link.png", "x\0y", ""):
        assert unsearchable(path) == ""


@pytest.mark.parametrize(
    "name", ["in", "a.png", "no.npz", "no.tar", "m.csv", "*.tar", "in/*.tar", "in/[ab]/*.png", "none/*.tar"]
)
def test_sources(name, shut) -> None:
    real = name == "*.tar"  # what is in the folder itself can be listed: there is no such file
    with pytest.raises(SourceError) as caught:
        open_source(f"{shut}/{name}")
    assert str(caught.value).startswith(f"{shut}/{name}: ")
    assert (reason(shut) in str(caught.value)) != real


def test_a_glob_in_a_folder_that_cannot_be_listed(tmp_path, without_privileges) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut" / "a.tar").touch()
    (tmp_path / "shut").chmod(0o300)
    try:
        with (
            without_privileges(),
            pytest.raises(SourceError, match=r"shut cannot be listed: its permission r is missing"),
        ):
            open_source(tmp_path / "shut" / "*.tar")
    finally:
        (tmp_path / "shut").chmod(0o700)


def test_what_is_missing_is_still_called_missing(shut, tmp_path) -> None:
    for name, words in (("no", "no such file or folder"), ("no*.tar", "no file matches")):
        with pytest.raises(SourceError, match=words):
            open_source(tmp_path / name)
    with pytest.raises(StoreError, match="there is no feature store at"):
        FeatureStore(tmp_path / "no", create=False)
    with pytest.raises(BundleError, match="there is no bundle at"):
        read_manifest(tmp_path / "no")
    with pytest.raises(UsageError, match="does not exist"):
        read_checkpoint(tmp_path / "no.pth")
    with pytest.raises(SourceError, match="the labels are not there"):
        check_labels(tmp_path / "no.csv")


def test_stores_bundles_weights_and_labels(shut) -> None:
    words = re.escape(reason(shut))
    with pytest.raises(StoreError, match=f"cannot tell whether there is a feature store at .*in: {words}"):
        FeatureStore(shut / "in", create=False)
    with pytest.raises(BundleError, match=f"cannot tell whether .*in is a bundle: {words}"):
        read_manifest(shut / "in")
    with pytest.raises(UsageError, match=f"cannot be read: {words}"):
        read_checkpoint(shut / "weights.pth")
    with pytest.raises(SourceError, match=words):
        check_labels(shut / "labels.csv")


def test_a_folder_that_is_shut_while_it_is_read(tmp_path, without_privileges) -> None:
    (tmp_path / "outer" / "pile").mkdir(parents=True)
    (tmp_path / "outer" / "pile" / "a.png").write_bytes(b"x")
    source = open_source(tmp_path / "outer" / "pile")
    locator = source.scan()["locator"][0].as_py()
    (tmp_path / "outer").chmod(0o600)
    try:
        with without_privileges(), pytest.raises(SourceError, match=re.escape(reason(tmp_path / "outer"))):
            source.read(locator)
    finally:
        (tmp_path / "outer").chmod(0o700)


@pytest.mark.parametrize(
    "command",
    [
        ["extract", "{}/in", "--store", "store"],
        ["extract", ".", "--store", "{}/store"],
        ["verify", "{}/store"],
        ["info", "{}/bundle"],
        ["predict", "{}/bundle", ".", "--to", "o.csv"],
        ["runs", "{}/store"],
    ],
)
def test_commands(command, tmp_path, monkeypatch, capsys, without_privileges) -> None:
    """With a real folder of mode 600."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "in").mkdir(parents=True)
    (tmp_path / "real").chmod(0o600)
    try:
        with without_privileges():
            assert main([part.format("real") for part in command]) in {1, 2}
    finally:
        (tmp_path / "real").chmod(0o700)
    error = capsys.readouterr().err
    assert reason(tmp_path / "real") in error
    assert "no such" not in error
