"""Tuning the layers above a node: equal to the network at the start, better at the end, and the same after a kill."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import featurepipe as fp
from featurepipe.backbones.engine import Engine, worst_cosine
from featurepipe.backbones.fusion import with_folded_norms
from featurepipe.backbones.tail import Tail, cuts
from featurepipe.errors import BundleError, DiskFull, Interrupted, UsageError
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.interrupt import StopRequest
from featurepipe.training.text import finetune_text
from featurepipe.tuning import activations, loop, stored_features, work
from featurepipe.tuning.finetune import finetune
from featurepipe.tuning.objective import TuningObjective, mixed_inputs, mixing_share

CUT = "s2"
FAST: dict[str, Any] = {"epochs": 3, "rate": 3e-3, "silent": True}


@pytest.fixture(scope="module")
def piles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of scikit-learn in folders of their classes, and a table of what else is known of them."""
    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    lines = ["id,label,value,tags,writer"]
    for number, (pixels, digit) in enumerate(zip(found.images[:500], found.target[:500].tolist(), strict=True)):
        path = folder / "piles" / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((32, 32)).save(path)
        tags = "|".join(["odd"] * (digit % 2) + ["large"] * int(digit > 4)) or "[]"
        lines.append(f"{digit}/{number}.png,{digit},{digit * 2.5},{tags},w{number // 10}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def store(piles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations and bottleneck of a LeNet-5 that was not trained."""
    path = tmp_path_factory.mktemp("features") / "store"
    fp.extract(
        piles / "piles",
        path,
        dataset="digits",
        backbone="lenet5",
        weights="none",
        nodes=[f"{CUT}:map", "bottleneck"],
        silent=True,
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("lenet5", "s2"),
        ("resnet18", "layer3"),
        ("swin_t", "features.5"),
    ],
)
def test_the_tail_of_stored_activations_gives_the_networks_own_features(name, node) -> None:
    backbone = fp.load_backbone(name, "none")
    tail = Tail(backbone, node)
    (stored,) = backbone.columns([tail.column])
    (out,) = backbone.columns([])
    images = torch.randn(2, *backbone.preprocessing.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = backbone.graph([stored.node, out.node])(images)
        vectors = fp.backbones.pool(
            found[stored.node], stored.pooling, channel_axis=backbone.channel_axis(stored.node)
        ).flatten(1)
        wanted = fp.backbones.pool(found[out.node], out.pooling, channel_axis=backbone.channel_axis(out.node)).flatten(
            1
        )
        assert torch.allclose(tail(vectors), wanted, atol=1e-5)
    assert any(parameter.requires_grad for parameter in tail.parameters())
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


def gradients_of(network: torch.nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a step gives: the outputs, and each parameter's gradient."""
    network.zero_grad(set_to_none=True)
    outputs = network(inputs)
    outputs.square().mean().backward()
    return {"outputs": outputs.detach(), **{name: p.grad.clone() for name, p in network.named_parameters()}}


def called(graph: torch.fx.GraphModule, owner: torch.nn.Module) -> list[type[torch.nn.Module]]:
    return [type(owner.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"]


def with_odd_statistics(network: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for norm in (layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        if norm.running_mean is None:
            continue
        norm.running_mean.uniform_(-1, 1, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


@pytest.mark.parametrize(("name", "node"), [("resnet18", "layer3"), ("efficientnet_lite0", "blocks.14")])
def test_a_step_with_folded_norms_has_the_gradients_of_one_without(name, node) -> None:
    tail = Tail(fp.load_backbone(name, weights="none"), node)
    with_odd_statistics(tail.double())
    tail.dtype = torch.float64
    assert called(tail.network, tail.network).count(torch.nn.BatchNorm2d) >= 4
    assert torch.nn.BatchNorm2d not in called(tail.folded(), tail.network)
    names = [name for name, _ in tail.named_parameters()]
    stored = torch.randn(3, *tail.input_shape, generator=torch.Generator().manual_seed(2)).double()
    found = gradients_of(tail, stored)
    tail._folded = (tail.network,)
    expected = gradients_of(tail, stored)
    assert [*found] == [*expected] == ["outputs", *names]
    for value, other in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-10 * other.abs().max().item())


def test_what_is_folded_into_a_step_and_what_is_not() -> None:
    shared = torch.nn.Conv2d(6, 6, 1)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.nn.BatchNorm2d(6, eps=0.1), torch.nn.ReLU(),
        shared, torch.nn.BatchNorm2d(6), shared, torch.nn.BatchNorm2d(6),
        torch.nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), torch.nn.BatchNorm2d(6),
        torch.nn.Conv2d(6, 6, 1), torch.nn.BatchNorm2d(6, affine=False),
        torch.nn.Conv2d(6, 6, 1), torch.nn.BatchNorm2d(6, track_running_stats=False),
    )  # fmt: skip
    plain = torch.fx.symbolic_trace(with_odd_statistics(layers.double()))
    folded = with_folded_norms(plain)
    left = called(folded, plain)
    assert (left.count(torch.nn.Conv2d), left.count(torch.nn.BatchNorm2d)) == (3, 3)
    assert {id(p) for p in folded.parameters()} == {id(p) for p in plain.parameters()}
    inputs = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(2)).double()
    found, expected = (gradients_of(network, inputs) for network in (folded, plain))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(("precision", "least"), [("fp32", 1 - 1e-6), ("bf16", 0.9995)])
def test_a_tail_computes_as_the_engine_does_in_each_precision(precision, least) -> None:
    backbone = fp.load_backbone("resnet18", "none")
    tail = Tail(backbone, "layer3")
    columns = backbone.columns([tail.column, "bottleneck"])
    images = torch.randint(0, 256, (2, *backbone.preprocessing.input_shape), dtype=torch.uint8)
    found = Engine(backbone, columns, precision=precision)(images)
    with torch.inference_mode():
        own = tail.as_engine(precision)(torch.from_numpy(found[tail.column]))
    assert worst_cosine(own.numpy(), found[tail.bottleneck]) >= least
    assert tail.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in tail.parameters())


def test_places_where_a_network_cannot_be_cut_are_refused_with_those_where_it_can() -> None:
    backbone = fp.load_backbone("resnet18", "none")
    assert cuts(backbone) == ["layer1", "layer2", "layer3"]
    with pytest.raises(UsageError, match=r"a skip around it.*it can be cut at layer1, layer2, layer3"):
        Tail(backbone, "layer3.1.conv1")
    for name in ("flatten", "bottleneck"):
        with pytest.raises(UsageError, match=r"at or above the bottleneck flatten.*layer1, layer2, layer3"):
            Tail(backbone, name)
    with pytest.raises(UsageError, match="leaves no weights to tune above it"):
        Tail(backbone, "layer4")
    with pytest.raises(UsageError, match="unknown node 'layer9'"):
        Tail(backbone, "layer9")


@pytest.mark.slow
def test_a_tuned_bundle_is_better_than_the_frozen_one_and_a_bundle_like_any_other(piles, store, tmp_path) -> None:
    frozen = fp.train(store, out=tmp_path / "frozen", tune=True, silent=True)
    tuned = finetune(store, from_node=CUT, out=tmp_path / "tuned", **{**FAST, "epochs": 12})
    before, after = (found["test"]["accuracy"]["value"] for found in (frozen, tuned))
    history = tuned["tuning"]["runs"][0]["history"]
    assert min(entry["loss"] for entry in history[1:]) < history[0]["loss"]
    assert after >= before
    # the start is the calmest head that does as well, so that something is left to learn
    assert tuned["params"]["C"] < max(trial["params"]["C"] for trial in frozen["search"]["trials"])
    assert history[1]["train_loss"] > history[-1]["train_loss"] > 0
    assert tuned["tuning"]["mix"] > 0
    start = tuned["tuning"]["start_test"]
    assert start["score"] == pytest.approx(before, abs=0.05)
    assert f"before tuning, the head on the frozen network: accuracy {start['score']:.4f} on the same" in finetune_text(
        tuned
    )
    bundle = read_bundle(tmp_path / "tuned")
    assert bundle.training["tuning"]["from"] == CUT
    assert not (tmp_path / "tuned.tuning").exists()
    # on images: what the tuned features said of the test images
    answers = fp.predict(tmp_path / "tuned", piles / "piles", to=tmp_path / "p.csv", silent=True)
    assert answers["counts"]["predicted"] == 500
    with (tmp_path / "p.csv").open(newline="") as file:
        evaluated = list(csv.reader(file))[1:]
    right = {row[0]: row[1] == row[0].split("/")[0] for row in evaluated}
    assert np.mean(list(right.values())) >= after - 0.03
    # only the layers above the cut have changed
    fresh = fp.load_backbone("lenet5", "none").state()
    from safetensors.torch import load_file

    held = load_file(bundle.weights_file)
    changed = {name for name, value in held.items() if not torch.equal(value, fresh[name])}
    assert changed == {name for name in held if name.startswith(("c3.", "c5.", "f6."))}
    # features of the frozen network are refused
    with pytest.raises(BundleError, match="differs in weights_sha256") as refused:
        fp.evaluate(tmp_path / "tuned", store, silent=True)
    assert f"--weights {bundle.weights_file}" in str(refused.value)
    assert "tune again with --store-features" in str(refused.value)
    assert finetune_text(tuned).splitlines()[-1].startswith(f"next: featurepipe predict {tmp_path / 'tuned'} IMAGES")
    # the tuned columns are a feature space like any other, on which the same head is as good
    fp.extract(
        piles / "piles",
        tmp_path / "own",
        dataset="digits",
        backbone="lenet5",
        weights=str(bundle.weights_file),
        precision=bundle.space["precision"],
        silent=True,
    )
    again = fp.evaluate(tmp_path / "tuned", tmp_path / "own", silent=True)
    assert again["metrics"]["accuracy"]["value"] >= after - 0.05
    module = fp.ImageClassifier.load(tmp_path / "tuned").to_torch()
    pictures = [np.asarray(Image.open(path)) for path in sorted((piles / "piles").rglob("*.png"))[:8]]
    logits = module(torch.from_numpy(np.stack(pictures))[:, None])
    names = [bundle.classes[code] for code in logits.argmax(1)]
    by_id = {row[0]: row[1] for row in evaluated}
    assert names == [by_id[f"{path.parent.name}/{path.name}"] for path in sorted((piles / "piles").rglob("*.png"))[:8]]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "softened"), [(1, {}), (9, {}), (9, {"mixup": 0.4, "label_smoothing": 0.1})])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(steps, softened, store, tmp_path, monkeypatch) -> None:
    asked: dict[str, Any] = {"from_node": CUT, **FAST, **softened}
    whole = finetune(store, out=tmp_path / "whole", **asked)
    done: list[int] = []

    def learn(run: Any, *args: Any, original: Callable[..., float] = loop.TuningRun.learn) -> float:
        done.append(1)
        if len(done) > steps:
            raise KeyboardInterrupt  # as a kill does, it leaves the last checkpoint alone
        return original(run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop.TuningRun, "learn", learn)
        patched.setattr(loop, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            finetune(store, out=tmp_path / "parts", **asked)
    assert (tmp_path / "parts.tuning" / "run-0.pt").is_file()
    assert not (tmp_path / "parts").exists()
    with monkeypatch.context() as patched:  # its search may have taken longer than all that the run did since
        patched.setattr(work, "exact_head", lambda *_, **__: pytest.fail("the head was searched for again"))
        again = finetune(store, out=tmp_path / "parts", **asked)
    scores = [[entry["score"] for entry in found["tuning"]["runs"][0]["history"]] for found in (whole, again)]
    assert scores[0] == scores[1]
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "parts.tuning").exists()


