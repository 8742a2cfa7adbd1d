"""The recipes run from end to end, offline, and what they find is what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import featurepipe as fp

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "pipelines" / "lenet_transfer.py"
TASKS = ["digits 0-4 (source)", "digits 5-9", "printed digits 0-4", "printed letters"]
DEPTHS = ["c1:avg14x14", "s2:flatten", "c3:flatten", "s4:flatten", "c5", "f6", "output"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("lenet_transfer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lenet_transfer"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def quick_run(out: Path, launcher: Any) -> tuple[Path, str, dict[str, Any]]:
    """Its folder, what it printed, and its result; in a fork, where PyTorch is loaded and nodes are timed for an instant."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = launcher.start(code, [SCRIPT, "--out", out, "--quick", "--tune"], out).wait()
    assert run.code == 0, run.err
    return out, run.out, json.loads((out / "result.json").read_text())


def accuracies(result: dict[str, Any], task: str, network: str) -> dict[str, float]:
    return {r["depth"]: r["accuracy"] for r in result["results"] if r["task"] == task and r["network"] == network}


def the_result_holds_every_task_and_depth_with_its_interval(finished):
    _, _, result = finished
    assert list(dict.fromkeys(row["task"] for row in result["results"])) == TASKS
    for task in TASKS:
        assert list(accuracies(result, task, "trained")) == DEPTHS
        assert list(accuracies(result, task, "random")) == DEPTHS
        assert list(accuracies(result, task, "none")) == ["pixels"]
    for row in result["results"]:
        assert row["accuracy"] == pytest.approx(np.mean(row["cells"]))
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert np.shape(row["cells"]) == (1, 3)


def folds_that_agree_by_chance_are_no_certainty(finished):
    from featurepipe.heads.statistics.comparison import over_images

    out, _, result = finished
    for row in result["results"]:
        name = "-".join("".join(c if c.isalnum() else " " for c in row["task"]).split())
        count = len(np.load(out / "images" / f"{name}.npz")["labels"])
        least = over_images(np.arange(count) < round(row["accuracy"] * count))
        assert row["high"] - row["low"] >= 0.98 * (least.high - least.low)


def it_learns_its_own_digits_and_its_last_layers_serve_them_alone(finished):
    _, _, result = finished
    assert result["networks"][0]["accuracy"] >= 0.95  # of held-out digits
    source = accuracies(result, "digits 0-4 (source)", "trained")
    assert max(source[depth] for depth in ("c5", "f6", "output")) >= 0.95
    for task in ("digits 5-9", "printed letters"):
        transferred = accuracies(result, task, "trained")
        shallow = max(transferred[depth] for depth in DEPTHS[:4])
        assert shallow >= 0.85
        assert transferred["output"] <= shallow - 0.08
        assert transferred["output"] >= 0.2  # chance, of five classes
    random = accuracies(result, "digits 0-4 (source)", "random")
    assert source["output"] >= random["output"] + 0.05  # what training is worth


def the_network_is_frozen_and_its_features_are_those_of_the_saved_weights(finished):
    out, _, result = finished
    (network,) = result["networks"]
    file = out / network["weights"]
    assert fp.load_backbone("lenet5", str(file)).weights_sha256 == network["sha256"] == network["sha256_of_features"]
    state = torch.load(file, weights_only=True)
    images = np.load(out / "images" / "digits-5-9.npz")["images"]
    module = fp.load_backbone("lenet5", "none").module
    module.load_state_dict(state)
    with torch.inference_mode():
        expected = module((torch.from_numpy(images)[:, None] / 255 - 0.5) / 0.5).numpy()
    space = next(s for s in fp.FeatureStore(out / "store").spaces() if s.fields["weights_sha256"] == network["sha256"])
    found, _ = fp.FeatureStore(out / "store").features("digits-5-9", node="output", backbone=space.fingerprint).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def it_ends_in_a_table_a_sentence_per_task_and_a_picture(finished):
    from PIL import Image

    out, printed, result = finished
    row = next(r for r in result["results"] if (r["task"], r["depth"], r["network"]) == (TASKS[3], "f6", "trained"))
    (line,) = [line for line in printed.splitlines() if line.startswith("f6 ")]
    assert f"{100 * row['accuracy']:.1f} +-" in line
    for task in TASKS:
        assert f"{task}: best at " in printed
    with Image.open(out / "transfer.png") as picture:
        assert picture.width >= 1200
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (colours == (0x0B, 0x57, 0xD0)).all(1).sum() > 500  # the trained networks' curves


