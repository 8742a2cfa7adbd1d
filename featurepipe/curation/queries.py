"""What look-alikes are looked for of: images of the store by id, or new ones, whose features are stored or computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.curation.options import SimilarOptions
from featurepipe.display import counted
from featurepipe.errors import Message, Option, Reject, UsageError, unknown
from featurepipe.features.options import Options
from featurepipe.progress import announcer
from featurepipe.store import FeatureSet, FeatureStore, Space
from featurepipe.store.choice import require_snapshot
from featurepipe.store.keys import as_keys
from featurepipe.store.rows import ColumnRows, WideRows

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone
    from featurepipe.features.session import Session

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

_FEW = 32  # ids that are looked for one by one: of a million that takes 5 ms each, and a table of all 300 ms
_NEAR = 10_000  # ids that a misspelt one is compared with, in less than a second


@dataclass(frozen=True)
class Queries:
    """What look-alikes are looked for of.

    Attributes:
        ids: (q,) of the images.
        vectors: (q, D) their features.
        own: (q,) position of each among the images that are searched, where it is one of them; else -1.
        payloads: What was read of new images, by id, for thumbnails.
        rejects: Images that cannot be used, and why.
        computed: How many features the network had to compute: the others are in the store.
    """

    ids: tuple[str, ...]
    vectors: Floats
    own: Positions
    payloads: Mapping[str, Any]
    rejects: Mapping[str, str]
    computed: int = 0


def queries_of(
    store: FeatureStore, features: FeatureSet, queries: Any, options: SimilarOptions, *, silent: bool
) -> Queries:
    """The features of all that was asked with."""
    named = of_ids(store, features, options.query_ids, options.query_dataset) if options.query_ids else None
    new = None
    if queries is not None and not (isinstance(queries, list | tuple) and not queries):
        new = _of_images(store, features, queries, options, silent=silent)
    parts = [part for part in (named, new) if part is not None]
    if not parts:
        raise UsageError(
            Message(
                "nothing is asked for: name images to find look-alikes of, or one of the store with ",
                Option("query_ids"),
            )
        )
    ids = [id_ for part in parts for id_ in part.ids]
    twice = next((id_ for id_, times in Counter(ids).items() if times > 1), None)
    if twice is not None:
        raise UsageError(f"{twice!r} is asked for twice; name each image once")
    last = parts[-1]
    vectors, own = np.concatenate([part.vectors for part in parts]), np.concatenate([part.own for part in parts])
    return Queries(tuple(ids), vectors, own, last.payloads, last.rejects, last.computed)


def of_ids(store: FeatureStore, features: FeatureSet, ids: Sequence[str], dataset: str | None = None) -> Queries:
    """Features of images of the store by id.

    Args:
        store: The store.
        features: The images that are searched.
        ids: Of the images.
        dataset: Whose images they are, if it is not the one that is searched.

    Raises:
        UsageError: An id is unknown, or of an image that could not be used.
    """
    of = features
    if dataset is not None and dataset != features.origin.dataset:
        of = store.features(dataset, node=list(features.columns), backbone=features.space_fingerprint)
    rows = _rows_of(of.table["id"], ids)
    if (rows < 0).any():
        raise _unknown_id(store, of, ids[int(np.argmin(rows))])
    own = rows if of is features else np.full(len(rows), -1, np.int64)
    return Queries(tuple(ids), of.read(np.float32, rows=rows), own, {}, {})


def _rows_of(column: pa.ChunkedArray, ids: Sequence[str]) -> Positions:
    """(q,) rows of some ids, -1 for one that is nowhere."""
    if len(ids) <= _FEW:
        return np.array([pc.index(column, id_).as_py() for id_ in ids], np.int64)
    place = pc.index_in(pa.array(ids, pa.string()), value_set=column.combine_chunks())
    return np.asarray(pc.fill_null(place, -1).to_numpy(zero_copy_only=False)).astype(np.int64)


def _unknown_id(store: FeatureStore, of: FeatureSet, id_: str) -> UsageError:
    """What to say of an id that has no features: it was rejected, or is nowhere."""
    dataset = of.origin.dataset
    rejected = require_snapshot(store, dataset).filter(pc.field("id") == id_)
    if rejected.num_rows and rejected["reason"][0].as_py():
        return UsageError(f"image {id_!r} of dataset {dataset} has no features: {rejected['reason'][0].as_py()}")
    inside = pc.match_substring(of.table["id"], Path(id_).name)
    near = of.table["id"].filter(inside)[:100].to_pylist() or of.table["id"][:_NEAR].to_pylist()
    return unknown("image", id_, near, where=f"dataset {dataset}")


def _of_images(
    store: FeatureStore, features: FeatureSet, queries: Any, options: SimilarOptions, *, silent: bool
) -> Queries:
    """Features of new images: stored ones where the store knows the bytes, and others computed."""
    from featurepipe.features.reading import opened  # 0.2 s, which a query by id is spared
    from featurepipe.images import key_of

    source = opened(queries, options)
    listing = source.scan()
    ids, locators = listing["id"].to_pylist(), listing["locator"].to_pylist()
    payloads: dict[str, Any] = {}
    rejects: dict[str, str] = {}
    for id_, locator in zip(ids, locators, strict=True):
        try:
            payloads[id_] = source.read(locator)
        except Reject as reject:
            rejects[id_] = str(reject)
    space = store.space(features.space_fingerprint)
    keys = as_keys([key_of(payload) for payload in payloads.values()])
    vectors, known = stored_vectors(space, features.columns, keys)
    rest = [id_ for id_, there in zip(payloads, known, strict=True) if not there]
    if rest:
        from featurepipe.features.stream import FeatureStream  # loads PyTorch, which takes seconds

        at = {id_: place for place, id_ in enumerate(payloads)}
        chosen = listing.filter(pc.is_in(listing["id"], pa.array(rest, pa.string())))
        announcer(silent=silent)(f"computing the features of {counted(len(rest), 'image')} by {space.backbone}")
        session = session_of(space, features.columns, options)
        for batch in FeatureStream(session).batches(source, chosen):
            names = chosen["id"].take(pa.array(batch.rows)).to_pylist()
            if names:
                vectors[[at[id_] for id_ in names]] = batch.vectors()
                known[[at[id_] for id_ in names]] = True
            rejects |= {chosen["id"][row].as_py(): reason for row, reason in batch.rejects}
    usable = [id_ for id_, there in zip(payloads, known, strict=True) if there]
    if not usable:
        first, reason = next(iter(rejects.items()), (str(source.name), "it holds no image"))
        raise UsageError(f"nothing to look for: {first} cannot be used: {reason}")
    shown = {id_: payloads[id_] for id_ in usable}
    return Queries(tuple(usable), vectors[known], np.full(len(usable), -1, np.int64), shown, rejects, len(rest))


def stored_vectors(
    space: Space, columns: Sequence[str], keys: npt.NDArray[np.uint8]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Reads the features of images by their keys.

    Args:
        space: The feature space.
        columns: In the order of the feature vector.
        keys: (m, 32).

    Returns:
        (m, D) features, zeros where there are none, and (m,) whether there are any.
    """
    index, widths = space.index(columns), space.columns()
    found = [index.locate(keys, column) for column in columns]
    known = np.logical_and.reduce([there for _, _, there in found]) if len(keys) else np.zeros(0, np.bool_)
    rows = WideRows(
        tuple(
            ColumnRows.of(column, index.parts, part[known], row[known], width=widths[column].width)
            for column, (part, row, _) in zip(columns, found, strict=True)
        )
    )
    vectors = np.zeros((len(keys), sum(widths[column].width for column in columns)), np.float32)
    vectors[known] = rows.read(np.float32)
    return vectors, known