def test_a_stop_keeps_what_was_done_and_other_options_begin_anew(store, tmp_path, monkeypatch) -> None:
    asked = count()
    monkeypatch.setattr(StopRequest, "__call__", lambda request: next(asked) > 2)
    with pytest.raises(Interrupted, match="run it again to go on from there"):
        finetune(store, from_node=CUT, out=tmp_path / "b", **FAST)
    monkeypatch.undo()
    assert (tmp_path / "b.tuning" / "run-0.pt").is_file()
    found = finetune(store, from_node=CUT, out=tmp_path / "b", **{**FAST, "epochs": 1, "rate": 1e-3})
    assert [entry["epoch"] for entry in found["tuning"]["runs"][0]["history"]] == [0, 1]


def test_activations_read_step_by_step_give_the_same_weights(store, tmp_path) -> None:
    for name, memory in (("held", "1GB"), ("streamed", "500KB")):
        finetune(store, from_node=CUT, out=tmp_path / name, memory=memory, **{**FAST, "epochs": 1})
    held, streamed = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("held", "streamed"))
    assert held == streamed


def test_numbers_and_several_labels_are_tuned_too(piles, store, tmp_path) -> None:
    table = piles / "table.csv"
    number = finetune(
        store,
        from_node=CUT,
        out=tmp_path / "number",
        labels=table,
        target="value",
        group="writer",
        **{**FAST, "epochs": 8},
    )
    assert number["tuning"]["measure"] == "R2"
    history = number["tuning"]["runs"][0]["history"]
    assert max(entry["score"] for entry in history[1:]) > history[0]["score"] + 0.05
    assert number["test"]["r2"]["value"] > 0.5
    labels = finetune(store, from_node=CUT, out=tmp_path / "labels", labels=table, multilabel="tags", **FAST)
    assert labels["tuning"]["measure"] == "mAP"
    assert labels["test"]["map"]["value"] > 0.9
    assert (list(number["params"]), len(labels["params"]["C"])) == (["alpha"], 2)
    bundle = read_bundle(tmp_path / "labels")
    assert bundle.classes == ("large", "odd")
    assert bundle.target_type == "multilabel"


