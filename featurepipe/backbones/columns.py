"""Columns: what users ask for, ``node:pooling``, as a value."""

from __future__ import annotations

from typing import NamedTuple

from featurepipe.backbones.pooling import check_pooling
from featurepipe.errors import UsageError

DEFAULT_POOLING = "gap"


class Column(NamedTuple):
    """One kept feature: a node of a backbone and the pooling applied to its output.

    Example:
        >>> str(Column("layer4", "gap"))
        'layer4:gap'
    """

    node: str
    pooling: str

    def __str__(self) -> str:
        return f"{self.node}:{self.pooling}"


def parse_column(text: str) -> Column:
    """Reads ``node`` or ``node:pooling``; the pooling is ``gap`` when left out.

    Whether the node exists is for the backbone to say (``Backbone.columns``).

    Raises:
        UsageError: The node is empty or the pooling unknown.

    Example:
        >>> parse_column("layer3"), parse_column("layer3:avg2x2")
        (Column(node='layer3', pooling='gap'), Column(node='layer3', pooling='avg2x2'))
    """
    node, separator, pooling = text.strip().partition(":")
    if not node:
        raise UsageError(
            f"column {text!r} names no node; write NODE or NODE:POOLING, for instance bottleneck or layer4:gap"
        )
    return Column(node, check_pooling(pooling) if separator else DEFAULT_POOLING)
