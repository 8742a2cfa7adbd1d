"""Frozen pretrained networks: loading, nodes, preprocessing, pooling, precision.

Names are imported when they are first used, so that ``import featurepipe.backbones`` does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurepipe.lazy_names import import_within, lazy_names, without_compiler

if TYPE_CHECKING:
    from featurepipe.backbones.engine import node_times
    from featurepipe.backbones.loading import (
        Backbone,
        BackboneInfo,
        default_backbone,
        list_backbones,
        load_backbone,
        timm_models,
        weights_at_hand,
    )
    from featurepipe.backbones.nodes import NodeInfo
    from featurepipe.backbones.pooling import Column, parse_column, pool
    from featurepipe.backbones.preprocessing import Preprocessing
    from featurepipe.backbones.stages import bounded_pooling

__all__ = [
    "Backbone",
    "BackboneInfo",
    "Column",
    "NodeInfo",
    "Preprocessing",
    "bounded_pooling",
    "default_backbone",
    "list_backbones",
    "load_backbone",
    "node_times",
    "parse_column",
    "pool",
    "timm_models",
    "weights_at_hand",
]

_HOMES = {
    "Backbone": "loading",
    "BackboneInfo": "loading",
    "Column": "pooling",
    "NodeInfo": "nodes",
    "Preprocessing": "preprocessing",
    "bounded_pooling": "stages",
    "default_backbone": "loading",
    "list_backbones": "loading",
    "load_backbone": "loading",
    "node_times": "engine",
    "parse_column": "pooling",
    "pool": "pooling",
    "timm_models": "loading",
    "weights_at_hand": "loading",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)


import_within(["torchvision", "torchvision.tv_tensors"], without_compiler)
