"""What is said of a precision that was measured."""

import pytest

from featurepipe.backbones.engine import PrecisionChoice


@pytest.mark.parametrize(
    ("precision", "cosine", "says"),
    [
        ("fp32", 0.998999, "worst cosine of 0.998999 over 8 images: not kept, the bound is 0.999; fp32 instead"),
        ("fp32", 0.99899999999, "worst cosine of 0.99899999999 over 8 images: not kept"),
        ("bf16", 0.999, "worst cosine of 0.99900 over 8 images: kept"),
        ("bf16", 0.9990000001, "worst cosine of 0.99900 over 8 images: kept"),
        ("fp32", 0.98, "worst cosine of 0.98000 over 8 images: not kept"),
    ],
)
def test_the_reason_shows_on_which_side_of_the_bound_a_cosine_is(precision, cosine, says):
    assert says in PrecisionChoice(precision, "bf16", cosine, 8).reason