def session_of(space: Space, columns: Sequence[str], options: SimilarOptions) -> Session:
    """The network of a feature space, loaded and compared with it.

    Raises:
        UsageError: The space names code that is not trusted, or the network gives other features here; names what differs.
        WeightsNotFound: Its weights are not at hand.
    """
    from featurepipe.backbones.from_user import check_trusted
    from featurepipe.features.session import Session

    check_trusted(space.backbone, options.trust_code, named_by="the store")
    described: Mapping[str, Any] = space.notes.get("backbone", {})
    label = str(described.get("weights", "DEFAULT"))
    weights = "none" if described.get("random") else label
    if options.weights is not None:
        weights = str(options.weights)
    elif label.startswith("file:"):
        raise UsageError(
            Message(
                f"the features of {space.name} were computed with weights of your own ({label}); for new images give them: ",
                Option("weights", "FILE"),
            )
        )

    def refusal(network: Backbone, changed: list[str]) -> UsageError:
        return UsageError(
            f"the features of {space.name} differ from those that {network.name} gives here ({', '.join(changed)}), so that new "
            "images cannot be compared with them; use the versions and weights that they were computed with, or extract again"
        )

    asked = Options(
        backbone=space.backbone, weights=weights, seed=int(described.get("seed") or 0), workers=options.workers
    )
    return Session.of_space(space.fields, columns, options, asked, why="as in the feature space", refuse=refusal)
