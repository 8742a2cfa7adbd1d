"""The public names, and what importing them costs."""

import subprocess
import sys
import time

import pytest

import featurepipe

HEAVY = ("torch", "torchvision", "xgboost", "dask", "h5py", "timm", "sklearn", "pyarrow")


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def loaded(statement):
    """Which heavy modules a fresh interpreter has loaded after ``statement``."""
    done = run(
        "-c",
        f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules])",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_public_surface_is_what_it_was():
    assert featurepipe.__all__ == ["FeatureStore", "__version__", "extract", "load_backbone"]
    assert dir(featurepipe) == sorted(featurepipe.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Store'; it has FeatureStore"):
        featurepipe.Store  # noqa: B018


def test_public_names_are_what_they_say():
    from featurepipe.backbones import load_backbone
    from featurepipe.extraction.extract import extract
    from featurepipe.store import FeatureStore

    assert featurepipe.extract is extract
    assert featurepipe.load_backbone is load_backbone
    assert featurepipe.FeatureStore is FeatureStore
    assert callable(featurepipe.extract)


def test_extract_stays_a_function_whatever_was_imported_before():
    code = "import featurepipe.extraction.extract, featurepipe as fp; print(fp.extract.__name__, callable(fp.extract))"
    assert run("-W", "error", "-c", code).stdout == "extract True\n"


@pytest.mark.parametrize(
    "statement",
    [
        "import featurepipe",
        "import featurepipe.backbones, featurepipe.heads, featurepipe.errors",
        "import featurepipe.cli",
        "from featurepipe.cli import main; main(['--help'])",
        "from featurepipe.cli import main; main(['extract', '--help'])",
        "from featurepipe.cli import main; main(['extract'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(statement):
    assert loaded(statement) == "[]"


def test_the_check_above_can_fail():
    assert loaded("import h5py") == "['h5py']"


def test_help_answers_in_half_a_second():
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        done = run("-m", "featurepipe.cli", "--help")
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0
    assert best < 0.5
