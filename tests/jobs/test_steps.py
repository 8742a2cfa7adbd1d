"""The steps of a night on a store of made-up features: what each does, and what it leaves alone."""

import signal
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurepipe.display import named_columns
from featurepipe.errors import BundleError, FeaturepipeError, UsageError
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.interrupt import StopRequest
from featurepipe.jobs import steps
from featurepipe.jobs.job import (
    CompactTable,
    DepthTable,
    DriftTable,
    ExportTable,
    Job,
    KeepTable,
    LabelsTable,
    OutliersTable,
    PredictTable,
    SelectTable,
    SimilarTable,
    TrainTable,
)
from featurepipe.jobs.step import Night, within_time
from featurepipe.jobs.steps.heads import new_images, snapshot_of
from featurepipe.store import fingerprint

STARTED = "2026-11-22T01:30:00+00:00"
FIELDS = {"dtype": "float32", "net": "tiny", "precision": "fp32"}


class Nights:
    """Plays the part of run_job: nights one after the other, each with its snapshot, record and steps."""

    def __init__(self, zoo: Any, folder: Path) -> None:
        self.zoo, self.folder, self.store = zoo, folder, zoo.store

    def job(self, **tables: Any) -> Job:
        source = {"path": "images", **tables.pop("source", {})}
        given = {"name": "nightly", "store": "store", "dataset": "zoo", "source": source, "features": [{}], **tables}
        return Job.model_validate(given, context={"folder": self.folder})

    def begin(self, rows: list[Any] | None = None, *, stop: StopRequest | None = None, **tables: Any) -> Night:
        """A night that has extracted these rows, or nothing."""
        before = next(reversed(self.store.snapshot_ids("zoo")), None)
        run_id = self.store.new_run_id()
        self.store.write_run(
            {"run_id": run_id, "command": "run", "job": "nightly", "dataset": "zoo", "status": "failed"}
        )
        extracted = ()
        if rows is not None:
            self.zoo.write(rows)
            extracted = ({**self.extraction(), "run_id": self.store.snapshot_ids("zoo")[-1]},)
            self.store.write_run(extracted[0])
        return Night(
            job=self.job(**tables), dataset="zoo", store=self.store, run_id=run_id, before=before,
            stop=stop or StopRequest(), say=lambda _: None, silent=True, extracted=extracted,
            record={"run_id": run_id, "started": STARTED},
        )  # fmt: skip

    def extraction(self) -> dict[str, Any]:
        (space,) = (space for space in self.store.spaces() if space.fingerprint == fingerprint(FIELDS))
        return {
            "command": "extract",
            "dataset": "zoo",
            "fingerprint": space.fingerprint,
            "space": space.name,
            "backbone": {"name": "tiny"},
            "columns": ["a:gap", "b:gap"],
        }

    def end(self, night: Night, *entries: dict[str, Any], exit_code: int = 0) -> None:
        """Writes the night's record, as run_job does."""
        record = {"run_id": night.run_id, "command": "run", "job": night.job.name, "dataset": "zoo", "status": "done",
                  "exit_code": exit_code, "ended": STARTED, "extractions": [run["run_id"] for run in night.extracted],
                  "steps": list(entries)}  # fmt: skip
        self.store.write_run(record)


@pytest.fixture
def nights(zoo, tmp_path):
    return Nights(zoo, tmp_path)


@pytest.fixture
def rows(zoo):
    return [*zoo.images("train", 20), *zoo.images("test", 8)]


def entry(step, result, status="done"):
    return {"step": step, "name": "", "status": status, "seconds": 0.1, "result": result}


# train


@pytest.fixture
def learn(tmp_path):
    return TrainTable(out=tmp_path / "bundle", nodes=("a:gap", "b:gap"), params={"C": 0.5})


def test_train_says_why_it_trains_and_why_not(nights, rows, learn, tmp_path):
    first = steps.train(nights.begin(rows), learn)
    assert first["why"] == ["there is no bundle yet"]
    assert first["text"].startswith("trained on 60 images of 3 classes; 0.")
    assert first["params"] == {"C": 0.5}
    assert not {"search", "classes", "test", "cost"} & first.keys()  # a run record stays small
    written = (tmp_path / "bundle" / "bundle.json").read_bytes()
    second = steps.train(nights.begin(rows), learn)
    assert second["skipped"].startswith("the 60 images that it learns from")
    assert (tmp_path / "bundle" / "bundle.json").read_bytes() == written
    third = steps.train(nights.begin([replace(rows[0], label="dog"), *rows[1:]]), learn)
    assert third["why"] == ["its images or their labels changed: 60 to learn from, 60 before"]
    always = steps.train(nights.begin(rows), learn.model_copy(update={"when": "always"}))
    assert "why" not in always
    assert always["text"].startswith("trained on 60 images")


