"""``--node recommended``: the column that the last comparison of layers recommends, for the task that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from featurepipe.errors import Message, Option, UsageError
from featurepipe.store import FeatureStore

RECOMMENDED = "recommended"
"""Instead of a node: the column that the last comparison of layers (``featurepipe depth``) recommends."""


def asks_for_it(nodes: str | Sequence[str]) -> bool:
    """Whether the recommended column is wanted, not one of that name."""
    return nodes in (RECOMMENDED, [RECOMMENDED], (RECOMMENDED,))


def last_comparison(store: FeatureStore, dataset: str, backbone: str | None, say: Callable[[str], None]) -> Any:
    """The document of the last comparison of a dataset's layers, of any network or of ``backbone``.

    Raises:
        UsageError: they have not been compared.
    """
    documents = store.depth_documents(dataset)
    if backbone is not None:
        spaces = {store.space(backbone, dataset=dataset).fingerprint}
        documents = [document for document in documents if document["space"]["fingerprint"] in spaces]
    if not documents:
        of = f" of {backbone}" if backbone else ""
        raise UsageError(
            Message(
                f"the layers{of} have not been compared on dataset {dataset}, so none is recommended; run: featurepipe depth "
                f"SOURCE --store {store.path} --dataset {dataset}, or name a column with ",
                Option("nodes"),
            )
        )
    found, own = documents[-1]["recommended"], _with_labels_of(documents[-1])
    say(
        f"recommended on {documents[-1]['provenance']['when'][:10]}{own}: {found['column']} (there {found['accuracy']:.4f}: "
        f"{found['head']}, its parameters chosen in each fold)"
    )
    return documents[-1]


def check_same_task(
    comparison: Mapping[str, Any], classes: Sequence[str], labels: Any, say: Callable[[str], None]
) -> None:
    """Says what the comparison was made for, where that is not quite what is trained; which layer is best may differ.

    Args:
        comparison: the document.
        classes: of the images to train on.
        labels: given instead of the dataset's, or None.
        say: told what differs.

    Raises:
        UsageError: no class is the same, so that the recommendation says nothing about this task.
    """
    compared = list(comparison["classes"])
    again = Message("compare again with featurepipe depth, or name a column with ", Option("nodes"))
    if not set(classes) & set(compared):
        raise UsageError(
            Message(
                f"layers were compared on other classes{_with_labels_of(comparison)}: {_some(compared)}; to train are "
                f"{_some(classes)}. Which layer is best for those may be none for these: ",
                again,
            )
        )
    differ = [f"{_some(names)} {what}" for names, what in (
        ([name for name in classes if name not in compared], "were not there then"),
        ([name for name in compared if name not in classes], "are not here now"),
    ) if names]  # fmt: skip
    if differ:
        say(f"the recommendation is of other classes: {', '.join(differ)}; if that matters, {again}")
    own = _name_of(labels)
    if own != comparison.get("labels"):
        say(
            f"the recommendation was made with the labels of {comparison.get('labels') or 'the dataset'}, not of "
            f"{own or 'the dataset'}; if these are others, {again}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _with_labels_of(comparison: Mapping[str, Any]) -> str:
    return f" with the labels of {comparison['labels']}" if comparison.get("labels") else ""


def _name_of(labels: Any) -> str | None:
    """As the comparison's document has it."""
    if labels is None:
        return None
    return Path(labels).name if isinstance(labels, str | PathLike) else type(labels).__name__
