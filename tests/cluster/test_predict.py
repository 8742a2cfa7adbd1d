"""Predicting on a cluster: the file of a local run, whoever has scored its rows, whoever was late, and whoever was killed."""

import re
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import distributed
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from featurepipe.backbones import load_backbone
from featurepipe.errors import ClusterError, Interrupted, TooManyRejects, UsageError, WorkerRefused
from featurepipe.execution import connect
from featurepipe.execution.executor import Worker
from featurepipe.extraction.extract import extract
from featurepipe.extraction.ledger import WorkerTotals
from featurepipe.extraction.shards import Shard, ShardRun
from featurepipe.heads.bundle.bundle import Bundle, read_bundle, write_bundle
from featurepipe.images.folder import FolderSource
from featurepipe.interrupt import StopRequest
from featurepipe.prediction import shards
from featurepipe.prediction.from_store import predict_features
from featurepipe.prediction.options import BundleOptions
from featurepipe.prediction.predict import predict
from featurepipe.prediction.shards import PredictionContext, WholeBatches, digest_of, predict_shard
from featurepipe.store import FeatureStore
from featurepipe.training.train import train

COUNT = 150
BATCH = 8


class Album:
    """150 pictures in three classes, two of them broken; their features in a store; a bundle that was trained on them."""

    def __init__(self, folder):
        self.root, self.store, self.bundle = folder / "pictures", folder / "store", folder / "bundle"
        for number in range(COUNT):
            path = self.root / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            low = (0, 60, 120)[number % 3]
            values = np.random.default_rng(number).integers(low, low + 130, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(values).resize((40, 36)).save(path)
        self.broken = ["a/!.png", "b/070.png"]
        (self.root / self.broken[0]).write_bytes(b"")
        (self.root / self.broken[1]).write_bytes(b"no picture")
        extract(self.root, self.store, dataset="album", backbone="lenet5", weights="none", precision="fp32", max_rejects=2,
                batch_size=BATCH, workers=1, silent=True)  # fmt: skip
        store = FeatureStore(self.store)
        (space,) = store.spaces()
        features = store.features("album")
        head = LogisticRegression(C=0.1).fit(*features.numpy())
        bundle = Bundle(
            backbone={"name": "lenet5", "weights": "none", "seed": 0, "description": space.notes["backbone"]},
            space=space.fields, fingerprint=space.fingerprint, columns=features.columns, family="logistic", params={},
            head=head, classes=tuple(head.classes_), temperature=2.0, metrics={}, training={}, seen=features.keys64,
        )  # fmt: skip
        write_bundle(self.bundle, bundle)

    def predict(self, to, source=None, **options):
        given = {"max_rejects": 2, "batch_size": BATCH, "workers": 1, "silent": True} | options
        return predict(self.bundle, self.root if source is None else source, to, **given)


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    return Album(tmp_path_factory.mktemp("album"))


@pytest.fixture(scope="session")
def local(album):
    """The files of a run without a cluster."""
    folder = album.store.parent / "local"
    folder.mkdir()
    for suffix in ("csv", "parquet"):
        album.predict(folder / f"out.{suffix}")
    return folder


# The same file


def test_the_file_is_that_of_a_local_run(album, local, cluster_address, tmp_path):
    record = album.predict(tmp_path / "out.csv", cluster=cluster_address)
    assert (tmp_path / "out.csv").read_bytes() == (local / "out.csv").read_bytes()
    assert record["counts"] == {"listed": COUNT + 1, "predicted": COUNT - 1, "rejected": 2}
    assert [reject["id"] for reject in record["rejects"]] == album.broken
    assert (record["exit_code"], record["status"]) == (3, "done")
    assert sum(record["labels"].values()) == COUNT - 1
    assert record["machine"] == {"device": "cpu", "batch_size": BATCH, "workers": 1, "engine": "pytorch"}


def test_the_record_says_who_did_how_much(album, local, dask_executor, tmp_path):
    record = album.predict(tmp_path / "out.parquet", cluster=dask_executor)
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(local / "out.parquet"))
    there = record["cluster"]
    assert there["scheduler"] == dask_executor.address
    assert there["refused"] == {}
    assert sum(worker["images"] for worker in there["workers"]) == COUNT + 1
    assert {worker["pid"] for worker in there["workers"]} <= {worker.pid for worker in dask_executor.workers()}
    assert record["seconds"]["forward"] > 0
    assert record["seconds"]["score"] > 0