def test_a_class_with_one_image_stops_no_training_and_is_said_each_night(nights, rows, learn):
    lonely = replace(rows[0], id="stray/1.png", label="stray", content="cat-stray")
    said = "not learned, as too few images are of this class: stray (1 image); give more, or set min_class_size to 1"
    first = steps.train(nights.begin([*rows, lonely]), learn)
    assert (first["left_out"], first["warnings"]) == ({"stray": 1}, [said])
    assert first["text"].startswith("trained on 60 images of 3 classes; 0.")
    assert read_bundle(learn.out).classes == ("cat", "dog", "emu")
    second = steps.train(nights.begin([*rows, lonely]), learn)
    assert (second["skipped"][:14], second["warnings"]) == ("the 60 images ", [said])
    more = replace(lonely, id="stray/2.png", content="cat-stray-2")
    third = steps.train(nights.begin([*rows, lonely, more]), learn)
    assert third["why"] == ["its images or their labels changed: 62 to learn from, 60 before"]
    assert (third["warnings"], "left_out" in third) == ([], False)
    assert read_bundle(learn.out).classes == ("cat", "dog", "emu", "stray")


def test_train_takes_the_tables_labels_then_the_sources(nights, rows, learn, tmp_path):
    for name, label in (("source", "old"), ("own", "new")):
        lines = [f"{row.id},{label}-{row.label}" for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,label", *lines]))
    night = nights.begin(rows, source={"labels": "source.csv"})
    steps.train(night, learn)
    assert read_bundle(learn.out).classes == ("old-cat", "old-dog", "old-emu")
    found = steps.train(night, learn.model_copy(update={"labels": tmp_path / "own.csv"}))
    assert read_bundle(learn.out).classes == ("new-cat", "new-dog", "new-emu")
    told = "the head in bundle was replaced by one that no longer knows the classes old-cat, old-dog, old-emu"
    assert (found["warnings"], found["lost_classes"]) == ([told], ["old-cat", "old-dog", "old-emu"])
    assert read_bundle(learn.out).training["lost_classes"] == found["lost_classes"]
    again = steps.train(night, learn.model_copy(update={"labels": tmp_path / "own.csv", "when": "always"}))
    assert again["warnings"] == []
    assert "lost_classes" not in again


def test_train_that_fails_or_has_no_time_leaves_the_bundle(nights, rows, learn, monkeypatch):
    steps.train(nights.begin(rows), learn)
    with pytest.raises(UsageError, match="all 20 training images are of class"):
        steps.train(nights.begin(rows[:20]), learn)
    monkeypatch.setattr("featurepipe.training.train.fit", lambda *_: time.sleep(60))
    start = time.monotonic()
    late = steps.train(nights.begin(rows[1:], stop=StopRequest.after(0.3)), learn)
    assert time.monotonic() - start < 40  # of the 60 that a fit takes here
    assert late["skipped"] == "no time was left: the older bundle stays, and the next run trains"
    assert late["warnings"] == [late["skipped"]]
    assert len(read_bundle(learn.out).seen) == 60


def test_whole_numbers_of_components_stay_whole(nights, rows, learn):
    found = steps.train(nights.begin(rows), learn.model_copy(update={"pca": 2.0}))
    assert "trained on 60 images" in found["text"]
    assert read_bundle(learn.out).head.steps[1][1].n_components == 2


# predict


@pytest.fixture
def labels(nights, zoo, rows, tmp_path):
    write_bundle(tmp_path / "bundle", zoo.bundle(rows[:60]))
    return PredictTable(bundle=tmp_path / "bundle", to=str(tmp_path / "predictions" / "{job}-{date}.parquet"))


def ids_in(file):
    return pq.read_table(file)["id"].to_pylist()


def date():
    return datetime.fromisoformat(STARTED).astimezone().date().isoformat()


def test_predict_labels_what_is_new_and_no_more(nights, zoo, rows, labels, tmp_path):
    night = nights.begin(rows[:10])
    first = steps.predict(night, labels)
    assert first["file"] == str(tmp_path / "predictions" / f"nightly-{date()}.parquet")
    assert ids_in(first["file"]) == [row.id for row in rows[:10]]
    nights.end(night, entry("predict", first))
    more = [
        *rows[2:10],
        replace(rows[0], content="dog-else"),
        *rows[10:12],
        zoo.image("bad", "cat-bad", None, is_usable=False),
    ]
    night = nights.begin(more)
    second = steps.predict(night, labels)
    assert second["file"] == str(
        tmp_path / "predictions" / f"nightly-{date()}-2.parquet"
    )  # on the same date: both stay
    assert ids_in(second["file"]) == [row.id for row in more[8:]]
    assert second["text"] == f"3 images labelled (1 more could not be used), in {second['file']}"
    found, bundle = pq.read_table(second["file"]), read_bundle(labels.bundle)
    expected = bundle.probabilities(zoo.features())[8:]
    np.testing.assert_allclose(
        np.stack([found[f"p({name})"].to_numpy() for name in bundle.classes], 1)[:3], expected, rtol=1e-5
    )
    assert found["reason"].to_pylist() == [None, None, None, "truncated: ends early"]
    assert ids_in(first["file"]) == [row.id for row in rows[:10]]


def test_predict_makes_up_for_nights_before_it_first_came_to_an_end(nights, rows, labels):
    nights.end(nights.begin(rows[:5]), {**entry("predict", {}), "status": "failed"}, exit_code=1)
    nights.end(nights.begin(rows[:8]), entry("predict", {"why": "no time was left"}, "not reached"))
    assert ids_in(steps.predict(nights.begin(rows[:8]), labels)["file"]) == [row.id for row in rows[:8]]


def test_predict_makes_up_for_a_night_on_which_it_failed(nights, rows, labels):
    night = nights.begin(rows[:10])
    nights.end(night, entry("predict", steps.predict(night, labels)))
    nights.end(nights.begin(rows[:12]), {**entry("predict", {}), "status": "failed"}, exit_code=1)
    night = nights.begin(rows[:15])
    third = steps.predict(night, labels)
    assert ids_in(third["file"]) == [row.id for row in rows[10:15]]
    nights.end(night, entry("predict", third))
    night = nights.begin(rows[:15])
    fourth = steps.predict(night, labels)
    assert fourth["skipped"] == "no new images"
    nights.end(night, entry("predict", fourth, "skipped"))
    assert ids_in(steps.predict(nights.begin(rows[:16]), labels)["file"]) == [rows[15].id]


def test_predict_all_replaces_its_file(nights, rows, labels, tmp_path):
    every = labels.model_copy(update={"images": "all", "to": str(tmp_path / "all.csv")})
    for count in (10, 12):
        found = steps.predict(nights.begin(rows[:count]), every)
        assert found["counts"]["predicted"] == count
        assert len((tmp_path / "all.csv").read_text().splitlines()) == count + 1
    assert sorted(tmp_path.glob("all*")) == [tmp_path / "all.csv"]


def test_predict_spares_what_it_is_made_from(nights, rows, labels, tmp_path):
    (tmp_path / "images.csv").write_text("path\n")
    night = nights.begin(rows, source={"path": "images.csv", "labels": "labels.csv"})
    (tmp_path / "labels.csv").write_text("id,label\n")
    for target in ("images.csv", "labels.csv", "store/runs/out.csv"):
        with pytest.raises(UsageError, match="cannot write predictions to"):
            steps.predict(night, labels.model_copy(update={"images": "all", "to": str(tmp_path / target)}))
    assert (tmp_path / "images.csv").read_text() == "path\n"


def test_predict_refuses_features_of_another_space(nights, zoo, rows, tmp_path, labels):
    write_bundle(tmp_path / "other", zoo.bundle(rows[:60], fields={**FIELDS, "precision": "bf16"}))
    with pytest.raises(BundleError, match=r"has none of that space(.|\n)*differs in precision"):
        steps.predict(nights.begin(rows), labels.model_copy(update={"bundle": tmp_path / "other"}))


def test_new_is_another_id_other_bytes_or_another_status(nights, zoo, rows):
    cat, dog, emu = rows[0], rows[20], rows[40]
    bad = zoo.image("bad", "cat-bad", None, is_usable=False)
    nights.begin([cat, dog, emu, bad, replace(bad, id="worse")])
    nights.begin([emu, replace(cat, label="dog", split=None), replace(dog, content="dog-else"), replace(cat, id="copy"),
                  replace(bad, is_usable=True), replace(bad, id="worse")])  # fmt: skip
    before, after = (nights.store.snapshot("zoo", run) for run in nights.store.snapshot_ids("zoo"))
    assert new_images(after, before).tolist() == [False, False, True, True, True, False]
    assert new_images(after, None).all()
    assert new_images(after, before.slice(0, 0)).all()
    assert not new_images(after, after).any()


def test_each_space_has_its_own_snapshot_of_this_run(nights, rows):
    night = nights.begin(rows)
    one = night.extracted[0]
    other = {
        **one,
        "run_id": "later",
        "fingerprint": "f" * 64,
        "space": "big-ffffffffffff",
        "backbone": {"name": "big"},
    }
    night = replace(night, extracted=(one, other))
    for name in ("tiny", one["space"], one["fingerprint"], one["fingerprint"][:6]):
        assert snapshot_of(night, name) == one["run_id"]
    assert snapshot_of(night, "big") == snapshot_of(night, None) == snapshot_of(night, "unheard of") == "later"
    assert snapshot_of(replace(night, extracted=()), "tiny") == one["run_id"]


# drift


def test_drift_warns_fails_and_keeps_what_it_found(nights, zoo):
    cats, emus = (images[:20] for images in (zoo.images("a", 40), zoo.images("b", 40)[80:]))
    more = [zoo.image(f"x{i}", f"cat-x-{i}", "cat") for i in range(20)]
    table = DriftTable(warn=0.01, seed=1)
    assert steps.drift(nights.begin(cats), table)["skipped"] == "the first night: there is nothing to compare with"
    first = nights.store.snapshot_ids("zoo")[0]
    night = nights.begin([*cats, *more])
    calm = steps.drift(night, table)
    nights.end(night, entry("drift", calm))
    second = night.extracted[0]["run_id"]
    assert calm["verdict"] == "no drift"
    assert calm["reference"] == first
    assert calm["text"].startswith("no drift: 20 new images, ")
    assert not calm["warnings"]
    night = nights.begin([*cats, *more])
    quiet = steps.drift(night, table)
    assert quiet["skipped"].startswith("0 images are new since")
    assert not quiet["warnings"]
    nights.end(night, entry("drift", quiet, "skipped"))
    night = nights.begin([*cats, *more, *emus])
    worried = steps.drift(night, table)
    (warning,) = worried["warnings"]
    assert (worried["reference"], worried["images"]["new"]) == (second, 20)  # a quiet night has tested nothing
    assert warning.startswith(f"this run's images may not be like those of {second}: ")
    least = min(worried["columns"], key=lambda test: test["adjusted"])
    named = named_columns(least["column"], least["bottleneck"])
    assert f"{named} differs most (p = {least['adjusted']:.2g}, " in warning
    with pytest.raises(FeaturepipeError, match=r"are not like those of .* differs most \(p = ") as caught:
        steps.drift(night, DriftTable(warn=0.01, fail=0.005, seed=1))
    assert caught.value.exit_code == 1
    assert caught.value.record["columns"] == worried["columns"]


def test_drift_compares_with_the_night_before_though_this_run_has_two_snapshots(nights, zoo, rows):
    nights.begin(rows[:20])
    night = nights.begin(rows)
    zoo.write(rows)  # of another feature space
    night = replace(
        night, extracted=(*night.extracted, {**nights.extraction(), "run_id": nights.store.snapshot_ids("zoo")[-1]})
    )
    found = steps.drift(night, DriftTable())
    assert (found["reference"], found["snapshot"]) == (night.before, nights.store.snapshot_ids("zoo")[-1])
    assert found["images"] == {"reference": 20, "new": 64}
    asked = steps.drift(night, DriftTable(reference=night.extracted[0]["run_id"]))
    assert asked["reference"] == night.extracted[0]["run_id"]


def test_drift_of_predicted_classes_is_told_too(nights, zoo, rows, labels):
    nights.begin(rows[:20])
    found = steps.drift(nights.begin(rows[:40]), DriftTable(bundle=labels.bundle))
    assert found["classes"]["adjusted"] < 0.01  # cats before, dogs now
    assert found["verdict"] == "warning"


# depth


def test_depth_compares_again_only_when_something_changed(nights, rows, monkeypatch, tmp_path):
    asked = []
    best = {"column": "a:gap", "head": "logistic", "accuracy": 0.91234, "low": 0.9, "high": 0.92, "se": 0.1}

    def fake(store, **options):
        asked.append(options)
        return {"recommended": best, "measure": "accuracy", "images": 84}

    monkeypatch.setattr("featurepipe.layer_depth.depth.depth", fake)
    pages = []
    monkeypatch.setattr(
        "featurepipe.reporting.from_store.report", lambda *a, **k: pages.append(k) or a[1].write_text("page")
    )
    table = DepthTable(heads=("logistic", "knn"), folds=3, report=tmp_path / "pages" / "depth.html")

    def current(rows, table, status="done", **tables):
        night = nights.begin(rows, **tables)
        found = steps.depth(night, table)
        nights.end(night, entry("depth", found, "skipped" if "skipped" in found else status))
        return found

    first = current(rows, table)
    assert first["text"] == f"recommended: a:gap, logistic 0.9123 right; page {table.report}"
    job = nights.begin(rows).job
    assert pages[0]["source"] == job.source.path  # by the job's word, where the store's would be questioned
    assert (pages[0]["only_under"], pages[0]["path_column"]) == (None, None)
    assert (asked[0]["heads"], asked[0]["folds"], asked[0]["dataset"]) == (("logistic", "knn"), 3, "zoo")
    assert current(rows, table)["skipped"] == "images, labels and columns are those that were compared last"
    assert "skipped" in current(list(reversed(rows)), table)
    assert len(asked) == 1
    relabelled = [replace(rows[0], label="dog"), *rows[1:]]
    assert "skipped" not in current(relabelled, table)
    assert "skipped" not in current([replace(row, split=None) for row in relabelled], table)
    assert "skipped" in current([replace(row, split=None) for row in relabelled], table)
    assert "skipped" not in current(rows, table)
    assert "skipped" not in current(rows, table.model_copy(update={"folds": 4}))
    assert "skipped" not in current(rows, table, status="failed")
    assert "skipped" not in current(rows, table)  # the night before failed, and the one before asked for other folds
    assert "skipped" in current(rows, table.model_copy(update={"jobs": 1}))
    table.report.unlink()
    assert "skipped" not in current(rows, table)
    assert "skipped" not in current(rows, table.model_copy(update={"when": "always"}))


# export


def test_export_hands_on_what_is_new_changed_or_gone_since_it_last_did(nights, rows, tmp_path):
    table = ExportTable(node="a", to=str(tmp_path / "{date}-{run}.parquet"), images="new", metadata="key")

    def current(rows):
        night = nights.begin(rows)
        found = steps.export(night, table)
        nights.end(night, entry("export", found, "skipped" if "skipped" in found else "done"))
        return found

    first = current(rows[:20])
    assert (first["rows"], first["text"].split(",")[0]) == (20, "20 images")
    assert "since" not in first
    second = current(rows[:20])
    assert second["skipped"] == "no image is new, changed or gone"
    relabelled = replace(rows[3], label="emu")
    third = current([rows[0], relabelled, *rows[4:25]])
    assert (third["since"], third["new"], third["relabelled"], third["deleted"]) == (second["snapshot"], 5, 1, 2)
    written = pq.read_table(third["file"])
    assert written["id"].to_pylist() == [relabelled.id, *(row.id for row in rows[20:25])]
    assert pq.read_table(third["deleted_file"])["id"].to_pylist() == [row.id for row in rows[1:3]]
    features = nights.store.features("zoo", "a")
    held = dict(zip(features.ids.tolist(), features.read(), strict=True))
    for id_, vector in zip(written["id"].to_pylist(), written["features"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.asarray(vector, features.dtype), held[id_])
    whole = steps.export(nights.begin(rows[:5]), ExportTable(node="a", to=str(tmp_path / "all"), dtype="float16"))
    assert (whole["rows"], whole["dtype"], pq.read_table(tmp_path / "all").num_rows) == (5, "float16", 5)


def exported(nights, rows, table, **tables):
    night = nights.begin(rows, **tables)
    found = steps.export(night, table)
    nights.end(night, entry("export", found, "skipped" if "skipped" in found else "done"))
    return found


@pytest.mark.parametrize("option", ["labels", "group"])
def test_export_hands_all_on_again_when_its_own_file_says_something_else(nights, rows, tmp_path, option):
    file = tmp_path / "labels.csv"

    def say(*values):
        lines = [f"id,{option.removesuffix('s')}", *(f"{row.id},{v}" for row, v in zip(rows, values, strict=False))]
        file.write_text("\n".join(lines))

    place = str(tmp_path / "{run}.parquet")
    plain = ExportTable(node="a", to=place, images="new")
    table = plain.model_copy(update={option: file if option == "labels" else str(file)})
    say(*"ab" * 10)
    first = exported(nights, rows[:20], table)
    assert exported(nights, rows[:20], table)["skipped"] == "no image is new, changed or gone"
    say(*"ab" * 11)  # of images that are not there yet
    assert exported(nights, rows[:20], table)["skipped"] == "no image is new, changed or gone"
    found = exported(nights, rows[:22], table)
    assert (found["new"], found["relabelled"]) == (2, 0)
    say(*"bb", *"ab" * 10)
    corrected = exported(nights, rows[:22], table)
    assert (corrected["new"], corrected["relabelled"], corrected["deleted"]) == (0, 22, 0)
    assert "0 gone, all again: labels changed, in " in corrected["text"]
    written = pq.read_table(corrected["file"])[option.removesuffix("s")].to_pylist()
    assert written[:4] == ["b", "b", "a", "b"]
    assert exported(nights, rows[:22], table)["skipped"] == "no image is new, changed or gone"
    assert exported(nights, rows[:22], plain)["relabelled"] == 22  # the file is not asked any more
    assert "skipped" in exported(nights, rows[:22], plain)
    assert exported(nights, rows[:22], table)["relabelled"] == 22
    assert first["checksums"].keys() == {"given", "images"}


@pytest.mark.parametrize("name", ["vectors/{date}", "{date}.parquet", "{date}.h5"])
def test_export_never_replaces_what_was_new_earlier_on_the_same_date(nights, rows, tmp_path, name):
    table = ExportTable(node="a", to=str(tmp_path / name), images="new")
    first = exported(nights, rows[:20], table)
    kept = Path(first["file"])
    second = exported(nights, rows[1:25], table)
    third = exported(nights, rows[1:26], table)
    stem = kept.with_suffix("")
    assert stem.name == date()
    assert [found["file"] for found in (second, third)] == [f"{stem}-2{kept.suffix}", f"{stem}-3{kept.suffix}"]
    assert [found["rows"] for found in (first, second, third)] == [20, 5, 1]
    assert pq.read_table(second["deleted_file"])["id"].to_pylist() == [rows[0].id]
    if kept.suffix != ".h5":
        assert pq.read_table(kept).num_rows == 20
        assert ids_in(second["file"]) == [row.id for row in rows[20:25]]
    if kept.suffix:  # it was fetched, the list of those that went was not
        Path(second["file"]).unlink()
        assert exported(nights, rows[1:27], table)["file"] == f"{stem}-4{kept.suffix}"


def test_export_of_all_images_replaces_that_of_the_same_date(nights, rows, tmp_path):
    table = ExportTable(node="a", to=str(tmp_path / "{date}.parquet"))
    assert [exported(nights, rows[:count], table)["rows"] for count in (5, 7)] == [5, 7]
    assert [path.name for path in tmp_path.glob("*.parquet")] == [f"{date()}.parquet"]


def test_answers_about_new_images_stay_on_the_same_date_and_others_are_replaced(nights, tmp_path):
    def place(table):
        found = nights.begin().place(table)
        found.parent.mkdir(exist_ok=True)
        found.touch()
        return found.name

    def names(table):
        return [place(table) for _ in range(2)]

    to = str(tmp_path / "answers" / "{date}.csv")
    assert names(SimilarTable(to=to)) == [f"{date()}.csv", f"{date()}-2.csv"]
    assert names(OutliersTable(to=to, since="previous")) == [f"{date()}-3.csv", f"{date()}-4.csv"]
    assert names(LabelsTable(to=to)) == names(OutliersTable(to=to)) == names(SelectTable(to=to, budget=3))
    assert names(SimilarTable(to=str(tmp_path / "answers" / "newest.html"))) == ["newest.html"] * 2


def test_export_says_why_all_images_count_as_new(nights, rows, tmp_path):
    table = ExportTable(node="a", to=str(tmp_path / "{run}"), images="new")
    first = exported(nights, rows[:20], table)
    assert (first["rows"], first["warnings"]) == (20, [])
    other = table.model_copy(update={"to": str(tmp_path / "other-{run}")})
    second = exported(nights, rows[:21], other)
    assert (second["rows"], *second["warnings"]) == (
        21,
        f"export {other.to}: all images count as new, and none as gone: the job handed on to {table.to} before, and never "
        f"to {other.to}",
    )
    (nights.store.path / "snapshots" / "zoo" / f"{second['snapshot']}.parquet").unlink()
    third = exported(nights, rows[:22], other)
    assert (third["rows"], *third["warnings"]) == (
        22,
        f"export {other.to}: all images count as new, and none as gone: snapshot {second['snapshot']}, which {other.to} "
        "handed on last, is not in the store any more",
    )
    assert exported(nights, rows[:23], other)["rows"] == 1


# compact, keep


def test_compact_merges_once_and_waits_for_nobody(nights, rows, zoo):
    night = nights.begin(rows[:10])
    night = nights.begin(rows)
    with night.store.lock(shared=True):
        busy = steps.compact(night, CompactTable())
    assert busy["skipped"] == "the store was not to be had alone: parts are merged in the next run"
    assert "cannot rewrite parts" in busy["warnings"][0]
    done = steps.compact(night, CompactTable())
    assert done["text"] == "2 parts into 1, 10 duplicate rows dropped"
    assert done["rows_dropped"] == 10
    assert steps.compact(night, CompactTable())["skipped"] == "nothing to merge: 1 part"


def run_ids(store):
    return [run["run_id"] for run in store.runs()]


def test_keep_lets_old_nights_go_with_what_only_they_needed(nights, rows, zoo):
    past = []
    for number in range(5):
        past.append(nights.begin(rows[number : number + 10]))
        nights.end(past[-1])
    zoo.write(rows[:3], "other")
    night = nights.begin(rows[5:15])
    found = steps.keep(night, KeepTable(snapshots=2, runs=3))
    assert found["text"].startswith(
        "removed 4 snapshots, 6 run records, 4 rows that no snapshot needs: "
    )  # four nights stored it
    assert nights.store.snapshot_ids("zoo") == [night.before, night.extracted[0]["run_id"]]
    assert nights.store.snapshot_ids("other")
    kept = [*past[3:], night]
    expected = [run_id for each in kept for run_id in (each.run_id, each.extracted[0]["run_id"])]
    assert run_ids(nights.store) == expected
    assert len(nights.store.features("zoo", node="a", snapshot=night.before)) == 10
    assert steps.keep(night, KeepTable(snapshots=2, runs=3))["skipped"] == "nothing to remove"
    assert steps.keep(night, KeepTable(snapshots=None, runs=None))["skipped"] == "nothing to remove"


@pytest.mark.parametrize(("runs", "removed"), [(1, 3), (3, 1), (4, 0), (6, 0), (100, 0)])
def test_keep_counts_this_run_among_the_nights_that_stay(nights, rows, runs, removed):
    for _ in range(3):
        nights.end(nights.begin(rows[:10]), exit_code=1)
    night = nights.begin(rows[:10])
    ids = run_ids(nights.store)
    steps.keep(night, KeepTable(snapshots=1, runs=runs))
    assert run_ids(nights.store) == ids[2 * removed :]


def test_keep_spares_the_record_of_a_snapshot_and_of_the_last_success(nights, rows):
    past = []
    for number in range(6):
        past.append(nights.begin(rows[number : number + 10]))
        nights.end(past[-1], exit_code=0 if number == 1 else 1)
    night = nights.begin(rows[5:15])
    steps.keep(night, KeepTable(snapshots=4, runs=1))
    with_snapshots = [each.extracted[0]["run_id"] for each in [*past[3:], night]]
    assert run_ids(nights.store) == sorted([past[1].run_id, *with_snapshots, night.run_id])


def test_keep_leaves_the_records_of_others_and_takes_those_of_killed_nights(nights, rows, zoo):
    process = {"host": {"name": "here", "pid": 7}}
    killed = nights.begin(rows[:10])  # it never came to say which extractions were its own
    nights.store.write_run({"run_id": killed.run_id, "command": "run", "job": "nightly", "dataset": "zoo", **process})
    nights.store.write_run({**nights.extraction(), "run_id": killed.extracted[0]["run_id"], **process})
    zoo.write(rows[:10])
    by_hand = nights.store.snapshot_ids("zoo")[-1]
    nights.store.write_run({**nights.extraction(), "run_id": by_hand, "host": {"name": "here", "pid": 8}})
    zoo.write(rows[:10])
    weekly = {"command": "run", "job": "weekly", "dataset": "zoo", "exit_code": 0}
    other = nights.store.new_run_id()
    nights.store.write_run({**weekly, "run_id": other, "extractions": [nights.store.snapshot_ids("zoo")[-1]]})
    nights.store.write_run({**nights.extraction(), "run_id": nights.store.snapshot_ids("zoo")[-1]})
    elsewhere = nights.store.new_run_id()
    nights.store.write_run({"run_id": elsewhere, "command": "extract", "dataset": "other"})
    unlisted = nights.store.new_run_id()  # the source could not be listed, so nobody knew the dataset
    nights.store.write_run({**weekly, "run_id": unlisted, "job": "nightly", "dataset": "", "exit_code": 1})
    for _ in range(3):
        night = nights.begin(rows[:10])
        nights.end(night, exit_code=1)
    later = nights.store.new_run_id()  # in a process that has the killed one's number now
    nights.store.write_run({**nights.extraction(), "run_id": later, **process})
    theirs = nights.store.snapshot_ids("zoo")[2]
    steps.keep(night, KeepTable(snapshots=1, runs=1))
    assert run_ids(nights.store) == sorted(
        [by_hand, other, theirs, elsewhere, later, night.run_id, night.extracted[0]["run_id"]]
    )


@pytest.mark.parametrize(("reference", "stays"), [("first", 0), ("previous", 2), ("ID", 1)])
def test_keep_leaves_what_drift_is_measured_against(nights, rows, reference, stays):
    past = []
    for number in range(5):
        past.append(nights.begin(rows[: 10 * number + 10]))
        own = past[-1].extracted[0]["run_id"]
        result = {"reference": past[-1].before, "snapshot": own}
        nights.end(past[-1], entry("drift", result, "done" if number == 2 else "failed" if number == 1 else "skipped")
                   if number < 3 else entry("drift", {"why": "no time was left"}, "not reached"))  # fmt: skip
    ids = nights.store.snapshot_ids("zoo")
    night = nights.begin(rows[:50], drift={"reference": ids[1] if reference == "ID" else reference})
    steps.keep(night, KeepTable(snapshots=1, runs=1))
    assert nights.store.snapshot_ids("zoo") == [ids[stays], night.extracted[0]["run_id"]]
    if reference == "previous":
        assert past[2].run_id in run_ids(nights.store)  # its record says which one it is
        assert steps.drift(nights.begin(rows), DriftTable())["reference"] == ids[2]


def test_keep_leaves_a_reference_that_is_named_by_the_jobs_run(nights, rows):
    past = [nights.begin(rows[:10]) for _ in range(4)]
    for night in past:
        nights.end(night)
    night = nights.begin(rows[:10], drift={"reference": past[1].run_id})
    steps.keep(night, KeepTable(snapshots=1, runs=1))
    assert nights.store.snapshot_ids("zoo") == [past[1].extracted[0]["run_id"], night.extracted[0]["run_id"]]
    assert past[1].run_id in run_ids(nights.store)


def test_keep_leaves_what_other_jobs_measure_drift_against(nights, rows):
    def weekly(*entries, dataset="zoo"):
        zoo = {"command": "run", "job": "weekly", "dataset": dataset, "exit_code": 0, "steps": entries}
        nights.store.write_run({**zoo, "run_id": nights.store.new_run_id()})

    for _ in range(5):
        nights.end(nights.begin(rows[:10]))
    ids = nights.store.snapshot_ids("zoo")
    weekly(entry("drift", {"reference": ids[0], "snapshot": ids[1]}))
    weekly(entry("drift", {"reference": ids[1], "snapshot": ids[2]}))
    weekly(entry("drift", {"why": "the run was stopped"}, "not reached"))
    weekly(entry("drift", {"reference": ids[3], "snapshot": ids[4]}), dataset="other")
    night = nights.begin(rows[:10])
    steps.keep(night, KeepTable(snapshots=1, runs=1))
    assert nights.store.snapshot_ids("zoo") == [*ids[1:3], night.extracted[0]["run_id"]]


@pytest.mark.parametrize(("reference", "stays"), [("ID", 2), ("RUN", 1), ("first", 0), ("previous", None)])
def test_keep_leaves_what_other_jobs_name_who_have_not_come_to_drift(nights, rows, reference, stays):
    past = [nights.begin(rows[:10]) for _ in range(4)]
    for night in past:
        nights.end(night)
    ids = nights.store.snapshot_ids("zoo")
    named = {"ID": ids[2], "RUN": past[1].run_id}.get(reference, reference)
    plan = {"drift_reference": named}
    weekly = {"command": "run", "job": "weekly", "dataset": "zoo", "exit_code": 1, "steps": [], "plan": plan}
    nights.store.write_run({**weekly, "run_id": nights.store.new_run_id()})
    night = nights.begin(rows[:10])
    for _ in range(2):  # the second time it is the record of the job's run that tells
        steps.keep(night, KeepTable(snapshots=1, runs=1))
        expected = [] if stays is None else [ids[stays]]
        assert nights.store.snapshot_ids("zoo") == [*expected, night.extracted[0]["run_id"]]
    assert (past[1].run_id in run_ids(nights.store)) == (reference == "RUN")


def test_a_run_says_in_its_plan_what_drift_is_measured_against(nights):
    from featurepipe.jobs.record import plan_of

    assert plan_of(nights.job(drift={"reference": "first"}), retry_rejects=False)["drift_reference"] == "first"
    assert plan_of(nights.job(), retry_rejects=False)["drift_reference"] is None


def test_drift_goes_on_from_the_reference_that_the_job_named(nights, zoo, rows):
    """So people say that images which failed are as they should be."""
    emus = zoo.images("x", 40)[80:100]
    nights.begin(rows[:20])
    night = nights.begin([*rows[:20], *emus])
    with pytest.raises(FeaturepipeError) as caught:
        steps.drift(night, DriftTable(fail=0.005))
    nights.end(night, entry("drift", caught.value.record, "failed"), exit_code=1)
    odd = night.extracted[0]["run_id"]
    assert f'reference = "{odd}"' in str(caught.value)
    with pytest.raises(FeaturepipeError):
        steps.drift(nights.begin([*rows[:20], *emus]), DriftTable(fail=0.005))
    night = nights.begin([*rows[:20], *emus])
    accepted = steps.drift(night, DriftTable(reference=odd, fail=0.005))
    assert accepted["skipped"].startswith("0 images are new since")
    nights.end(night, entry("drift", accepted, "skipped"))
    assert steps.drift(nights.begin([*rows[:20], *emus]), DriftTable(fail=0.005))["reference"] == odd


def test_a_job_of_two_spaces_keeps_twice_as_many_snapshots(nights, rows):
    for _ in range(5):
        nights.end(nights.begin(rows[:10]))
    night = nights.begin(rows[:10], features=[{"backbone": "a"}, {"backbone": "b"}])
    assert steps.keep(night, KeepTable(snapshots=2))["snapshots_removed"] == 2


# time


def test_work_ends_with_the_time_and_not_before():
    assert within_time(None, lambda: {"done": 1}, "x") == {"done": 1}
    assert within_time(time.monotonic() + 60, lambda: {"done": 1}, "x") == {"done": 1}
    start = time.monotonic()
    late = within_time(start + 0.2, lambda: {"slept": time.sleep(60)}, "tomorrow then")
    assert 0.1 < time.monotonic() - start < 40
    assert late == {"skipped": "no time was left: tomorrow then", "warnings": ["no time was left: tomorrow then"]}
    assert "skipped" in within_time(start - 5, lambda: {"slept": time.sleep(60)}, "x")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # no alarm is left behind
