"""Whole nights with every step, over real images and a small network."""

import json
import shutil
from datetime import datetime

import numpy as np
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from featurepipe.errors import UsageError
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.jobs.text import summary_text
from featurepipe.prediction.predict import predict

STEPS = """
[[train]]
out = "bundles/head"
nodes = ["c3", "bottleneck"]
[[predict]]
bundle = "bundles/head"
to = "predictions/{run}.parquet"
[[predict]]
bundle = "bundles/head"
to = "predictions/all.parquet"
images = "all"
[drift]
bundle = "bundles/head"
[compact]
[keep]
snapshots = 2
runs = 2
[metrics]
prometheus = "watched/featurepipe.prom"
"""


def by_step(record):
    return {f"{entry['step']} {entry['name']}".strip(): entry for entry in record["steps"][2:]}


@pytest.fixture
def classed(pile):
    pile.fill(24, folder="day/")
    pile.fill(24, first=100, folder="night/")
    pile.job(STEPS)
    return pile


def success(pile):
    (family,) = (
        family
        for family in text_string_to_metric_families((pile.folder / "watched" / "featurepipe.prom").read_text())
        if family.name == "featurepipe_last_success_timestamp_seconds"
    )
    return family.samples[0].value


def test_night_after_night_with_every_step(classed):
    pile = classed
    first = pile.run()
    assert first["exit_code"] == 0, first["steps"]
    steps = by_step(first)
    assert {name: entry["status"] for name, entry in steps.items()} == {
        "train head": "done", "predict head": "done", "drift": "skipped", "compact": "skipped", "keep": "skipped",
        "metrics": "done",
    }  # fmt: skip
    everything = pq.read_table(pile.folder / "predictions" / "all.parquet")
    assert everything.equals(pq.read_table(pile.folder / "predictions" / f"{first['run_id']}.parquet"))
    predict(pile.folder / "bundles" / "head", pile.root, pile.folder / "network.parquet", workers=2, silent=True)
    network = pq.read_table(pile.folder / "network.parquet")
    assert everything["id"].equals(network["id"])
    assert everything["label"].equals(network["label"])
    for name in ("p(day)", "p(night)"):
        np.testing.assert_allclose(everything[name].to_numpy(), network[name].to_numpy(), rtol=1e-4)
    ended = success(pile)

    quiet = pile.run()
    steps = by_step(quiet)
    assert {name: entry["status"] for name, entry in steps.items()} == {
        "train head": "skipped", "predict head": "done", "drift": "skipped", "compact": "skipped", "keep": "skipped",
        "metrics": "done",
    }  # fmt: skip
    assert quiet["steps"][3]["result"]["skipped"] == "no new images"
    assert quiet["warnings"] == []
    assert not (pile.folder / "predictions" / f"{quiet['run_id']}.parquet").exists()
    assert success(pile) >= ended

    before = (pile.folder / "bundles" / "head" / "bundle.json").read_bytes()
    pile.fill(12, first=200, folder="night/")
    third = pile.run()
    steps = by_step(third)
    assert {name: entry["status"] for name, entry in steps.items()} == dict.fromkeys(steps, "done")
    assert steps["train head"]["result"]["why"][0].startswith("its images or their labels changed: ")
    assert (pile.folder / "bundles" / "head" / "bundle.json").read_bytes() != before
    news = pq.read_table(pile.folder / "predictions" / f"{third['run_id']}.parquet")
    assert news["id"].to_pylist() == [f"night/{number}.png" for number in range(200, 212)]
    assert steps["drift"]["result"]["images"] == {"reference": 48, "new": 12}
    assert steps["compact"]["result"]["parts_after"] == 1
    assert steps["keep"]["result"]["snapshots_removed"] == 1
    assert len(pile.store.snapshot_ids("pile")) == 2
    assert len(pile.records()) == 2
    json.dumps(third)
    assert len(summary_text(third).splitlines()) < 24


TUNED = """
[[finetune]]
out = "bundles/tuned"
from_node = "s2"
epochs = 2
rate = 0.003
store_features = true
[[predict]]
bundle = "bundles/tuned"
to = "predictions/{run}.parquet"
"""


