"""What the store holds is what a plain forward of the same image gives, row by row."""

import importlib
import io
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from featurepipe.backbones import load_backbone

ODD_NAMES = [
    "b/ümlaut.png", "b/with space.jpg", "a/10.png", "a/9.png", "a/Z.png", "b/deep/er/x.jpeg", "a/%41.png", "c/'q\".png",
    "a/back\\slash.png", "c/日本.jpg", "c/UPPER.PNG", "b/" + "n" * 200 + ".jpg",
]  # fmt: skip


def cosine(a, b):
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def lenet_by_hand(data, seed=0):
    """Two columns of LeNet-5 with PIL for the pixels and the plain module for the rest."""
    image = Image.open(io.BytesIO(data)).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    batch = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None, None]
    net = load_backbone("lenet5", "none", seed=seed).module
    with torch.no_grad():
        maps = net.c3(net.s2(net.c1((batch - 0.5) / 0.5)))
        return {"c3": maps.mean((2, 3))[0].numpy(), "f6": net.f6(net.c5(net.flatten(net.s4(maps))))[0].numpy()}


def test_features_equal_a_plain_forward_row_by_row(album, run):
    names = [*ODD_NAMES, *(f"d/{i}.png" for i in range(40))]
    random.Random(1).shuffle(names)
    for seed, name in enumerate(names):
        album.add(name, seed)
    for number, bad in enumerate(["a/0-bad.png", "b/m-bad.jpg", "d/25-bad.png", "zz.png"]):
        album.write(bad, b"" if number % 2 else b"this is no image")
    record = run(album.root, nodes=["c3", "bottleneck"], batch_size=7, dtype="float32", max_rejects=4)
    assert record["counts"] == {
        "listed": len(names) + 4,
        "computed": len(names),
        "known": 0,
        "rejected": 4,
        "read": len(names) + 4,
    }
    for column in ("c3", "f6"):
        stored = run.features(node=column if column == "c3" else "bottleneck")
        assert len(stored) == len(names)
        for name in names:
            expected = lenet_by_hand((album.root / name).read_bytes())[column]
            id_ = name if name in stored else name.replace("\\", "\\\\")
            assert cosine(stored[id_], expected) >= 0.9999, name
    # The pictures are different enough for a shifted row to be seen.
    a, b = (lenet_by_hand((album.root / name).read_bytes())["f6"] for name in names[:2])
    assert cosine(a, b) < 0.999


def test_resizing_cropping_normalising_and_folding_agree_with_torchvision_and_pil(album, run, network):
    spec = network()
    for seed, (height, width) in enumerate([(20, 20), (31, 57), (90, 22), (16, 17), (200, 300)]):
        album.add(f"{seed}.png", seed, height=height, width=width)
        album.add(f"{seed}.jpg", seed + 50, height=height, width=width)
    run(album.root, backbone=spec, nodes=["act", "flat", "norm:flatten"], dtype="float32")
    net = importlib.import_module(spec.partition(":")[0]).make().eval()
    outputs = {}
    net.act.register_forward_hook(lambda _m, _i, output: outputs.update(act=output.clone()))
    net.norm.register_forward_hook(lambda _m, _i, output: outputs.update(norm=output.clone()))
    stored = {node: run.features(node=node) for node in ("act", "flat", "norm:flatten")}
    for path in album.root.iterdir():
        image = functional.center_crop(functional.resize(Image.open(path).convert("RGB"), [20]), [16, 16])
        tensor = functional.normalize(functional.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            net(tensor[None])
        gap = outputs["act"].mean((2, 3))
        assert cosine(stored["act"][path.name], gap) >= 0.9999
        assert cosine(stored["flat"][path.name], gap) >= 0.9999
        assert cosine(stored["norm:flatten"][path.name], outputs["norm"]) >= 0.9999
        np.testing.assert_allclose(stored["flat"][path.name], gap[0], rtol=0.05, atol=0.01)


def test_features_do_not_depend_on_batch_size_workers_or_order(album, run, tmp_path):
    album.fill(30)
    run(album.root, batch_size=1, dtype="float32", workers=1)
    one = run.features()
    run.path = tmp_path / "other"
    run({f"{i:03d}.png": (album.root / f"{i:03d}.png").read_bytes() for i in reversed(range(30))},
        batch_size=13, dtype="float32", workers=5, dataset="album")  # fmt: skip
    other = run.features()
    assert one.keys() == other.keys()
    assert min(cosine(one[name], other[name]) for name in one) >= 1 - 1e-5


def test_labels_and_splits_come_with_the_rows(album, run):
    for seed, name in enumerate(["train/cat/1.png", "train/dog/1.png", "test/dog/2.png"]):
        album.add(name, seed)
    run(album.root)
    found = run.store.features("album")
    assert list(zip(found.ids, found.labels, found.splits, strict=True)) == [
        ("test/dog/2.png", "dog", "test"), ("train/cat/1.png", "cat", "train"), ("train/dog/1.png", "dog", "train"),
    ]  # fmt: skip


@pytest.mark.parametrize("height_width", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_and_thin_images_are_computed(album, run, network, height_width):
    height, width = height_width
    album.add("thin.png", 3, height=height, width=width)
    album.add("usual.png", 4)
    run(album.root, backbone=network(), nodes=["act"])
    stored = run.features(node="act")
    assert sorted(stored) == ["thin.png", "usual.png"]
    assert np.isfinite(stored["thin.png"]).all()


def test_stored_float16_is_the_rounded_float32(album, run):
    album.fill(5)
    run(album.root, dtype="float32")
    run(album.root, dtype="float16")
    spaces = {space.fields["dtype"]: space.name for space in run.store.spaces()}
    exact, half = (run.features(backbone=spaces[dtype]) for dtype in ("float32", "float16"))
    for name, values in exact.items():
        np.testing.assert_array_equal(half[name], values.astype(np.float16).astype(np.float32))


def test_the_record_says_who_did_what_and_where_time_went(album, run):
    album.fill(40)
    record = run(album.root, nodes=["c3", "f6"], batch_size=4)
    assert run.store.runs() == [record]
    seconds = record["seconds"]
    assert set(seconds) == {"scan", "read", "decode", "forward", "write", "waiting", "wall"}
    assert min(seconds.values()) >= 0
    assert seconds["decode"] > 0
    assert seconds["forward"] + seconds["waiting"] + seconds["write"] <= seconds["wall"] + 0.01
    assert record["images_per_second"] == pytest.approx(40 / seconds["wall"], rel=0.1)
    assert record["verdict"].startswith("done in ")
    assert record["columns"] == ["c3:gap", "f6:gap"]
    engine = {"engine": "pytorch", "version": torch.__version__}
    assert record["machine"] == {"device": "cpu", "batch_size": 4, "workers": 2, "engine": engine}
    assert record["versions"]["torch"] == importlib.import_module("torch").__version__.partition("+")[0]
    assert record["host"]["pid"] == os.getpid()
    assert record["started"] <= record["ended"]
    assert (record["status"], record["command"], record["exit_code"]) == ("done", "extract", 0)