def test_the_command_names_a_scheduler(album, local, cli, cluster_address, tmp_path):
    finished = cli(
        "predict", album.bundle, album.root, "--to", tmp_path / "out.csv", "--scheduler", cluster_address, "--max-rejects", 2,
        "--batch-size", BATCH, "--workers", 1, "--quiet",
    )  # fmt: skip
    assert finished.code == 3, finished.err
    assert (tmp_path / "out.csv").read_bytes() == (local / "out.csv").read_bytes()
    (line,) = [line for line in finished.out.splitlines() if "workers: " in line or "worker: " in line]
    assert sum(int(count) for count in re.findall(r" (\d+) images", line)) == COUNT + 1


def test_without_a_file_it_counts(album, thread_executor):
    record = album.predict(None, cluster=thread_executor)
    assert record["file"] is None
    assert record["counts"]["predicted"] == COUNT - 1


def test_too_many_rejects_leave_the_file_as_locally(album, local, thread_executor, tmp_path):
    with pytest.raises(TooManyRejects, match=r"2 of 151 images .* first: a/!.png: empty: 0 bytes; .* holds all"):
        album.predict(tmp_path / "out.csv", max_rejects=1, cluster=thread_executor)
    assert (tmp_path / "out.csv").read_bytes() == (local / "out.csv").read_bytes()


# Order and bounds


def test_what_comes_early_waits_and_the_flow_does_not_run_ahead(
    album, local, thread_executor, tmp_path, monkeypatch, slow_folder
):
    """The first shard takes long; shards of 8 make 19, of which 3 for each of two workers may be begun beyond it."""
    monkeypatch.setattr(shards, "WholeBatches", lambda batch, most: Eights())
    begun, taken = [], []
    monkeypatch.setattr(WorkerTotals, "add", lambda self, images, run: taken.append(images))
    monkeypatch.setattr(shards, "cut", partial(watched, shards.cut, lambda shard: begun.append((shard, len(taken)))))
    album.predict(tmp_path / "out.csv", source=slow_folder(album.root, {"a/000": 2.0}), cluster=thread_executor)
    assert taken == [8] * 18 + [7]
    before = [shard.number for shard, count in begun if count == 0]
    assert 2 < max(before) <= 6
    assert (tmp_path / "out.csv").read_bytes() == (local / "out.csv").read_bytes()


class Eights:
    def next(self, left, _workers):
        return min(left, 8)

    def note(self, images, seconds):
        pass


def watched(cut, see, *args):
    for shard in cut(*args):
        see(shard)
        yield shard


@pytest.mark.parametrize("rate", [None, 3.0, 5000.0])
def test_shards_are_whole_batches(rate):
    sizes = WholeBatches(16, most=100)
    if rate is not None:
        sizes.note(1000, 1000 / rate)
    left, found = 1003, []
    while left:
        found.append(sizes.next(left, 3))
        left -= found[-1]
    assert {size % 16 for size in found[:-1]} == {0}
    assert max(found) <= 96
    assert WholeBatches(256, most=16).next(10_000, 3) == 256  # a batch at least


def test_workers_keep_what_is_damaged_where_asked_and_tell_of_it(
    album, thread_executor, tmp_path, monkeypatch, noisy_jpeg
):
    monkeypatch.setattr(shards, "WholeBatches", lambda batch, most: Eights())
    source = tmp_path / "pile"
    source.mkdir()
    for number in range(18):
        (source / f"{number:02d}.jpg").write_bytes(noisy_jpeg(number, damaged=number in (3, 17)))
    found = [
        album.predict(tmp_path / f"{name}.csv", source=source, damaged="keep", **where)
        for name, where in {"here": {}, "there": {"cluster": thread_executor}}.items()
    ]
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()
    assert found[0]["damaged"] == found[1]["damaged"]
    assert [image["id"] for image in found[1]["damaged"]["images"]] == ["03.jpg", "17.jpg"]
    assert album.predict(None, source=source, cluster=thread_executor)["damaged"]["kept"] == 0
    with pytest.raises(UsageError, match="unknown damaged 'repair'"):
        album.predict(None, source=source, cluster=thread_executor, damaged="repair")


def test_workers_tell_what_they_ignored_of_a_file_of_weights(album, thread_executor, tmp_path):
    state = load_backbone("lenet5", "none").module.state_dict()
    more = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": more}, tmp_path / "two.pt")
    own, bundle = load_backbone("lenet5", str(tmp_path / "two.pt")), read_bundle(album.bundle)
    backbone, space = {**bundle.backbone, "weights": "file"}, {**bundle.space, **own.identity()}
    write_bundle(tmp_path / "bundle", replace(bundle, backbone=backbone, space=space))
    options = {"weights": tmp_path / "two.pt", "max_rejects": 2, "workers": 1, "silent": True}
    record = predict(tmp_path / "bundle", album.root, cluster=thread_executor, **options)
    assert record["weights_note"] == "the file holds other tensors as well, which are ignored: ['state_dict_ema']"


