"""``python -m benchmarks``: runs every benchmark in full and records its result; ``--tiny`` only shows that they work."""

import subprocess
import sys

BENCHMARKS = (
    "bench_store",
    "bench_similar",
    "bench_select",
    "bench_rerun",
    "bench_nightly",
    "bench_scale",
    "bench_extract",
    "bench_decode",
    "bench_heads",
    "bench_multilabel",
    "bench_targets",
    "layer_depth",
    "bench_cluster",
)

for name in BENCHMARKS:
    arguments = sys.argv[1:] or ["--record"]
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=True)
