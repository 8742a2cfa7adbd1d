"""What changes a feature's value starts a new feature space, and a run says so; what does not, does not."""

import dataclasses
import hashlib
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine, PrecisionChoice
from featurepipe.errors import UsageError, in_python
from featurepipe.extraction import prepare
from featurepipe.extraction.extract import extract
from featurepipe.features import session as session_module
from featurepipe.features import settings as auto
from featurepipe.images.decode import DECODING, decoding_fields
from featurepipe.store import FeatureStore


@pytest.fixture(autouse=True)
def filled(album):
    album.fill(3)


@pytest.fixture
def measured(monkeypatch):
    """Stands in for measuring precision: decides as told, and counts how often it was asked."""

    class Measured:
        precision, calls = "fp32", 0

        def __call__(self, *_args, **_options):
            self.calls += 1
            return PrecisionChoice(self.precision, "bf16", 0.99912, 3), None

    measured = Measured()
    monkeypatch.setattr(session_module, "choose_precision", measured)
    return measured


def expect_new_space(run, album, what, **options):
    """A first run, then one with ``options``: everything is computed again, in a space of its own, and it is said why."""
    (space,) = run.store.spaces()
    record = run(album.root, **options)
    assert record["counts"]["computed"] == 3
    assert record["fingerprint"] != space.fingerprint
    assert len(run.store.spaces()) == 2
    assert "starting a new feature space" in record["new_space"]
    assert what in record["new_space"]


FLIPS = {
    "seed": ({"seed": 1}, "holds none for lenet5"),
    "precision": ({"precision": "bf16"}, "precision differs from lenet5-"),
    "dtype": ({"dtype": "float32"}, "dtype differs from lenet5-"),
}


@pytest.mark.parametrize(("options", "what"), FLIPS.values(), ids=FLIPS)
def test_an_option_that_changes_values_makes_a_new_space(album, run, options, what):
    assert "holds none for lenet5" in run(album.root)["new_space"]
    assert run(album.root)["new_space"] is None
    expect_new_space(run, album, what, **options)


def test_another_decoding_or_numerics_version_makes_a_new_space(album, run, monkeypatch):
    run(album.root)
    spaces = 1
    for name in DECODING.keys() - {"intensity"}:  # which is an option, and follows the store
        with monkeypatch.context() as patch:
            patch.setitem(DECODING, name, "otherwise")
            record = run(album.root)
        spaces += 1
        assert record["counts"]["computed"] == 3
        assert f"decoding.{name}" in record["new_space"]
    monkeypatch.setattr(prepare, "NUMERICS", prepare.NUMERICS + 1)
    record = run(album.root)
    assert (record["counts"]["computed"], len(run.store.spaces())) == (3, spaces + 1)
    assert "numerics" in record["new_space"]


PREPROCESSING = {
    "resize": ("resize=20", "resize=24"),
    "crop": ("crop=(16, 16)", "crop=(18, 16)"),
    "mean": ("0.485", "0.486"),
    "std": ("0.229", "0.230"),
    "interpolation": ('"bilinear"', '"bicubic"'),
    "antialias": ("resize=20", "resize=20, antialias=False"),
    "scale": ("resize=20", "resize=20, scale=1.0"),
    "colour": ("mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)", 'mean=(0.5,), std=(0.2,), colour="grey"'),
    "source": ("import torch", "import torch  # a comment"),
    "weights": ("manual_seed(7)", "manual_seed(8)"),
}


@pytest.mark.parametrize("field", PREPROCESSING)
def test_every_field_of_a_users_network_makes_a_new_space(album, run, network, field):
    before, after = PREPROCESSING[field]
    spec = network(name="mine")
    run(album.root, backbone=spec, nodes=["act"])
    old = load_backbone(spec).identity()
    network(
        lambda source: source.replace(before, after).replace("Conv2d(3", f"Conv2d({1 if field == 'colour' else 3}"),
        "mine",
    )
    new = load_backbone(spec).identity()
    if field in dataclasses.asdict(load_backbone(spec).preprocessing):
        assert {name for name in new["preprocessing"] if new["preprocessing"][name] != old["preprocessing"][name]} >= {
            field
        }
    expect_new_space(run, album, "holds none for mine:make", backbone=spec, nodes=["act"])


