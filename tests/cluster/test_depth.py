"""A comparison of layers on a cluster: the numbers of a local one, each measured once, whoever was killed."""

import pickle
import shutil
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from featurepipe.errors import ClusterError, Interrupted
from featurepipe.execution import connect
from featurepipe.execution.worker import Attempt, Requirements
from featurepipe.interrupt import StopRequest
from featurepipe.layer_depth import measure as measuring
from featurepipe.layer_depth.depth import depth
from featurepipe.layer_depth.journal import Journal
from featurepipe.store import FeatureStore

OPTIONS = {
    "dataset": "halves", "backbone": "lenet5", "weights": "none", "nodes": ["c1", "f6"], "heads": ["logistic", "knn"],
    "folds": 2, "seeds": 2, "silent": True, "extraction": {"precision": "fp32", "workers": 1, "batch_size": 8},
}  # fmt: skip
CELLS = 2 * 4


def draw(root, count, start=0):
    """Noise with a bright half, the left one or the upper one."""
    for number in range(start, start + count):
        values = np.random.default_rng(number).integers(0, 160, (32, 32))
        values[(slice(None), slice(16)) if number % 2 else slice(16)] += 60
        path = root / ("left" if number % 2 else "upper") / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(values.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("halves"), 48)


@pytest.fixture(scope="session")
def local(pictures, tmp_path_factory):
    """The answer of a comparison without a cluster, and its store."""
    store = tmp_path_factory.mktemp("local") / "store"
    return depth(pictures, store, jobs=1, **OPTIONS), store


def numbers(answer):
    """All of an answer that is not about time or place."""
    fixed = {
        name: value for name, value in answer.items() if name not in {"provenance", "timing", "columns", "recommended"}
    }
    times = {"ms_per_image", "seconds"}
    fixed["columns"] = [{k: v for k, v in column.items() if k not in times} for column in answer["columns"]]
    fixed["recommended"] = {k: v for k, v in answer["recommended"].items() if k not in times}
    fixed["results"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in answer["results"]]
    return fixed


def journal_of(store):
    return Journal(FeatureStore(store).depth_journal("halves"))


# The same numbers


@pytest.mark.slow
def test_all_numbers_are_those_of_a_local_comparison(pictures, local, dask_executor, tmp_path):
    answer = depth(pictures, tmp_path / "store", cluster=dask_executor, **OPTIONS)
    assert numbers(answer) == numbers(local[0])
    assert {worker.host for worker in dask_executor.workers()} == {answer["timing"]["host"]}
    assert answer["timing"]["threads"] == 1
    assert all(column["ms_per_image"] > 0 for column in answer["columns"])
    assert answer["provenance"]["exit_code"] == 0
    assert len(answer["provenance"]["runs"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("multilabel", {"multilabel": ["left", "even"], "heads": ["logistic"]}),
        ("continuous", {"target": "age", "heads": ["ridge"]}),
    ],
)
def test_several_labels_and_numbers_of_groups_are_those_of_a_local_comparison(
    local, thread_executor, tmp_path, kind, roles
):
    ids = [f"{'left' if number % 2 else 'upper'}/{number:03d}.png" for number in range(48)]
    labels = pa.table(
        {
            "id": ids,
            "left": ["" if number < 4 else str(number % 2) for number in range(48)],  # unknown of the first
            "even": [str(int(number % 3 == 0)) for number in range(48)],
            "age": [str(number % 2 + number / 100) for number in range(48)],
            "group": [f"g{number // 2}" for number in range(48)],
        }
    )
    same = (
        {name: OPTIONS[name] for name in ("dataset", "nodes", "folds", "silent")}
        | roles
        | {"labels": labels, "seeds": 1}
    )
    answers = []
    for name, options in (("here", {"jobs": 1}), ("there", {"cluster": thread_executor})):
        shutil.copytree(local[1], tmp_path / name)
        answers.append(depth(FeatureStore(tmp_path / name), **options, **same))
    here, there = answers
    assert here["target_type"] == kind
    assert numbers(there) == numbers(here)


@pytest.mark.slow
def test_images_from_elsewhere_are_tested_on_there_too(pictures, thread_executor, tmp_path):
    asked = {**OPTIONS, "heads": ["knn"], "test_source": draw(tmp_path / "other", 20, start=1000)}
    here = depth(pictures, tmp_path / "here", jobs=1, **asked)
    there = depth(pictures, tmp_path / "there", cluster=thread_executor, **asked)
    assert numbers(there) == numbers(here)
    assert here["details_shifted"]["metrics"]["accuracy"]["value"] > 0