# Who may take part


def test_a_bundle_that_no_worker_sees_is_an_error_before_any_work(album, thread_executor, said, tmp_path, monkeypatch):
    def digest(folder):
        try:
            distributed.get_worker()
        except ValueError:  # at the client
            return digest_of(folder)
        return "of another bundle"

    monkeypatch.setattr(shards, "digest_of", digest)
    monkeypatch.setattr(shards, "predict_shard", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ClusterError, match=r"no worker of tcp://.* can be used: .*another bundle is at .*/bundle"):
        album.predict(tmp_path / "out.csv", cluster=thread_executor)
    assert not list(tmp_path.iterdir())
    assert len([line for line in said if "is not used: another bundle is at" in line]) == 2


def context_of(album, **changes):
    source = FolderSource(str(album.root))
    probes = (FolderSource(str(album.root)).scan()["locator"][5].as_py(),)
    context = PredictionContext(
        str(album.bundle), digest_of(str(album.bundle)), BundleOptions(workers=1), source, probes
    )
    return replace(context, **changes)


def test_what_speaks_against_a_worker(album, tmp_path):
    assert context_of(album).refusal() == ""
    assert context_of(album, bundle=str(tmp_path)).refusal() == f"it does not see the bundle {tmp_path}"
    assert context_of(album, digest="x").refusal() == f"another bundle is at {album.bundle}"
    away = FolderSource(str(tmp_path / "away"))
    missing = (str(tmp_path / "away" / "x.png").encode(),)
    assert context_of(album, source=away, probes=missing).refusal().endswith("away: the folder has gone")
    assert context_of(album, probes=missing).refusal().startswith("it cannot read the source: missing: ")
    assert context_of(album, probes=(*missing, *context_of(album).probes)).refusal() == ""  # one of them is enough


def test_a_bundle_or_images_in_this_process_cannot_be_seen_by_workers(album, tmp_path):
    with pytest.raises(UsageError, match="give its folder"):
        predict(read_bundle(album.bundle), album.root, cluster="local:2", silent=True)


def test_images_in_memory_do_not_travel(album, thread_executor):
    pixels = np.zeros((2000, 50, 50), np.uint8)
    with pytest.raises(UsageError, match=r"MiB in memory.*folder"):
        album.predict(None, source=pixels, cluster=thread_executor)


ONE = Worker("one", 1, is_local=False)


def test_a_worker_that_lost_the_source_is_not_believed(album):
    """Nothing in its shard can be read, and nothing else either: that is no fault of the images."""
    context, scored = context_of(album), []
    listing = FolderSource(str(album.root)).scan().slice(1, 20)
    gone = [b"/nowhere/" + locator for locator in listing["locator"].to_pylist()]
    shard = Shard.of(0, 0, listing.set_column(listing.column_names.index("locator"), "locator", [gone]))
    with pytest.raises(WorkerRefused, match="cannot read the source"):
        predict_shard(replace(context, probes=(gone[0],)), shard, ONE, bool, bool)
    predict_shard(context, shard, ONE, bool, scored.append)  # the probes are there, so these images are missing
    assert Counter(code for rows in scored for code in rows.codes.tolist()) == {-1: 20}


def test_workers_load_the_network_once(album, monkeypatch):
    loaded, original, scored = [], shards.make_ready, []
    monkeypatch.setattr(shards, "make_ready", lambda *a, **b: loaded.append(a) or original(*a, **b))
    context, listing = context_of(album), FolderSource(str(album.root)).scan()
    runs = [
        predict_shard(context, Shard.of(n, 10 * n, listing.slice(10 * n, 10)), ONE, bool, scored.append)
        for n in range(3)
    ]
    assert len(loaded) == 1
    assert [number for rows in scored for number in rows.numbers] == list(range(30))
    assert isinstance(runs[0], ShardRun)


# Stops and kills


def test_a_stop_leaves_no_file(album, thread_executor, tmp_path, monkeypatch, slow_folder):
    """Signals reach the main thread alone, so here a request is met by hand."""
    request = StopRequest()
    monkeypatch.setattr("featurepipe.prediction.predict.stop_on_signals", lambda: at(request, 1.0))
    source = slow_folder(album.root, {"b/": 1.0})
    start = time.monotonic()
    with pytest.raises(
        Interrupted, match=r"stopped by SIGTERM: .* of 151 images were predicted, and no file was written"
    ):
        album.predict(tmp_path / "out.csv", source=source, cluster=thread_executor)
    assert time.monotonic() - start < 20  # all of b/ takes 50 s on one of the workers
    assert not list(tmp_path.iterdir())


