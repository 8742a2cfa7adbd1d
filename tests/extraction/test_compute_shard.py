"""What a worker elsewhere does with a shard, without a cluster: features, statuses, second attempts, refusals."""

import inspect
import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import replace

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import PYTORCH
from featurepipe.errors import SourceError, WorkerRefused
from featurepipe.execution.executor import Worker
from featurepipe.execution.worker import Carried
from featurepipe.extraction.compute import ExtractionContext, compute_shard, part_bytes
from featurepipe.extraction.shards import COMPUTED, KNOWN, REJECTED, UNTOUCHED, Shard
from featurepipe.features import session as session_module
from featurepipe.features.options import Options, RejectOptions
from featurepipe.features.session import Session, keep_memory, load_network
from featurepipe.features.settings import Machine, Settings
from featurepipe.images import open_source

WORKER = Worker("w0", threads=2, is_local=False)


class Office:
    """The context of a run over a folder of images, whose store and space a run over one image has made."""

    def __init__(self, album, run, nodes=("bottleneck",)):
        album.add("made/0.png", 10_000)
        run(album.root / "made", dataset="made", nodes=nodes, dtype="float32")
        self.run, self.source = run, open_source(album.root)
        self.listing = self.source.scan()
        backbone = load_backbone("lenet5", "none")
        space = run.store.spaces()[0]
        options = Options(backbone="lenet5", weights="none", workers=1)
        session = Session.of(backbone, backbone.columns(nodes), Machine("cpu", 4, 1), options)
        self.context = ExtractionContext(
            replace(session, settings=Settings.of_space(space.fields, why="as in the space")),
            self.source,
            "album",
            run.store.new_run_id(),
            str(run.path),
            space.name,
            tuple(self.listing["locator"].to_pylist()),
            rejects=RejectOptions(),
        )

    def shard(self, rows=None, number=0):
        rows = np.arange(self.listing.num_rows) if rows is None else np.array(rows)
        return Shard.of(number, 0, self.listing.take(pa.array(rows)))

    def parts(self):
        return {part.name: part.rows for part in self.run.store.spaces()[0].parts() if part.dataset == "album"}

    def __call__(self, shard, stop=bool):
        return compute_shard(self.context, shard, WORKER, stop, bool)


@pytest.fixture
def office(album, run):
    album.fill(12)
    return Office(album, run)


def after(images, count):
    """A stop that is asked for once so many images were decoded."""
    return lambda: images.decodes >= count


def test_a_shard_is_computed_as_on_one_machine(office, album, run):
    done = office(office.shard())
    assert done.error is None
    assert list(done.status) == [COMPUTED] * 12 + [KNOWN]  # the last is the one that made the store
    assert done.kinds == [("f6.1:gap",)]
    assert done.has_key.all()
    assert (len(done.keys), done.reasons) == (13, {})
    assert (done.run.worker, done.run.device, done.run.threads, done.run.parts) == ("w0", "cpu", 1, 1)
    assert list(office.parts().values()) == [12]
    run(album.root, dtype="float32")
    by_cluster = run.features()
    run.path = run.path.with_name("alone")
    run(album.root, dtype="float32")
    for name, values in run.features().items():
        np.testing.assert_allclose(by_cluster[name], values, rtol=1e-5, atol=1e-7)


def test_a_second_attempt_computes_only_what_the_first_had_not_committed(office, run):
    piece = office.shard(range(12))
    run.forwards = run.decodes = 0
    first = office(piece, stop=after(run, 5))
    reached = int((first.status != UNTOUCHED).sum())
    assert 5 <= reached < 12
    assert first.error is None
    assert run.forwards == reached == sum(office.parts().values())
    second = office(piece)
    assert run.forwards == 12 == sum(office.parts().values())
    assert list(second.status) == [COMPUTED] * 12  # it was this run that computed them
    assert second.kinds == [("f6.1:gap",)]
    third = office(piece)
    assert (run.forwards, list(third.status), third.run.parts) == (12, [COMPUTED] * 12, 0)
    assert np.array_equal(third.keys, second.keys)


def test_a_second_attempt_of_another_process_reads_no_image_again(office, run, monkeypatch):
    piece = office.shard(range(12))
    office(piece)
    load_network.cache_clear()
    office.context = cloudpickle.loads(cloudpickle.dumps(office.context))
    read = []
    monkeypatch.setattr(
        "featurepipe.features.reading.PatientReader.__call__", lambda self, locator: read.append(locator)
    )
    assert list(office(piece).status) == [COMPUTED] * 12
    assert read == []


def test_parts_of_another_shard_are_known_and_not_of_this_one(office):
    office(office.shard(range(6), number=0))
    office.context = replace(office.context, run_id=office.run.store.new_run_id())  # a later run, whose index has them
    assert list(office(office.shard(range(12), number=0)).status) == [KNOWN] * 6 + [COMPUTED] * 6


def test_a_damaged_part_of_the_first_attempt_counts_as_absent(office, run):
    piece = office.shard(range(12))
    office(piece)
    (name,) = office.parts()
    path = next(run.path.glob(f"spaces/*/parts/{name}.h5"))
    path.write_bytes(path.read_bytes()[:200])
    run.forwards = 0
    assert list(office(piece).status) == [COMPUTED] * 12
    assert run.forwards == 12