def test_the_second_time_nothing_is_measured(pictures, local, thread_executor, monkeypatch):
    """The journal of a local comparison serves one on a cluster."""
    monkeypatch.setattr(measuring, "measure_cells", lambda *_: pytest.fail("measured again"))
    answer = depth(pictures, local[1], cluster=thread_executor, **OPTIONS)
    assert answer["results"] == local[0]["results"]  # the seconds, too


@pytest.mark.slow
def test_wide_cells_have_a_worker_to_themselves(local, thread_executor, tmp_path, monkeypatch):
    shutil.copytree(local[1], tmp_path / "store")
    journal_of(tmp_path / "store").path.unlink()
    monkeypatch.setattr(measuring, "SMALL_VALUES", 10)
    given, original = [], measuring.Measuring.of

    def spy(study):
        given.append(original(study).wide)
        return original(study)

    monkeypatch.setattr(measuring.Measuring, "of", spy)
    same = {name: OPTIONS[name] for name in ("dataset", "nodes", "heads", "folds", "seeds", "silent")}
    answer = depth(FeatureStore(tmp_path / "store"), cluster=thread_executor, **same)
    assert given == [True, True, True]  # single columns, side by side, and what heads say of each image
    assert numbers(answer)["results"] == numbers(local[0])["results"]


# What travels


@pytest.mark.slow
def test_little_travels_with_each_cell(pictures, local, thread_executor, monkeypatch, tmp_path):
    """The study goes to a worker once; a shard names a column and a fold."""
    sizes, original = [], thread_executor.map

    def mapped(function, shards, **options):
        def watched():
            for shard in shards:
                if isinstance(shard, measuring.Work):
                    sizes.append(len(pickle.dumps((Attempt(function, None, Requirements(())), shard))))
                yield shard

        return original(function, watched(), **options)

    monkeypatch.setattr(thread_executor, "map", mapped)
    depth(pictures, tmp_path / "store", cluster=thread_executor, **{**OPTIONS, "heads": ["knn"]})
    assert len(sizes) >= CELLS
    assert max(sizes) < 1000


# Stops, kills, resumption


@pytest.mark.slow
def test_a_signal_ends_it_at_once_and_the_next_call_goes_on(pictures, local, thread_executor, tmp_path, monkeypatch):
    request, original, kept = StopRequest(), Journal.add, []

    def add(self, key, cells):
        kept.append((key, [(cell.head, cell.seed, cell.fold) for cell in cells]))
        original(self, key, cells)
        if len(kept) == 3:
            request.signalled(15)

    monkeypatch.setattr(Journal, "add", add)
    monkeypatch.setattr(measuring, "stop_on_signals", lambda: entered(request))
    with pytest.raises(
        Interrupted, match=r"stopped by SIGTERM: \d+ of \d+ fits are measured and kept; the same command goes on"
    ):
        depth(pictures, tmp_path / "store", cluster=thread_executor, **OPTIONS)
    assert 3 <= len(kept) < CELLS
    request.signal_number = None
    answer = depth(pictures, tmp_path / "store", cluster=thread_executor, **OPTIONS)
    assert numbers(answer) == numbers(local[0])
    single = kept[:CELLS]
    assert len(set(map(str, single))) == CELLS  # no cell was measured twice


class entered:
    def __init__(self, request):
        self.request = request

    def __enter__(self):
        return self.request

    def __exit__(self, *error):
        pass


def after_two_answers(monkeypatch, action):
    """Does something then; returns what is kept in the journal, as it comes."""
    original, kept = Journal.add, []

    def add(self, key, cells):
        kept.append(key)
        original(self, key, cells)
        if len(kept) == 2:
            action()

    monkeypatch.setattr(Journal, "add", add)
    return kept


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_cell_alone(pictures, local, processes, tmp_path, monkeypatch):
    after_two_answers(monkeypatch, processes.workers[0].kill)
    with connect(processes.address, say=print) as dask_executor:
        dask_executor.wait_for_workers(2)
        answer = depth(pictures, tmp_path / "store", cluster=dask_executor, **OPTIONS)
    assert numbers(answer) == numbers(local[0])


@pytest.mark.slow
def test_a_scheduler_that_is_killed_ends_it_and_the_journal_goes_on(pictures, local, processes, tmp_path, monkeypatch):
    kept = after_two_answers(monkeypatch, processes.scheduler.kill)
    with connect(processes.address, say=print) as dask_executor:
        dask_executor.wait_for_workers(2)
        start = time.monotonic()
        with pytest.raises(ClusterError, match=r"the scheduler .*gone"):
            depth(pictures, tmp_path / "store", cluster=dask_executor, **OPTIONS)
        assert time.monotonic() - start < 90
    there = len(kept)
    assert 2 <= there < CELLS
    answer = depth(pictures, tmp_path / "store", jobs=1, **OPTIONS)  # here, with what the cluster has left
    assert numbers(answer) == numbers(local[0])
