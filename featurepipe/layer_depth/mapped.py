"""Which images a map of features shows: the same for the document of a comparison and for a page made later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from featurepipe.reporting.projection import POINTS

if TYPE_CHECKING:
    from featurepipe.store import FeatureSet


def mapped(view: FeatureSet) -> FeatureSet:
    """Draws as many rows as a map shows, at random but always the same of as many rows, in their order."""
    return view.take(np.sort(np.random.default_rng(0).permutation(len(view))[:POINTS]))