def test_a_weights_file_is_known_by_its_values_not_its_name(album, run, tmp_path):
    net = load_backbone("lenet5", "none").module
    torch.save(net.state_dict(), tmp_path / "one.pth")
    run(album.root, weights=str(tmp_path / "one.pth"))
    torch.save(dict(reversed(net.state_dict().items())), tmp_path / "two.pth")
    assert run(album.root, weights=str(tmp_path / "two.pth"))["counts"]["known"] == 3
    with torch.no_grad():
        state = {name: value.clone() for name, value in net.state_dict().items()}
        state["c1.0.bias"][0] += 1e-4
    torch.save(state, tmp_path / "one.pth")
    expect_new_space(run, album, "holds none for lenet5", weights=str(tmp_path / "one.pth"))


def test_machine_settings_stay_in_the_space(album, run):
    run(album.root)
    record = run(album.root, batch_size=2, workers=1, device="cpu", max_rejects=5, nodes=["c3"])
    assert record["new_space"] is None
    assert len(run.store.spaces()) == 1


def test_the_fields_of_a_space_are_exactly_what_changes_values(album, run):
    run(album.root)
    (space,) = run.store.spaces()
    assert sorted(space.fields) == [
        "architecture", "decode", "decoding", "dtype", "numerics", "precision", "preprocessing", "weights_sha256",
    ]  # fmt: skip
    assert space.fields["preprocessing"] == load_backbone("lenet5", "none").preprocessing.as_dict()
    assert space.fields["architecture"] == "featurepipe/lenet5"


def test_random_controls_are_marked_as_such(album, run):
    record = run(album.root, seed=4)
    assert record["backbone"]["random"] is True
    assert record["backbone"]["weights"] == "random (seed 4)"
    assert run.store.spaces()[0].notes["backbone"]["random"] is True


def test_auto_is_measured_once_and_written_down(album, run, measured):
    measured.precision = "bf16"
    record = run(album.root, precision="auto")
    assert measured.calls == 1
    assert record["settings"]["precision"]["value"] == "bf16"
    assert "0.99912 over 3 images: kept" in record["settings"]["precision"]["why"]
    assert record["settings"]["dtype"]["value"] == "float16"
    assert record["settings"]["decode"]["value"] == "cpu"
    (space,) = run.store.spaces()
    assert space.fields["precision"] == "bf16"
    assert space.notes["resolved"] == {name: record["settings"][name]["why"] for name in record["settings"]}


def test_auto_follows_the_store_and_does_not_measure(album, run, measured):
    run(album.root, precision="bf16", dtype="float32")
    record = run(album.root, precision="auto")
    assert measured.calls == 0
    assert record["counts"]["known"] == 3
    assert {name: s["value"] for name, s in record["settings"].items()} == {
        "precision": "bf16",
        "dtype": "float32",
        "decode": "cpu",
        "intensity": "declared",
    }
    assert {s["why"] for s in record["settings"].values()} == {"as in the store"}


def test_auto_follows_a_killed_first_run_too(album, run, measured):
    """Such a run has a space and parts, but no record."""
    run(album.root, precision="bf16")
    for path in (*run.path.glob("runs/*"), *run.path.glob("snapshots/*/*")):
        path.unlink()
    assert run.counts(album.root, precision="auto") == (0, 3, 0, 0, 0)
    assert measured.calls == 0


def test_explicit_settings_override_what_the_store_holds(album, run, measured):
    run(album.root, precision="bf16", dtype="float32")
    record = run(album.root, precision="fp32")
    assert measured.calls == 0
    assert {n: s["value"] for n, s in record["settings"].items()} == {
        "precision": "fp32",
        "dtype": "float32",
        "decode": "cpu",
        "intensity": "declared",
    }
    assert record["settings"]["precision"]["why"] == "asked for"
    assert record["settings"]["dtype"]["why"] == "as in the store"
    assert "precision" in record["new_space"]
    assert len(run.store.spaces()) == 2


def test_what_was_settled_before_is_followed_and_says_why():
    as_before = pickle.loads(pickle.dumps(auto.Settled("bf16", "as the training images")))
    asked = {"precision": as_before, "dtype": "float32", "decode": "auto", "intensity": "auto"}
    found = auto.resolve(asked, [], lambda *_: pytest.fail("compared"))
    assert (found.precision, found.why["precision"]) == ("bf16", "as the training images")
    assert (found.dtype, found.why["dtype"]) == ("float32", "asked for")


