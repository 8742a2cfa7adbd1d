"""Images that cannot be read for a moment are tried again; a source that goes away ends the run, and nothing is lost."""

import http.server
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import Reject, SourceError, Unavailable
from featurepipe.features import reading
from featurepipe.features.reading import DOUBT, PATIENCE, PROBES, WAITS, PatientReader
from featurepipe.images import open_source
from featurepipe.store import verify_store


class Fickle:
    """A source of 1,000 images; ``fails`` says for a number what reading it raises, or None."""

    location = "fickle"

    def __init__(self, fails=lambda number: None):
        self.fails, self.reads = fails, []

    def read(self, locator):
        number = int(locator)
        self.reads.append(number)
        error = self.fails(number)
        if error is not None:
            raise error
        return locator

    def reader(self):
        return PatientReader(self, pa.chunked_array([[str(number).encode() for number in range(1000)]]))


def in_turn(*errors):
    """A failure that changes with every read, and ends."""
    left = list(errors)
    return lambda _number: left.pop(0) if left else None


def rejected(reader, number):
    with pytest.raises(Reject) as caught:
        reader(str(number).encode())
    return str(caught.value)


def test_the_waits_are_short():
    assert 3 < sum(WAITS) < 10  # as they were when imported; here they are shorter still


@pytest.mark.parametrize("error", [Unavailable("unreadable: busy"), SourceError("not there")])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_passing_failure_is_tried_again(error, times):
    source = Fickle(in_turn(*[error] * times))
    reader = source.reader()
    assert reader(b"5") == b"5"
    assert source.reads == [5] * (times + 1)
    assert reader.tried_again == 1
    assert reader(b"6") == b"6"
    assert reader.tried_again == 1


def test_what_stays_is_rejected_with_its_last_reason():
    source = Fickle(in_turn(*[Unavailable(f"unreadable: {number}") for number in range(9)]))
    assert rejected(source.reader(), 5) == "unreadable: 3"
    assert source.reads == [5] * 4


@pytest.mark.parametrize("reason", ["missing: no such file", "unreadable: Permission denied", "corrupt: it is"])
def test_what_waiting_cannot_help_is_not_tried_again(reason):
    source = Fickle(in_turn(Reject(reason)))
    assert rejected(source.reader(), 5) == reason
    assert source.reads == [5]


def test_a_file_that_turns_out_missing_is_missing():
    source = Fickle(in_turn(Unavailable("unreadable: stale"), Reject("missing: no such file"), None))
    assert rejected(source.reader(), 5) == "missing: no such file"
    assert source.reads == [5, 5]


def test_waiting_that_never_helps_is_given_up():
    """Or each of a million images of a broken disk would take seconds."""
    source = Fickle(lambda number: Unavailable("unreadable: I/O") if number % 2 else None)
    reader = source.reader()
    for number in range(4 * PATIENCE):
        rejected(reader, number) if number % 2 else reader(str(number).encode())
    odd = [number for number in source.reads if number % 2]
    assert len(odd) == 4 * PATIENCE + PATIENCE  # PATIENCE images four times, as many once


def test_waiting_that_helps_now_and_then_is_not():
    count = {}

    def fails(number):
        count[number] = count.get(number, 0) + 1
        helps = number % PATIENCE == 0 and count[number] > 1
        return None if helps else Unavailable("unreadable: I/O")

    reader = Fickle(fails).reader()
    for number in range(1, 3 * PATIENCE + 1):
        try:
            reader(str(number).encode())
        except Reject:
            assert count[number] == 4
        except SourceError:  # nearly all of many in a row
            assert number >= DOUBT
    assert reader.tried_again == 3


def test_closing_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (30.0, 30.0))
    reader = Fickle(lambda _: Unavailable("unreadable: busy")).reader()
    threading.Timer(0.1, reader.close).start()
    started = time.monotonic()
    assert rejected(reader, 1) == "unreadable: busy"
    assert time.monotonic() - started < 10


def test_a_source_that_is_gone_is_noticed_after_a_few_images():
    source = Fickle(lambda number: Reject("missing: no such file") if number >= 100 or gone else None)
    gone = []
    reader = source.reader()
    for number in range(100):
        reader(str(number).encode())
    gone.append(1)
    for number in range(100, 100 + DOUBT - 1):
        rejected(reader, number)
    with pytest.raises(
        SourceError, match=r"fickle: nearly no image can be read any more.*missing: no such file.*mounted"
    ):
        reader(b"500")
    assert len(source.reads) == 100 + DOUBT + PROBES


def test_a_source_that_is_there_may_lack_many_images():
    """A folder of half of them was deleted, and the manifest still lists it."""
    source = Fickle(lambda number: Reject("missing: no such file") if number < 500 else None)
    reader = source.reader()
    for number in range(500):
        rejected(reader, number)
    probes = len(source.reads) - 500
    assert probes == 3 * PROBES  # after 64 images, after 128 more, and 256 more; not after each
    for number in range(500, 1000):
        assert reader(str(number).encode())
    reader.check_at_end()


def test_a_few_that_can_be_read_do_not_hide_that_the_others_cannot():
    reader = Fickle(lambda number: None if number % 40 == 7 else Reject("unreadable: Input/output error")).reader()
    for number in range(1000):
        try:
            reader(str(number).encode())
        except Reject:
            continue
        except SourceError:
            break
    assert 64 < number < 100


def test_bad_images_say_nothing_about_the_source():
    source = Fickle(lambda _: Reject("corrupt: the checksum in the archive does not match"))
    reader = source.reader()
    for number in range(300):
        rejected(reader, number)
    assert len(source.reads) == 300