def test_all_is_tuned_at_once_from_a_random_head_on_request(store, tmp_path, capsys) -> None:
    exact, random = (
        finetune(store, from_node=CUT, out=tmp_path / start, head_start=start, **{**FAST, "silent": False})
        for start in ("exact", "random")
    )
    assert "nothing is mixed: a random head, which it began with, has nothing to give" in capsys.readouterr().err
    assert (random["tuning"]["mix"], [*random["tuning"]["mixes"]]) == (1, ["1"])
    assert exact["tuning"]["runs"][0]["history"][0]["score"] > 0.8
    first, *_, last = random["tuning"]["runs"][0]["history"]
    assert first["score"] < 0.35  # ten digits
    assert last["score"] > first["score"] + 0.2
    again = finetune(store, from_node=CUT, out=tmp_path / "again", head_start="random", **FAST)
    assert again["tuning"]["runs"][0]["history"][-1]["loss"] == last["loss"]


def test_a_loss_that_is_no_number_names_a_lower_rate(store, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"not a number in epoch 1.*rate='0\.001'"):
        finetune(store, from_node=CUT, out=tmp_path / "b", **{**FAST, "rate": 1e30})


def test_a_loss_that_is_no_number_after_the_last_step_of_an_epoch_is_said_so(store, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"not a number in epoch 1, after its last step, before .* try rate='0\.001'"):
        finetune(store, from_node=CUT, out=tmp_path / "b", **{**FAST, "rate": 1e30, "batch_size": 1000})


