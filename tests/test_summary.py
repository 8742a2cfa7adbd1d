"""Stores and reports as text: every number and every next step is there."""

from pathlib import Path

import numpy as np
import pytest

from featurepipe import extract, summary
from featurepipe.store import CompactReport, FeatureStore, GcReport, Problem, VerifyReport, describe


def test_info_of_a_store(tmp_path: Path) -> None:
    images = {f"train/{name}.png": np.full((32, 32), value, np.uint8) for name, value in (("a", 1), ("b", 2), ("c", 2))}
    for _ in range(2):
        extract(images, tmp_path / "store", dataset="greys", backbone="lenet5", weights="none", silent=True)
    text = summary.info_text(describe(FeatureStore(tmp_path / "store")))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith(f"{tmp_path / 'store'} (store format 1)\n")
    assert "dataset greys: 3 images, 2 snapshots" in text
    assert "1 of them is a copy of another, and shares its feature" in text
    assert "a random control network, not a trained one: weights random (seed 0)" in text
    assert "rejected" not in text.partition("feature space")[2].partition("runs")[0]
    assert "quarantine" not in text
    assert any(line[1:3] == ["bottleneck", "84"] for line in lines if len(line) > 2)
    assert [line[-4:] for line in lines if line[-5:-4] == ["done"]] == [["3", "2", "1", "0"], ["3", "0", "3", "0"]]


def test_info_of_an_empty_store(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    with store.lock(shared=True):
        text = summary.info_text(describe(store))
    assert text == f"{tmp_path / 'store'} (store format 1)\n\nno dataset yet"


def test_info_shows_the_last_runs_and_some_classes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    for number in range(7):
        counts = {"listed": number, "computed": 0, "known": 0, "rejected": 0}
        store.write_run(
            {"run_id": store.new_run_id(), "dataset": f"night-{number}", "status": "done", "counts": counts}
        )
    found = describe(store)
    labels = {f"class-{number}": 1000 + number for number in range(8)}
    found["datasets"] = [
        {"name": "x", "snapshots": 1, "images": 9, "distinct": 9, "rejects": 2, "labels": labels, "splits": {}}
    ]
    text = summary.info_text(found)
    assert "7 runs, the last 5" in text
    assert [number for number in range(7) if f"night-{number}" in text] == [2, 3, 4, 5, 6]
    assert "classes  8: class-0 (1,000)," in text
    assert text.count("class-") == 6
    assert "2 more could not be used" in text


def test_info_counts_what_a_job_extracted_as_one_run_with_the_job(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    by_hand, part, night = (store.new_run_id() for _ in range(3))
    for run_id, extractions in ((by_hand, []), (part, []), (night, [part])):
        store.write_run({"run_id": run_id, "dataset": f"of {run_id}", "status": "done", "extractions": extractions})
    text = summary.info_text(describe(store))
    assert "\n2 runs\n" in text
    assert [f"of {run_id}" in text for run_id in (by_hand, part, night)] == [True, False, True]


def test_info_of_a_space_with_trained_weights_and_a_part_in_quarantine(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    notes = {"backbone": {"random": False, "weights": "IMAGENET1K_V2"}}
    space = store.open_space({"dtype": "float16"}, backbone="resnet50", notes=notes)
    (space.path / "quarantine").mkdir()
    (space.path / "quarantine" / "p1.h5").write_bytes(b"damaged")
    text = summary.info_text(describe(store))
    assert "\n  weights IMAGENET1K_V2\n" in text
    again = "run the same featurepipe extract again, then featurepipe gc STORE"
    assert f"\n  1 damaged part in quarantine; {again}\n" in text


def test_info_names_the_bottleneck_of_a_space_and_of_its_index(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    space = store.open_space({"dtype": "float16"}, backbone="tiny", notes={"aliases": {"bottleneck": "f6"}})
    store.open_space({"dtype": "float32"}, backbone="other")
    found = describe(store)
    assert {one["backbone"]: one["bottleneck"] for one in found["spaces"]} == {"tiny": "f6", "other": None}
    index = {"vectors": 5, "dataset": "d", "columns": ["f6:gap"], "distance": "cosine", "bytes": 20}
    found["indexes"] = [{**index, "fingerprint": space.fingerprint}, {**index, "fingerprint": "gone"}]
    text = summary.info_text(found)
    assert "\nindex of 5 images of d by bottleneck (f6:gap) (cosine), 20 B" in text
    assert "\nindex of 5 images of d by f6:gap (cosine), 20 B" in text


def test_verify() -> None:
    clean = VerifyReport(parts=2, rows=2000, bytes=5_700_000)
    assert summary.verify_text(clean) == "2 parts checked, 2,000 rows, 5.7 MB\neverything is as it was committed"
    problem = Problem("its checksum differs", "p1", "net-1", "features/fc:gap", "spaces/net-1/quarantine/p1.h5")
    report = VerifyReport(1, 1, 10, [problem, Problem("not JSON", "store.json")], ["spaces/.x.tmp"])
    assert summary.verify_text(report).splitlines() == [
        "1 part checked, 1 row, 10 B",
        "problem: net-1/p1/features/fc:gap: its checksum differs; moved to spaces/net-1/quarantine/p1.h5",
        "problem: store.json: not JSON",
        "leftover, harmless: spaces/.x.tmp",
        "run the same featurepipe extract again: it computes what is missing",
        "featurepipe gc STORE removes what dead writers left",
    ]


@pytest.mark.parametrize(("dry_run", "last"), [(False, "left alone, damaged: p9; run: featurepipe verify STORE"),
                                               (True, "dry run: nothing was changed")])  # fmt: skip
def test_compact(dry_run: bool, last: str) -> None:
    report = CompactReport(parts_before=1200, parts_after=1, rows_dropped=1, bytes_freed=2000, damaged=["p9"])
    lines = summary.compact_text(report, dry_run=dry_run).splitlines()
    assert lines[0] == "1,200 parts into 1, 1 duplicate row dropped, 2.0 kB freed"
    assert lines[-1] == last


def test_compact_that_frees_or_does_nothing() -> None:
    assert (
        summary.compact_text(CompactReport(2, 1, 0, -60)) == "2 parts into 1, 0 duplicate rows dropped, no space freed"
    )
    assert summary.compact_text(CompactReport(3, 3)).startswith("nothing to do: 3 parts")


def test_gc() -> None:
    assert summary.gc_text(GcReport()) == "nothing to remove"
    report = GcReport(bytes_freed=999, rows_dropped=3, leftovers_removed=1, rows_unfinished=1)
    assert summary.gc_text(report).splitlines() == [
        "removed 3 rows that no snapshot needs, 1 leftover file: 999 B",
        "kept 1 row of runs that have not finished, for the next run",
    ]
    assert summary.gc_text(report, dry_run=True).splitlines()[0].startswith("would remove 3 rows")
    assert summary.gc_text(GcReport(rows_dropped=1)) == "removed 1 row that no snapshot needs: 0 B"
