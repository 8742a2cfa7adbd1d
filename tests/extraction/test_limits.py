"""What an extraction refuses, when it stops by itself, and that the next one goes on from there."""

import hashlib
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from featurepipe.errors import DiskFull, Interrupted, SourceError, UsageError, in_python
from featurepipe.extraction import limits
from featurepipe.extraction.extract import extract
from featurepipe.extraction.limits import Limits, Losses
from featurepipe.extraction.text import estimate_text, text
from featurepipe.images import open_source
from featurepipe.interrupt import StopRequest
from featurepipe.store import FeatureStore, verify_store
from featurepipe.store.parts import read_array


def committed_rows(store):
    return sum(part.rows for space in store.spaces() for part in space.parts())


def slow(album, each=0.02, then=lambda: None):
    """A source that takes its time, and calls ``then`` at every read."""
    source = open_source(album.root)
    read = source.read

    def reading(locator):
        time.sleep(each)
        then()
        return read(locator)

    source.read = reading
    return source


# --- images that are gone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_gone", ["30%", 3, "0", "39.9%"])
def test_too_many_gone_are_refused_before_anything_is_read(album, run, max_gone):
    album.fill(10)
    run(album.root)
    for number in range(4):
        (album.root / f"{number:03d}.png").unlink()
    album.fill(20, first=100)
    before = run.store.snapshot_ids("album"), run.parts(), run.store.runs()
    with pytest.raises(
        SourceError, match=f"4 of the 10 images .* gone from album, more than max_gone={max_gone!r} allows"
    ) as caught:
        run(album.root, max_gone=max_gone)
    assert (run.reads, run.forwards) == (0, 0)
    assert (run.store.snapshot_ids("album"), run.parts(), run.store.runs()) == before
    assert str(caught.value).endswith("max_gone=4")
    with pytest.raises(SourceError, match="4 of the 10"):
        run(album.root, max_gone=max_gone, dry_run=True)
    record = run(album.root, max_gone=4)
    assert (record["gone"], record["changes"]["deleted"], record["counts"]["computed"]) == (4, 4, 20)


def test_as_many_gone_as_allowed_are_no_reason_to_refuse(album, run):
    album.fill(10)
    run(album.root, max_gone="0%")  # nothing is known of it, so nothing can be gone
    for number in range(4):
        (album.root / f"{number:03d}.png").unlink()
    assert run(album.root, max_gone="40%")["gone"] == 4


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (Losses(), []),
        (Losses(100, 9), []),
        (Losses(100, 10), ["10.0 % of the images are gone or renamed (10 of the 100 in the last snapshot)"]),
        (
            Losses(100, 2, {"cat": 2, "dog": 5}),
            ["no image has the labels cat (of 2 images), dog (of 5 images) any more"],
        ),
    ],
)
def test_many_that_are_gone_and_labels_that_are_make_a_warning(losses, told):
    found = [warning.spelled(in_python) for warning in losses.warnings("40%")]
    allowed = ". max_gone='40%' allows it (default of jobs: 50%); a smaller one refuses such runs"
    assert found == [text + allowed for text in told]


def test_a_label_is_lost_with_the_last_of_its_images_though_few_are_gone(album, run):
    album.fill(27, pattern="cat/{}.png")
    album.fill(2, first=30, pattern="dog/{}.png")
    album.fill(1, first=40, pattern="bird/{}.png")
    run(album.root)
    for name in ("cat/3.png", "dog/30.png", "bird/40.png"):
        (album.root / name).unlink()
    assert run(album.root, dry_run=True)["lost_labels"] == {}  # one bird taught nothing
    (album.root / "dog" / "31.png").unlink()
    estimate = run(album.root, dry_run=True)
    record = run(album.root)
    for found in (estimate, record):
        assert (found["gone"], found["lost_labels"]) == (4, {"dog": 2})
        assert "the label dog (of 2 images) any more. Without --max-gone only an empty" in found["warnings"][0]
    assert "0 to read (at most 0 new ones: copies are known once read), 4 gone" in estimate_text(estimate)
    assert "warning: 13.3 % of the images are gone or renamed (4 of the 30 in the last snapshot)" in text(record)