def test_missing_activations_name_the_command_that_makes_them(piles, store, tmp_path) -> None:
    with pytest.raises(UsageError) as found:
        finetune(store, from_node="c1", out=tmp_path / "b", **FAST)
    assert str(found.value).endswith(
        f"has no c1:map, the activations that are tuned from; there are activations at s2. Add them with: featurepipe extract "
        f"{piles / 'piles'} --store {store} --dataset digits --backbone lenet5 --weights none --seed 0 --node c1:map"
    )


@pytest.mark.slow
def test_images_are_extracted_once_and_tuned_as_from_a_store(piles, store, tmp_path, cli, monkeypatch) -> None:
    asked: dict[str, Any] = {"backbone": "lenet5", "weights": "none", "from_node": CUT, "out": tmp_path / "b"}
    planned = finetune(piles / "piles", **asked, dry_run=True, silent=True)
    assert list(tmp_path.iterdir()) == []
    assert planned["extraction"]["bytes"] == 500 * 2 * (6 * 14 * 14 + 84)
    assert planned["tuning"]["seconds_per_1000_images"] > 0
    with monkeypatch.context() as full:
        full.setattr(activations.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 700_000}))
        with pytest.raises(DiskFull, match=r"take 1\.3 MB, and 700\.0 kB are free.*store='DIR'.*or cut at s4"):
            finetune(piles / "piles", **asked, silent=True)
    assert list(tmp_path.iterdir()) == []
    found = finetune(piles / "piles", **asked, **FAST)
    assert found["extraction"]["counts"]["computed"] == 500
    wanted = finetune(store, from_node=CUT, out=tmp_path / "other", **FAST)
    assert found["tuning"]["runs"][0]["history"][-1]["loss"] == wanted["tuning"]["runs"][0]["history"][-1]["loss"]
    again = cli(
        "finetune", piles / "piles", "--backbone", "lenet5", "--weights", "none", "--from", CUT, "--out", tmp_path / "b",
        "--store", tmp_path / "b.features", "--dry-run",
    )  # fmt: skip
    assert "360 images to learn from, 40 to choose by, 100 to test" in again.out
    with pytest.raises(UsageError, match="unknown argument 'nodes' in extraction"):
        finetune(piles / "piles", **asked, extraction={"nodes": "c1"}, silent=True)
    with pytest.raises(UsageError, match="as they were extracted: leave store, damaged out"):
        finetune(store, tmp_path / "x", from_node=CUT, out=tmp_path / "b", extraction={"damaged": "keep"}, silent=True)