def test_layers_are_tuned_when_what_they_learn_from_has_changed(pile):
    pile.fill(24, folder="day/")
    pile.fill(24, first=100, folder="night/")
    text = pile.job(TUNED).read_text()
    with pytest.raises(
        UsageError, match=r"finetune\[0\]\.from_node = 's2:map': unknown column 's2:map' in \[\[features\]\]"
    ):
        pile.run()
    pile.file.write_text(text.replace('nodes = ["c3", "bottleneck"]', 'nodes = ["s2:map"]'))
    sound = pile.file.read_text()
    pile.file.write_text(sound.replace("store_features = true", ""))
    with pytest.raises(
        UsageError, match=r"predict\[0\]\.bundle = .*needs the tuned features: store_features = true in"
    ):
        pile.run()
    pile.file.write_text(sound)
    plan = pile.run(dry_run=True)
    assert plan["steps"][0] == {"step": "finetune", "name": "tuned", "runs": True, "why": "there is no bundle yet"}
    steps = by_step(pile.run())
    first = steps["finetune tuned"]
    assert first["status"] == "done", first
    assert steps["predict tuned"]["result"]["counts"]["predicted"] == 48
    assert first["result"]["from"] == "s2"
    assert "of 2 classes; 0." in first["result"]["text"]
    assert read_bundle(pile.folder / "bundles" / "tuned").training["tuning"]["from"] == "s2"
    (pile.root / "unknown").mkdir()
    pile.add("outside.png", 500)  # which has no label, so that nothing that is learned from changes
    steps = by_step(pile.run())
    assert steps["predict tuned"]["result"]["counts"]["predicted"] == 1
    again = steps["finetune tuned"]
    assert again["status"] == "skipped"
    assert again["result"]["skipped"].startswith(
        "the 38 images that it learns from, their labels and its settings are those"
    )
    pile.file.write_text(pile.file.read_text().replace("epochs = 2", "epochs = 1"))
    other = by_step(pile.run())["finetune tuned"]["result"]
    assert other["why"] == ["other settings: epochs"]


def test_a_failed_night_has_figures_too_and_the_next_one_makes_up_for_it(classed):
    pile = classed
    first = pile.run()
    so_far, ended = success(pile), datetime.fromisoformat(first["ended"]).timestamp()
    assert so_far <= ended  # the figures are a step of the night, which ends after it
    bundle = pile.folder / "bundles" / "head"
    (bundle / "bundle.json").write_text("broken")
    (bundle / "notes.txt").write_text("mine")  # so that nothing may replace what is there
    pile.fill(3, first=300, folder="day/")
    failed = pile.run()
    assert failed["exit_code"] == 1
    broken = {name for name, entry in by_step(failed).items() if entry["status"] == "failed"}
    assert broken == {"train head", "predict head", "drift"}
    assert success(pile) == ended
    shutil.rmtree(bundle)
    pile.fill(2, first=400, folder="night/")
    mended = pile.run()
    assert mended["exit_code"] == 0
    assert read_bundle(bundle).classes == ("day", "night")
    news = pq.read_table(pile.folder / "predictions" / f"{mended['run_id']}.parquet")
    assert news["id"].to_pylist() == [*(f"day/{n}.png" for n in range(300, 303)), "night/400.png", "night/401.png"]
    assert success(pile) >= ended


def test_a_bundle_takes_the_weights_of_its_own_network_along(classed):
    """Two networks with weights of the user's own: each head comes with those that its features are from."""
    import torch

    from featurepipe.backbones import load_backbone

    pile = classed
    for name, seed in (("one.pt", 1), ("two.pt", 2)):
        torch.save(load_backbone("lenet5", "none", seed=seed).module.state_dict(), pile.folder / name)
    second = '[[features]]\nbackbone = "lenet5"\nweights = "two.pt"\nnodes = ["f6"]\nprecision = "fp32"\n'
    heads = "".join(
        f'[[train]]\nout = "{out}"\nnodes = ["{node}"]\nbackbone = "BACKBONE"\n'
        for out, node in (("a", "c3"), ("b", "f6"))
    )
    pile.job(second)
    pile.file.write_text(pile.file.read_text().replace('weights = "none"', 'weights = "one.pt"'))
    extractions = [entry["result"]["space"] for entry in pile.run()["steps"][1:]]
    text = pile.file.read_text() + heads
    for space in extractions:
        text = text.replace("BACKBONE", space, 1)
    pile.file.write_text(text)
    record = pile.run()
    assert record["exit_code"] == 0, record["steps"]
    for name in ("one.pt", "two.pt"):
        (pile.folder / name).unlink()
    for out, seed in (("a", 1), ("b", 2)):
        bundle = read_bundle(pile.folder / out)
        assert bundle.space["weights_sha256"] == load_backbone("lenet5", "none", seed=seed).weights_sha256
        found = predict(bundle, pile.root, workers=1, silent=True)
        assert found["counts"]["predicted"] == 48


@pytest.mark.slow
def test_layers_are_compared_and_shown_once(classed):
    pile = classed
    pile.job('[depth]\nfolds = 2\nseeds = 1\njobs = 1\nreport = "pages/depth.html"')
    first = by_step(pile.run())["depth"]
    assert first["status"] == "done", first
    document = pile.store.depth_documents("pile")[-1]
    assert first["result"]["recommended"]["column"] == document["recommended"]["column"]
    assert "<html" in (pile.folder / "pages" / "depth.html").read_text()
    assert (
        by_step(pile.run())["depth"]["result"]["skipped"]
        == "images, labels and columns are those that were compared last"
    )
    pile.fill(4, first=500, folder="night/")
    assert by_step(pile.run())["depth"]["result"]["images"] == 52


