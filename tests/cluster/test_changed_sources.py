"""Workers live longer than what they read: the next run opens what is there then, and says what a worker lacks."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from featurepipe.errors import FeaturepipeError
from featurepipe.execution import DaskExecutor
from featurepipe.extraction.extract import extract
from featurepipe.store import FeatureStore

OPTIONS: dict[str, Any] = {
    "backbone": "lenet5", "weights": "none", "precision": "fp32", "batch_size": 4, "silent": True, "dataset": "pile",
}  # fmt: skip


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def replace(path: Path, seeds: range) -> None:
    """Another tar of the same layout in the place of this one, as a nightly copy does it."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as archive:
        for place, seed in enumerate(seeds):
            content = encoded(seed).ljust(4000, b"\0")  # all of one size, so that every offset fits both
            info = tarfile.TarInfo(f"{place}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    part.rename(path)


def keys(store: Path) -> list[bytes]:
    return FeatureStore(store).snapshot("pile")["key"].to_pylist()


def test_the_workers_of_the_run_before_open_an_archive_that_was_replaced(
    tmp_path: Path, thread_executor: DaskExecutor
) -> None:
    for seeds in (range(6), range(100, 106)):
        replace(tmp_path / "s.tar", seeds)
        record = extract(tmp_path / "s.tar", tmp_path / "store", cluster=thread_executor, **OPTIONS)
        assert record["counts"]["computed"] == 6
        expected = [hashlib.sha256(encoded(seed).ljust(4000, b"\0")).digest() for seed in seeds]
        assert keys(tmp_path / "store") == expected


def test_arrays_that_were_replaced(tmp_path: Path, thread_executor: DaskExecutor) -> None:
    for value in (3, 4):
        np.savez(
            tmp_path / "a.npz",
            x=np.full((5, 30, 30), value, np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None] * 9,
        )
        record = extract(tmp_path / "a.npz", tmp_path / "store", cluster=thread_executor, **OPTIONS)
        assert (record["counts"]["computed"], record["counts"]["rejected"]) == (5, 0)


class OnlyHere(LocalFileSystem):
    protocol = "onlyhere"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("onlyhere://"))


@pytest.mark.slow
@pytest.mark.parametrize("as_manifest", [False, True])
def test_a_file_system_that_no_worker_has_is_one_line(
    tmp_path: Path, dask_executor: DaskExecutor, as_manifest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_executor, "patience", 0.2)  # for another worker, of which there is none
    fsspec.register_implementation("onlyhere", OnlyHere, clobber=True)
    (tmp_path / "pile").mkdir()
    for seed in range(4):
        (tmp_path / "pile" / f"{seed}.png").write_bytes(encoded(seed))
    rows = "".join(f"onlyhere://{tmp_path}/pile/{seed}.png\n" for seed in range(4))
    (tmp_path / "list.csv").write_text(f"path\n{rows}")
    source = tmp_path / "list.csv" if as_manifest else f"onlyhere://{tmp_path}/pile"
    with pytest.raises(FeaturepipeError, match=r"onlyhere") as caught:
        extract(source, tmp_path / "store", cluster=dask_executor, **OPTIONS)
    assert "\n" not in str(caught.value)