def test_tuned_features_are_kept_as_extract_would_give_them(piles, tmp_path) -> None:
    path = tmp_path / "store"
    extracting: dict[str, Any] = {"dataset": "digits", "backbone": "lenet5", "precision": "fp32", "silent": True}
    fp.extract(piles / "piles", path, weights="none", nodes=[f"{CUT}:map", "bottleneck"], **extracting)
    asked: dict[str, Any] = {"from_node": CUT, "out": tmp_path / "b", **FAST, "epochs": 8, "store_features": True}
    found = finetune(path, **asked)
    assert found["tuning"]["mix"] > 0
    kept = found["stored_features"]
    assert (kept["images"], kept["known"]) == (500, 0)
    bundle = read_bundle(tmp_path / "b")
    store = fp.FeatureStore(path)
    own = store.features("digits", backbone=bundle.fingerprint).read(np.float32)
    measured = fp.evaluate(tmp_path / "b", path, silent=True)["metrics"]["accuracy"]["value"]
    assert measured == found["test"]["accuracy"]["value"]
    assert store.space("lenet5").fingerprint != bundle.fingerprint  # a tuned space is asked for by its own name
    again = finetune(path, **{**asked, "if_changed": True})
    assert "skipped" in again
    assert (again["stored_features"]["images"], again["stored_features"]["known"]) == (0, 500)
    fp.extract(piles / "piles", tmp_path / "other", weights=str(bundle.weights_file), **extracting)
    other = fp.FeatureStore(tmp_path / "other")
    assert other.spaces()[0].fingerprint == bundle.fingerprint
    wanted = other.features("digits").read(np.float32)
    assert 1 - worst_cosine(own, wanted) <= kept["tolerance"]
    assert fp.extract(piles / "piles", path, weights=str(bundle.weights_file), **extracting)["counts"]["computed"] == 0


