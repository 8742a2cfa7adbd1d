"""Each benchmark runs from end to end in its tiny form and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("bench_store", {"commit_of_raw", "read_all_of_fromfile", "random_rows_times_memmap"}),
        ("bench_rerun", {"times_the_walk", "growth_mb"}),
        ("bench_extract", {"results"}),
        ("bench_heads", {"times_faster", "streamed_times_in_memory", "streamed_peak_mb"}),
    ],
)
def test_a_tiny_run_prints_one_json_document_with_its_figures(name, figures):
    arguments = ["--backbone", "resnet18", "--precision", "fp32"] if name == "bench_extract" else []
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--json", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert figures <= result.keys()
    assert result["machine"]["cores"] >= 1
    if name == "bench_extract":
        assert result["results"][0]["worst_cosine"] >= 0.9999
    else:
        assert all(isinstance(result[figure], int | float) for figure in figures)
