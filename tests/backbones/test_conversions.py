"""A converted network is kept by all that it follows from, used by the next run, and converted again if damaged."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from featurepipe.backbones import conversions, load_backbone
from featurepipe.backbones import openvino as converting
from featurepipe.backbones.engine import OPENVINO, Engine

NODES = ["c3", "f6.1"]
IMAGES = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATUREPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A cache with one network in it, and its features."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATUREPIPE_CACHE", str(folder))
        return folder / "openvino", features()


@pytest.fixture
def filled(cache, template):
    shutil.copytree(template[0], cache)
    return cache, template[1]


@pytest.fixture
def quick(monkeypatch, template):
    """A conversion that takes no time, counted."""
    count = []

    def converted(_whole, _shape):
        count.append(1)
        (model,) = template[0].glob("*/network.xml")
        return converting._core().read_model(model)

    monkeypatch.setattr(converting, "_converted", converted)
    return count


def features():
    backbone = load_backbone("lenet5", "none")
    engine = Engine(backbone, backbone.columns(NODES), engine=OPENVINO)
    assert engine.runtime["engine"] == OPENVINO
    return engine(IMAGES)


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


def forbid_conversion(monkeypatch):
    def export(*_args, **_options):
        raise AssertionError("it was converted")

    monkeypatch.setattr(torch.export, "export", export)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values)


def test_the_next_run_neither_traces_nor_converts_and_has_the_same_bits(filled, monkeypatch):
    cache, expected = filled
    kept = entries(cache)
    assert len(kept) == 1
    forbid_conversion(monkeypatch)
    backbone = load_backbone("lenet5", "none")
    columns = backbone.columns(NODES)
    fresh = load_backbone("lenet5", "none")
    monkeypatch.setattr(type(fresh), "graph", None)  # calling it would fail
    engine = Engine(fresh, columns, engine=OPENVINO)
    assert_equal(engine(IMAGES), expected)
    assert "_trace_of_skeleton" not in vars(fresh)
    assert "module" not in vars(fresh)
    assert entries(cache) == kept


def test_what_it_follows_from_is_its_name(filled, monkeypatch):
    cache, _ = filled
    backbone = load_backbone("lenet5", "none")
    names = {
        converting._name_of(backbone, NODES),
        converting._name_of(backbone, NODES[:1]),
        converting._name_of(backbone, NODES[::-1]),
        converting._name_of(load_backbone("lenet5", "none", seed=1), NODES),
    }
    monkeypatch.setattr(converting, "version", lambda _: "1.0")
    names.add(converting._name_of(backbone, NODES))
    monkeypatch.setattr(converting, "versions", lambda: {"torch": "3.0"})
    names.add(converting._name_of(backbone, NODES))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    names.add(converting._name_of(backbone, NODES))
    assert len(names) == 7
    assert set(entries(cache)) < names


def test_code_of_the_user_is_converted_each_time(cache, quick, monkeypatch):
    assert converting._name_of(load_backbone("tests.backbones.test_openvino:residual", "none"), ["stem"]) is None
    monkeypatch.setattr(converting, "_name_of", lambda *_: None)
    features(), features()
    assert len(quick) == 2
    assert not cache.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("network.xml", "network.bin") for damage in (cut, flip, os.unlink)),
        *(("facts.json", damage) for damage in (cut, os.unlink)),
    ],
)
def test_damage_is_found_and_removed(filled, name, damage):
    cache, _ = filled
    (entry,) = entries(cache)
    damage(cache / entry / name)
    assert conversions.find(entry) is None
    assert entries(cache) == []


def test_a_damaged_or_useless_network_is_converted_again(filled, quick):
    cache, expected = filled
    (entry,) = entries(cache)
    flip(cache / entry / "network.bin")
    assert_equal(features(), expected)
    (cache / entry / "network.xml").write_text("<net/>")  # whole, and no network
    facts = json.loads((cache / entry / "facts.json").read_text())
    facts["sha256"] = conversions._sha256_of(cache / entry)
    (cache / entry / "facts.json").write_text(json.dumps(facts))
    assert conversions.find(entry) is not None
    assert_equal(features(), expected)
    assert entries(cache) == [entry]
    assert len(quick) == 2


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, template, quick):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATUREPIPE_CACHE", str(tmp_path / "file"))
    assert_equal(features(), template[1])
    assert len(quick) == 1


def put(name, size):
    with conversions.draft() as folder:
        (folder / "network.xml").write_text("")
        (folder / "network.bin").write_bytes(bytes(size))
        conversions.keep(folder, name, {})


def test_what_was_used_longest_ago_goes_first(cache, monkeypatch):
    monkeypatch.setattr(conversions, "MOST_BYTES", 10_000)
    for age, name in enumerate("abc"):
        put(name, 2_500)
        os.utime(cache / name, (1e9 + age, 1e9 + age))
    assert conversions.find("a") is not None  # used now
    put("d", 2_500)
    assert entries(cache) == ["a", "c", "d"]
    put("e", 10_001)
    assert entries(cache) == ["a", "c", "d"]


def test_two_processes_may_keep_the_same_and_a_killed_one_leaves_nothing_for_long(cache):
    put("a", 10)
    put("a", 20)
    assert (cache / "a" / "network.bin").stat().st_size == 10
    assert conversions.find("a") is not None
    assert entries(cache) == ["a"]
    (cache / ".draft-killed").mkdir()
    put("b", 10)
    assert entries(cache) == [".draft-killed", "a", "b"]  # it may be at work
    os.utime(cache / ".draft-killed", (1e9, 1e9))
    put("c", 10)
    assert entries(cache) == ["a", "b", "c"]


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("FEATUREPIPE_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert conversions.cache_folder() == tmp_path / "featurepipe" / "openvino"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert conversions.cache_folder() == tmp_path / ".cache" / "featurepipe" / "openvino"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert conversions.cache_folder() == tmp_path / "local" / "featurepipe" / "openvino"
    monkeypatch.setenv("FEATUREPIPE_CACHE", "")
    assert conversions.cache_folder() is None


def test_a_kept_network_runs_a_batch_alone_before_it_is_handed_out(filled, monkeypatch):
    alone = []
    activations = converting.OpenVinoNetwork.activations

    def counted(self, batch):
        alone.append((converting._FIRST_BATCH.locked(), tuple(batch.shape)))
        return activations(self, batch)

    monkeypatch.setattr(converting.OpenVinoNetwork, "activations", counted)
    forbid_conversion(monkeypatch)
    backbone = load_backbone("lenet5", "none")
    Engine(backbone, backbone.columns(NODES), engine=OPENVINO)
    assert alone == [(True, (1, 1, 32, 32))]
    assert not converting._FIRST_BATCH.locked()


AT_ONCE = """
import os, sys, threading, torch
from featurepipe.backbones import load_backbone
from featurepipe.backbones.openvino import network_of
torch.set_num_threads(1)
backbone = load_backbone("lenet5", "none")
network = network_of(backbone, ["c3", "f6.1"], 8)
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(8)
def run():
    barrier.wait()
    with network.activations(torch.zeros((2, 1, 32, 32), dtype=torch.uint8)):
        pass
threads = [threading.Thread(target=run, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
print("waiting" if any(thread.is_alive() for thread in threads) else "done", flush=True)
os._exit(0)  # threads that wait for each other cannot be ended
"""


@pytest.mark.slow
def test_threads_that_begin_at_once_do_not_wait_for_each_other(filled):
    """Without the batch before, two or three of six such processes waited for good."""
    for _ in range(4):
        found = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, timeout=300, check=True)
        assert found.stdout == "done\n", found.stderr


def test_openvino_sends_no_messages_to_its_makers():
    converting._openvino()
    from openvino.tools.ovc import convert_impl, telemetry_utils

    assert sys.modules["openvino_telemetry"] is None
    assert convert_impl.tm.__name__ == telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
