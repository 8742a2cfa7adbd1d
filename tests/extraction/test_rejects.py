"""Images that cannot be used are recorded with their reason, tried again only when their bytes change, and counted."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from featurepipe.errors import FeaturepipeError, Reject, SourceError, TooManyRejects, UsageError
from featurepipe.extraction.ledger import ExtractionLedger
from featurepipe.extraction.limits import allowance
from featurepipe.images import open_source


@pytest.fixture
def bad(album, picture):
    """20 good images and six that are no good, among them in order; their reasons by id."""
    album.fill(20)
    album.write("003-truncated.png", picture(1)[:-40])
    album.write("005-truncated.jpg", picture(2, "JPEG")[:300])
    album.write("007-empty.png", b"")
    album.write("009-text.jpg", b"Dear Sir or Madam")
    (album.root / "011-folder.png").mkdir()
    (album.root / "013-gone.png").symlink_to("nowhere.png")
    return {
        "003-truncated.png": "truncated",
        "005-truncated.jpg": "truncated",
        "007-empty.png": "empty",
        "009-text.jpg": "not-an-image",
        "011-folder.png": "unreadable",
        "013-gone.png": "missing",
    }


def test_each_reject_is_recorded_and_no_row_shifts(album, run, bad, picture, tmp_path):
    record = run(album.root, max_rejects=6, batch_size=4)
    assert record["counts"] == {"listed": 26, "computed": 20, "known": 0, "rejected": 6, "read": 26}
    assert record["exit_code"] == 3
    assert record["reject_reasons"] == {"truncated": 2, "empty": 1, "not-an-image": 1, "unreadable": 1, "missing": 1}
    snapshot = {row["id"]: row for row in run.store.snapshot("album").to_pylist()}
    assert {id_: row["reason"].partition(":")[0] for id_, row in snapshot.items() if row["status"] == "rejected"} == bad
    kept = {row["id"]: row["reason"].partition(":")[0] for row in run.store.spaces()[0].rejects().to_pylist()}
    assert kept == bad
    assert run.store.features("album").rejected == 6
    among_bad = run.features()
    run.path = tmp_path / "clean"
    run({f"{i:03d}.png": picture(i) for i in range(20)}, dataset="album")
    clean = run.features()
    assert among_bad.keys() == clean.keys()
    for name, values in clean.items():
        np.testing.assert_allclose(among_bad[name], values, rtol=1e-2, atol=1e-4)


def test_unchanged_rejects_are_not_tried_again(album, run, bad):
    run(album.root, max_rejects=6)
    without_bytes = 2  # a folder and a dead link: nothing that a key could be made of
    record = run(album.root, max_rejects=6)
    assert record["counts"] == {"listed": 26, "computed": 0, "known": 20, "rejected": 6, "read": without_bytes}
    assert (run.reads, run.decodes) == (without_bytes, 0)
    assert record["exit_code"] == 3
    path = album.root / "009-text.jpg"
    os.utime(path, ns=(1, 1))
    assert run(album.root, max_rejects=6)["counts"]["rejected"] == 6
    assert run.decodes == 0  # read, for its time has changed, and recognised
    path.rename(album.root / "moved.jpg")
    assert run(album.root, max_rejects=6)["counts"]["rejected"] == 6
    assert run.decodes == 0


def test_a_reject_that_is_mended_is_computed(album, run, bad, picture):
    run(album.root, max_rejects=6)
    album.write("009-text.jpg", picture(77, "JPEG"))
    record = run(album.root, max_rejects=6)
    assert (record["counts"]["computed"], record["counts"]["rejected"]) == (1, 5)
    assert "009-text.jpg" in run.features()


def test_an_image_that_breaks_is_rejected_and_leaves_the_features(album, run):
    album.fill(4)
    run(album.root)
    album.write("002.png", b"overwritten")
    record = run(album.root, max_rejects=1)
    assert (record["counts"]["known"], record["counts"]["rejected"]) == (3, 1)
    assert sorted(run.features()) == ["000.png", "001.png", "003.png"]


def test_rejects_of_one_run_are_not_tried_by_the_next_after_a_failure(album, run, bad):
    """Too many rejects keep everything but the snapshot."""
    with pytest.raises(TooManyRejects):
        run(album.root)
    record = run(album.root, max_rejects=6)
    assert (record["counts"]["computed"], run.decodes) == (0, 0)


def test_max_rejects_as_a_share_counts_inclusively(album, run, bad):
    album.fill(2, first=50)  # 6 rejects of 28 images: 21.4 %
    assert run(album.root, max_rejects="22%")["exit_code"] == 3
    before = run.store.snapshot_ids("album")
    for options in ({"max_rejects": "21%"}, {"max_rejects": 5}, {}):
        with pytest.raises(TooManyRejects) as caught:
            run(album.root, **options)
        assert caught.value.exit_code == 4
    assert run.store.snapshot_ids("album") == before
    assert run.store.runs()[-1]["status"] == "failed"
    assert run(album.root, max_rejects=6)["exit_code"] == 3
    message = str(caught.value)
    assert "6 of 28 images were rejected, more than max_rejects='1%' allows" in message
    assert "003-truncated.png: truncated: " in message


def test_known_rejects_fail_no_run_because_others_have_gone(album, run, bad):
    """6 of 26 images are 23 %; of the 16 that are left they are more, until a new one comes."""
    run(album.root, max_rejects="25%")
    for number in range(10):
        (album.root / f"{number + 10:03d}.png").unlink()
    for _ in range(2):  # the next run sees nothing but the smaller snapshot
        record = run(album.root, max_rejects="25%")
        assert (record["exit_code"], record["counts"]["listed"], record["counts"]["rejected"]) == (3, 16, 6)
        assert (
            "6 of 16 images were rejected, more than --max-rejects 25% allows; the run goes on"
            in record["warnings"][-1]
        )
    with pytest.raises(TooManyRejects, match="0 of them new or changed"):  # the user asks for less
        run(album.root, max_rejects="24%")
    album.write("015-new.png", b"no picture")
    album.write("009-text.jpg", b"other text")
    (album.root / "000.png").unlink()
    with pytest.raises(TooManyRejects) as caught:
        run(album.root, max_rejects="25%")
    message = str(caught.value)
    assert "7 of 16 images were rejected, more than max_rejects='25%' allows, 2 of them new or changed" in message
    assert "; 1 of the 16 in the last snapshot are gone; first: 009-text.jpg: " in message


def test_features_of_a_failed_run_are_kept(album, run, bad):
    with pytest.raises(TooManyRejects):
        run(album.root)
    assert run.store.datasets() == []
    assert sum(part.rows for part in run.store.spaces()[0].parts()) == 20


@pytest.mark.parametrize(
    ("given", "listed", "allowed"),
    [("1%", 250, 2.5), (3, 250, 3), ("0", 10, 0), ("100%", 7, 7), ("12.5%", 8, 1), (" 2 ", 5, 2), ("0.5", 9, 0.5)],
)
def test_allowance(given, listed, allowed):
    assert allowance(given, listed) == allowed


@pytest.mark.parametrize("given", ["", "%", "-1", "1 %%", "ten", "1e3", "nan", None])
def test_allowance_refuses(given):
    with pytest.raises(UsageError, match="must be a number of images such as 10, or a share such as '1%'"):
        allowance(given, 10)


def test_the_first_reject_recorded_is_the_one_shown_and_lines_are_json(album, run, bad):
    run(album.root, max_rejects=6)
    (path,) = run.path.glob("spaces/*/rejects.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["id"] for line in lines} == set(bad)
    assert all(line["run_id"] == run.store.runs()[0]["run_id"] for line in lines)


@pytest.mark.parametrize(("computed", "known", "rejected"), [(2, 0, 0), (1, 1, 2), (0, 0, 0)])
def test_books_that_do_not_balance_fail_the_run(computed, known, rejected):
    ledger = ExtractionLedger(np.zeros((3, 32), np.uint8), np.zeros(3, bool), computed=computed, known=known)
    ledger.reasons = dict.fromkeys(range(rejected), "x")
    with pytest.raises(
        FeaturepipeError, match=f"3 images were listed but {computed + known + rejected} are accounted for"
    ):
        ledger.check()
    ledger.known += 3 - computed - known - rejected
    ledger.check()


def test_a_lost_image_fails_the_run_and_writes_no_snapshot(album, run, monkeypatch):
    from featurepipe.features.loader import Loader

    album.fill(20)
    load = Loader.load

    def losing(self, *args, **options):
        for images in load(self, *args, **options):
            yield [image for image in images if image.row != 9]

    monkeypatch.setattr(Loader, "load", losing)
    with pytest.raises(FeaturepipeError, match="20 images were listed but 19 are accounted for"):
        run(album.root)
    assert run.store.datasets() == []


def test_a_source_that_goes_away_ends_the_run(album, run):
    album.fill(20)
    source = open_source(album.root)
    read = source.read

    def failing(locator):
        if b"011" in locator:
            raise SourceError("the disk was pulled")
        return read(locator)

    source.read = failing
    with pytest.raises(SourceError, match="the disk was pulled"):
        run(source, batch_size=2)
    source.read = read
    record = run(source)
    assert record["counts"]["computed"] + record["counts"]["known"] == 20
    assert record["counts"]["known"] > 0


def test_a_read_error_of_one_night_is_forgotten_the_next(album, run):
    album.fill(5)
    source = open_source(album.root)
    read = source.read

    def failing(locator):
        if b"002" in locator:
            raise Reject("unreadable: Input/output error")
        return read(locator)

    source.read = failing
    assert run(source, max_rejects=1)["counts"]["rejected"] == 1
    source.read = read
    record = run(source)
    assert (record["counts"]["computed"], record["counts"]["rejected"], record["exit_code"]) == (1, 0, 0)


def test_a_source_without_images_is_an_error(album, run):
    with pytest.raises(SourceError, match="no images in album"):
        run(album.root)
    assert not list(run.path.glob("spaces/*"))


@pytest.fixture
def late_decoder(monkeypatch):
    """A decoder that cannot read files that start with ``new``, until its ``learn()`` was called."""
    from featurepipe.features import session

    decode = session.try_decode
    known = []

    def decoder(payload, **options):
        if payload.startswith(b"new"):
            if not known:
                return Reject("not-an-image: unknown format")
            payload = payload[3:]
        return decode(payload, **options)

    monkeypatch.setattr(session, "try_decode", decoder)
    return SimpleNamespace(learn=lambda: known.append(1))


def test_rejects_are_retried_on_request_only(album, run, picture, late_decoder):
    album.fill(3)
    album.write("late.png", b"new" + picture(60))
    album.write("never.png", b"nothing")
    assert run(album.root, max_rejects=2)["counts"]["rejected"] == 2
    (path,) = run.path.glob("spaces/*/rejects.jsonl")
    noted = path.read_text()
    late_decoder.learn()
    assert run(album.root, max_rejects=2)["counts"]["rejected"] == 2
    assert run.reads == 0
    record = run(album.root, max_rejects=2, retry_rejects=True)
    assert record["counts"] == {"listed": 5, "computed": 1, "known": 3, "rejected": 1, "read": 2}
    assert (record["changes"]["repaired"], record["changes"]["still_rejected"]) == (1, 1)
    assert "late.png" in run.features()
    assert path.read_text() == noted  # the same bytes for the same reason


def test_an_image_that_was_repaired_by_retrying_stays_so(album, run, picture, late_decoder):
    """What was once said of its bytes is over: for copies of it, for other nodes, for the nights to come."""
    album.write("late.png", b"new" + picture(60))
    run(album.root, max_rejects=1)
    late_decoder.learn()
    run(album.root, retry_rejects=True)
    assert run(album.root, max_rejects=0)["changes"]["unchanged"] == 1
    assert run.reads == 0
    album.write("copy.png", b"new" + picture(60))
    record = run(album.root, max_rejects=0)
    assert (record["counts"]["known"], record["changes"]["copied"]) == (2, 1)
    record = run(album.root, max_rejects=0, nodes=["c3", "bottleneck"])
    assert record["computed_by_column"] == {"c3:gap": 1, "f6.1:gap": 0}
    assert len(run.store.features("album", "c3")) == 2


def test_a_dry_run_knows_what_would_be_retried(album, run):
    album.fill(2)
    album.write("bad.png", b"nothing")
    run(album.root, max_rejects=1)
    plans = [run(album.root, dry_run=True, retry_rejects=retry) for retry in (False, True)]
    assert [(plan["rejected"], plan["to_read"]) for plan in plans] == [(1, 0), (0, 1)]