@pytest.mark.slow
def test_routes_are_compared_again_when_images_changed_or_a_budget_left_some_out(classed, monkeypatch):
    monkeypatch.setattr(
        "featurepipe.layer_depth.measure.Timing.measure",
        lambda timing: {"milliseconds": dict.fromkeys(timing.nodes, 1.0), "waited": 0.0},
    )
    pile = classed
    table = '[routes]\nroutes = ["bottleneck", "node"]\nsizes = [5, "all"]\nseeds = 1\nreport = "pages/routes.html"'
    pile.job(table)
    first = by_step(pile.run())["routes"]
    assert first["status"] == "done", first
    assert first["result"]["text"].startswith(f"recommended: {first['result']['recommended']['route']}, accuracy ")
    assert "<html" in (pile.folder / "pages" / "routes.html").read_text()
    skipped = by_step(pile.run())["routes"]["result"]["skipped"]
    assert skipped == "images, labels and columns are those that were compared last"
    pile.job(table.replace('"all"]', "10]") + '\nbudget = "1min"')
    with monkeypatch.context() as slow:
        slow.setattr("featurepipe.transfer_routes.measure.TrialTimes.seconds", lambda *_: 1e6)
        short = by_step(pile.run())["routes"]["result"]
    assert short["text"].endswith("; 2 measurements are left for the next run; page pages/routes.html")
    again = by_step(pile.run())["routes"]["result"]
    assert again["over_budget"] == 0
    assert "skipped" in by_step(pile.run())["routes"]["result"]


def test_the_page_of_nights_has_this_run(classed):
    pile = classed
    pile.job('[report]\nto = "pages/nights.html"')
    record = pile.run()
    assert by_step(record)["report"]["status"] == "done", record["steps"]
    page = (pile.folder / "pages" / "nights.html").read_text()
    assert record["run_id"] in page
    assert "nightly" in page
    assert "was going well" in page
    assert "no record of how it ended" not in page  # which is what the store still says


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multilabel", "target"])
def test_labels_and_numbers_are_trained_predicted_and_compared(pile, kind):
    """A job whose heads predict several labels, or a number; drift then tests what they predict of new images."""
    pile.fill(48)
    rng = np.random.default_rng(0)
    rows = [f"{k:03d}.png,{rng.integers(2)},{rng.integers(2)},{rng.normal():.3f}" for k in range(100)]
    (pile.folder / "labels.csv").write_text("\n".join(["id,red,big,age", *rows]))
    role = 'multilabel = ["red", "big"]' if kind == "multilabel" else 'target = "age"'
    pile.job(f"""
[[train]]
out = "bundles/head"
labels = "labels.csv"
{role}
[[predict]]
bundle = "bundles/head"
to = "predictions/{{run}}.parquet"
[drift]
bundle = "bundles/head"
[depth]
folds = 2
seeds = 1
jobs = 1
labels = "labels.csv"
{role}
[report]
to = "nights.html"
[metrics]
prometheus = "featurepipe.prom"
""")
    first = pile.run()
    assert first["exit_code"] == 0, first["steps"]
    depth = by_step(first)["depth"]["result"]
    measure = "map" if kind == "multilabel" else "r2"
    assert depth["text"].endswith(f"{measure} {depth['recommended'][measure]:.4f}")
    pile.fill(20, first=100)
    second = pile.run()
    assert second["exit_code"] in (0, 3), second["steps"]
    steps = by_step(second)
    assert steps["depth"]["status"] == "skipped"  # no new image has a label
    found = steps["drift"]["result"]
    name = "labels" if kind == "multilabel" else "numbers"
    assert found[name]["compared"] == {"reference": 48, "new": 20}
    assert found["classes"] is None
    figures = (pile.folder / "featurepipe.prom").read_text()
    assert f'featurepipe_drift_p_value{{column="predicted {name}",job="nightly"}} {found[name]["adjusted"]}' in figures
    assert f"predicted {name}" in (pile.folder / "nights.html").read_text()


QUESTIONS = """
[[similar]]
to = "asked/{run}.csv"
top = 2
[[labels]]
to = "asked/labels.csv"
folds = 2
[[outliers]]
to = "asked/outliers.html"
since = "previous"
[[outliers]]
to = "asked/far.parquet"
by = "class"
neighbours = 3
[[select]]
to = "asked/next.csv"
budget = 50
"""


