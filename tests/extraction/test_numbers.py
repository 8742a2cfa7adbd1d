"""Numbers that cannot be kept, and memory that does not suffice."""

import re

import numpy as np
import pytest
import torch

from featurepipe.backbones import load_backbone, parse_column
from featurepipe.backbones.engine import Engine
from featurepipe.errors import NonFiniteFeatures
from featurepipe.store import verify_store


def test_nan_names_the_image_and_keeps_what_was_computed_before(album, run, network, picture):
    album.fill(9)
    spec = network(
        lambda source: source.replace("self.conv(x)", "torch.log(self.conv(x) * 0 + x.mean((1, 2, 3), True) + 1.9)")
    )
    from PIL import Image

    Image.new("RGB", (30, 30), "black").save(album.root / "005-black.png")
    with pytest.raises(NonFiniteFeatures) as caught:
        run(album.root, backbone=spec, nodes=["act"], batch_size=2)
    assert re.search(r"act:gap: NaN or infinity for 1 of 2 images: 005-black\.png", str(caught.value))
    assert caught.value.exit_code == 1
    assert run.store.datasets() == []
    assert verify_store(run.store).clean
    (album.root / "005-black.png").unlink()
    counts = run(album.root, backbone=spec, nodes=["act"], batch_size=2)["counts"]
    assert counts["known"] >= 4
    assert counts["computed"] + counts["known"] == 9


def test_what_float16_cannot_hold_is_kept_as_float32_and_said(album, run, network, capsys):
    album.fill(4)
    spec = network(lambda source: source.replace("self.fc(", "self.fc(1e6 * "))
    record = run(album.root, backbone=spec, nodes=["fc", "act"], silent=False)
    said = capsys.readouterr().err
    assert re.search(
        r"fc:gap: a value of [\d.e+]+ is above float16's largest, 65504; .* float32 .*: nothing is lost", said
    )
    assert said.count("above float16's largest") == 1
    assert record["counts"]["computed"] == 4
    (space,) = run.store.spaces()
    assert {name: info.dtype for name, info in space.columns().items()} == {"act:gap": "float16", "fc:gap": "float32"}
    stored = np.stack(list(run.features(node="fc").values()))
    assert np.isfinite(stored).all()
    assert np.abs(stored).max() > 65504


def test_out_of_memory_halves_the_batch_and_changes_no_feature(album, run, monkeypatch):
    album.fill(23)
    column = [parse_column("f6")]
    backbone = load_backbone("lenet5", "none")
    batch = torch.randint(0, 256, (23, 1, 32, 32), dtype=torch.uint8)
    expected = Engine(backbone, column, batch_size=16)(batch)["f6:gap"]
    engine = Engine(backbone, column, batch_size=16)
    sizes, forward = [], engine._forward

    class Done:
        def __init__(self, outputs):
            self.outputs = outputs

        def result(self):
            return {name: values.numpy() for name, values in self.outputs.items()}

    def small_device(piece):
        sizes.append(len(piece))
        if len(piece) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Done(forward(piece))

    engine._pool = None  # as on CUDA
    monkeypatch.setattr(engine, "_start_copy", small_device)
    found = engine.submit(batch).result()["f6:gap"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 3]
    engine.submit(batch[:4]).result()
    assert sizes[-1:] == [4]
    assert engine.largest_batch == 4


def test_one_image_that_does_not_fit_is_an_error(monkeypatch):
    engine = Engine(load_backbone("lenet5", "none"), [parse_column("f6")])
    engine._pool = None

    def no_memory(_piece):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_start_copy", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine(torch.zeros((2, 1, 32, 32), dtype=torch.uint8))


def test_features_too_small_for_float16_are_kept_as_float32_and_said(tmp_path):
    from featurepipe.store import FeatureStore

    said = []
    space = FeatureStore(tmp_path / "store").open_space({"dtype": "float16"}, backbone="small")
    keys = np.arange(64, dtype=np.uint8).reshape(2, 32)
    small = np.array([[1e-9, 2e-9], [3e-9, 4e-9]], np.float32)
    with space.writer(FeatureStore(tmp_path / "store").new_run_id(), on_overflow=said.append) as writer:
        writer.add(keys, ["a", "b"], [1, 1], [1, 1], {"small:gap": small, "usual:gap": small * 1e9})
    assert {name: info.dtype for name, info in space.columns().items()} == {
        "small:gap": "float32",
        "usual:gap": "float16",
    }
    assert len(said) == 1
    assert said[0].startswith(
        "small:gap: values of 2e-09 on average are too small for float16's steps; it is stored as float32"
    )
