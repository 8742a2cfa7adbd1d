"""Extraction over workers gives what one machine gives: rows, keys, rejects, snapshots, counts; and only metadata travels."""

import io
import json
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import ClusterError, SourceError, TooManyRejects, UsageError
from featurepipe.execution import DaskExecutor
from featurepipe.extraction import compute
from featurepipe.extraction.extract import extract
from featurepipe.extraction.shards import ShardSizes
from featurepipe.extraction.text import text
from featurepipe.features.session import check_travels
from featurepipe.images import open_source
from featurepipe.interrupt import StopRequest
from featurepipe.progress import Lines
from featurepipe.store import FeatureStore


def encoded(seed: int) -> bytes:
    """A small coloured picture that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """90 images in three folders; of 10 there is a copy in another folder, and 3 are no good."""
    folder = tmp_path / "photos"
    for n in range(77):
        path = folder / "abc"[n % 3] / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(n))
    for n in range(10):
        (folder / "c" / f"copy-{n}.png").write_bytes(encoded(n * 3))
    (folder / "a" / "torn.png").write_bytes(encoded(500)[:-60])
    (folder / "b" / "empty.png").write_bytes(b"")
    (folder / "c" / "text.png").write_text("Dear Sir or Madam")
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies then lie in different shards, and there is something to hand out."""
    monkeypatch.setattr(compute, "ShardSizes", lambda: ShardSizes(first=8, most=8))


OPTIONS: dict[str, Any] = {
    "backbone": "lenet5", "weights": "none", "precision": "fp32", "batch_size": 4, "max_rejects": 3, "silent": True,
}  # fmt: skip


def run(source: Any, store: Path, dask_executor: DaskExecutor | None = None, **options: Any) -> dict[str, Any]:
    return extract(source, store, cluster=dask_executor, **{**OPTIONS, **options})


def features(store: Path, dataset: str = "photos", node: str = "bottleneck") -> dict[str, np.ndarray]:
    found = FeatureStore(store).features(dataset, node)
    return dict(zip(found.ids, found.read(np.float32), strict=True))


def same_features(a: Path, b: Path, **options: Any) -> None:
    mine, theirs = features(a, **options), features(b, **options)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        np.testing.assert_allclose(
            values, theirs[name], rtol=2e-3, atol=1e-5
        )  # float16, whose last digit a batch may move


def rejects(store: Path) -> list[tuple[str, str, bytes | None]]:
    (space,) = FeatureStore(store).spaces()
    return sorted((row["id"], row["reason"], row["key"]) for row in space.rejects().to_pylist())