def test_questions_are_asked_of_every_night_and_answered_in_files(pile):
    pile.fill(12, folder="day/")
    pile.fill(12, first=100, folder="night/")
    pile.fill(3, first=300, folder="unknown/")
    pile.job(QUESTIONS.replace("budget = 50", ""))
    with pytest.raises(UsageError, match=r"select\[0\]\.budget: is missing: how many images to choose"):
        pile.run()
    pile.job(QUESTIONS.replace("far.parquet", "labels.csv"))
    with pytest.raises(UsageError, match=r"is written to the same place"):
        pile.run()
    names = [f"{kind}/{first + n:03d}.png,{kind}" for kind, first in (("day", 0), ("night", 100)) for n in range(12)]
    (pile.folder / "labels.csv").write_text("\n".join(["id,label", *names]))
    text = pile.job(QUESTIONS).read_text()
    pile.file.write_text(text.replace("[source]", '[source]\nlabels = "labels.csv"', 1))
    plan = pile.run(dry_run=True)["steps"]
    assert [(step["step"], step["runs"]) for step in plan] == [
        ("similar", None), ("labels", True), ("outliers", None), ("outliers", True), ("select", True),
    ]  # fmt: skip
    first = pile.run()
    steps = {f"{entry['step']} {entry['name']}": entry for entry in first["steps"] if entry["name"]}
    assert {name: entry["status"] for name, entry in steps.items() if not name.startswith("extract")} == {
        "similar {run}.csv": "skipped", "labels labels.csv": "done", "outliers outliers.html": "skipped",
        "outliers far.parquet": "done", "select next.csv": "done",
    }, first["steps"]  # fmt: skip
    chosen = (pile.folder / "asked" / "next.csv").read_text().splitlines()
    assert sorted(row.split(",")[0] for row in chosen[1:4]) == [
        f'"unknown/30{n}.png"' for n in range(3)
    ]  # then those with labels
    assert len(chosen) == 1 + 3 + 24  # a budget of 50, of which three images have no label
    assert len(pq.read_table(pile.folder / "asked" / "far.parquet")) == 24
    pile.fill(2, first=500, folder="night/")
    second = pile.run()
    assert second["exit_code"] == 0, second["steps"]
    steps = {f"{entry['step']} {entry['name']}": entry["result"] for entry in second["steps"] if entry["name"]}
    asked = f"asked/{second['run_id']}.csv"
    assert steps["similar {run}.csv"]["text"] == f"look-alikes of 2 new images, in {asked}"
    assert steps["similar {run}.csv"]["files"] == [str(pile.folder / asked)]
    assert steps["outliers outliers.html"]["text"].endswith(" outliers of 2 new images, in asked/outliers.html")
    assert steps["select next.csv"]["text"] == "5 images to label next, of 5, in asked/next.csv"
    rows = (pile.folder / "asked" / f"{second['run_id']}.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rows[1:]] == ['"night/500.png"'] * 2 + ['"night/501.png"'] * 2
    assert steps["outliers outliers.html"]["images"] == 2
    pile.fill(1, first=600, folder="night/")
    third = pile.run()
    (text,) = [
        entry["result"]["text"] for entry in third["steps"] if entry["step"] == "outliers" and entry["result"]["since"]
    ]
    assert "s of 1 new image, in asked/outliers" in text.replace("1 outlier ", "outliers ")
    assert (pile.folder / "asked" / "outliers.html").read_text().count("<img src=") >= 2
    assert "queries" not in json.dumps(second["steps"])


def test_an_answer_is_found_by_the_record_and_the_page_and_so_is_why_there_is_none(pile):
    pile.fill(12)  # without labels, so that there are none to check
    tables = (
        '[[labels]]\nto = "asked/labels.csv"\n[[outliers]]\nto = "asked/far.csv"\n[report]\nto = "pages/nights.html"'
    )
    pile.job(tables)
    why = [step["why"] for step in pile.run(dry_run=True)["steps"]]
    assert why == [
        "asks of this run's features, into asked/labels.csv", "asks of this run's features, into asked/far.csv",
        "the last 30 nights, into pages/nights.html",
    ]  # fmt: skip
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    labels, outliers, report = record["steps"][2:]
    assert (labels["status"], labels["name"], labels["error_type"]) == ("failed", "labels.csv", "UsageError")
    assert "0 labelled images are too few to be judged in 5 parts" in labels["error"]
    assert not (pile.folder / "asked" / "labels.csv").exists()
    assert outliers["result"]["files"] == [str(pile.folder / "asked" / "far.csv")]
    said = f"{outliers['result']['count']} outliers of 12 images, in asked/far.csv"
    assert (outliers["result"]["text"], report["result"]["text"]) == (said, "pages/nights.html")
    page, text = (pile.folder / "pages" / "nights.html").read_text(), summary_text(record)
    for shown in (page, text):
        assert said in shown
        assert "0 labelled images are too few to be judged in 5 parts" in shown
    assert text.startswith("nightly: FAILED: labels labels.csv (exit code 1)")