def test_a_dataset_goes_on_in_the_space_it_used_last(album, run, measured):
    run(album.root, precision="bf16")
    run(album.root, precision="fp32")
    assert run(album.root, precision="auto")["settings"]["precision"]["value"] == "fp32"
    run(album.root, precision="bf16", dataset="other")
    assert run(album.root, precision="auto", dataset="other")["settings"]["precision"]["value"] == "bf16"
    assert run(album.root, precision="auto")["settings"]["precision"]["value"] == "fp32"
    assert measured.calls == 0


def test_what_was_decided_is_said_in_one_line_and_why_only_where_asked(album, run, capsys, caplog):
    caplog.set_level(logging.DEBUG, "featurepipe")
    record = run(album.root, silent=False)
    said = capsys.readouterr()
    assert said.out == ""
    listed, values = said.err.splitlines()[:2]
    assert listed.endswith(": 3 images, no labels, no splits")
    assert values == (
        f"new feature space {record['space']}: precision fp32, dtype float16, decode cpu, intensity declared, engine "
        "pytorch, device cpu"
    )
    for reason in (
        "precision fp32: asked for",
        "dtype float16: default: half the bytes",
        "store holds none for lenet5",
    ):
        assert reason in caplog.text
        assert reason not in said.err
    assert record["settings"]["dtype"] == {"value": "float16", "why": auto._DEFAULTS["dtype"][1]}
    caplog.clear()
    album.fill(1, first=3)
    run(album.root, silent=False)
    assert "feature space" not in (again := capsys.readouterr().err)
    assert "dtype float16" not in again
    assert "dtype float16: as in the store" in caplog.text


def test_a_setting_that_nobody_asked_for_and_that_costs_features_says_why_unasked(album, run, measured, capsys):
    """The store's bf16 misses the bound for a new column, so that nothing there can be reused."""
    (old,) = (run(album.root, precision="bf16")["space"],)
    capsys.readouterr()
    measured.precision = "fp32"
    record = run(album.root, nodes=["c3"], precision="auto", silent=False)
    said = capsys.readouterr().err
    assert record["settings"]["precision"]["value"] == "fp32"
    assert f"precision fp32: {record['settings']['precision']['why']}" in said
    assert f"precision differs from {old}, so no feature there can be reused" in said
    assert "dtype float16: " not in said


def test_auto_takes_fp32_where_reduced_precision_disagrees(album, run, network, monkeypatch):
    """The last layer subtracts nearly all that its input has in common, which bfloat16 cannot hold."""
    from featurepipe.backbones import engine as precision

    monkeypatch.setattr(precision, "reduced_precision", lambda _device: "bf16")
    monkeypatch.setattr(precision, "DEMANDED_COSINE", 0.999)  # more than the small network of tests can keep to
    monkeypatch.setattr(session_module, "ENOUGH_IMAGES", 3)
    spec = network(
        lambda source: source.replace("self.norm(self.conv(x))", "self.norm(self.conv(x) + 300) * 100")
        .replace("net.norm.running_mean.uniform_(-0.5, 0.5)", "net.norm.running_mean.fill_(300.0)")
    )  # fmt: skip
    record = run(album.root, backbone=spec, nodes=["act"], precision="auto")
    assert record["settings"]["precision"]["value"] == "fp32"
    why = record["settings"]["precision"]["why"]
    worst = float(re.search(r"worst cosine of (-?[\d.]+) over 3 images", why)[1])
    assert worst < 0.999
    assert "not kept" in why
    spec = network()
    record = run(album.root, backbone=spec, nodes=["act"], precision="auto")
    assert record["settings"]["precision"]["value"] == "bf16"
    assert "kept" in record["settings"]["precision"]["why"]


def test_auto_without_a_usable_image_takes_fp32(run, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"no")
    record = run(folder, precision="auto", max_rejects=1)
    assert record["settings"]["precision"]["value"] == "fp32"


