"""What is measured is measured once; what changes is measured anew."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from featurepipe.errors import Interrupted
from featurepipe.execution.local import LocalExecutor
from featurepipe.heads.calibration import expected_calibration_error, probabilities
from featurepipe.layer_depth import document as details_module
from featurepipe.layer_depth import measure as module
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import measure
from featurepipe.layer_depth.study import PRETRAINED, RANDOM

COLUMNS = [("a:gap", 0.3, 2), ("b:gap", 1.0, 3)]
COUNT = 60
LABELS = ["cat", "dog", "emu"] * (COUNT // 3)


def features(seed=0, count=COUNT):
    rng = np.random.default_rng(seed)
    codes = np.arange(count) % 3
    centres = rng.normal(size=(3, 5))
    values = (centres[codes] + rng.normal(size=(count, 5))).astype(np.float32)
    return {"a:gap": values[:, :2], "b:gap": values[:, 2:]}


class Counted:
    """Measures, and keeps what it was asked to measure."""

    def __init__(self, path, monkeypatch):
        self.path, self.calls, self.fail_after = path, [], None
        original = module.measure_fold

        def spy(data, fold, heads):
            if self.fail_after is not None and len(self.calls) >= self.fail_after:
                raise KeyboardInterrupt
            self.calls.append((data.features.column, fold.seed, fold.number, tuple(heads)))
            return original(data, fold, heads)

        monkeypatch.setattr(module, "measure_fold", spy)

    def __call__(self, study, sets=None, jobs=1):
        """The series, and what had to be measured for them."""
        self.calls = []
        sets = sets or [(PRETRAINED, (column.column,)) for column in study.columns]
        progress = Silent()
        found = measure(study, sets, Journal(self.path), jobs=jobs, progress=progress)
        self.advanced = progress.count
        return found


class Silent:
    def __init__(self):
        self.count = 0

    def advance(self, count, detail=""):
        self.count += count


@pytest.fixture
def counted(tmp_path, monkeypatch):
    return Counted(tmp_path / "journal.jsonl", monkeypatch)


@pytest.fixture
def study(album):
    fingerprint = album.write("zoo", features(), LABELS)
    album.write("away", features(1, 30), LABELS[:30])

    def make(name="zoo", **options):
        return album.study(name, fingerprint, COLUMNS, **options)

    make.fingerprint = fingerprint
    return make


def check_same(one, other):
    assert [(s.network, s.columns, s.head) for s in one] == [(s.network, s.columns, s.head) for s in other]
    for first, second in zip(one, other, strict=True):
        assert [(c.seed, c.fold, c.params) for c in first.cells] == [(c.seed, c.fold, c.params) for c in second.cells]
        for a, b in zip(first.cells, second.cells, strict=True):
            np.testing.assert_array_equal(a.contributions, b.contributions)


def test_each_series_has_a_cell_a_fold_in_order(study, counted):
    given = study(heads=("centroid", "knn"), folds=3, seeds=2)
    found = counted(given)
    assert [(series.columns, series.head) for series in found] == [
        (("a:gap",), "centroid"), (("a:gap",), "knn"), (("b:gap",), "centroid"), (("b:gap",), "knn")
    ]  # fmt: skip
    for series in found:
        assert [(cell.seed, cell.fold) for cell in series.cells] == [(s, f) for s in range(2) for f in range(3)]
        assert {cell.head for cell in series.cells} == {series.head}
        assert [len(cell.contributions) for cell in series.cells] == [len(fold.test) for fold in given.folds]
    assert counted.advanced == 2 * 2 * 6
    assert len(counted.calls) == 2 * 6  # all heads of a column and fold at once


def test_the_second_time_nothing_is_measured(study, counted):
    first = counted(study(heads=("centroid", "knn")))
    again = counted(study(heads=("centroid", "knn")))
    assert counted.calls == []
    assert counted.advanced == 2 * 2 * 2  # the progress still comes to its end
    check_same(first, again)


@pytest.mark.parametrize("done", range(4))
def test_interrupted_it_goes_on_where_it_was(study, counted, done):
    counted.fail_after = done
    with pytest.raises(KeyboardInterrupt):
        counted(study())
    assert len(counted.calls) == done
    before = counted.calls
    counted.fail_after = None
    found = counted(study())
    every = [(column, 0, fold, ("centroid",)) for column in ("a:gap", "b:gap") for fold in range(2)]
    assert before + counted.calls == every
    assert all(len(series.cells) == 2 for series in found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_says_what_is_kept(study, counted, monkeypatch, number):
    real = module.measure_fold

    def signalled(*arguments):
        if len(counted.calls) == 3:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(module, "measure_fold", signalled)
    before = signal.getsignal(number)
    told = f"^stopped by {number.name}: 3 of 4 fits are measured and kept; the same command goes on from there$"
    with pytest.raises(Interrupted, match=told) as caught:
        counted(study(), jobs=1)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    counted(study(), jobs=1)
    assert len(counted.calls) == 1


@pytest.fixture
def no_time_passes(monkeypatch):
    """A busy machine makes nothing take longer."""
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0, time=time.time))


def test_seconds_of_work_start_no_processes(study, counted, monkeypatch, no_time_passes):
    monkeypatch.setattr(module, "ProcessExecutor", lambda *_, **__: pytest.fail("started"))
    found = counted(study(heads=("centroid", "knn"), folds=3, seeds=2), jobs=2)
    assert len(counted.calls) == 2 * 6
    assert [len(series.cells) for series in found] == [6, 6, 6, 6]


def test_processes_are_started_as_soon_as_much_is_left(study, counted, monkeypatch):
    taken, now = [], [0.0]

    class There(LocalExecutor):
        def __init__(self, processes):
            super().__init__()
            taken.append(processes)

    fit = module.measure_fold
    monkeypatch.setattr(module, "measure_fold", lambda *given: (now.__setitem__(0, now[0] + 1.0), fit(*given))[1])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], time=time.time))
    monkeypatch.setattr(module, "ProcessExecutor", There)
    counted(study(folds=3, seeds=2), jobs=2)  # 12 cells of a second: after 4 of them 8 s are left
    assert taken == [2]
    assert len(counted.calls) == 12
    counted.path = counted.path.with_name("few.jsonl")
    counted(study(folds=3, seeds=1), jobs=2)  # 6 cells: after 4 of them 2 s are left
    assert taken == [2]


@pytest.mark.slow
def test_several_at_once_measure_the_same(study, counted, tmp_path, monkeypatch, no_time_passes):
    given = study(heads=("logistic", "knn"), seeds=2, shifted="away")
    alone = counted(given, jobs=2)
    assert len(counted.calls) == 8  # seconds of work: all here
    counted.path = tmp_path / "other.jsonl"
    monkeypatch.setattr(module, "WORTH_STARTING", -1.0)
    together = counted(given, jobs=2)
    assert len(counted.calls) == 1  # the others in processes
    check_same(alone, together)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.cells, other.cells, strict=True):
            np.testing.assert_array_equal(a.shifted, b.shifted)
            assert len(a.shifted) == 30


def test_a_seed_a_head_or_a_column_more_measures_only_what_is_new(study, counted, album):
    counted(study())
    counted(study(seeds=2))
    assert counted.calls == [(c, 1, fold, ("centroid",)) for c in ("a:gap", "b:gap") for fold in range(2)]
    counted(study(heads=("knn", "centroid")))
    assert counted.calls == [(c, 0, fold, ("knn",)) for c in ("a:gap", "b:gap") for fold in range(2)]
    counted(album.study("zoo", study.fingerprint, COLUMNS[:1], heads=("knn",), seeds=2))
    assert counted.calls == [("a:gap", 1, fold, ("knn",)) for fold in range(2)]
    counted(study(), sets=[(PRETRAINED, ("a:gap", "b:gap"))])
    assert counted.calls == [("a:gap+b:gap", 0, fold, ("centroid",)) for fold in range(2)]
    counted(study(), sets=[(PRETRAINED, ("a:gap", "b:gap"))])
    assert counted.calls == []


ANEW = 4


def test_other_folds_are_measured_anew(study, counted):
    counted(study())
    counted(study(folds=3))
    assert len(counted.calls) == 6


def test_other_labels_are_measured_anew(study, counted):
    counted(study())
    changed = {f"{row}.png": "dog" if row == 0 else LABELS[row] for row in range(COUNT)}
    counted(study(labels=changed))
    assert len(counted.calls) == ANEW
    counted(study(labels={f"{row}.png": LABELS[row] for row in range(COUNT)}))
    assert counted.calls == []  # the same labels, only given otherwise


def test_another_set_of_images_is_measured_anew(study, counted, album):
    counted(study())
    album.write("zoo", features(count=57), LABELS[:57])
    counted(study())
    assert len(counted.calls) == ANEW


def test_an_unlabelled_image_changes_nothing(study, counted, album):
    first = counted(study())
    more = {name: np.concatenate([values, values[:1] + 9]) for name, values in features().items()}
    album.write("zoo", more, [*LABELS, None])
    again = study()
    assert again.left_out["unlabelled"] == 1
    check_same(first, counted(again))
    assert counted.calls == []


def test_another_space_is_measured_anew(study, counted, album):
    given = study()
    one = counted(given)
    fields = {"dtype": "float32", "net": "random", "precision": "fp32"}
    other = album.write("zoo", features(5), LABELS, fields=fields)
    both = album.study("zoo", study.fingerprint, COLUMNS, spaces={PRETRAINED: study.fingerprint, RANDOM: other})
    sets = [(network, (column,)) for network in both.networks for column in ("a:gap", "b:gap")]
    found = counted(both, sets)
    assert len(counted.calls) == ANEW
    check_same(one, found[:2])
    assert [cell.contributions.tolist() for cell in found[2].cells] != [
        cell.contributions.tolist() for cell in found[0].cells
    ]


def test_another_source_to_test_on_is_measured_anew(study, counted, album):
    counted(study())
    counted(study(shifted="away"))
    assert len(counted.calls) == ANEW
    album.write("away", features(1, 27), LABELS[:27])
    counted(study(shifted="away"))
    assert len(counted.calls) == ANEW
    counted(study())
    assert counted.calls == []


def test_own_splits_are_measured_apart_from_folds(album, counted, study):
    counted(study())
    splits = ["train"] * 40 + ["test"] * 20
    album.write("zoo", features(), LABELS, splits=splits)
    counted(study(folds=None))
    assert len(counted.calls) == 2
    album.write("zoo", features(), LABELS, splits=["train"] * 39 + ["test"] * 21)
    counted(study(folds=None))
    assert len(counted.calls) == 2  # an image has moved


def test_another_version_of_the_protocol_is_measured_anew(study, counted, monkeypatch):
    counted(study())
    monkeypatch.setattr("featurepipe.layer_depth.study.PROTOCOL_VERSION", 10_000)
    counted(study())
    assert len(counted.calls) == ANEW


def test_large_features_are_measured_one_after_the_other(study, counted, monkeypatch):
    monkeypatch.setattr(module, "SMALL_VALUES", 10)
    counted(study(), jobs=2)
    assert len(counted.calls) == ANEW  # in this process


def test_copies_and_strangers_of_the_other_source_take_no_part(album, study):
    contents = ["zoo-0", "zoo-1", *[f"new-{i}" for i in range(8)]]  # the first two are images of the zoo
    labels = ["cat", "dog", "emu", "cat", None, "fox", "cat", "dog", "emu", "cat"]
    album.write("away", features(3, 10), labels, contents=contents)
    given = study(shifted="away")
    assert given.elsewhere.rows.tolist() == [2, 3, 6, 7, 8, 9]
    assert given.left_out == {
        "unlabelled": 0, "rejected": 0, "kept_for_the_test": 0, "in_no_fold": 0, "shifted_of_other_classes": 2,
        "shifted_in_both": 2, "shifted_twins_that_train": 0,
    }  # fmt: skip
    data = given.data(PRETRAINED, ["b:gap"])
    assert [given.classes[code] for code in data.shifted_truth] == ["emu", "cat", "cat", "dog", "emu", "cat"]
    np.testing.assert_array_equal(data.shifted.read(), features(3, 10)["b:gap"][given.elsewhere.rows])


def test_data_are_the_labelled_rows_in_order(album):
    labels = ["cat", None, "dog", "cat", "dog", "cat", "dog", "cat", "dog", None, "cat", "dog"]
    fingerprint = album.write("gaps", features(count=12), labels)
    given = album.study("gaps", fingerprint, COLUMNS)
    data = given.data(PRETRAINED, ["b:gap", "a:gap"])
    rows = [row for row, label in enumerate(labels) if label]
    values = features(count=12)
    np.testing.assert_array_equal(data.features.read(), np.hstack([values["b:gap"], values["a:gap"]])[rows])
    assert [given.classes[code] for code in data.truth] == [labels[row] for row in rows]
    assert given.test_share == pytest.approx(1)


def test_what_is_extracted_meanwhile_changes_nothing(album, study):
    """Positions are those of the snapshot that was settled on."""
    given = study()
    before = given.data(PRETRAINED, ["b:gap"])
    keys, values = before.features.keys.copy(), before.features.read()
    album.write("zoo", features(9, 30), LABELS[:30], contents=[f"later-{i}" for i in range(30)])
    after = given.data(PRETRAINED, ["b:gap"])
    np.testing.assert_array_equal(after.features.keys, keys)
    np.testing.assert_array_equal(after.features.read(), values)
    assert len(study().images) == 30  # whoever settles now sees the new ones


def test_images_of_the_split_test_take_no_part_in_cross_validation(album):
    splits = ["test" if place >= 45 else "train" for place in range(COUNT)]
    given = album.study("split", album.write("split", features(), LABELS, splits=splits), COLUMNS)
    assert given.left_out["kept_for_the_test"] == 15
    assert len(given.images) == 45
    assert set(given.images.splits) == {"train"}


def test_probabilities_of_a_fold_are_calibrated_by_the_other_folds():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 600)
    scores = 4 * (rng.normal(size=(600, 3)) + 1.5 * np.eye(3)[codes])  # four times as sure as is right
    tests = np.array_split(rng.permutation(600), 3)
    likely, temperature = details_module._calibrated(scores, codes, tests)
    assert 2 < temperature < 4
    assert expected_calibration_error(likely, codes) < 0.5 * expected_calibration_error(probabilities(scores), codes)
    changed = codes.copy()
    changed[tests[0]] = (changed[tests[0]] + 1) % 3  # a fold's own labels do not matter to it
    again, _ = details_module._calibrated(scores, changed, tests)
    np.testing.assert_array_equal(again[tests[0]], likely[tests[0]])
    assert not np.array_equal(again[tests[1]], likely[tests[1]])
    alone, one = details_module._calibrated(scores, codes, tests[:1])
    assert one == 1.0
    np.testing.assert_array_equal(alone, probabilities(scores))