@pytest.mark.parametrize("max_gone", [None, "99%", 3, "50%"])
def test_an_empty_source_is_refused(album, run, max_gone):
    with pytest.raises(SourceError, match=r"no images in album: .* Check the path$"):
        run(album.root, max_gone=max_gone)
    album.fill(3)
    run(album.root)
    shutil.rmtree(album.root)
    album.root.mkdir()
    with pytest.raises(SourceError, match=r"the last snapshot has 3. If they are gone on purpose: max_gone='100%'"):
        run(album.root, max_gone=max_gone)
    assert len(run.store.snapshot_ids("album")) == 1


def test_an_empty_source_can_be_meant(album, run):
    record = run(album.root, max_gone="100%")
    assert (record["status"], record["exit_code"], record["counts"]["listed"]) == ("done", 0, 0)
    assert run.store.snapshot("album").num_rows == 0
    album.fill(3)
    record = run(album.root, precision="auto")
    assert (record["changes"]["new"], record["changes"]["deleted"]) == (3, 0)
    for path in album.root.iterdir():
        path.unlink()
    record = run(album.root, max_gone="100%")
    assert (record["changes"]["deleted"], record["counts"]["listed"]) == (3, 0)
    assert run.store.snapshot("album").num_rows == 0
    assert len(run.store.snapshot_ids("album")) == 3


# --- space on the disk ------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_read(album, run):
    album.fill(3)
    with pytest.raises(DiskFull, match=r"are free on the disk of .*, less than the 900,000.0 TB of min_free"):
        run(album.root, min_free="900000TB")
    assert (run.reads, run.store.runs(), run.store.datasets()) == (0, [], [])
    assert run(album.root, min_free="1kB")["status"] == "done"
    assert run(album.root, min_free="0")["status"] == "done"


def test_a_disk_that_fills_up_ends_the_run_with_everything_committed(album, run, monkeypatch):
    album.fill(60)
    free = iter([10_000] * 8)
    monkeypatch.setattr(limits, "LOOK_EVERY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=next(free, 4_999)))
    with pytest.raises(DiskFull, match=r"5.0 kB are free .* less than the 5.0 kB of min_free"):
        run(album.root, min_free=5_000, batch_size=2)
    (record,) = run.store.runs()
    assert (record["status"], record["exit_code"], record["changes"]) == ("failed", 1, None)
    assert "--min-free" in record["error"]
    computed = record["counts"]["computed"]
    assert 0 < computed < 60
    assert committed_rows(run.store) == computed
    assert run.store.datasets() == []
    assert verify_store(run.store).clean
    again = run(album.root, min_free=4_999)
    assert again["counts"] == {
        "listed": 60,
        "computed": 60 - computed,
        "known": computed,
        "rejected": 0,
        "read": 60 - computed,
    }


def test_the_disk_is_not_asked_for_every_image(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=10))
    floor = Limits(min_free=5).floor(tmp_path)
    assert [floor() for _ in range(100)] == [False] * 100
    assert asked == [tmp_path]
    assert not Limits().floor(tmp_path)()
    assert not Limits(min_free=0).floor(tmp_path)()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_gone": "half"}, "max_gone 'half' must be a number of images such as 10, or a share such as '1%'"),
        ({"max_gone": -1}, "max_gone -1 must be a number"),
        ({"min_free": "20 parsecs"}, "min_free '20 parsecs' is no amount of space; give bytes or text such as '500MB'"),
        ({"min_free": -5}, "min_free -5 is no amount of space"),
        ({"time_budget": 0}, "time_budget 0 must be a positive number of seconds"),
        ({"time_budget": float("nan")}, "time_budget nan must be a positive number"),
        ({"time_budget": 5, "stop": StopRequest()}, "stop and time_budget were both given"),
    ],
)
def test_limits_that_are_none_are_refused_before_any_work(album, run, options, says):
    with pytest.raises(UsageError, match=says):
        extract("no/such/folder", run.path, **options)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_time_budget_ends_the_night_cleanly_and_the_next_one_goes_on(album, run, tmp_path):
    album.fill(40)
    album.write("bad.png", b"none")
    options = {"batch_size": 1, "dtype": "float32", "max_rejects": 1}
    nights = []
    while not nights or nights[-1]["status"] != "done":
        started = time.monotonic()
        longer = 0.6 * 1.1 ** len(nights)  # on a busy machine a night of 0.6 s may end before its first image
        nights.append(run(slow(album, each=0.05), time_budget=longer, **options))
        if nights[-1]["status"] != "done":
            assert time.monotonic() - started < 60
            assert run.store.datasets() == []
            assert nights[-1]["exit_code"] == 0
            assert nights[-1]["changes"] is None
            assert nights[-1]["left"] > 0
        assert len(nights) < 40
    assert len(nights) > 1
    assert [record["status"] for record in run.store.runs()] == ["out of time"] * (len(nights) - 1) + ["done"]
    assert sum(record["counts"]["computed"] for record in nights) == committed_rows(run.store) == 40
    assert nights[-1]["changes"]["new"] == 40
    kept = run.features()
    run.path = tmp_path / "fresh"
    run(album.root, **options)
    fresh = run.features()
    assert kept.keys() == fresh.keys()
    assert all(np.array_equal(kept[name], fresh[name]) for name in kept)