def test_resolve_prefers_explicit_then_held_then_measured():
    fields = [
        {"precision": "bf16", "dtype": "float16", "decode": "cpu", "decoding": decoding_fields("minmax")},
        {"precision": "fp32", "dtype": "float32", "decode": "gpu", "decoding": decoding_fields("bits=12")},
    ]
    held = [auto.Held(of_space, complete=True) for of_space in fields]
    auto_all = dict.fromkeys(auto.SETTINGS, "auto")
    tried = []

    def measure(precision, intensity):
        tried.append((precision, intensity))
        return "fp16", "measured"

    assert auto.resolve(auto_all, held, measure).fields() == fields[0]
    assert auto.resolve({**auto_all, "dtype": "float32"}, held, measure).fields() == fields[1]
    found = auto.resolve({**auto_all, "dtype": "float32", "decode": "cpu"}, held, measure)
    assert found.values() == {"precision": "bf16", "dtype": "float32", "decode": "cpu", "intensity": "minmax"}
    why = {"precision": "as in the store", "dtype": "asked for", "decode": "asked for", "intensity": "as in the store"}
    assert found.why == why
    assert auto.resolve({**auto_all, "intensity": "bits=12"}, held, measure).fields() == fields[1]
    assert auto.resolve({**auto_all, "intensity": "window=0.0:12e2"}, held, measure).intensity == "window=0:1200"
    assert tried == []
    found = auto.resolve(auto_all, [], measure)
    assert found.values() == {"precision": "fp16", "dtype": "float16", "decode": "cpu", "intensity": "declared"}
    assert found.fields()["decoding"] == DECODING
    assert found.why["precision"] == "measured"
    assert tried == [(None, "declared")]


def test_scaled_decoding_is_followed_only_where_it_is_asked_for():
    full = {"precision": "fp32", "dtype": "float32", "decode": "cpu", "decoding": decoding_fields("declared")}
    scaled = {**full, "dtype": "float16", "decode": "scaled=2", "decoding": decoding_fields("declared", "scaled=2")}
    assert {name for name in DECODING if scaled["decoding"][name] != DECODING[name]} == {"jpeg"}
    auto_all = dict.fromkeys(auto.SETTINGS, "auto")
    held = [auto.Held(fields, complete=True) for fields in (scaled, full)]

    def resolved(held, **asked):
        return auto.resolve({**auto_all, **asked}, held, lambda *_: ("bf16", "measured"))

    found = resolved(held)
    assert found.fields() == full
    assert found.why["decode"] == "as in the store; scaled=2, which the store has too, is only used where asked for"
    alone = resolved(held[:1])
    assert (alone.decode, alone.precision) == ("cpu", "bf16")
    assert alone.why["decode"].endswith("; scaled=2, which the store has too, is only used where asked for")
    assert found.costly == alone.costly == {"decode"}  # said unasked
    for text in ("scaled", "scaled=2.00"):
        assert resolved(held, decode=text).fields() == scaled
        assert resolved(held, decode=text).why["decode"] == "asked for"
    other = resolved(held, decode="scaled=3")
    assert (other.decode, other.dtype) == ("scaled=3", "float32")  # all else as in the space that was decoded in full