class at:
    """A request to stop that is met after some seconds."""

    def __init__(self, request, seconds):
        self.request = request
        self.timer = threading.Timer(seconds, setattr, [request, "signal_number", signal.SIGTERM])

    def __enter__(self):
        self.timer.start()
        return self.request

    def __exit__(self, *error):
        self.timer.cancel()


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(album, local, processes, tmp_path, monkeypatch, slow_folder):
    monkeypatch.setattr(shards, "WholeBatches", lambda batch, most: Eights())
    original, seen = WorkerTotals.add, []

    def add(self, images, run):
        seen.append(run.pid)
        if len(seen) == 4:
            processes.workers[0].kill()
        original(self, images, run)

    monkeypatch.setattr(WorkerTotals, "add", add)
    with connect(processes.address, say=print) as dask_executor:
        dask_executor.wait_for_workers(2)
        record = album.predict(
            tmp_path / "out.csv", source=slow_folder(album.root, {".png": 0.02}), cluster=dask_executor
        )
    assert (tmp_path / "out.csv").read_bytes() == (local / "out.csv").read_bytes()
    assert set(seen[-4:]) == {processes.workers[1].pid}
    assert sum(worker["images"] for worker in record["cluster"]["workers"]) == COUNT + 1


@pytest.mark.slow
def test_sigterm_ends_the_command_without_a_file(album, launcher, cluster_address, tmp_path):
    code = f"""
        import sys, time
        from pathlib import Path
        from featurepipe.images.folder import FolderSource
        from featurepipe.prediction.predict import predict

        class Slow(FolderSource):
            def read(self, locator):
                Path({str(tmp_path.parent / "begun")!r}).touch()
                time.sleep(0.3)
                return super().read(locator)

        try:
            predict({str(album.bundle)!r}, Slow({str(album.root)!r}), "out.csv", cluster={cluster_address!r}, workers=1)
        except Exception as error:
            print(type(error).__name__, error.exit_code, error, file=sys.stderr)
    """
    process = launcher.start(code, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path.parent / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send(signal.SIGTERM)
    ended = process.wait()
    assert "Interrupted 143 stopped by SIGTERM" in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "values"),
    [
        ({"target": "brightness"}, [f"{60 * (number % 3) + 0.1 * number:.1f}" for number in range(COUNT)]),
        ({"multilabel": "kinds"}, [("a|odd", "b", "none")[number % 3] for number in range(COUNT)]),
    ],
)
def test_numbers_and_several_labels_are_those_of_one_process(album, thread_executor, tmp_path, role, values):
    ids = [f"{'abc'[number % 3]}/{number:03d}.png" for number in range(COUNT)]
    labels = pa.table({"id": ids, next(iter(role.values())): values})
    made = {"out": tmp_path / "bundle", "head": "ridge", "labels": labels, "silent": True}
    train(album.store, **made, **role)
    files = {}
    for name, where in {"here": {}, "there": {"cluster": thread_executor}}.items():
        options = {"max_rejects": 2, "batch_size": BATCH, "workers": 1, "silent": True, **where}
        from_images = predict(tmp_path / "bundle", album.root, tmp_path / f"{name}.csv", **options)
        stored = predict_features(
            tmp_path / "bundle", album.store, tmp_path / f"{name}-stored.csv", dataset="album", silent=True, **where
        )
        assert from_images["counts"]["predicted"] == stored["counts"]["predicted"] == COUNT - 1
        files[name] = [pa.csv.read_csv(tmp_path / f"{name}{kind}.csv") for kind in ("", "-stored")]
    for here, there in zip(*files.values(), strict=True):
        assert here.schema.equals(there.schema)
        for name in here.column_names:
            if pa.types.is_floating(here[name].type):
                np.testing.assert_allclose(there[name].to_numpy(), here[name].to_numpy(), rtol=1e-5)
            else:
                assert there[name].equals(here[name])


# From stored features


def test_predictions_on_stored_features_are_those_of_one_process(album, thread_executor, tmp_path):
    here = predict_features(album.bundle, album.store, tmp_path / "here.parquet", dataset="album", silent=True)
    there = predict_features(
        album.bundle, album.store, tmp_path / "there.parquet", dataset="album", cluster=thread_executor, silent=True
    )
    one, other = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("here", "there"))
    assert one.drop_columns(one.column_names[2:]).equals(other.drop_columns(other.column_names[2:]))
    for name in one.column_names[4:]:
        np.testing.assert_allclose(other[name].to_numpy(), one[name].to_numpy(), rtol=1e-6)
    assert there["counts"] == here["counts"] == {"images": COUNT + 1, "predicted": COUNT - 1, "rejected": 2}
    assert there["labels"] == here["labels"]
