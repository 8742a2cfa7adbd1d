"""The command to type next, as errors name it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def extract_command(
    store: Path,
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    notes: Mapping[str, Any] | None = None,
    node: str | None = None,
) -> str:
    """Writes the ``featurepipe extract`` that would fill a gap; only SOURCE is left to the user.

    Args:
        store: The store's folder.
        dataset: Name of the dataset.
        backbone: Name of the network.
        notes: Of the network's feature space: a random control is asked for by its seed.
        node: The node or column to compute.

    Example:
        >>> extract_command(Path("my store"), backbone="lenet5", notes={"backbone": {"random": True, "seed": 3}})
        "featurepipe extract SOURCE --store 'my store' --backbone lenet5 --weights none --seed 3"
    """
    words = ["featurepipe", "extract", "SOURCE", "--store", str(store)]
    for option, value in (("--dataset", dataset), ("--backbone", backbone)):
        words += [option, value] if value else []
    described = (notes or {}).get("backbone", {})
    if described.get("random"):
        words += ["--weights", "none", "--seed", str(described.get("seed") or 0)]
    words += ["--node", node] if node else []
    return shlex.join(words)
