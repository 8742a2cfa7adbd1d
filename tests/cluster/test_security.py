"""The commands of SECURITY.md: certificates, a cluster that lets in nobody without one, permissions, what a manifest may name."""

import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import ClusterError
from featurepipe.execution import connect
from featurepipe.extraction.extract import extract
from featurepipe.store import FeatureStore
from tests.conftest import MAIN

PAGE = Path(__file__).parents[2] / "SECURITY.md"
SMALL = ("--backbone", "lenet5", "--weights", "none")
FORMS = {"backbone": "lenet5", "weights": "none", "precision": "fp32", "silent": True}


def blocks(form: str) -> list[str]:
    return re.findall(rf"```{form}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def block(text: str, form: str = "sh") -> str:
    (found,) = (block for block in blocks(form) if text in block)
    return found


def shell(script: str, folder: Path) -> None:
    """Runs commands of the page, where ``featurepipe`` is this one, with a network that needs no weights."""
    command = f"{sys.executable} -m featurepipe extract --backbone lenet5 --weights none --precision fp32"
    text = script.replace("featurepipe extract", command)
    done = subprocess.run(["bash", "-ec", text], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_a_cluster_with_certificates_works_and_lets_in_nobody_without(images, tmp_path, port):
    shell(block("openssl req"), tmp_path)
    assert stat.S_IMODE((tmp_path / "dask.key").stat().st_mode) == 0o600
    verified = ["openssl", "verify", "-x509_strict", "-CAfile", "authority.pem", "dask.pem"]  # as Python 3.13 does
    assert subprocess.run(verified, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    settings = block("REQUIRE_ENCRYPTION")

    def start(text: str) -> subprocess.Popen[bytes]:
        command = block(text).replace("8786", str(port)).replace("dask ", f"exec {sys.executable} -m dask ", 1)
        with (tmp_path / f"{text}.log").open("wb") as log:
            return subprocess.Popen(["bash", "-ec", settings + command], cwd=tmp_path, stdout=log, stderr=log)

    started = [start("dask scheduler"), start("dask worker")]
    try:
        deadline = time.monotonic() + 60
        while b"tls://" not in (tmp_path / "dask scheduler.log").read_bytes():
            assert time.monotonic() < deadline, (tmp_path / "dask scheduler.log").read_text()
            time.sleep(0.05)
        shell(settings + block("--scheduler tls://").replace("8786", str(port)), tmp_path)
        (run,) = FeatureStore(tmp_path / "features").runs()
        assert (run["counts"]["computed"], run["status"]) == (6, "done")
        assert len(run["cluster"]["workers"]) == 1
        for scheme, why in (("tcp", "no scheduler answers"), ("tls", "takes certificates, and none is set here")):
            with pytest.raises(ClusterError, match=why), connect(f"{scheme}://127.0.0.1:{port}"):
                pass
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


@pytest.mark.slow
def test_a_cluster_on_this_machine_uses_tls_where_its_table_says_so(images, tmp_path):
    (tmp_path / "cluster.toml").write_text(block("security", "toml").replace("workers = 2", "workers = 1"))
    with connect(tmp_path / "cluster.toml") as dask_executor:
        assert dask_executor.address.startswith("tls://127.0.0.1:")
        extract(images, tmp_path / "features", cluster=dask_executor, **FORMS)
    assert FeatureStore(tmp_path / "features").runs()[0]["counts"]["computed"] == 6


def test_a_store_is_as_private_as_the_umask_says(images, tmp_path, launcher):
    umask, extraction = block("umask").splitlines()
    code = f"import os; os.umask(0o{umask.split()[1]}); {MAIN}"
    done = launcher.start(code, [*extraction.split()[1:], *SMALL], tmp_path).wait()
    assert done.code == 0, done.err[-2000:]
    made = [tmp_path / "features", *(tmp_path / "features").rglob("*")]
    assert len(made) > 8
    assert all(not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) for path in made)


def test_a_manifest_is_held_to_a_folder(images, tmp_path, cli):
    Image.new("L", (28, 28)).save(tmp_path / "private.png")
    (images / "link.png").symlink_to(tmp_path / "private.png")
    rows = ["path", *(f"images/{n}.png" for n in range(6)), "private.png", "images/link.png"]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    done = cli(*block("--only-under").split()[1:], *SMALL, "--max-rejects", "2", cwd=tmp_path)
    assert done.code == 3, done.err[-2000:]
    reasons = {r["id"]: r["reason"] for r in FeatureStore(tmp_path / "features").runs()[-1]["rejects"]}
    assert len(reasons) == 2
    assert all("--only-under" in reason for reason in reasons.values())


def test_no_command_of_the_page_is_left_untested():
    tested = (
        "openssl req",
        "REQUIRE_ENCRYPTION",
        "dask scheduler",
        "dask worker",
        "--scheduler tls",
        "umask",
        "--only-under",
    )
    assert len(blocks("sh")) == len(tested)
    assert all(block(text) for text in tested)
