"""Several processes that torchrun starts tune as one does, and go on from a kill to the same bits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import featurepipe as fp
from featurepipe.errors import UsageError
from featurepipe.tuning.finetune import finetune
from featurepipe.tuning.objective import TuningObjective
from featurepipe.tuning.peers import Peers, fabric_on, processes
from tests.conftest import Process

ROUNDING = 1e-5
"""Of the loss after an epoch: gradients are summed in another order."""
GROWN = 1e-3
"""Of loss and weights after a second one. A process that sums the gradients of both parts by itself is as far from one."""
ASKED = ("--from", "images", "--backbone", "lenet5", "--weights", "none", "--batch-size", "8", "--seed", "3")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 123 digits, of which one file has other bytes by now, so that only one of the processes misses it."""
    folder, found = tmp_path_factory.mktemp("peers"), load_digits()
    for number, (pixels, digit) in enumerate(zip(found.images[:123], found.target[:123].tolist(), strict=True)):
        path = folder / "piles" / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((32, 32)).save(path)
    fp.extract(folder / "piles", folder / "store", dataset="digits", backbone="lenet5", weights="none", silent=True)
    Image.new("L", (32, 32), 7).save(folder / "piles" / "4" / "4.png")
    return folder / "store"


def together(store: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Starts two processes on this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "featurepipe",
    ]
    return subprocess.Popen(
        [*command, "finetune", str(store), "--out", str(out), *ASKED, *more, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip


def is_at_work(process: Process) -> bool:
    """Whether it has not ended."""
    return " Z " not in Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1][:3]


FORKED = """
    import os, sys

    rank, port, *sys.argv[1:] = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    from featurepipe.cli import main

    sys.exit(main())
"""
"""One of two processes with the environment that torchrun gives them, in a fork that need not load PyTorch again."""


def forked(launcher, store: Path, out: Path, *more: str) -> list[Process]:
    """Starts two processes as `together` does, but without torchrun to watch over them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = ["finetune", store, "--out", out, *ASKED, *more, "--json"]
    return [launcher.start(FORKED, [rank, port, *command], store.parent) for rank in range(2)]


def weights_of(bundle: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(bundle / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_also_after_a_kill(store, tmp_path, launcher) -> None:
    alone = finetune(store, out=tmp_path / "one", from_node="images", backbone="lenet5", weights="none", batch_size=8,
                     seed=3, epochs=2, silent=True)  # fmt: skip
    whole = together(store, tmp_path / "two", "--epochs", "2")
    said, log = whole.communicate(timeout=900)
    assert whole.returncode == 0, log
    record = json.loads(said)  # one document: the first process alone speaks
    assert record["tuning"]["processes"] == 2
    assert log.count("epoch 1 of 2") == 1
    first, second = (found["tuning"]["runs"][0]["history"] for found in (alone, record))
    assert [entry["score"] for entry in first] == [entry["score"] for entry in second]
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    assert second[1]["loss"] == pytest.approx(first[1]["loss"], rel=ROUNDING)
    assert second[1]["train_loss"] == pytest.approx(first[1]["train_loss"], rel=ROUNDING)
    assert second[2]["loss"] == pytest.approx(first[2]["loss"], rel=GROWN)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    fresh = fp.load_backbone("lenet5", "none", seed=3).state()
    assert not torch.equal(one["c1.0.weight"], fresh["c1.0.weight"])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=GROWN)
    assert record["test"]["accuracy"]["value"] == alone["test"]["accuracy"]["value"]

    killed = forked(launcher, store, tmp_path / "parts", "--epochs", "2")
    checkpoint = tmp_path / "parts.tuning" / "run-0.pt"
    while not checkpoint.is_file():
        assert is_at_work(killed[0]), killed[0].wait()
        time.sleep(0.02)
    for one in killed:  # at once, so that nobody can say or write anything
        one.kill()
    assert {one.wait().code for one in killed} == {-signal.SIGKILL}
    assert not (tmp_path / "parts").exists()
    ended = [one.wait() for one in forked(launcher, store, tmp_path / "parts", "--epochs", "2")]
    log = "".join(one.err for one in ended)
    assert [one.code for one in ended] == [0, 0], log
    assert log.count("going on from a checkpoint") == 1
    assert (tmp_path / "parts" / "weights.safetensors").read_bytes() == (
        tmp_path / "two" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_too_few_images_and_small_batches_end_all_processes_with_one_message(store, tmp_path) -> None:
    refused = together(store, tmp_path / "b", "--batch-size", "3")
    said, log = refused.communicate(timeout=900)
    assert refused.returncode != 0
    assert said == ""
    assert log.count("batches of 3 images are too small for 2 processes") == 1
    assert "--batch-size 4 or more" in log
    assert not (tmp_path / "b").exists()


def fake(rank: int, world: int) -> Peers:
    peers = Peers()
    peers.rank, peers.world = rank, world
    return peers


def test_every_row_is_taken_once_and_few_rows_by_all() -> None:
    rows = np.arange(10, 21)
    parts = [fake(rank, 3).part(rows) for rank in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(fake(rank, 3).part(rows[:5]).tolist() == rows[:5].tolist() for rank in range(3))
    assert np.array_equal(Peers().part(rows), rows)


def test_the_shares_of_processes_make_the_loss_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.normal(size=(7, 3)))
    objective = TuningObjective("multiclass", random.integers(0, 3, 7), random.uniform(0, 2, 7))
    rows, parts = np.arange(7), [np.array([0, 4, 5]), np.array([1, 2, 3, 6]), np.array([], np.int64)]
    own = [(float(objective.loss(scores[part], part)) if len(part) else 0.0, objective.total(part)) for part in parts]
    sums = [sum(value * weight for value, weight in own), sum(weight for _, weight in own)]
    monkeypatch.setattr(Peers, "_sums", lambda *_: sums)
    found = [fake(rank, 3).mean(*own[rank]) for rank in range(3)]
    whole = float(objective.loss(scores, rows))
    assert all(value == pytest.approx(whole) for value, _ in found)
    averaged = sum(loss * share for (loss, _), (_, share) in zip(own, found, strict=True)) / 3
    assert averaged == pytest.approx(whole)  # as DistributedDataParallel averages gradients
    monkeypatch.setattr(Peers, "_sums", lambda *_: [0.0, 0.0])
    assert fake(0, 3).mean(0.0, 0.0) is None


def test_what_several_processes_cannot_do_is_refused(store, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes() == (0, 1)
    with pytest.raises(UsageError, match=r"5 training images are too few for 3 processes.*--nproc-per-node 2 at most"):
        fake(0, 3).check(5, 32)
    with pytest.raises(UsageError, match=r"batches of 4 images are too small for 3 processes.*batch_size='6'"):
        fake(0, 3).check(50, 4)
    fake(0, 3).check(6, 6)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    asked: dict[str, Any] = {"out": tmp_path / "b", "silent": True}
    with pytest.raises(UsageError, match=r"a tail is tuned in one process, and torchrun has started 2"):
        finetune(store, from_node="s2", **asked)
    with pytest.raises(UsageError, match=r"2 processes cannot share device='cuda:1'"):
        fabric_on("cuda:1", "fp32", together=True)
    with pytest.raises(UsageError, match=r"this runs in one process"):
        fabric_on("cpu", "fp32")