def test_columns_that_are_there_are_not_computed_and_said(album, run):
    album.fill(6)
    office = Office(album, run)
    office(office.shard(range(4)))
    wider = Office(album, run, nodes=["c3.1:gap", "bottleneck"])
    done = wider(wider.shard(range(6)))
    assert [done.kinds[code - COMPUTED] for code in done.status] == [("c3.1:gap",)] * 4 + [("c3.1:gap", "f6.1:gap")] * 2


def test_rejects_come_back_with_reason_and_key(office, album, picture):
    album.write("zz-truncated.png", picture(1)[:-40])
    album.write("zz-vanishes.png", picture(2))
    office.listing = office.source.scan()
    (album.root / "zz-vanishes.png").unlink()
    done = office(office.shard(range(9, 15)))
    assert list(done.status) == [COMPUTED] * 3 + [KNOWN, REJECTED, REJECTED]
    assert {row: reason.partition(":")[0] for row, reason in done.reasons.items()} == {4: "truncated", 5: "missing"}
    assert list(done.has_key) == [True] * 5 + [False]
    assert office.run.store.spaces()[0].rejects().num_rows == 0  # the client notes them


def test_a_process_that_does_not_see_the_source_is_refused(office, album):
    everything = office.shard(range(5))
    for path in sorted(album.root.rglob("*.png")):  # an empty folder: nothing is mounted here
        path.unlink()
    with pytest.raises(WorkerRefused, match=r"it cannot read the source: .*nearly no image can be read any more"):
        office(everything)
    assert office.parts() == {}


def test_a_few_images_that_are_gone_are_rejects_and_no_reason_to_doubt(office, album):
    piece = office.shard([3, 4])
    (album.root / "003.png").unlink()
    (album.root / "004.png").unlink()
    assert list(office(piece).status) == [REJECTED, REJECTED]


def test_a_source_that_goes_away_keeps_what_was_computed(office, run, monkeypatch):
    from featurepipe.images.folder import FolderSource

    read = FolderSource.read

    def failing(self, locator):
        if run.decodes >= 6:
            raise SourceError("the share has gone")
        return read(self, locator)

    monkeypatch.setattr(FolderSource, "read", failing)
    with pytest.raises(WorkerRefused, match="it cannot read the source: the share has gone"):
        office(office.shard(range(12)))
    assert sum(office.parts().values()) == run.forwards - 1 >= 6  # one forward made the store


def test_an_error_of_ours_comes_back_with_what_was_done(office, monkeypatch):
    from featurepipe.errors import DiskFull
    from featurepipe.store.writer import PartWriter

    def full(self):
        raise DiskFull("no space left")

    monkeypatch.setattr(PartWriter, "commit", full)
    done = office(office.shard(range(12)))
    assert isinstance(done.error, DiskFull)
    assert (done.status == UNTOUCHED).all()  # nothing was committed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"network": {"seed": 1}}, r"its lenet5 would give other features: weights_sha256 differs"),
        ({"network": {"backbone": "nowhere:net"}}, r"it cannot load nowhere:net: "),
        ({"machine": {"device": "cuda"}}, "it has no CUDA device, and this run computes on cuda"),
    ],
)
def test_a_process_that_would_compute_other_features_is_refused(office, monkeypatch, change, why):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    session = office.context.session
    changed = {name: replace(getattr(session, name), **fields) for name, fields in change.items()}
    office.context = replace(office.context, session=replace(session, **changed))
    with pytest.raises(WorkerRefused, match=why):
        office(office.shard())


def test_a_network_is_loaded_once_for_all_shards(office, monkeypatch):
    load_network.cache_clear()
    loaded = []
    original = session_module.load_backbone
    monkeypatch.setattr(session_module, "load_backbone", lambda *a, **b: (loaded.append(a), original(*a, **b))[1])
    engines = {id(engine) for n in range(3) for engine in _engines(office, office.shard([n], number=n))}
    assert len(loaded) == 1 == len(engines)


def _engines(office, piece):
    office(piece)
    return load_network(office.context.session.network, "cpu").engines["fp32", PYTORCH].values()


def test_a_source_whose_code_is_not_there_is_refused():
    carried = Carried("digest", b"cnowhere\nSource\n.")
    with (
        pytest.raises(WorkerRefused, match="it lacks what the work needs: No module named 'nowhere'"),
        carried.opened(),
    ):
        pass


@pytest.mark.parametrize(("memory", "part"), [(0, 64), (64 << 30, 64), (1 << 30, 32), (256 << 20, 8), (1 << 20, 4)])
def test_parts_are_small_where_memory_is(memory, part):
    assert part_bytes(Worker("w", 1, memory, is_local=False)) == part << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_is_kept_between_batches_though_dask_gives_it_back():
    code = """
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(50):
                np.ones(1 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        before = faults()
        keep_memory()
        faults()
        print(before, faults())
    """
    names = ("TRIM_VARIABLE", "M_MMAP_THRESHOLD", "M_TRIM_THRESHOLD", "LARGEST_KEPT")
    values = [f"{name} = {getattr(session_module, name)!r}" for name in names]
    imports = "import ctypes, os, platform, resource, numpy as np"  # and no PyTorch, which takes seconds
    code = "\n".join([imports, *values, inspect.getsource(keep_memory), textwrap.dedent(code)])
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}  # as Dask's nanny sets it
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, said.stdout.split())
    assert before >= 50 * 4  # 8 MiB are four huge pages, or 2,048 small ones
    assert after < before / 10
