"""Features without a store are those that a store would hold, row by row, in the listing's order and in bounded memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.errors import NonFiniteFeatures
from featurepipe.features import stream as streaming
from featurepipe.features.options import MachineOptions, Options
from featurepipe.features.session import Session
from featurepipe.features.settings import Settings, settle_machine
from featurepipe.features.stream import FeatureStream
from featurepipe.images import open_source


def stream_of(nodes=("c3", "bottleneck"), *, backbone="lenet5", weights="none", dtype="float16", batch_size=7):
    network = load_backbone(backbone, weights)
    settings = Settings("fp32", dtype, "cpu", "declared", why={})
    machine, options = (
        settle_machine(MachineOptions(device="cpu", batch_size=batch_size, workers=2), "cpu"),
        Options(backbone=backbone, weights=weights),
    )
    session = Session.of(network, network.columns(nodes), machine, options)
    return FeatureStream(replace(session, settings=settings))


def streamed(stream, spec, **options):
    """(features by id and column, rejects by id), and the ids in the order they came."""
    source = open_source(spec)
    listing = source.scan().combine_chunks()
    ids = listing["id"].to_pylist()
    features, rejects, order, keys = {}, {}, [], {}
    for batch in stream.batches(source, listing, **options):
        assert len(batch.rows) + len(batch.rejects) > 0
        for place, row in enumerate(batch.rows):
            features[ids[row]] = {name: values[place] for name, values in batch.features.items()}
            keys[ids[row]] = batch.keys[place].tobytes()
        rejects.update({ids[row]: reason for row, reason in batch.rejects})
        order.append(sorted([*batch.rows, *(row for row, _ in batch.rejects)]))
    return features, rejects, order, keys


def check_equal(run, features, nodes, dataset="album"):
    """Bit for bit what the store holds, in the dtype of its first rows or wider."""
    for node in nodes:
        found = run.store.features(dataset, node)
        assert set(found.ids) == set(features)
        for id_, stored in zip(found.ids, found.read(np.float32), strict=True):
            np.testing.assert_array_equal(features[id_][found.column].astype(np.float32), stored)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_streamed_features_are_bit_for_bit_those_of_the_store(album, run, dtype):
    for number in range(60):
        album.add(f"{number:03d}.png", number % 37)  # copies, near and far
    album.write("003-bad.png", b"")
    album.write("zz.png", b"no image")
    run(album.root, nodes=["c3", "bottleneck"], dtype=dtype, batch_size=7, max_rejects=2)
    features, rejects, order, keys = streamed(stream_of(dtype=dtype), album.root)
    check_equal(run, features, ["c3", "bottleneck"])
    assert {values.dtype for row in features.values() for values in row.values()} == {np.dtype(dtype)}
    assert rejects["003-bad.png"] == "empty: 0 bytes"
    assert rejects["zz.png"].startswith("not-an-image: ")
    assert [row for batch in order for row in batch] == list(range(62))
    found = run.store.features("album")
    assert keys == {id_: key.tobytes() for id_, key in zip(found.ids, found.keys, strict=True)}


BRIGHT = "torch.where(x.mean((1, 2, 3)) > 0, 1e7, 1.0)[:, None]"


@pytest.mark.parametrize("factor", ["1e7", "1e-7", BRIGHT, "1.0"])
def test_columns_that_float16_cannot_hold_are_widened_as_in_the_store(album, run, network, factor):
    album.fill(12)
    Image.new("RGB", (20, 20), "black").save(album.root / "000.png")
    spec = network(
        lambda source: source.replace("self.fc(", f"self.fc({factor} * ").replace("(6, 4)", "(6, 4, bias=False)")
    )
    run(album.root, backbone=spec, nodes=["fc", "act"], batch_size=1)
    said = []

    class Said:
        say = said.append

        def advance(self, images, bottleneck=""):
            pass

    stream = stream_of(("fc", "act"), backbone=spec, weights="DEFAULT", batch_size=1)
    features, *_ = streamed(stream, album.root, progress=Said())
    check_equal(run, features, ["fc", "act"])
    wide = {name for name, info in run.store.spaces()[0].columns().items() if info.dtype == "float32"}
    assert wide == (set() if factor == "1.0" else {"fc:gap"})
    assert [message.partition(":gap")[0] for message in said] == (["fc"] if wide else [])
    first, last = (features[f"{number:03d}.png"]["fc:gap"].astype(np.float32) for number in (0, 11))
    with np.errstate(over="ignore"):
        assert (first == first.astype(np.float16)).all() == (factor in (BRIGHT, "1.0"))  # rounded before it was widened
        assert (last == last.astype(np.float16)).all() == (not wide)
    assert {row["act:gap"].dtype for row in features.values()} == {np.dtype("float16")}


def test_copies_are_computed_once(album, run, monkeypatch):
    for number in range(40):
        album.add(f"{number:03d}.png", number % 4)
    forwards = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda engine, batch: forwards.append(len(batch)) or submit(engine, batch))
    features, *_ = streamed(stream_of(), album.root)
    assert sum(forwards) == 4
    assert len(features) == 40
    np.testing.assert_array_equal(features["000.png"]["c3:gap"], features["036.png"]["c3:gap"])
    assert (features["000.png"]["c3:gap"] != features["001.png"]["c3:gap"]).any()


def test_a_copy_that_comes_long_after_is_computed_again_and_agrees(album, run, monkeypatch):
    monkeypatch.setattr(streaming, "REMEMBERED_BYTES", 0)  # then as many as a batch has
    for number in range(45):
        album.add(f"{number:03d}.png", number % 15)
    forwards = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda engine, batch: forwards.append(len(batch)) or submit(engine, batch))
    features, _, order, _ = streamed(stream_of(dtype="float32"), album.root)
    assert sum(forwards) == 45
    assert [row for batch in order for row in batch] == list(range(45))
    for number in range(45):
        expected, found = (features[f"{n:03d}.png"]["c3:gap"] for n in (number % 15, number))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_thousands_of_copies_of_one_image_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(streaming, "LONGEST_WAIT", 50)
    image = np.full((20, 20), 7, np.uint8)
    images = {f"{number:04d}": image for number in range(400)}
    _, _, order, _ = streamed(stream_of(batch_size=16), images)
    assert max(map(len, order)) <= 50 + 8
    assert sum(map(len, order)) == 400


def test_what_is_read_ahead_is_bounded():
    class Counting:
        name, location, reads = "counted", "counted", 0

        def __init__(self):
            rng = np.random.default_rng(0)
            self._source = open_source(rng.integers(0, 256, (400, 20, 20), dtype=np.uint8))
            self.scan = self._source.scan

        def read(self, locator):
            self.reads += 1
            return self._source.read(locator)

    source = Counting()
    stream = stream_of(batch_size=4)
    batches = stream.batches(source, source.scan().combine_chunks())
    taken = 0
    for batch in batches:
        taken += len(batch.rows)
        # four batches loaded ahead, those being computed, and a slice or two on the way
        assert source.reads - taken <= 4 * 4 + 4 * (torch.get_num_threads() + 3) + 3 * 8
    assert taken == source.reads == 400


def test_a_stop_ends_the_stream_after_the_rows_read_so_far(album):
    album.fill(80)
    source = open_source(album.root)
    listing = source.scan().combine_chunks()
    rows: list[int] = []

    def enough():
        return len(rows) >= 8

    for batch in stream_of(batch_size=4).batches(source, listing, stop=enough):
        rows.extend(batch.rows)
    assert rows == list(range(len(rows)))
    assert 8 <= len(rows) < 80


def test_nan_names_the_image(album, network):
    album.fill(5)
    spec = network(
        lambda source: source.replace("self.conv(x)", "torch.log(self.conv(x) * 0 + x.mean((1, 2, 3), True) + 1.9)")
    )
    Image.new("RGB", (30, 30), "black").save(album.root / "003-black.png")
    stream = stream_of(("act",), backbone=spec, weights="DEFAULT", batch_size=2)
    with pytest.raises(NonFiniteFeatures, match=r"act:gap: NaN or infinity for 1 of 2 images: 003-black\.png"):
        streamed(stream, album.root)


def test_one_stream_serves_several_sources_with_one_network(album, monkeypatch):
    album.fill(6)
    built = []
    prepare = Engine._prepare
    monkeypatch.setattr(Engine, "_prepare", lambda engine, *args: built.append(1) or prepare(engine, *args))
    stream = stream_of()
    first, *_ = streamed(stream, album.root)
    again, *_ = streamed(stream, [str(path) for path in sorted(album.root.iterdir())])
    assert len(built) == 1
    assert len(first) == len(again) == 6
    for name, other in zip(sorted(first), sorted(again), strict=True):
        np.testing.assert_array_equal(first[name]["c3:gap"], again[other]["c3:gap"])
    assert streamed(stream, {})[0] == {}
