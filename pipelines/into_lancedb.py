"""Features of a store in a table of LanceDB, kept up to date: run it after each night.

    featurepipe run pipelines/nightly.toml; python pipelines/into_lancedb.py pipelines/out/features --to pipelines/out/lancedb

It runs after any night, whatever the exit code: with ``&&`` it would miss those with a few images that could not be used (3).
A copy of this file is yours to change: other columns, an index, a filter. Needs ``pip install lancedb``.

The table is compared with the current snapshot by id and key (SHA-256 of the bytes), so it needs no note of the night before:
what is new, changed or relabelled is written, what is gone is deleted, forgotten images too. Vectors of two feature spaces
or columns are never mixed: the table keeps the space's fingerprint and the column in its schema's metadata, and takes no other.

LanceDB keeps earlier versions of a table for queries that are running, and marks deleted rows before it removes them from its
files. Versions older than VERSIONS go in each run. ``--purge``, after images were forgotten, writes the whole table anew and
removes all that was before, so that no byte of theirs is left; no query should be running then, and indexes are to be made again.
"""
# ruff: noqa: INP001 - a script to copy, no part of the package

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

import featurepipe as fp
from featurepipe.errors import UsageError
from featurepipe.store import FeatureSet
from featurepipe.store.exports import behind
from featurepipe.store.keys import keys_to_arrow

ROWS = 4096  # written at a time: memory does not grow with the images
IDS = 1000  # deleted at a time
VERSIONS = timedelta(hours=1)  # how long what was deleted can still be queried


def schema_of(features: FeatureSet) -> pa.Schema:
    """What a row is: id, key, label, split and the vector; and whose vectors they are."""
    texts = [pa.field(name, pa.string()) for name in ("id", "label", "split")]
    vector = pa.field("vector", pa.list_(pa.float32(), features.shape[1]))
    about = {"space": features.space_fingerprint, "column": features.column}
    return pa.schema([*texts, pa.field("key", pa.binary()), vector], metadata=about)


def check_space(rows: Any, features: FeatureSet, own_name: str) -> None:
    """Refuses vectors of another feature space or column than the table's.

    Raises:
        UsageError: They are of another; or it is not known, as of tables by names of their own that earlier recipes made.
    """
    noted = {name.decode(): value.decode() for name, value in (rows.schema.metadata or {}).items()}
    held, ours = (noted.get("column"), noted.get("space")), (features.column, features.space_fingerprint)
    if held == ours or (held == (None, None) and (rows.name == own_name or not rows.count_rows())):
        return
    of = "another table, or an earlier recipe" if held == (None, None) else f"{held[0]} of feature space {held[1]}"
    raise UsageError(
        f"table {rows.name} has vectors of {of}, and these are {ours[0]} of feature space {ours[1]}: vectors of two are never "
        "mixed; give another --table, or drop that one"
    )


def blocks(features: FeatureSet) -> Iterator[pa.Table]:
    """Rows as Arrow tables, some at a time."""
    for start in range(0, len(features), ROWS):
        some = features.take(slice(start, start + ROWS))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(some.read("float32").reshape(-1)), features.shape[1])
        columns = [
            some.table["id"],
            some.table["label"],
            some.table["split"],
            keys_to_arrow(some.keys).cast(pa.binary()),
        ]
        yield pa.table([*columns, vectors], schema=schema_of(features))


def batches_of(features: FeatureSet) -> Iterator[pa.RecordBatch]:
    """The same as batches."""
    for block in blocks(features):
        yield from block.to_batches()


def listed(ids: Sequence[str]) -> str:
    """Ids as SQL writes them."""
    return ", ".join("'" + id_.replace("'", "''") + "'" for id_ in ids)


def bring_up_to_date(
    store: fp.FeatureStore,
    to: str,
    *,
    dataset: str | None = None,
    node: str = "bottleneck",
    backbone: str | None = None,
    table: str | None = None,
    purge: bool = False,
) -> dict[str, Any]:
    """Makes a table equal the current snapshot; returns its name, how many rows it has, and what changed.

    Raises:
        UsageError: The table has vectors of another feature space or column; nothing is changed.
    """
    features = store.features(dataset or store.only_dataset(), node=node, backbone=backbone)
    parts = (features.origin.dataset, features.space_fingerprint[:12], features.column)
    own_name = re.sub(r"[^A-Za-z0-9_.-]", "-", "-".join(parts))
    database = lancedb.connect(to)
    name = table or own_name
    try:
        rows = database.open_table(name)
    except (FileNotFoundError, ValueError):  # which of them it is depends on where the tables are
        rows = database.create_table(name, schema=schema_of(features))
    check_space(rows, features, own_name)
    held = rows.search().select(["id", "key", "label", "split"]).limit(max(1, rows.count_rows())).to_arrow()
    found = behind(features, held.set_column(held.column_names.index("key"), "key", held["key"].cast(pa.binary(32))))
    gone = found.gone["id"].to_pylist()
    for start in range(0, len(gone), IDS):
        rows.delete(f"id IN ({listed(gone[start : start + IDS])})")
    fresh = set(found.fresh.to_pylist())
    changed = features.take([row for row, id_ in enumerate(features.table["id"].to_pylist()) if id_ in fresh])
    for block in blocks(changed):
        rows.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(block)
    if purge:
        batches = pa.RecordBatchReader.from_batches(schema_of(features), batches_of(features))
        rows = database.create_table(name, batches, mode="overwrite")
    rows.optimize(cleanup_older_than=timedelta(milliseconds=1) if purge else VERSIONS)
    return {"table": name, "rows": rows.count_rows(), **found.counts}


def main() -> None:
    """Reads the command line, and says what changed."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="the feature store")
    parser.add_argument("--to", required=True, help="LanceDB's folder, or a URL such as s3://bucket/vectors")
    parser.add_argument("--dataset", help="default: the store's only one")
    parser.add_argument("--node", default="bottleneck", help="which column (default: bottleneck)")
    parser.add_argument("--backbone", help="where the store has several with that column")
    parser.add_argument("--table", help="its name (default: dataset, feature space and column)")
    parser.add_argument("--purge", action="store_true", help="write the table anew, and remove all that was before")
    args = vars(parser.parse_args())
    told = bring_up_to_date(fp.FeatureStore(args.pop("store"), create=False), args.pop("to"), **args)
    changes = ", ".join(f"{told[name]:,} {name}" for name in ("new", "changed", "relabelled", "deleted"))
    print(f"{told['table']}: {told['rows']:,} rows; {changes}")


if __name__ == "__main__":
    main()