def test_a_deadline_that_passes_when_all_is_done_ends_nothing(album, run):
    album.fill(4)
    run(album.root)
    stop = StopRequest(deadline=time.monotonic() - 1)
    assert run(album.root, stop=stop)["status"] == "done"
    album.add("new.png", 70)
    record = run(album.root, stop=stop)
    assert (record["status"], record["left"]) == ("out of time", 1)
    assert len(run.store.snapshot_ids("album")) == 2


# --- a caller that handles signals itself -------------------------------------------------------------------------------


def test_the_callers_own_request_stops_and_its_handlers_stay(album, run):
    album.fill(60)
    stop, handlers = StopRequest(), []

    def ask_later():
        handlers.append(signal.getsignal(signal.SIGTERM))
        if len(handlers) == 20:
            stop.signalled(signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"stopped by SIGTERM: .* images computed and committed") as caught:
        run(slow(album, each=0.005, then=ask_later), stop=stop, batch_size=2)
    assert caught.value.exit_code == 143
    assert set(handlers) == {signal.getsignal(signal.SIGTERM)}
    (record,) = run.store.runs()
    assert (record["status"], record["exit_code"], record["changes"]) == ("interrupted", 143, None)
    assert committed_rows(run.store) == record["counts"]["computed"] > 0
    assert run(album.root)["counts"]["known"] == record["counts"]["computed"]


