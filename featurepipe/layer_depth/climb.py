"""Choosing C on images set aside, without fitting the values of C that cannot be it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

AT_ONCE = 3
"""Values of C that are fitted before the first one is judged: the smallest ones take little time, and share passes."""

RULE = (
    f"Values of C are tried from the smallest upwards, {AT_ONCE} at least, until one does worse there than the best by more than "
    "a standard error."
)
"""What ``climb`` does, in words."""


def climb(
    strengths: Sequence[float], accuracies_of: Callable[[Sequence[float]], Sequence[float]], images: int
) -> float:
    """The value of C that does best on the images set aside; of equals the smallest.

    Beyond the best value heads learn the training images by heart, and a fit takes ever longer: on 60,000 images the last
    value took ten times as long as all that mattered. A drop by a standard error of one accuracy is far outside of
    what chance does to the difference of two heads on the same images.

    Args:
        strengths: values of C, ascending.
        accuracies_of: for some of them, the accuracy of each on the images set aside.
        images: how many these are.
    """
    found = list(accuracies_of(strengths[:AT_ONCE]))
    while len(found) < len(strengths) and found[-1] >= max(found) - _standard_error(max(found), images):
        found += accuracies_of([strengths[len(found)]])
    return strengths[int(np.argmax(found))]


def _standard_error(accuracy: float, images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / images)
