"""A source that cannot be had just now: what is tried again, how often, after which waits; and what is not."""

import pickle
import threading
import time
from contextlib import contextmanager

import pytest

from featurepipe.errors import Interrupted, SourceError, UsageError
from featurepipe.images import open_source
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.sources import JobSource, Listed, RetryPolicy, wait
from featurepipe.jobs.validation import read_job


class Attempts:
    """Fails so often, then returns 7."""

    def __init__(self, failures, error=None):
        self.failures, self.error, self.count = failures, error or SourceError("no share there"), 0

    def __call__(self):
        self.count += 1
        if self.count <= self.failures:
            raise self.error
        return 7


class Waits:
    """Waits no time, and notes how long it should have."""

    def __init__(self, then=lambda stop: None):
        self.seconds, self.then = [], then

    def __call__(self, seconds, stop):
        self.seconds.append(seconds)
        self.then(stop)


def patience(waits, *, retries=5, first_wait=10.0, longest_wait=600.0, stop=None, said=None):
    @contextmanager
    def meanwhile(why):
        (said if said is not None else []).append(why)
        yield

    return RetryPolicy(retries, first_wait, longest_wait, stop or StopRequest(), meanwhile, waits)


def test_waits_double_up_to_the_longest():
    waits, said = Waits(), []
    assert patience(waits, retries=8, longest_wait=100.0, said=said).insist(Attempts(6)) == 7
    assert waits.seconds == [10, 20, 40, 80, 100, 100]
    assert said[0] == "no share there; trying again in 10 s, 1 of 8"
    assert said[-1] == "no share there; trying again in 1:40 min, 6 of 8"


def test_waits_stay_the_longest_however_often_it_is_tried():
    waits = Waits()
    assert patience(waits, retries=3000, longest_wait=600.0).insist(Attempts(2000)) == 7
    assert set(waits.seconds[6:]) == {600.0}


def test_what_works_is_not_waited_for():
    waits, said = Waits(), []
    assert patience(waits, said=said).insist(Attempts(0)) == 7
    assert (waits.seconds, said) == ([], [])


def test_it_fails_after_the_last_try():
    waits, attempts = Waits(), Attempts(99)
    with pytest.raises(SourceError, match=r"^no share there \(tried 4 times\)$"):
        patience(waits, retries=3).insist(attempts)
    assert (attempts.count, waits.seconds) == (4, [10, 20, 40])
    with pytest.raises(SourceError, match=r"^no share there$"):
        patience(waits, retries=0).insist(Attempts(1))


def test_an_empty_folder_has_one_more_chance(pile):
    """Minutes of waiting for a folder that is simply empty would look like a night that hangs."""
    source, waits, said = JobSource(read_job(pile.file), StopRequest()), Waits(), []
    with pytest.raises(SourceError, match=r"lists no image; .* \(tried 2 times\)$"):
        patience(waits, said=said).insist(source)
    assert waits.seconds == [10]
    assert said[0].endswith("trying again in 10 s, 1 of 1")
    waits = Waits(lambda stop: pile.fill(1))  # the share was being mounted
    assert patience(waits).insist(source).scan().num_rows == 1
    assert waits.seconds == [10]


def test_what_cannot_heal_fails_at_once():
    waits, attempts = Waits(), Attempts(1, UsageError("cannot read images from 'notes.txt'"))
    with pytest.raises(UsageError, match=r"notes\.txt"):
        patience(waits).insist(attempts)
    assert (attempts.count, waits.seconds) == (1, [])


def test_a_signal_ends_the_waiting():
    waits, attempts = Waits(lambda stop: setattr(stop, "signal_number", 15)), Attempts(99)
    with pytest.raises(Interrupted, match="stopped by SIGTERM while waiting for the source") as caught:
        patience(waits).insist(attempts)
    assert (caught.value.exit_code, attempts.count) == (143, 1)


def test_without_time_left_it_is_not_tried_again():
    waits, attempts = Waits(), Attempts(99)
    with pytest.raises(SourceError, match="no share there"):
        patience(waits, stop=StopRequest.after(0)).insist(attempts)
    assert (attempts.count, waits.seconds) == (1, [])