def test_a_request_that_was_stopped_before_computes_nothing(album, run):
    album.fill(3)
    stop = StopRequest()
    stop.signalled(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT before the first image; nothing was changed") as caught:
        run(album.root, stop=stop)
    assert caught.value.exit_code == 130
    assert run.reads == 0


def test_a_signal_during_the_listing_ends_it_there(album, run):
    album.fill(3)
    source, stop = open_source(album.root), StopRequest()

    def scan():
        stop.signalled(signal.SIGTERM)  # as a handler does
        pytest.fail("went on listing")

    source.scan = scan
    with pytest.raises(Interrupted, match="before the first image"):
        run(source, stop=stop)
    stop.signalled(signal.SIGTERM)  # outside of it a signal is only noted
    assert stop.name == "SIGTERM"


# --- runs that fail ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_a_record_if_that_still_fits(album, run, monkeypatch):
    from featurepipe.extraction import compute
    from featurepipe.store import writer

    album.fill(40)
    monkeypatch.setattr(compute, "part_bytes", lambda worker: 1)
    write_part, written = writer.write_part, []

    def until_full(*args, **options):
        if len(written) == 4:
            raise DiskFull("no space left while writing a part")
        written.append(write_part(*args, **options))
        return written[-1]

    monkeypatch.setattr(writer, "write_part", until_full)
    with pytest.raises(DiskFull, match="no space left"):
        run(album.root, batch_size=4)
    (record,) = run.store.runs()
    assert (record["status"], record["exit_code"], record["error"]) == (
        "failed",
        1,
        "no space left while writing a part",
    )
    assert committed_rows(run.store) == record["counts"]["computed"] == 16  # not what was handed to the writer
    assert set(record["computed_by_column"].values()) == {16}
    assert run.store.datasets() == []
    written.clear()
    monkeypatch.setattr(writer, "write_part", write_part)
    assert run(album.root, batch_size=4)["counts"]["known"] == 16


@pytest.mark.parametrize("fit", [0, 1])
def test_copies_of_what_a_full_disk_kept_from_being_committed_are_left(album, run, monkeypatch, fit):
    from featurepipe.extraction import compute
    from featurepipe.store import writer

    album.fill(6)
    for number in range(6):
        for copy in ("a", "b"):
            (album.root / f"{number:02d}{copy}.png").write_bytes((album.root / "000.png").read_bytes())
    monkeypatch.setattr(compute, "part_bytes", lambda worker: 1)
    write_part, written = writer.write_part, []

    def until_full(*args, **options):
        if len(written) == fit:
            raise DiskFull("no space left while writing a part")
        written.append(write_part(*args, **options))
        return written[-1]

    monkeypatch.setattr(writer, "write_part", until_full)
    with pytest.raises(DiskFull):
        run(album.root, batch_size=3, workers=1)
    (record,) = run.store.runs()
    keys = {
        keys for space in run.store.spaces() for part in space.parts() for keys in map(bytes, read_array(part, "key"))
    }
    copied = hashlib.sha256((album.root / "000.png").read_bytes()).digest()
    assert record["counts"]["computed"] == len(keys) == 3 * fit
    assert (copied in keys) == bool(fit)
    assert (record["counts"]["known"], record["copies"]) == ((12, 12) if fit else (0, 0))


def test_a_defect_leaves_a_record_too_and_what_was_computed(album, run, monkeypatch):
    from featurepipe.backbones.engine import Engine

    album.fill(20)
    submit, submitted = Engine.submit, []

    def failing(engine, batch):
        submitted.append(1)
        if len(submitted) == 4:
            raise RuntimeError("the device is gone")
        return submit(engine, batch)

    monkeypatch.setattr(Engine, "submit", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(album.root, batch_size=2)
    (record,) = run.store.runs()
    assert (record["status"], record["exit_code"], record["error"]) == ("failed", 1, "the device is gone")
    assert record["changes"] is None
    before = committed_rows(run.store)
    assert 0 < before < 8
    assert run(album.root, batch_size=2)["counts"]["known"] == before


# --- what is read of the past -------------------------------------------------------------------------------------------


def test_run_records_are_read_once(album, run, monkeypatch):
    album.fill(3)
    for _ in range(3):
        run(album.root)
    asked, runs = [], FeatureStore.runs
    monkeypatch.setattr(FeatureStore, "runs", lambda store: asked.append(1) or runs(store))
    assert run(album.root)["counts"]["known"] == 3
    assert asked == [1]


def test_a_failed_run_on_another_place_does_not_devalue_the_snapshot(album, run, tmp_path):
    """Nor is it believed of files there that have names, sizes and times of files here."""
    from PIL import Image

    def write(folder, seed):
        path = tmp_path / folder / "a.bmp"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        os.utime(path, ns=(5, 5))

    write("here", 1)
    write("there", 2)
    (tmp_path / "there/b.png").write_bytes(b"none")
    run(tmp_path / "here", dataset="one")
    for _ in range(2):
        with pytest.raises(Exception, match="1 of 2 images were rejected"):
            run(tmp_path / "there", dataset="one", max_rejects=0)
        assert run.reads == 2
    assert run.counts(tmp_path / "here", dataset="one") == (0, 1, 0, 0, 0)
    assert run.counts(tmp_path / "there", dataset="one", max_rejects=1) == (0, 1, 2, 0, 0)