def test_columns_above_the_cut_are_kept_too_so_that_heads_depth_and_drift_work_on_tuned_features(
    piles, tmp_path, cli
) -> None:
    path = tmp_path / "store"
    extracting: dict[str, Any] = {"dataset": "digits", "backbone": "lenet5", "precision": "fp32", "silent": True}
    for image in [path for path in (piles / "piles").rglob("*.png") if int(path.stem) % 2]:  # of an earlier snapshot
        place = tmp_path / "half" / image.parent.name / image.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
    for images in (tmp_path / "half", piles / "piles"):
        fp.extract(images, path, weights="none", nodes=[f"{CUT}:map", "bottleneck"], **extracting)
    asked: dict[str, Any] = {"from_node": CUT, "out": tmp_path / "b", **FAST, "interpolate": False}
    kept = finetune(path, **asked, store_features="c5, s4:max2x2")["stored_features"]
    assert (kept["columns"], kept["images"]) == (["c5:gap", "s4:max2x2", "f6.1:gap"], 500)
    planned = cli("finetune", path, "--from", CUT, "--out", tmp_path / "x", "--store-features", "all", "--dry-run")
    assert "tuned features to be stored: s2:" in planned.out
    again = finetune(path, **asked, store_features="all", if_changed=True)
    every = again["stored_features"]["columns"]
    assert "skipped" in again
    assert (again["stored_features"]["images"], again["stored_features"]["known"]) == (500, 0)
    once_more = finetune(path, **asked, store_features=["all"], if_changed=True)["stored_features"]
    assert (once_more["images"], once_more["known"]) == (0, 500)
    # what extract gives images with the bundle's weights, and the same columns
    bundle, other = read_bundle(tmp_path / "b"), tmp_path / "other"
    assert (
        fp.extract(piles / "piles", path, weights=str(bundle.weights_file), nodes=every, **extracting)["counts"][
            "computed"
        ]
        == 0
    )
    fp.extract(piles / "piles", other, weights=str(bundle.weights_file), nodes=[*every, "s4:max2x2"], **extracting)
    stores = [fp.FeatureStore(place) for place in (path, other)]
    assert every == ["s2:avg4x4", "s4:avg4x4", "c5:gap", "f6.1:gap"]
    for column in [*every, "s4:max2x2"]:
        own, wanted = (each.features("digits", node=column, backbone=bundle.fingerprint) for each in stores)
        assert list(own.ids) == list(wanted.ids)
        assert 1 - worst_cosine(own.read(np.float32), wanted.read(np.float32)) <= kept["tolerance"], column
    # and what is done with any space
    name = stores[0].space(bundle.fingerprint).name
    depths = [
        fp.depth(place, dataset="digits", backbone=bundle.fingerprint, folds=2, seeds=1, silent=True)
        for place in (path, other)
    ]
    assert len(depths[0]["columns"]) >= 4
    assert {column["column"] for column in depths[0]["columns"]} == {
        column["column"] for column in depths[1]["columns"]
    }
    for own, wanted in zip(*(sorted(found["results"], key=str) for found in depths), strict=True):
        assert own["accuracy"] == pytest.approx(wanted["accuracy"], abs=0.01)
    trained = fp.train(path, out=tmp_path / "head", backbone=name, nodes="c5", silent=True)
    assert trained["test"]["accuracy"]["value"] > 0.7
    drifted = fp.drift(path, backbone=name, reference="first", bundle=tmp_path / "head", silent=True)
    assert {one["column"] for one in drifted["columns"]} == {*every, "s4:max2x2"}
    assert drifted["images"] == {"reference": 250, "new": 250}
    assert drifted["classes"]["columns"] == ["c5:gap"]