def test_waiting_ends_with_the_request():
    started = time.monotonic()
    wait(0.3, StopRequest())
    assert time.monotonic() - started >= 0.3
    wait(60, StopRequest.after(0.1))
    stop = StopRequest()
    threading.Timer(0.1, setattr, [stop, "signal_number", 15]).start()
    wait(60, stop)
    assert time.monotonic() - started < 20


def test_listed_once_a_night(pile):
    pile.fill(2)
    source = JobSource(read_job(pile.file), StopRequest())
    assert source().scan()["id"].to_pylist() == ["000.png", "001.png"]
    pile.fill(1, first=2)
    assert source().scan().num_rows == 2
    assert (source().name, source().location) == ("pile", str(pile.root))
    assert source().read(b"000.png") == (pile.root / "000.png").read_bytes()
    source.forget()
    assert source().scan().num_rows == 3


def test_an_empty_folder_may_be_a_share_that_is_not_mounted(pile):
    source = JobSource(read_job(pile.file), StopRequest())
    with pytest.raises(SourceError, match="lists no image"):
        source()
    pile.fill(1)
    assert source().scan().num_rows == 1
    (pile.root / "000.png").unlink()
    pile.job('[limits]\nmax_gone = "100%"')
    assert JobSource(read_job(pile.file), StopRequest())().scan().num_rows == 0


def test_errors_of_the_operating_system_may_heal_too(pile, monkeypatch):
    from featurepipe.images.folder import FolderSource

    def scan(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FolderSource, "scan", scan)
    with pytest.raises(SourceError, match="Input/output error"):
        JobSource(read_job(pile.file), StopRequest())()


def test_what_is_no_source_does_not_heal(pile):
    (pile.folder / "notes.txt").write_text("no images")
    pile.file.write_text(pile.file.read_text().replace('path = "pile"', 'path = "notes.txt"'))
    with pytest.raises(UsageError, match=r"notes\.txt"):
        JobSource(read_job(pile.file), StopRequest())()


def test_a_server_that_is_busy_for_a_while(pile, tmp_path):
    """Three answers of 503, then the manifest."""
    import http.server

    pile.fill(1)
    (pile.folder / "list.csv").write_text(f"path\n{pile.root}/000.png\n")
    refusals = iter(range(3))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if next(refusals, None) is not None:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(pile.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/list.csv"
        pile.file.write_text(pile.file.read_text().replace('path = "pile"', f'path = "{url}"'))
        source = JobSource(read_job(pile.file), StopRequest())
        waits = Waits()
        found = patience(waits, retries=9).insist(source)
        assert found.scan().num_rows == 1
        assert 1 <= len(waits.seconds) <= 3
    finally:
        server.shutdown()
        server.server_close()


def test_a_source_travels_to_workers_without_its_listing(tmp_path):
    for n in range(2000):
        (tmp_path / f"{n}.png").write_bytes(b"image")
    source = open_source(tmp_path)
    listed = Listed(source, source.scan())
    content = pickle.dumps(Listed(listed, listed.scan()))
    assert len(content) < 1000 + len(str(tmp_path))
    assert pickle.loads(content).read(b"7.png") == b"image"


def test_a_job_reads_only_under_what_its_file_says(pile):
    pile.fill(3)
    outside = pile.add("3.png", 3).rename(pile.folder / "outside.png")
    (pile.root / "link.png").symlink_to(outside)
    pile.job(source='only_under = "pile"', rest='[limits]\nmax_rejects = "50%"')
    pile.run()
    (extraction,) = (run for run in pile.store.runs() if run["command"] == "extract")
    assert extraction["counts"]["computed"] == 3
    assert extraction["only_under"] == [str(pile.root)]
    assert extraction["reject_reasons"] == {"refused": 1}
    (reject,) = extraction["rejects"]
    assert reject["reason"].startswith("refused: a file that is not below ")