def test_a_run_on_workers_leaves_what_a_run_on_one_machine_leaves(
    photos: Path, dask_executor: DaskExecutor, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    alone, together = run(photos, here), run(photos, there, dask_executor)
    for name in ("counts", "copies", "exit_code", "status", "rejects",
                 "new_rejects", "reject_reasons", "changes", "computed_by_column",
                 "dataset", "space", "fingerprint", "settings", "columns", "source", "new_space"):  # fmt: skip
        assert together[name] == alone[name], name
    assert together["counts"] == {"listed": 90, "computed": 77, "known": 10, "rejected": 3, "read": 90}
    assert together["copies"] == 10
    snapshots = [FeatureStore(store).snapshot("photos") for store in (here, there)]
    assert snapshots[0].equals(snapshots[1])
    same_features(here, there)
    assert rejects(here) == rejects(there)
    assert len(rejects(there)) == 3


def test_the_record_says_who_did_what(photos: Path, dask_executor: DaskExecutor, tmp_path: Path) -> None:
    record = run(photos, tmp_path / "store", dask_executor)
    cluster = record["cluster"]
    assert cluster["scheduler"] == dask_executor.address
    assert sum(worker["images"] for worker in cluster["workers"]) == 90
    assert cluster["slices"] == 12 == sum(worker["slices"] for worker in cluster["workers"])
    assert len({worker["pid"] for worker in cluster["workers"]}) == 2
    assert all(worker["seconds"] > 0 and worker["verdict"] for worker in cluster["workers"])
    (kept,) = FeatureStore(tmp_path / "store").runs()
    assert kept["cluster"] == cluster
    (line,) = [line for line in text(record).splitlines() if line.startswith("2 workers (worker ")]
    assert sum(int(said.split(" images")[0].split()[-1]) for said in line.split("; ")) == 90
    alone = run(photos, tmp_path / "alone")
    assert "cluster" not in alone
    assert "workers (" not in text(alone)


def test_a_second_night_computes_only_what_is_new(photos: Path, thread_executor: DaskExecutor, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(photos, store)  # begun on one machine, and gone on with on workers
    again = run(photos, store, thread_executor)
    assert again["counts"] == {"listed": 90, "computed": 0, "known": 87, "rejected": 3, "read": 0}
    (photos / "a" / "new.png").write_bytes(encoded(900))
    (photos / "a" / "moved.png").write_bytes((photos / "b" / "001.png").read_bytes())
    (photos / "b" / "001.png").unlink()
    third = run(photos, store, thread_executor)
    assert third["counts"] == {"listed": 91, "computed": 1, "known": 87, "rejected": 3, "read": 2}
    assert third["changes"]["moved"] == 1
    wider = run(photos, store, thread_executor, nodes=["s2:gap", "bottleneck"])
    assert wider["computed_by_column"] == {"s2:gap": 78, "f6.1:gap": 0}
    run(photos, tmp_path / "alone", nodes=["s2:gap", "bottleneck"])
    same_features(store, tmp_path / "alone", node="s2:gap")


def test_too_many_rejects_end_as_on_one_machine(photos: Path, thread_executor: DaskExecutor, tmp_path: Path) -> None:
    said = []
    for number, who in enumerate((None, thread_executor)):
        store = tmp_path / str(number)
        with pytest.raises(TooManyRejects) as caught:
            run(photos, store, who, max_rejects=2)
        said.append(str(caught.value).replace(str(store), "STORE"))
        assert len(rejects(store)) == 3
        assert FeatureStore(store).snapshot("photos") is None
    assert said[0] == said[1]
    assert run(photos, tmp_path / "1", thread_executor)["counts"]["computed"] == 0  # features of all others were kept


def test_no_time_is_left(
    photos: Path, thread_executor: DaskExecutor, tmp_path: Path, slow_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over as soon as something is committed."""
    is_over = property(lambda _self: any((tmp_path / "store").glob("spaces/*/parts/*.h5")))
    monkeypatch.setattr(StopRequest, "out_of_time", is_over)
    record = run(slow_folder(photos, 0.05), tmp_path / "store", thread_executor, time_budget=1000.0, dataset="photos")
    monkeypatch.undo()
    assert (record["status"], record["exit_code"]) == ("out of time", 0)
    assert 0 < record["counts"]["computed"] < 77
    rows = sum(part.rows for part in FeatureStore(tmp_path / "store").spaces()[0].parts())
    assert rows == record["counts"]["computed"]
    rest = run(photos, tmp_path / "store", thread_executor)
    assert rest["counts"]["computed"] == 77 - rows


def test_the_disk_floor_holds(
    photos: Path, thread_executor: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_folder: Any
) -> None:
    from featurepipe.errors import DiskFull
    from featurepipe.extraction.limits import DiskFloor

    looks = iter(range(10_000))
    monkeypatch.setattr(
        DiskFloor, "__call__", lambda self: vars(self).setdefault("n", 0) or _reached(self, next(looks))
    )
    with pytest.raises(DiskFull, match="less than the"):
        run(slow_folder(photos, 0.03), tmp_path / "store", thread_executor, min_free="1GB", dataset="photos")


def _reached(floor: Any, look: int) -> bool:
    floor.reached = look > 6
    return floor.reached


def test_auto_is_measured_by_a_worker_and_settled_once(
    photos: Path, thread_executor: DaskExecutor, tmp_path: Path
) -> None:
    alone = run(photos, tmp_path / "here", precision="auto")
    together = run(photos, tmp_path / "there", thread_executor, precision="auto")
    assert together["settings"] == alone["settings"]
    assert together["machine"]["device"] == alone["machine"]["device"]
    assert together["fingerprint"] == alone["fingerprint"]


def test_a_dry_run_times_a_worker_and_changes_nothing(
    photos: Path, thread_executor: DaskExecutor, tmp_path: Path
) -> None:
    estimate = run(photos, tmp_path / "store", thread_executor, dry_run=True)
    assert (estimate["to_read"], estimate["sampled"]) == (90, 64)
    assert estimate["images_per_second"] > 0
    assert not (tmp_path / "store").exists()


def test_small_arrays_travel_and_large_ones_are_refused(thread_executor: DaskExecutor, tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    assert run(arrays, tmp_path / "a", thread_executor)["counts"]["computed"] == 20
    large = np.zeros((6000, 28, 28), np.uint8)
    with pytest.raises(UsageError, match=r"memory:memory holds 5 MiB in memory.* images come from where every worker"):
        run(large, tmp_path / "b", thread_executor)


def test_a_source_that_cannot_be_pickled_is_refused(
    photos: Path, thread_executor: DaskExecutor, tmp_path: Path
) -> None:
    source = open_source(photos)
    source.socket = (n for n in ())  # type: ignore[attr-defined]
    with pytest.raises(
        UsageError, match=r"photos cannot be sent to workers \(.*generator.*\); on a cluster, images come"
    ):
        run(source, tmp_path / "store", thread_executor)


def test_every_kind_of_source_is_read_by_workers(photos: Path, thread_executor: DaskExecutor, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "birds.tar", "w") as tar:
        tar.add(photos, "photos")
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(str(path) for path in sorted(photos.rglob("0*.png"))))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "arrays.npz", images=pixels)
    assert run(tmp_path / "birds.tar", tmp_path / "store", thread_executor)["counts"]["computed"] == 77
    assert run(tmp_path / "list.csv", tmp_path / "store", thread_executor)["counts"]["known"] == 77
    assert run(tmp_path / "arrays.npz", tmp_path / "store", thread_executor)["counts"]["computed"] == 30


def test_relative_paths_mean_the_clients_folder(
    photos: Path, dask_executor: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("photos", Path("store"), dask_executor)["counts"]["computed"] == 77
    assert (tmp_path / "store" / "store.json").exists()


def test_a_worker_with_other_weights_is_refused_by_name(
    photos: Path, dask_executor: DaskExecutor, tmp_path: Path
) -> None:
    module = tmp_path / "only_here.py"
    module.write_text(
        "import os, torch\nfrom torch import nn\nfrom featurepipe.backbones import Preprocessing\n"
        "def make():\n"
        "    torch.manual_seed(os.getpid())\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
        "    net.preprocessing = Preprocessing(resize=20, crop=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3,"
        " interpolation='bilinear')\n"
        "    return net\n"
    )
    folder, dask_executor.patience = str(tmp_path), 1
    dask_executor.client.run(lambda: __import__("sys").path.append(folder))
    __import__("sys").path.append(folder)
    try:
        with pytest.raises(
            ClusterError, match=r"would give other features: weights_sha256 differs.*; .*weights_sha256 differs"
        ):
            run(
                photos,
                tmp_path / "store",
                dask_executor,
                backbone="only_here:make",
                weights="DEFAULT",
                precision="fp32",
            )
    finally:
        __import__("sys").path.remove(folder)
        dask_executor.refused.clear()
    (record,) = FeatureStore(tmp_path / "store").runs()
    assert record["status"] == "failed"
    assert len(record["cluster"]["refused"]) == 2


@pytest.mark.slow
def test_a_source_that_no_worker_can_read_ends_the_run(
    photos: Path, thread_executor: DaskExecutor, tmp_path: Path, slow_folder: Any
) -> None:
    class Elsewhere(slow_folder):
        def read(self, locator: bytes) -> Any:
            raise SourceError("the share is not mounted")

    thread_executor.patience = 1
    try:
        with pytest.raises(ClusterError, match=r"it cannot read the source: the share is not mounted"):
            run(Elsewhere(photos, 0), tmp_path / "store", thread_executor, dataset="photos")
    finally:
        thread_executor.refused.clear()
    assert FeatureStore(tmp_path / "store").snapshot("photos") is None


def test_few_bytes_pass_through_the_scheduler(photos: Path, thread_executor: DaskExecutor, tmp_path: Path) -> None:
    """What is sent and what comes back, as Dask would serialise it, beside the images' and the features' own bytes."""
    import pickle

    travelled = []

    class Counting(DaskExecutor):
        def __init__(self) -> None:
            self.__dict__.update(vars(thread_executor))

        def map(self, function: Any, shards: Any, *, context: Any = None, **options: Any) -> Any:
            common = len(cloudpickle.dumps((function, context)))
            for shard, result in super().map(function, shards, context=context, **options):
                travelled.append(common + len(pickle.dumps(shard)) + len(pickle.dumps(result)))
                yield shard, result

    record = run(photos, tmp_path / "store", Counting(), nodes=["c1.1:flatten"])
    shards = record["cluster"]["slices"]
    assert len(travelled) == shards == 12
    features = sum(path.stat().st_size for path in (tmp_path / "store").glob("spaces/*/parts/*.h5"))
    assert sum(travelled) < 90 * 200 + shards * 6000 < features / 8


def test_the_network_is_loaded_once_per_process(photos: Path, dask_executor: DaskExecutor, tmp_path: Path) -> None:
    def loads() -> dict[str, int]:
        from featurepipe.features.session import load_network

        return load_network.cache_info().misses

    before = dask_executor.client.run(loads)
    run(photos, tmp_path / "store", dask_executor, precision="auto", backbone="lenet5", seed=12)
    assert {after - before[who] for who, after in dask_executor.client.run(loads).items()} == {1}


def test_progress_shows_images_and_workers(
    photos: Path,
    thread_executor: DaskExecutor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(Lines.__init__.__kwdefaults__, "every", 0.0)
    run(photos, tmp_path / "store", thread_executor, silent=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("extract:")]
    assert lines[-1].startswith("extract: 90 of 90 images")
    assert lines[-1].endswith("-bound, 2 workers")


def test_the_command_line_names_a_cluster(photos: Path, cluster_address: str, tmp_path: Path, capsys: Any) -> None:
    from featurepipe.cli import main

    arguments = [
        "extract",
        str(photos),
        "--store",
        str(tmp_path / "store"),
        "--backbone",
        "lenet5",
        "--weights",
        "none",
    ]
    assert main([*arguments, "--max-rejects", "3", "--scheduler", cluster_address, "--quiet", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["counts"]["computed"] == 77


def test_a_source_in_this_process_memory_is_refused_before_any_work() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/pile/a.png", b"")
    with pytest.raises(UsageError, match=r"memory://.* is in this process' memory, where no worker can read it"):
        check_travels(open_source("memory://pile"))
    memory.rm("/pile", recursive=True)
