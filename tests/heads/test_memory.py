"""``memory`` bounds what a fit takes, head by head, in a process of its own so that nothing else is counted."""

import json
import subprocess
import sys
import textwrap

import pytest

from featurepipe.heads.families import HEADS

ROWS, WIDTH, ALLOWED = 125_000, 200, 30_000_000  # 50 MB as float16, 100 MB as float32
BESIDES = 16_000_000  # labels and weights of 125,000 rows, and what the allocator holds on to
KEPT = {"xgboost": 2 * ROWS * WIDTH}  # its own quantised copy, which the documentation states

FIT = textwrap.dedent("""
    import json, resource, sys, warnings
    import numpy as np
    from featurepipe.heads.families import make_head

    name, rows, width, allowed, path, params = json.loads(sys.argv[1])

    class Stored:
        def __init__(self, count):
            self.shape, self.dtype = (count, width), np.dtype(np.float16)
            self.labels = np.array(["cat", "dog", "eel"])[np.arange(count) % 3]
        def read(self, dtype=None, *, rows=None):
            if rows is None:
                rows = slice(0, self.shape[0])
            if isinstance(rows, slice):
                start, stop, _ = rows.indices(self.shape[0])
                found = np.fromfile(path, np.float16, (stop - start) * width, offset=2 * start * width)
                return found.reshape(-1, width).astype(dtype or np.float16, copy=False)
            rows = np.asarray(rows)  # some of a block are cut out of it: a read of each took most of the time
            found = np.empty((len(rows), width), np.float16)
            for start in range(0, len(rows), 4096):
                some = rows[start : start + 4096]
                low, high = int(some.min()), int(some.max()) + 1
                if high - low <= 8 * len(some):
                    found[start : start + 4096] = self.read(rows=slice(low, high))[some - low]
                else:
                    for place, row in enumerate(some.tolist(), start):
                        found[place] = np.fromfile(path, np.float16, width, offset=2 * row * width)
            return found.astype(dtype or np.float16, copy=False)

    def fit(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two iterations converge to nothing
            make_head(name, out_of_core=True, memory=allowed, **params).fit(Stored(count))

    def peak():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    fit(3000)  # loads libraries and their buffers
    before = peak()
    fit(rows)
    print(peak() - before)
""")

FEW = {
    "logistic": {"max_iter": 3},
    "linear-svm": {"max_iter": 3},
    "xgboost": {"n_estimators": 2, "max_depth": 3},
    "rbf-svm": {"exact_rows": 1000, "n_components": 50},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Made-up features on disk, three classes apart by a little."""
    import numpy as np

    path = tmp_path_factory.mktemp("features") / "x.f16"
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, ROWS, 25_000):
            block = draw.standard_normal((25_000, WIDTH), np.float32)
            block[:, 0] += (start + np.arange(25_000)) % 3
            file.write(block.astype(np.float16).tobytes())
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(HEADS) - {"knn"}))  # knn keeps its rows, and refuses if they do not fit
def test_a_fit_stays_within_its_memory(name, stored):
    order = json.dumps([name, ROWS, WIDTH, ALLOWED, str(stored), FEW.get(name, {})])
    done = subprocess.run([sys.executable, "-c", FIT, order], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= ALLOWED + KEPT.get(name, 0) + BESIDES
