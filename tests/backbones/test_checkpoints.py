"""Weights files as training scripts leave them: the trunk is found, what is ignored is said, what cannot be meant is refused."""

from __future__ import annotations

import argparse
import collections
import gzip
import os
import pickle
import re
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.errors import UsageError

HEAD = "output."


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(load_backbone("lenet5", "none", seed=5).module.state_dict())


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return features(load_backbone("lenet5", "none", seed=5))


def features(backbone) -> np.ndarray:
    columns = backbone.columns(["bottleneck"])
    images = torch.randint(0, 256, (3, 1, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Engine(backbone, columns)(images)[str(columns[0])]


def renamed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def trunk(state):
    return {name: value for name, value in state.items() if not name.startswith(HEAD)}


def classes(state, count=37):
    return {**state, "output.weight": torch.zeros(count, 84), "output.bias": torch.zeros(count)}


class Config(collections.OrderedDict[str, object]):
    """A mapping of a training script's own, which the machine that reads the file may not have."""


class Attributes(dict[str, object]):
    """As EasyDict and Lightning's AttributeDict: items are attributes, too."""

    def __init__(self, **items: object) -> None:
        super().__init__(**items)
        vars(self).update(items)


class Log:
    """An object that is no mapping."""

    def __init__(self) -> None:
        self.loss = [1.0]


ARGUMENTS = argparse.Namespace(
    lr=np.float64(0.1), epochs=3, out=Path("runs"), names=["a"], inner=argparse.Namespace(a=1)
)
SHAPES = {
    "lightning": lambda s: {
        "state_dict": renamed(s, "model."),
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {},
        "epoch": 3,
    },
    "compiled": lambda s: renamed(s, "_orig_mod."),
    "compiled and parallel": lambda s: {"model": renamed(s, "module._orig_mod.")},
    "ema": lambda s: {"model_ema": renamed(s, "module."), "epoch": 1},
    "network": lambda s: {"network": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "teacher": lambda s: {"teacher": {**renamed(trunk(s), "backbone."), "head.mlp.0.weight": torch.zeros(3, 3)}},
    "moco's query": lambda s: {"state_dict": {**renamed(s, "module.encoder_q."), "module.queue": torch.zeros(4, 4)}},
    "deep": lambda s: {"a": {"b": {"c": s}}},
    "another class count": classes,
    "no head": trunk,
    "a head of another kind": lambda s: {
        **trunk(s),
        "output.0.weight": torch.zeros(5, 84),
        "projector.weight": torch.ones(3),
    },
    "arguments": lambda s: {"model": s, "args": ARGUMENTS, "best": np.float32(0.5), "scores": np.arange(3.0)},
    "numbers beside the tensors": lambda s: {**s, "epoch": 3, "name": "lenet"},
    "half": lambda s: {"net": {name: value.half() for name, value in s.items()}},
    "ordered": lambda s: collections.OrderedDict(renamed(s, "encoder.")),
    "defaultdict": lambda s: {
        "model": s,
        "log": collections.defaultdict(list, loss=[1.0]),
        "n": collections.defaultdict(int),
        "by_class": collections.defaultdict(collections.OrderedDict, a=collections.OrderedDict(b=1)),
    },
    "state in a defaultdict": lambda s: {"net": collections.defaultdict(str, renamed(s, "module."))},
    "state in a mapping of its own": lambda s: Config(
        state_dict=Config(renamed(s, "module.")), hyper_parameters=Config()
    ),
    "mappings with attributes": lambda s: {
        "state_dict": s,
        "hyper_parameters": Attributes(lr=0.1, out=Attributes(a=1)),
    },
    "saved twice": lambda s: {"model": trunk(s), "best": {k: v.clone() for k, v in trunk(s).items()}},
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ckpt", "pth.tar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_trunk_is_found(shape, suffix, state, truth, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(SHAPES[shape](state), f"own.{suffix}")
    backbone = load_backbone("lenet5", f"own.{suffix}")
    assert backbone.weights == f"file:own.{suffix}"
    np.testing.assert_allclose(features(backbone), truth, atol=2e-3 if shape == "half" else 1e-6)


def test_safetensors_by_content_with_a_prefix_and_no_head(state, truth, tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    for name in ("model.safetensors", "pytorch_model.bin"):
        save_file(renamed(trunk(state), "backbone."), tmp_path / name)
        np.testing.assert_allclose(features(load_backbone("lenet5", str(tmp_path / name))), truth, atol=1e-6)


def saved(content, tmp_path, name="own.pth"):
    torch.save(content, tmp_path / name)
    return load_backbone("lenet5", str(tmp_path / name))


def test_the_hash_is_of_what_goes_into_the_network(state, tmp_path) -> None:
    plain = saved(state, tmp_path).weights_sha256
    assert saved({"state_dict": renamed(state, "model."), "epoch": 1}, tmp_path).weights_sha256 == plain
    body = saved(trunk(state), tmp_path).weights_sha256
    assert body != plain
    assert saved(classes(state), tmp_path).weights_sha256 == body
    assert saved({"ema": renamed(classes(state, 12), "module.")}, tmp_path).weights_sha256 == body
    changed = {**trunk(state), "c1.0.bias": state["c1.0.bias"] + 1}
    assert saved(changed, tmp_path).weights_sha256 != body
    assert saved(trunk(state), tmp_path).identity()["weights_sha256"] == body


def test_what_is_ignored_and_what_is_missing_is_said(state, tmp_path) -> None:
    assert saved(state, tmp_path).weights_note == ""
    backbone = saved({"state_dict": renamed(classes(state), "model.")}, tmp_path)
    assert backbone.weights_note == (
        "8 of the 10 tensors of lenet5 are in ['state_dict'] with the prefix 'model.'; 2 are not (output.bias, output.weight); "
        "2 of the file are ignored (model.output.bias, model.output.weight)"
    )
    assert backbone.description()["weights_note"] == backbone.weights_note
    other = {name: value + 1 for name, value in state.items()}
    backbone = saved({"state_dict": state, "state_dict_ema": other}, tmp_path)
    assert torch.equal(backbone.module.output.bias, state["output.bias"])
    assert backbone.weights_note == "the file holds other tensors as well, which are ignored: ['state_dict_ema']"


def test_only_what_is_missing_up_to_the_deepest_node_is_refused(state, tmp_path) -> None:
    lower = {name: value for name, value in state.items() if name.startswith(("c1.", "c3."))}
    backbone = saved(lower, tmp_path)
    assert [column.node for column in backbone.columns(["c3"])] == ["c3"]
    with pytest.raises(UsageError, match=r"6 keys are missing .*; node f6.1 needs 4 of these, such as c5"):
        backbone.columns(["bottleneck"])
    with pytest.raises(UsageError, match="node output needs 6"):
        backbone.graph(["c3", "output"])
    assert torch.isnan(backbone.module.output.weight).all()


@pytest.mark.parametrize(
    "shape",
    [
        lambda s, o: {"teacher": renamed(s, "backbone."), "student": renamed(o, "module.backbone.")},
        lambda s, o: {**renamed(s, "module.encoder_q."), **renamed(o, "module.encoder_k.")},
        lambda s, o: {"net": s, "net_ema": o},
        lambda s, o: {"state_dict": {**renamed(trunk(s), "online."), **renamed(o, "target.")}},
    ],
)
def test_several_sets_of_tensors_are_refused(shape, state, tmp_path) -> None:
    other = {name: value + 1 for name, value in state.items()}
    with pytest.raises(
        UsageError, match=r"hold several sets of tensors for lenet5: .*; save the one that you want alone"
    ):
        saved(shape(state, other), tmp_path)


def written(path: Path, kind: str) -> None:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "weights.pth")
    elif kind == "cut":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": np.zeros(2), "net": nn.Linear(2, 2)}))
    elif kind == "attributes":
        torch.save({"log": Log()}, path)
    elif kind == "folder":
        path.mkdir()
    else:
        starts = {
            "empty": b"",
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "page": b"\n<!DOCTYPE html><html>sign in</html>",
            "keras": b"\x89HDF\r\n\x1a\n" + bytes(99),
            "gzip": gzip.compress(b"x"),
            "json": b'{"weight_map": {"a": "model-1.safetensors"}}',
            "onnx": b"\x08\x07\x12\x07pytorch:onnx" + bytes(50),
        }
        path.write_bytes(starts[kind])


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "it is empty"),
        ("lfs", "pointer of git LFS"),
        ("page", "web page"),
        ("keras", "HDF5 file"),
        ("gzip", "compressed with gzip"),
        ("json", "JSON text"),
        ("onnx", "ONNX model"),
        ("zip", "zip archive .of readme.txt.; unpack"),
        ("tar", "tar archive; unpack"),
        ("cut", "cut short or damaged"),
        ("torchscript", "TorchScript archive"),
        ("module", r"object of torch.nn.modules.linear.Linear.*torch.save.model.state_dict"),
        ("pickle", r"torch.save.model.state_dict"),
        ("attributes", r"object of .*test_checkpoints.Log.*torch.save.model.state_dict"),
        ("folder", "is a folder; name the file in it"),
    ],
)
def test_what_is_no_weights_file_is_told_in_words(kind, words, tmp_path) -> None:
    written(tmp_path / "odd.pth", kind)
    with pytest.raises(UsageError, match=words) as caught:
        load_backbone("lenet5", str(tmp_path / "odd.pth"))
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mappings_of_unknown_classes_load_without_their_module(state, truth, tmp_path, monkeypatch) -> None:
    """Saved where the class is, read where its module is not: nothing is imported for it."""
    module = types.ModuleType("training_script")
    exec("import collections\nclass Tree(collections.OrderedDict): pass", vars(module))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        tree = module.Tree(renamed(state, "net."))
        tree._metadata = {"": {"version": 1}}
        torch.save({"state_dict": tree}, tmp_path / "own.pth")
    (tmp_path / "training_script.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    backbone = load_backbone("lenet5", str(tmp_path / "own.pth"))
    np.testing.assert_allclose(features(backbone), truth, atol=1e-6)
    assert "training_script" not in sys.modules


def test_a_call_in_a_file_is_refused_and_not_made(state, tmp_path) -> None:
    class Call:
        def __reduce__(self) -> object:
            return eval, (f"open({str(tmp_path / 'made')!r}, 'w')",)

    torch.save({"state_dict": state, "log": Call()}, tmp_path / "call.pth")
    with pytest.raises(UsageError, match=r"not a state dict that torch.load"):
        load_backbone("lenet5", str(tmp_path / "call.pth"))
    assert not (tmp_path / "made").exists()


def old_name(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", pytest.param("timm/densenet121", marks=pytest.mark.slow)])
def test_old_names_of_densenets_load_from_files(name, tmp_path) -> None:
    """The names that torchvision's own files have, as published and as a training script keeps them."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    today = load_backbone(name, "none", seed=3)
    state = today.module.state_dict()
    old = {old_name(key): value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    count = len(old.keys() - state.keys())
    assert count == 58 * 10  # layers with two norms of four tensors and two convolutions of one
    torch.save(collections.OrderedDict(old), tmp_path / "old.pth")
    backbone = load_backbone(name, str(tmp_path / "old.pth"))
    loaded = backbone.module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert backbone.weights_sha256 == today.weights_sha256
    said = (
        f"{count} tensors renamed as torchvision does (features.denseblock1.denselayer1.norm.1.weight to "
        "features.denseblock1.denselayer1.norm1.weight, ...)"
    )
    assert backbone.weights_note == said
    kept = {"state_dict": renamed({k: v for k, v in old.items() if "classifier" not in k}, "module.net."), "epoch": 2}
    torch.save(kept, tmp_path / "kept.ckpt")
    backbone = load_backbone(name, str(tmp_path / "kept.ckpt"))
    backbone.columns(["features.norm5"])
    loaded = backbone.module.state_dict()
    assert all(
        torch.equal(loaded[key], value) for key, value in state.items() if key in old and "classifier" not in key
    )
    assert backbone.weights_note.startswith(f"{count} tensors renamed as torchvision does (module.net.features.")
    assert "2 are not (classifier.bias, classifier.weight)" in backbone.weights_note


def test_a_file_with_old_and_new_names_is_read_by_the_new_ones(tmp_path) -> None:
    state = load_backbone("densenet121", "none", seed=3).module.state_dict()
    key = "features.denseblock1.denselayer1.norm1.weight"
    torch.save({**state, old_name(key): state[key] + 1}, tmp_path / "both.pth")
    backbone = load_backbone("densenet121", str(tmp_path / "both.pth"))
    assert torch.equal(backbone.module.state_dict()[key], state[key])
    assert backbone.weights_note.endswith(f"1 of the file are ignored ({old_name(key)})")


NORMS_OF_ITS_OWN = """
from collections import OrderedDict
from torch import nn
def network():
    layer = nn.Sequential(OrderedDict(norm=nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))))
    net = nn.Sequential(OrderedDict(denselayer1=layer, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), out=nn.Linear(3, 2)))
    net.preprocessing = dict(resize=12, crop=(12, 12), mean=(0.5,) * 3, std=(0.5,) * 3)
    return net
"""


def test_networks_that_have_such_names_today_keep_them(tmp_path, monkeypatch) -> None:
    (tmp_path / "norms_of_its_own.py").write_text(NORMS_OF_ITS_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    state = load_backbone("norms_of_its_own:network", "none", seed=4).module.state_dict()
    assert "denselayer1.norm.1.weight" in state
    state["denselayer1.norm.1.bias"] += 2
    torch.save(state, tmp_path / "own.pth")
    backbone = load_backbone("norms_of_its_own:network", str(tmp_path / "own.pth"))
    assert torch.equal(backbone.module.state_dict()["denselayer1.norm.1.bias"], state["denselayer1.norm.1.bias"])
    assert backbone.weights_note == ""


def test_old_files_of_torch_say_what_object_they_hold(tmp_path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"object of torch.nn.modules.linear.Linear"):
        load_backbone("lenet5", str(tmp_path / "old.pt"))


NETWORK = """
from torch import nn
class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 2)
        self.preprocessing = dict(resize=12, crop=(12, 12), mean=(0.5,) * 3, std=(0.5,) * 3)
    def forward(self, x):
        return self.head(self.backbone(x))