def tuned_routes_are_compared_for_every_task_on_the_same_images(finished):
    _, printed, result = finished
    for task in TASKS:
        rows = {row["route"]: row for row in result["routes"] if row["task"] == task}
        assert list(rows) == ["bottleneck", "tail", "full", "scratch"]
        assert len({row["images"] for row in rows.values()}) == 1
        assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows.values())
        assert sum(row["recommended"] for row in rows.values()) == 1
        assert rows["bottleneck"]["accuracy"] > rows["scratch"]["accuracy"]  # five epochs of a few dozen images
        (line,) = [line for line in printed.splitlines() if line.startswith(task) and "*" in line]
        assert f"{100 * rows['tail']['accuracy']:.1f}" in line


@pytest.mark.slow
def test_the_quick_run(tmp_path, launcher):
    """One test of all, so that it runs once however many processes share the tests."""
    finished = quick_run(tmp_path, launcher)
    for is_so in (
        the_result_holds_every_task_and_depth_with_its_interval,
        folds_that_agree_by_chance_are_no_certainty,
        it_learns_its_own_digits_and_its_last_layers_serve_them_alone,
        the_network_is_frozen_and_its_features_are_those_of_the_saved_weights,
        it_ends_in_a_table_a_sentence_per_task_and_a_picture,
        tuned_routes_are_compared_for_every_task_on_the_same_images,
    ):
        is_so(finished)


def test_glyphs_are_the_same_for_the_same_seed_and_no_two_alike(recipe):
    once, again, other = (recipe.glyphs("4A", 6, recipe.DIGITS_CAMERA, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(once.images, again.images)
    assert once.labels.tolist() == ["4"] * 6 + ["A"] * 6
    assert not np.array_equal(once.images, other.images)
    assert len({image.tobytes() for image in once.images}) == 12


def test_glyphs_look_like_the_handwritten_digits(recipe):
    digits = recipe.handwritten_digits()
    glyphs = recipe.glyphs("0123456789", 8, recipe.DIGITS_CAMERA, 0)
    for task in (digits, glyphs):
        assert task.images.dtype == np.uint8
        assert task.images.shape[1:] == (32, 32)
        assert task.images[:, :2].max() == task.images[:, :, -2:].max() == 0  # the margin
        assert np.median(task.images) < 60 < np.percentile(task.images, 90)  # bright ink on a dark ground
    rows, columns = (np.flatnonzero(glyphs.images[0].max(axis) > 64) for axis in (1, 0))
    assert 18 <= np.ptp(rows) <= 28  # a 0 is as high as the frame, nearly
    assert np.ptp(columns) < np.ptp(rows)
    means = [task.images.mean() for task in (digits, glyphs)]
    assert 0.6 <= means[0] / means[1] <= 1.6


def test_every_font_draws_every_character_its_own_way(recipe):
    from PIL import ImageFont

    rng = np.random.default_rng(0)
    folder = Path(recipe.mpl.get_data_path()) / "fonts" / "ttf"
    for name in recipe.FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 64)
        drawn = {recipe.draw_glyph(c, font, 1.0, rng).tobytes() for c in "01234" + recipe.LETTERS}
        assert len(drawn) == 5 + len(recipe.LETTERS), name
        masks = {
            bytes(font.getmask(c)) for c in "01234" + recipe.LETTERS
        }  # a box for what a font lacks would be one mask
        assert len(masks) == 5 + len(recipe.LETTERS), name


def test_idx_folders_take_the_place_of_the_digits(recipe, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + (40).to_bytes(4, "big") + labels.tobytes())
    task = recipe.idx_task(tmp_path, 3, recipe.MNIST_CAMERA)
    assert np.unique(task.labels, return_counts=True)[1].tolist() == [3] * 10
    places = [int(np.flatnonzero((pixels == image[2:-2, 2:-2]).all((1, 2)))[0]) for image in task.images]  # as they are
    assert [str(labels[place]) for place in places] == task.labels.tolist()


def test_worse_means_that_all_deeper_ones_are_worse_by_more_than_chance(recipe):
    def curve(*means: float) -> list[dict[str, Any]]:
        noise = np.array([-0.01, 0.0, 0.01, 0.005, -0.005])
        return [{"accuracy": m, "cells": [(m + noise * (-1) ** k).tolist()]} for k, m in enumerate(means)]

    assert recipe.first_worse(curve(0.9, 0.9, 0.5, 0.4), 5) == 2
    assert recipe.first_worse(curve(0.5, 0.9, 0.9, 0.9), 5) == 4  # only shallow ones are worse
    assert recipe.first_worse(curve(0.5, 0.9, 0.5, 0.9), 5) == 4  # the last is as good as the best