@pytest.mark.parametrize("readable", [True, False])
def test_the_last_images_are_doubted_at_the_end(readable):
    gone = []
    source = Fickle(lambda number: Reject("missing: x") if number >= 980 or (gone and not readable) else None)
    reader = source.reader()
    for number in range(980):
        reader(str(number).encode())
    gone.append(1)
    for number in range(980, 1000):
        rejected(reader, number)
    if readable:
        reader.check_at_end()
    else:
        with pytest.raises(SourceError, match="the last images could not be read"):
            reader.check_at_end()


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 33, 95])
def test_a_share_that_is_unmounted_in_the_middle_ends_the_run(album, run, after):
    """It leaves an empty folder: not one image may be taken for a reject, and all that was read is kept."""
    album.fill(100)
    run({"001.png": album.root / "001.png"}, dataset="album")
    source, reads, gone = open_source(album.root), [], []
    read = source.read
    kept = album.root.with_name("kept")

    def reading_until(locator):
        if len(reads) == after and not gone:
            gone.append(album.root.rename(kept))
            album.root.mkdir()
        payload = read(locator)
        reads.append(locator)
        return payload

    source.read = reading_until
    with pytest.raises(SourceError, match="nearly no image can be read any more"):
        run(source, batch_size=4, workers=1, max_rejects="100%")
    record = run.store.runs()[-1]
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    assert "Everything computed so far is kept" in record["error"]
    new = len(set(reads) - {b"001.png"})
    assert record["counts"]["computed"] == new
    assert sum(part.rows for part in run.store.spaces()[0].parts()) == 1 + new
    assert len(run.store.snapshot_ids("album")) == 1
    assert verify_store(run.store).clean
    shutil.rmtree(album.root)
    kept.rename(album.root)
    again = run(album.root)
    assert (again["counts"]["known"], again["counts"]["computed"]) == (1 + new, 99 - new)
    assert (again["changes"]["new"], again["counts"]["rejected"]) == (99, 0)


def test_a_folder_that_is_gone_ends_the_run(album, run):
    album.fill(30)
    source = open_source(album.root)
    read = source.read

    def reading_until(locator):
        if locator == b"020.png" and album.root.exists():
            shutil.rmtree(album.root)
        return read(locator)

    source.read = reading_until
    with pytest.raises(SourceError, match="the folder has gone"):
        run(source, batch_size=4, workers=1)
    assert run.store.runs()[-1]["counts"]["computed"] >= 16
    assert run.store.datasets() == []


def test_bytes_that_were_not_all_read_are_no_reject_of_theirs(album, run):
    """A connection that ends early gives half a file: its key is that of other bytes."""
    album.fill(3)
    source = open_source(album.root)
    read, broken = source.read, [b"001.png"]
    source.read = lambda locator: read(locator)[:200] if locator in broken else read(locator)
    record = run(source, max_rejects=1)
    (reject,) = record["rejects"]
    assert reject["id"] == "001.png"
    assert reject["reason"].endswith(f"(read 200 bytes, listed with {(album.root / '001.png').stat().st_size:,})")
    assert run.store.spaces()[0].rejects()["key"].to_pylist() == [None]
    broken.clear()
    record = run(source)
    assert (record["counts"]["computed"], record["changes"]["repaired"], record["exit_code"]) == (1, 1, 0)


class Troubled(http.server.SimpleHTTPRequestHandler):
    """Answers every image with a 503, then with a broken connection, then as it should; ``gone.png`` never."""

    def do_GET(self):
        seen = self.server.seen
        seen[self.path] = seen.get(self.path, 0) + 1
        is_image = self.path.endswith(".png")
        if is_image and (seen[self.path] == 1 or "gone" in self.path):
            self.send_error(503)
        elif is_image and seen[self.path] == 2:
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def troubled(album):
    import fsspec

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Troubled(*args, directory=album.root)
    ) as server:
        server.seen = {}
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    http_file_system = fsspec.get_filesystem_class("http")
    for instance in list(http_file_system._cache.values()):
        if (session := getattr(instance, "_session", None)) is not None:
            http_file_system.close_session(instance.loop, session)
    http_file_system.clear_instance_cache()


def test_a_server_in_trouble_is_asked_again(album, run, troubled):
    server, url = troubled
    album.fill(5)
    record = run(f"{url}/", dataset="web")
    assert (record["counts"]["computed"], record["counts"]["rejected"], record["tried_again"]) == (5, 0, 5)
    assert set(server.seen.values()) >= {3}
    here = run(album.root, dataset="here")
    assert here["counts"]["known"] == 5  # the very bytes
    assert here["tried_again"] == 0


def test_a_server_that_stays_in_trouble_gives_a_reject_of_one_night(album, run, troubled):
    server, url = troubled
    album.fill(4)
    album.add("gone.png", 9)
    record = run(f"{url}/", dataset="web", max_rejects=1)
    (reject,) = record["rejects"]
    assert reject["reason"].startswith("unreadable: ClientResponseError: 503")
    assert server.seen["/gone.png"] >= 4
    assert run.store.spaces()[0].rejects()["key"].to_pylist() == [None]


def test_a_reader_of_arrays_hands_them_on():
    images = np.zeros((3, 4, 4), np.uint8)
    source = open_source(images)
    reader = PatientReader(source, source.scan()["locator"])
    assert reader(source.scan()["locator"][1].as_py()).shape == (4, 4)
