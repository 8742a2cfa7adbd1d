"""Features of a store in a collection of Qdrant, kept up to date: run it after each night.

    featurepipe run pipelines/nightly.toml; python pipelines/into_qdrant.py pipelines/out/features --url http://localhost:6333

It runs after any night, whatever the exit code: with ``&&`` it would miss those with a few images that could not be used (3).
``--path FOLDER`` in the place of ``--url`` uses the client's local mode, which needs no server, for some ten thousand images.
A copy of this file is yours to change: another payload, quantisation, a filter. Needs ``pip install qdrant-client``.

The collection is compared with the current snapshot by id and key (SHA-256 of the bytes), so it needs no note of the night
before: what is new, changed or relabelled is written, what is gone is deleted, forgotten images too. Vectors of two feature
spaces or columns are never mixed: each point's payload names its own, and a collection takes no other. A point's number is
made of the image's id, which is in the payload.
"""
# ruff: noqa: INP001 - a script to copy, no part of the package

from __future__ import annotations

import argparse
import os
import re
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
from qdrant_client import QdrantClient, models

import featurepipe as fp
from featurepipe.errors import UsageError
from featurepipe.store import FeatureSet
from featurepipe.store.exports import behind

ROWS = 512  # written at a time: memory does not grow with the images, and a request stays below the server's limit
READ = 10_000  # payloads read at a time
DISTANCES = {"cosine": models.Distance.COSINE, "euclid": models.Distance.EUCLID, "dot": models.Distance.DOT}
COMPARED = ("id", "key", "label", "split")
HELD = pa.schema([(name, pa.string()) for name in (*COMPARED, "column", "space")])
IMAGES = uuid.UUID("8d0f3d5e-6f0c-5c3c-9f43-0f6a6f5f3b51")  # points of any store: one id, one number


def point_of(id_: str) -> str:
    """The number of an image's point."""
    return str(uuid.uuid5(IMAGES, id_))


def held_by(client: QdrantClient, collection: str) -> pa.Table:
    """What the collection has: ids, keys, labels, splits, columns and feature spaces, without vectors."""
    rows: list[dict[str, Any]] = []
    offset = None
    while True:
        points, offset = client.scroll(collection, limit=READ, offset=offset, with_payload=True, with_vectors=False)
        rows += [{name: (point.payload or {}).get(name) for name in HELD.names} for point in points]
        if offset is None:
            return pa.Table.from_pylist(rows, schema=HELD)


def check_space(collection: str, held: pa.Table, features: FeatureSet, own_name: str) -> None:
    """Refuses vectors of another feature space or column than the collection's.

    Raises:
        UsageError: They are of another; or it is not known, as of collections by names of their own that earlier recipes made.
    """
    ours = (features.column, features.space_fingerprint)
    allowed = {ours, (None, None)} if collection == own_name else {ours}
    pairs = held.select(["column", "space"]).group_by(["column", "space"]).aggregate([]).to_pylist()
    strange = next((own for pair in pairs if (own := (pair["column"], pair["space"])) not in allowed), None)
    if strange is None:
        return
    of = "something else, or an earlier recipe" if None in strange else f"{strange[0]} of feature space {strange[1]}"
    raise UsageError(
        f"collection {collection} has vectors of {of}, and these are {ours[0]} of feature space {ours[1]}: vectors of two are "
        "never mixed; give another --collection, or delete that one"
    )


def points(features: FeatureSet) -> models.Batch:
    """Images as points."""
    table, keys = features.table, [bytes(key).hex() for key in features.keys]
    columns = (table["id"].to_pylist(), keys, table["label"].to_pylist(), table["split"].to_pylist())
    about = {"column": features.column, "space": features.space_fingerprint}
    payloads = [{**dict(zip(COMPARED, values, strict=True)), **about} for values in zip(*columns, strict=True)]
    numbers = [point_of(id_) for id_ in columns[0]]
    return models.Batch(ids=numbers, payloads=payloads, vectors=features.read("float32").tolist())


def bring_up_to_date(
    store: fp.FeatureStore,
    client: QdrantClient,
    *,
    dataset: str | None = None,
    node: str = "bottleneck",
    backbone: str | None = None,
    collection: str | None = None,
    distance: str = "cosine",
) -> dict[str, Any]:
    """Makes a collection equal the current snapshot; returns its name, how many points it has, and what changed.

    Raises:
        UsageError: The collection has vectors of another feature space or column; nothing is changed.
    """
    features = store.features(dataset or store.only_dataset(), node=node, backbone=backbone)
    parts = (features.origin.dataset, features.space_fingerprint[:12], features.column)
    own_name = re.sub(r"[^A-Za-z0-9_.-]", "-", "-".join(parts))
    name = collection or own_name
    if not client.collection_exists(name):
        client.create_collection(name, models.VectorParams(size=features.shape[1], distance=DISTANCES[distance]))
    held = held_by(client, name)
    check_space(name, held, features, own_name)
    found = behind(features, held.select(list(COMPARED)))
    gone = [point_of(id_) for id_ in found.gone["id"].to_pylist()]
    for start in range(0, len(gone), READ):
        client.delete(name, models.PointIdsList(points=gone[start : start + READ]), wait=True)
    fresh = set(found.fresh.to_pylist())
    changed = features.take([row for row, id_ in enumerate(features.table["id"].to_pylist()) if id_ in fresh])
    for start in range(0, len(changed), ROWS):
        client.upsert(name, points(changed.take(slice(start, start + ROWS))), wait=True)
    return {"collection": name, "points": client.count(name).count, **found.counts}


def main() -> None:
    """Reads the command line, and says what changed; a server's key is in the environment, as QDRANT_API_KEY."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="the feature store")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of the server, such as http://localhost:6333")
    where.add_argument("--path", help="a folder of the client's local mode")
    parser.add_argument("--dataset", help="default: the store's only one")
    parser.add_argument("--node", default="bottleneck", help="which column (default: bottleneck)")
    parser.add_argument("--backbone", help="where the store has several with that column")
    parser.add_argument("--collection", help="its name (default: dataset, feature space and column)")
    parser.add_argument("--distance", choices=DISTANCES, default="cosine", help="of a new collection (default: cosine)")
    args = vars(parser.parse_args())
    url, path, store = args.pop("url"), args.pop("path"), fp.FeatureStore(args.pop("store"), create=False)
    client = QdrantClient(path=path) if path else QdrantClient(url=url, api_key=os.environ.get("QDRANT_API_KEY"))
    told = bring_up_to_date(store, client, **args)
    client.close()
    changes = ", ".join(f"{told[name]:,} {name}" for name in ("new", "changed", "relabelled", "deleted"))
    print(f"{told['collection']}: {told['points']:,} points; {changes}")


if __name__ == "__main__":
    main()