class Hooked(Wrapped):
    def forward(self, x):
        if x.sum() > 1e9:
            x = -x
        return super().forward(x)
"""


@pytest.mark.parametrize("factory", ["Wrapped", "Hooked"])
def test_networks_of_the_users_own(factory, tmp_path, monkeypatch) -> None:
    """Also when the network has the prefix and the file has not, and when the network cannot be traced."""
    (tmp_path / "wrapped_networks.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    state = load_backbone(f"wrapped_networks:{factory}", "none", seed=4).module.state_dict()
    body = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    torch.save({"state_dict": {**body, "fc.weight": torch.zeros(9, 4)}}, "body.ckpt")
    backbone = load_backbone(f"wrapped_networks:{factory}", "body.ckpt")
    backbone.columns(["bottleneck"])
    assert torch.equal(backbone.module.backbone[0].weight, state["backbone.0.weight"])
    assert "2 are not (head.bias, head.weight)" in backbone.weights_note
    with pytest.raises(UsageError, match="node head needs 2"):
        backbone.columns(["head"])


def test_a_model_of_timm(tmp_path) -> None:
    pytest.importorskip("timm")
    state = load_backbone("timm/resnet18", "none", seed=2).module.state_dict()
    state = {f"module.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    torch.save({"state_dict_ema": state, "args": ARGUMENTS}, tmp_path / "last.pth.tar")
    backbone = load_backbone("timm/resnet18", str(tmp_path / "last.pth.tar"))
    backbone.columns(["layer4"])
    assert torch.equal(backbone.module.conv1.weight, state["module.conv1.weight"])


FIRST = "c1.0.weight"
NO_NUMBERS = {
    "sparse": lambda value: value.to_sparse(),
    "without values": lambda value: value.to("meta"),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "complex": lambda value: value.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # by which the test makes one
@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_tensors_that_no_network_takes_are_left_out_and_refused_where_they_are_needed(
    kind, state, truth, tmp_path
) -> None:
    odd = NO_NUMBERS[kind](state[FIRST])
    with pytest.raises(UsageError, match=rf"left out, which no network takes \({FIRST}: {kind}.*node f6.1 needs"):
        saved({**state, FIRST: odd}, tmp_path).columns(["bottleneck"])
    backbone = saved({**state, "other": odd}, tmp_path)
    assert f"other: {kind}" in backbone.weights_note
    np.testing.assert_allclose(features(backbone), truth, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_whole_numbers_are_not_taken_for_weights(dtype, state, tmp_path) -> None:
    name = str(dtype).removeprefix("torch.")
    for wrap in (dict, lambda tensors: {"ema": renamed(tensors, "module.")}):
        with pytest.raises(UsageError, match=f"{FIRST} has the dtype {name}, not a floating one"):
            saved(wrap({**state, FIRST: state[FIRST].to(dtype)}), tmp_path).columns(["bottleneck"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_where_they_are_needed(value, state, tmp_path) -> None:
    """A ReLU makes zeros of NaN on some processors: the same features for all images, and no error."""
    bad = torch.full_like(state[FIRST], value, dtype=torch.float64)
    with pytest.raises(UsageError, match=rf"1 tensor of the file holds NaN or infinity \({FIRST}\); node c3 needs"):
        saved({**state, FIRST: bad}, tmp_path).columns(["c3"])
    beyond = saved({**state, "output.bias": state["output.bias"] * float("nan")}, tmp_path)
    assert beyond.weights_note == "1 tensor of the file holds NaN or infinity (output.bias)"
    assert [column.node for column in beyond.columns(["c3"])] == ["c3"]


def test_float8_is_read_as_what_it_means(state, tmp_path) -> None:
    small = {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}
    plain = {name: value.float() for name, value in small.items()}
    backbone = saved(small, tmp_path)
    np.testing.assert_array_equal(features(backbone), features(saved(plain, tmp_path, "plain.pth")))


def test_tensors_that_are_views_of_others_are_read_as_what_they_mean(state, truth, tmp_path) -> None:
    tensors = {**state, FIRST: torch._neg_view(-state[FIRST]), "tied": state[FIRST]}
    tensors["c3.0.weight"] = state["c3.0.weight"].transpose(0, 3).contiguous().transpose(0, 3)
    np.testing.assert_allclose(features(saved(tensors, tmp_path)), truth, atol=1e-6)


def test_mappings_that_hold_themselves(state, truth, tmp_path) -> None:
    content = {"state_dict": dict(state)}
    content["state_dict"]["self"] = content
    np.testing.assert_allclose(features(saved(content, tmp_path)), truth, atol=1e-6)


def test_odd_names_are_no_names_of_tensors(state, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds a dict with keys 0, 1, 2, 3, \.\.\., not a state dict"):
        saved(dict(enumerate(state.values())), tmp_path).columns(["bottleneck"])
    note = saved({**state, "x" * 100_000: torch.zeros(1)}, tmp_path).weights_note
    assert len(note) < 400


def test_what_is_no_regular_file_or_unpacks_to_far_more_is_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UsageError, match="no regular file"):
        load_backbone("lenet5", str(tmp_path / "pipe.pth")).columns(["bottleneck"])
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(1 << 22))
    with pytest.raises(UsageError, match="unpacks to 4,194,304"):
        load_backbone("lenet5", str(tmp_path / "bomb.pth")).columns(["bottleneck"])
