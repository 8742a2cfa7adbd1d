"""Each benchmark runs from end to end in its tiny form and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--backbone", "resnet18", "--precision", "fp32"]
ARGUMENTS = {"bench_extract": SMALL, "layer_depth": [*SMALL, "--weights", "none"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("bench_store", {"commit_of_raw", "read_all_of_fromfile", "random_rows_times_memmap"}),
        ("bench_rerun", {"times_the_walk", "growth_mb"}),
        ("bench_nightly", {"times_the_walk", "peak_mb", "index_bytes_per_row", "compact_bytes_per_row"}),
        ("bench_extract", {"results"}),
        ("bench_heads", {"times_faster", "streamed_times_in_memory", "streamed_peak_mb"}),
        ("layer_depth", {"columns", "results", "script"}),
    ],
)
def test_a_tiny_run_prints_one_json_document_with_its_figures(name, figures):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--json", *ARGUMENTS.get(name, [])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert figures <= result.keys()
    assert result["machine"]["cores"] >= 1
    if name == "bench_extract":
        assert result["results"][0]["worst_cosine"] >= 0.9999
    elif name == "layer_depth":
        (measured,) = result["results"]
        assert measured["ratio"] == pytest.approx(measured["stages_seconds"] / measured["deepest_seconds"], abs=1e-3)
        assert measured["stages"]["images"] == measured["deepest"]["images"] == 24
        # float16 values; an HDF5 file of 24 rows has some 60 bytes of frame for each row and column
        assert 0 <= measured["stages"]["bytes_per_image"] - 2 * sum(result["columns"].values()) < 2000
        assert result["script"]["passes"] == len(result["columns"]) == 5
    else:
        assert all(isinstance(result[figure], int | float) for figure in figures)
    if name == "bench_nightly":
        assert result["daily_s"].keys() == {"one_night", "many_nights"}
        # two run records: the snapshot is another name of the last one, which takes 32 bytes an image
        assert 0 < result["bytes_added_a_night"] < 32 * result["files"]