def test_nodes_below_the_cut_are_no_part_of_what_is_tuned_and_a_full_disk_is_said_before(
    store, tmp_path, monkeypatch
) -> None:
    with pytest.raises(
        UsageError, match=r"store_features='c1:gap' lies below s2, or beside it.*the blocks that do: s2"
    ):
        finetune(store, from_node=CUT, out=tmp_path / "b", store_features="c1", **FAST)
    with pytest.raises(UsageError, match="unknown node 'c9'"):
        finetune(store, from_node=CUT, out=tmp_path / "b", store_features="c9", **FAST)
    monkeypatch.setattr(stored_features.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskFull, match=r"tuned features take .*1\.0 kB are free.*store_features='true'"):
        finetune(store, from_node=CUT, out=tmp_path / "b", store_features="all", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(store, tmp_path, cli) -> None:
    finished = cli("finetune", store, "--from", CUT, "--out", tmp_path / "b", "--dry-run")
    assert finished.code == 0
    assert "lenet5 above s2: 60,700 weights in 3 blocks" in finished.out
    assert list(tmp_path.iterdir()) == []


def test_losses_are_those_of_torch_and_unknown_labels_do_not_count() -> None:
    scores = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    truth = np.array([[1.0, np.nan], [0.0, 1.0]])
    own = TuningObjective("multilabel", truth).loss(scores, np.array([0, 1]))
    each = torch.nn.functional.binary_cross_entropy_with_logits
    first = each(scores[0, :1], torch.ones(1))
    second = each(scores[1], torch.tensor([0.0, 1.0]))
    assert own.item() == pytest.approx(((first + second) / 2).item())
    weighted = TuningObjective("multiclass", np.array([1, 0]), np.array([3.0, 1.0])).loss(scores, np.array([0, 1]))
    losses = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0]), reduction="none")
    assert weighted.item() == pytest.approx(((3 * losses[0] + losses[1]) / 4).item())
    numbers = TuningObjective.of("continuous", np.array([1.0, 3.0, 5.0]), None, np.array([0, 2]))
    assert (numbers.centre, numbers.scale) == (3.0, 2.0)
    weight, bias = numbers.to_target(*numbers.to_scores(np.array([[4.0]]), np.array([7.0])))
    assert (weight.item(), bias.item()) == (4.0, 7.0)
    assert numbers.score(np.array([[-1.0], [0.0], [1.0]], np.float32), np.array([0, 1, 2])) == pytest.approx(1.0)


def test_losses_of_mixed_inputs_are_those_of_mixed_answers_and_smoothing_is_torchs() -> None:
    scores, share, rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), 0.3, np.array([3, 0, 2, 1])
    classes, one_hot = np.array([2, 0, 0, 1]), torch.eye(3)
    answers = one_hot[torch.from_numpy(classes[rows])]
    mixed = share * answers + (1 - share) * answers.roll(1, 0)
    own = TuningObjective("multiclass", classes).mixed_loss(scores, rows, share, smoothing=0.1)
    wanted = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert own.item() == pytest.approx(wanted(scores, mixed).item())
    plain = TuningObjective("multiclass", classes).loss(scores, rows, smoothing=0.1)
    assert plain.item() == pytest.approx(wanted(scores, torch.from_numpy(classes[rows])).item())
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]], np.float64)
    own = TuningObjective("multilabel", labels).mixed_loss(scores, rows, share)
    truth = torch.from_numpy(labels[rows]).float()
    mixed = share * truth + (1 - share) * truth.roll(1, 0)
    assert own.item() == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(scores, mixed).item(), rel=1e-5
    )
    numbers, guesses = np.array([1.0, 3.0, -2.0, 0.5]), scores[:, :1].clone().requires_grad_()
    TuningObjective("continuous", numbers).mixed_loss(guesses, rows, share).backward()
    truth = torch.from_numpy(numbers[rows]).float()
    wanted = 2 * (guesses.detach()[:, 0] - share * truth - (1 - share) * truth.roll(1)) / 4
    torch.testing.assert_close(guesses.grad[:, 0], wanted)
    weighted = TuningObjective("multiclass", classes, np.array([0.0, 0.0, 1.0, 0.0])).mixed_loss(scores, rows, share)
    each = torch.nn.functional.cross_entropy
    wanted = share * each(scores[2:3], torch.tensor([0])) + (1 - share) * each(scores[3:], torch.tensor([0]))
    assert weighted.item() == pytest.approx(
        wanted.item()
    )  # the image that counts is third, and was mixed into the fourth


