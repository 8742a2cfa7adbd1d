"""Which precision is chosen, on what evidence, and what is said of it."""

import numpy as np
import pytest
import torch

from featurepipe.backbones import engine as precision
from featurepipe.backbones.engine import ENOUGH_IMAGES, PrecisionChoice, choose_precision


@pytest.mark.parametrize(
    ("precision", "cosine", "says"),
    [
        ("fp32", 0.999949, "worst cosine of 0.999949 over 128 images: not kept, the bound is 0.99995; fp32 instead"),
        ("fp32", 0.99994999999, "worst cosine of 0.99994999999 over 128 images: not kept"),
        ("bf16", 0.99995, "worst cosine of 0.99995 over 128 images: kept"),
        ("bf16", 0.9999500001, "worst cosine of 0.99995 over 128 images: kept"),
        ("fp32", 0.98, "worst cosine of 0.98000 over 128 images: not kept"),
    ],
)
def test_the_reason_shows_on_which_side_of_the_bound_a_cosine_is(precision, cosine, says):
    reason = PrecisionChoice(precision, "bf16", cosine, 128).reason
    assert says in reason
    assert reason.startswith(
        "bf16 agrees with fp32 to a " if precision == "bf16" else "bf16 disagrees with fp32, with a "
    )


def test_the_reason_tells_too_little_evidence_from_a_bad_agreement():
    assert "over 1 image: not kept, as 128 images must agree" in PrecisionChoice("fp32", "bf16", 0.99999, 1).reason
    assert (
        PrecisionChoice("fp32", "bf16").reason
        == "there are too few images to compare bf16 with fp32 on, 128 are needed"
    )


class Turning:
    """Features of one image are a unit vector, turned in reduced precision by the angle whose cosine the image's pixel tells."""

    def __init__(self, _backbone, _columns, *, precision, device, batch_size):
        self.precision = precision

    def __call__(self, batch):
        distance = batch[:, 0, 0, 0].numpy() * 1e-5 * (self.precision != "fp32")
        return {"a": np.ones((len(batch), 2)), "b": np.stack([1 - distance, np.sqrt(1 - (1 - distance) ** 2)], axis=1)}


def chosen(monkeypatch, distances, at_once=16, **more):
    """The choice for images with these 1 - cosine (of 1e-5), and how many batches were asked for."""
    monkeypatch.setattr(precision, "Engine", Turning)
    images = torch.tensor(distances, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    asked = []
    batches = (asked.append(at) or images[at : at + at_once] for at in range(0, len(images), at_once))
    choice, engine = choose_precision(None, [], batches, "cpu", tried="bf16", **more)
    assert engine.precision == choice.precision
    return choice, len(asked)


def test_enough_images_that_agree_with_a_margin_keep_it(monkeypatch):
    choice, batches = chosen(monkeypatch, [4] * 200)
    assert (choice.precision, choice.images, batches) == ("bf16", 128, 8)
    assert choice.worst_cosine == pytest.approx(1 - 4e-5, abs=1e-9)


def test_one_image_beyond_the_margin_keeps_fp32_though_it_is_within_the_promise(monkeypatch):
    choice, batches = chosen(monkeypatch, [1] * 127 + [6] + [1] * 72)
    assert (choice.precision, choice.images, batches) == ("fp32", 128, 8)
    assert choice.worst_cosine == pytest.approx(1 - 6e-5, abs=1e-9)


def test_the_first_bad_image_ends_the_comparison(monkeypatch):
    choice, batches = chosen(monkeypatch, [1] * 20 + [100] + [1] * 200)
    assert (choice.precision, choice.images, batches) == ("fp32", 32, 2)


def test_too_few_images_keep_fp32_however_well_they_agree(monkeypatch):
    choice, batches = chosen(monkeypatch, [0] * (ENOUGH_IMAGES - 1))
    assert (choice.precision, choice.images, batches) == ("fp32", 127, 8)
    assert choice.worst_cosine == pytest.approx(1, abs=1e-12)
    assert chosen(monkeypatch, [0] * 3, enough=1)[0].precision == "bf16"  # where a store holds it


def test_the_rule_refuses_what_was_kept_on_sixteen_images_by_luck(monkeypatch):
    """Of 1,000 sprites 2 in 100 are beyond 0.999 while the median is at 0.99956: most draws of 16 have none of the 2."""
    rng = np.random.default_rng(0)
    sprites = rng.permutation([44] * 800 + [64] * 150 + [90] * 29 + [200] * 21)
    by_luck = [max(rng.choice(sprites, 16, replace=False)) <= 100 for _ in range(200)]
    assert 0.6 < np.mean(by_luck) < 0.85
    assert chosen(monkeypatch, sprites.tolist())[0].precision == "fp32"