def test_features_of_scaled_jpegs_are_a_space_of_their_own(run, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((400, 300))
    (tmp_path / "jpeg").mkdir()
    (tmp_path / "png").mkdir()
    photo.save(tmp_path / "jpeg" / "a.jpg")
    small = Image.open(tmp_path / "jpeg" / "a.jpg")
    small.draft("L", (100, 75))  # lenet5 resizes to 32x32
    small.save(tmp_path / "png" / "a.png")
    record = run(tmp_path / "jpeg", decode="scaled", dtype="float32", dataset="jpeg")
    assert record["settings"]["decode"] == {"value": "scaled=2", "why": "asked for"}
    (space,) = run.store.spaces()
    assert (space.fields["decode"], space.fields["decoding"]["jpeg"]) == ("scaled=2", "libjpeg-islow-scaled")
    run(tmp_path / "png", dtype="float32", dataset="png")
    run(tmp_path / "jpeg", dtype="float32", decode="cpu", dataset="jpeg")
    assert sorted(found.fields["decode"] for found in run.store.spaces()) == ["cpu", "scaled=2"]
    of_png = run.store.features("png").numpy()[0]
    of_scaled = run.store.features("jpeg", backbone=space.fingerprint).numpy()[0]
    np.testing.assert_array_equal(of_png, of_scaled)


def test_reduced_precision_of_the_store_is_measured_before_a_new_column_joins_it():
    fields = {"precision": "bf16", "dtype": "float32", "decode": "cpu", "decoding": decoding_fields("high-byte")}
    auto_all = dict.fromkeys(auto.SETTINGS, "auto")
    tried = []

    def disagree(precision, intensity):
        tried.append((precision, intensity))
        return "fp32", "bf16 agrees with fp32 to a worst cosine of 0.92 only"

    found = auto.resolve(auto_all, [auto.Held(fields, complete=False)], disagree)
    assert tried == [("bf16", "high-byte")]
    assert found.fields() == {**fields, "precision": "fp32"}
    assert "0.92 only" in found.why["precision"]
    exact = auto.Held({**fields, "precision": "fp32"}, complete=False)
    assert auto.resolve(auto_all, [exact], disagree).fields() == exact.fields
    assert (
        auto.resolve({**auto_all, "precision": "bf16"}, [auto.Held(fields, complete=False)], disagree).fields()
        == fields
    )
    assert tried == [("bf16", "high-byte")]


def test_a_dataset_taken_from_another_place_is_said_and_read_anew(album, run, tmp_path, capsys):
    """Two folders of one name with files of one name, size and time: the times alone must not be believed."""
    import os
    import shutil

    other = tmp_path / "other" / album.root.name
    shutil.copytree(album.root, other)
    names = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    (other / names[0]).write_bytes((album.root / names[1]).read_bytes())
    for path in (album.root / names[0], other / names[0]):
        path.write_bytes(path.read_bytes().ljust(4096, b"\0"))
        os.utime(path, (1, 1))
    run(album.root)
    before = run.features()
    record = run(other, silent=False)
    said = capsys.readouterr().err
    assert f"was last taken from {album.root}, now from {other}" in said
    assert record["counts"]["read"] == len(names)
    after = run.features()
    assert not np.array_equal(after[str(names[0])], before[str(names[0])])
    assert np.array_equal(after[str(names[1])], before[str(names[1])])


def test_a_space_whose_decoding_needs_a_gpu_is_not_silently_left(album, run):
    run(album.root)
    (space,) = run.store.spaces()
    on_gpu = FeatureStore(run.path).open_space({**space.fields, "decode": "gpu"}, backbone="lenet5", notes=space.notes)
    with on_gpu.writer(run.store.new_run_id(), dataset="album") as writer:
        writer.add(np.zeros((1, 32), np.uint8), ["x"], [1], [1], {"f6:gap": np.ones((1, 84), np.float32)})
    for path in (*run.path.glob("runs/*"), *space.path.glob("parts/*")):
        path.unlink()
    with pytest.raises(UsageError, match=r"decode='cpu' starts another"):
        run(album.root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'; choices: auto, fp32, bf16, fp16"),
        ({"dtype": "f2"}, "unknown dtype 'f2'; choices: auto, float16, float32"),
        ({"decode": "tpu"}, "unknown decode 'tpu'; choices: auto, cpu, gpu"),
        ({"intensity": "bits=0"}, r"unknown intensity 'bits=0'; choices: declared, full, bits=N, window=LO:HI, minmax"),
        ({"intensity": "window=5:5"}, "unknown intensity 'window=5:5'; choices: declared, full"),
        ({"decode": "gpu", "device": "cpu"}, "decode 'gpu' needs device='cuda'"),
        ({"device": "tpu"}, "unknown device 'tpu'; choices: auto, cpu, cuda, cuda:N"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"batch_size": 0}, "batch_size 0 must be"),
        ({"batch_size": "many"}, "batch_size 'many' must be 'auto' or a number from 1"),
        ({"workers": 0}, "workers 0 must be"),
        ({"workers": -2}, "workers -2 must be"),
        ({"max_rejects": "few"}, "max_rejects 'few' must be a number"),
        ({"max_rejects": -1}, "max_rejects -1 must be a number"),
        ({"backbone": "lenet6"}, "unknown backbone 'lenet6'; nearest: lenet5"),
        ({"nodes": ["c4"]}, "unknown node 'c4' in lenet5; nearest: s4, c5, c3"),
        ({"nodes": ["c3:avg"]}, "avg"),
        ({"dataset": "a/b"}, "not a dataset name: 'a/b'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(album, run, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        run(album.root, **options)
    assert run.reads == 0
    assert not list(run.path.glob("spaces/*/parts/*"))


def test_an_unknown_network_leaves_no_store_behind(album, tmp_path):
    for asked in ({"backbone": "lenet6"}, {"backbone": "resnet50", "weights": "IMAGNET"}):
        with pytest.raises(UsageError, match="unknown"):
            extract(album.root, tmp_path / "store", **asked)
        assert not (tmp_path / "store").exists()


def test_fingerprints_do_not_depend_on_the_process(launcher, album, run):
    """Weights hashes, source hashes and canonical JSON are the same in a fresh process."""
    run(album.root)
    code = """
        import sys
        from featurepipe.backbones import load_backbone
        print(load_backbone("lenet5", "none").weights_sha256)
    """
    other = launcher.start(code).wait()
    assert other.out.strip() == load_backbone("lenet5", "none").weights_sha256
    assert hashlib.sha256().digest_size * 2 == len(run.store.spaces()[0].fingerprint)


def test_engine_is_only_built_when_there_is_something_to_compute(album, run, monkeypatch):
    run(album.root)
    monkeypatch.setattr(Engine, "__init__", lambda *_args, **_options: pytest.fail("built for nothing"))
    assert run(album.root)["counts"]["known"] == 3


def test_precisions_are_compared_on_images_from_all_over_the_listing():
    rows = prepare.spread(100_000, 512)
    assert len(set(rows.tolist())) == 512
    assert np.diff(np.sort(rows)).min() >= 195
    first = np.sort(rows[:128])  # those that are taken if all can be used
    assert np.histogram(first, bins=4, range=(0, 100_000))[0].min() >= 20
    np.testing.assert_array_equal(prepare.spread(100_000, 512), rows)
    assert sorted(prepare.spread(5, 512)) == [0, 1, 2, 3, 4]
    assert prepare.spread(0, 512).tolist() == []


def test_too_few_images_are_not_compared_and_give_fp32(album, run, monkeypatch):
    from featurepipe.backbones import engine

    monkeypatch.setattr(engine, "reduced_precision", lambda _device: "bf16")
    settings = run(album.root, precision="auto")["settings"]["precision"]
    assert settings["value"] == "fp32"
    assert settings["why"] == "there are too few images to compare bf16 with fp32 on, 128 are needed"


def test_images_are_decoded_only_as_long_as_precisions_agree(album, run, monkeypatch):
    album.fill(60)
    given = []

    def three_batches(_backbone, _columns, batches, _device, **_options):
        given.extend(len(next(batches)) for _ in range(3))
        return PrecisionChoice("fp32", "bf16", 0.9, 48), None

    monkeypatch.setattr(session_module, "choose_precision", three_batches)
    monkeypatch.setattr(session_module, "ENOUGH_IMAGES", 50)
    record = run(album.root, precision="auto")
    assert given == [16, 16, 16]
    assert "over 48 images: not kept" in record["settings"]["precision"]["why"]


def test_another_source_of_the_same_name_does_not_replace_a_dataset(album, run, tmp_path):
    album.fill(4)
    run(album.root)
    other = tmp_path / "elsewhere" / album.root.name
    other.mkdir(parents=True)
    (other / "000.png").write_bytes((album.root / "003.png").read_bytes())
    before = run.store.snapshot_ids("album")
    with pytest.raises(UsageError) as caught:
        run(other)
    assert caught.value.message.spelled(in_python) == (
        f"dataset album was last taken from {album.root}, and {other} has the same name but lacks 3 of its 4 images: it would "
        "put its own in their place. To keep the two apart: dataset='album-2'; if those images have moved here, and others were "
        "deleted: max_gone=3"
    )
    assert run.store.snapshot_ids("album") == before
    assert run(other, dataset="album-2")["counts"]["known"] == 1
    assert run(other, max_gone=3)["changes"]["deleted"] == 3
    assert run(album.root)["counts"]["listed"] == 4  # all that the snapshot has are there: these images may have moved