def test_inputs_are_mixed_with_those_before_them_in_a_share_of_the_step() -> None:
    inputs = torch.tensor([[0, 255], [100, 3], [7, 9]], dtype=torch.uint8)
    found = mixed_inputs(inputs, 0.25)
    wanted = 0.25 * inputs.double() + 0.75 * inputs.double()[[2, 0, 1]]
    torch.testing.assert_close(found.double(), wanted)
    assert inputs[0, 1] == 255  # what was read stays
    draws = [mixing_share(0.4, (0, 0, step)) for step in range(400)]
    assert draws[7] == mixing_share(0.4, (0, 0, 7)) != mixing_share(0.4, (0, 1, 7))
    assert np.mean(draws) == pytest.approx(0.5, abs=0.05)
    assert np.var(draws) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.15)  # of Beta(0.4, 0.4)
    assert mixing_share(0.0, (0, 0, 7)) == 1


def test_softened_answers_are_recorded_and_take_part_in_what_is_learned(piles, store, tmp_path, cli) -> None:
    one = {**FAST, "epochs": 1, "interpolate": False}
    found = {
        name: finetune(store, from_node=CUT, out=tmp_path / name, **one, **more)["tuning"]
        for name, more in {"plain": {"mixup": 0}, "mixed": {"mixup": 1.0}, "smooth": {"label_smoothing": 0.2}}.items()
    }
    assert len({tuning["runs"][0]["history"][1]["loss"] for tuning in found.values()}) == 3
    assert found["mixed"]["softened"] == "mixup of 1"
    assert (found["mixed"]["schedule"]["mixup"], found["smooth"]["schedule"]["label_smoothing"]) == (1.0, 0.2)
    assert "softened" not in found["plain"]
    told = cli(
        "finetune",
        store,
        "--from",
        CUT,
        "--out",
        tmp_path / "b",
        "--mixup",
        "0.2",
        "--label-smoothing",
        "0.1",
        "--dry-run",
    )
    assert "; mixup of 0.2, label smoothing of 0.1; an epoch takes" in told.out
    for column, words in (("target", "value"), ("multilabel", "tags")):
        asked: dict[str, Any] = {"labels": piles / "table.csv", column: words, **one}
        with pytest.raises(
            UsageError, match=rf"label_smoothing=0\.1 spreads the answer over the classes, and {column} is of"
        ):
            finetune(store, from_node=CUT, out=tmp_path / "b", label_smoothing=0.1, **asked)
        assert finetune(store, from_node=CUT, out=tmp_path / column, mixup=0.4, **asked)["tuning"]["softened"]


EPOCHS = {
    "blocks.10": (165, 19, 64, 1.079, (2.786, 2.826)),
    "blocks.14": (165, 19, 64, 0.233, (0.665, 0.677)),
    "all of Fashion-MNIST": (54_000, 6_000, 64, 64 * 0.009255, (5742.3 / 10,) * 10),
}
"""Images that train and that validate, images a step, processor seconds of a step on noise and of each epoch with its validation,
as recorded on one core with `efficientnet_lite0` and emoji; the last as `benchmarks/results/bench_finetune.json` has it, with the
head's fit and the first validation in it."""


@pytest.mark.parametrize("name", EPOCHS)
def test_the_time_of_an_epoch_is_right_within_a_factor_of_one_and_a_half(monkeypatch, name) -> None:
    train, validation, size, step, epochs = EPOCHS[name]
    monkeypatch.setattr(work, "step_seconds", lambda body, images: {("body", size): step}[body, images])
    task = SimpleNamespace(
        division=SimpleNamespace(train=np.arange(train), validation=np.arange(train, train + validation))
    )
    planned = SimpleNamespace(task=task, schedule=SimpleNamespace(batch_size=size), body="body")
    told = work.TuningWork.epoch_seconds(planned)
    for seconds in epochs:
        assert seconds / 1.5 <= told <= seconds * 1.5


def test_the_recorded_tuning_is_that_of_the_benchmark() -> None:
    found = json.loads((Path(__file__).parents[2] / "benchmarks/results/bench_finetune.json").read_text("utf-8"))
    train, _, size, step, epochs = EPOCHS["all of Fashion-MNIST"]
    assert (found["full"]["images"], found["full"]["history"][-1]["epoch"]) == (train, len(epochs))
    assert step == pytest.approx(size * found["cost"]["tail, ms an image"] / 1000)
    assert sum(epochs) == pytest.approx(found["full"]["processor_seconds"])
