"""Piles of files and stores of rows that are too large to be real: sparse files, random keys, narrow features."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

import featurepipe as fp
from featurepipe.images import open_source
from featurepipe.store import FeatureStore, Space
from featurepipe.store.keys import keys_to_arrow

DATASET = "pile"
NETWORK = {"backbone": "lenet5", "weights": "none", "precision": "fp32"}
COLUMN = "f6.1:gap"
WIDTH = 4
PART_ROWS = 16_384  # of a 64 MB part with 2,048 float16 values a row
FOLDER_FILES = 1000
JOB = """
store = "{store}"
dataset = "pile"

[source]
path = "{source}"
retries = 0

[[features]]
backbone = "lenet5"
weights = "none"
precision = "fp32"
"""
STEPS = """
[compact]

[keep]
snapshots = 30
runs = 365
"""


def make_sparse_files(folder: Path, count: int) -> Path:
    """Files that have a size and a time and take no room, in folders of 1,000: a night with nothing new reads none."""
    for number in range(count):
        if number % FOLDER_FILES == 0:
            inner = folder / f"class{number // FOLDER_FILES:05d}"
            inner.mkdir(parents=True)
        descriptor = os.open(inner / f"{number:08d}.jpg", os.O_CREAT | os.O_WRONLY)
        os.ftruncate(descriptor, 20_000 + number % 1_000)
        os.close(descriptor)
    return folder


def listing_of(count: int) -> pa.Table:
    """The listing of so many files that are not there: ``id, label, split, size, mtime_ns``."""
    numbers = np.arange(count)
    folders = pc.utf8_lpad(pa.array(numbers // FOLDER_FILES).cast(pa.string()), 5, "0")
    names = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
    return pa.table(
        {
            "id": pc.binary_join_element_wise("class", folders, "/", names, ".jpg", ""),
            "label": pc.binary_join_element_wise("class", folders, ""),
            "split": pa.nulls(count, pa.string()),
            "size": 20_000 + numbers % 1_000,
            "mtime_ns": numbers * 1_000,
        }
    )


def write_manifest(path: Path, listing: pa.Table, *, folder: str, stats: bool) -> Path:
    """A manifest of listed files, with their sizes and times or without."""
    paths = pc.binary_join_element_wise(f"{folder}/", listing["id"], "")
    columns = listing.select(["id", "label", *(("size", "mtime_ns") if stats else ())])
    pq.write_table(columns.append_column("path", paths), path)
    return path


def write_job(path: Path, source: Path, store: Path, *, steps: bool = False) -> None:
    """A job about a pile, with or without the steps that keep a store in order."""
    path.write_text(JOB.format(store=store, source=source) + (STEPS if steps else ""))


def random_keys(count: int, seed: int = 0) -> np.ndarray:
    """Keys of images that are all different, uint8 (count, 32)."""
    return np.frombuffer(np.random.default_rng(seed).bytes(32 * count), np.uint8).reshape(count, 32)


class Pile:
    """A store that holds what a pile's nights would have left there, without a single image having been read.

    Args:
        folder: Where to put an image that is really computed, which makes the feature space.
        store: The store to make.
        location: Where the pile's source is.
    """

    def __init__(self, folder: Path, store: FeatureStore, location: str) -> None:
        self.store, self._location = store, location
        (folder / "one").mkdir(exist_ok=True)
        pixels = (np.arange(784) % 256).astype(np.uint8).reshape(28, 28)
        Image.fromarray(pixels).save(folder / "one" / "one.png")
        self._record = fp.extract(folder / "one", store, dataset=DATASET, silent=True, **NETWORK)
        self.space: Space = store.space("lenet5")
        for path in (*self.space.part_paths(), *store.path.glob("*s/**/2*.*")):  # its snapshot and record
            path.unlink(missing_ok=True)

    def compute(self, run_id: str, listing: pa.Table, keys: np.ndarray, part_rows: int = PART_ROWS) -> None:
        """Commits a row of features for each listed image, through the store's own writer."""
        features = np.zeros((part_rows, WIDTH), np.float32)
        with self.space.writer(run_id, dataset=DATASET, part_bytes=1 << 40, part_seconds=1e9) as writer:
            for start in range(0, len(keys), part_rows):
                rows = listing.slice(start, part_rows)
                stats = rows["size"].to_numpy(), rows["mtime_ns"].to_numpy()
                columns = {COLUMN: features[: len(rows)]}
                writer.add(keys[start : start + part_rows], rows["id"].to_pylist(), *stats, columns)
                writer.commit()

    def end(self, run_id: str, listing: pa.Table, keys: np.ndarray) -> None:
        """Writes the snapshot and the record of a night that could use every image."""
        count = len(keys)
        columns: dict[str, Any] = {name: listing[name] for name in ("id", "label", "split", "size", "mtime_ns")}
        status = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), ["ok"]).cast(pa.string())
        columns |= {"key": keys_to_arrow(keys), "status": status, "reason": pa.nulls(count, pa.string())}
        self.store.write_snapshot(DATASET, run_id, pa.table(columns))
        counts = {"listed": count, "computed": count, "known": 0, "rejected": 0, "read": count}
        self.store.write_run({**self._record, "run_id": run_id, "source": self._location, "counts": counts})


def fill_store(folder: Path, name: str, source: Path, listing: pa.Table) -> None:
    """Fills ``folder/name`` as if the previous run had computed every listed image, and writes the job ``folder/name.toml``."""
    keys = random_keys(len(listing))
    pile = Pile(folder, FeatureStore(folder / name), open_source(source).location)
    run_id = pile.store.new_run_id()
    pile.compute(run_id, listing, keys)
    pile.end(run_id, listing, keys)
    write_job(folder / f"{name}.toml", source, folder / name)


def fill_nights(folder: Path, name: str, source: Path, *, nights: int, parts: int) -> None:
    """The same with many nights, each of which saw one more label change, and many parts."""
    images = open_source(source)
    listing = images.scan().combine_chunks()
    keys = random_keys(len(listing))
    pile = Pile(folder, FeatureStore(folder / name), images.location)
    pile.compute(pile.store.new_run_id(), listing, keys, part_rows=len(listing) // parts)
    labels = listing["label"].to_pylist()
    for night in range(nights):
        labels[night % len(labels)] = f"night{night:04d}"
        relabelled = listing.set_column(listing.column_names.index("label"), "label", pa.array(labels))
        pile.end(pile.store.new_run_id(), relabelled, keys)
    write_job(folder / f"{name}.toml", source, folder / name)


def build(folder: Path, files: int, rows: int, nights: int, parts: int) -> None:
    """Makes everything that ``bench_nightly`` measures: each store beside its job."""
    pile = make_sparse_files(folder / "pile", files)
    listing = open_source(pile).scan().combine_chunks()
    fill_store(folder, "files", pile, listing)
    write_job(folder / "with_steps.toml", pile, folder / "files", steps=True)
    for name, stats in (("manifest", False), ("manifest_with_stats", True)):
        manifest = write_manifest(folder / f"{name}.parquet", listing, folder=pile.name, stats=stats)
        fill_store(folder, name, manifest, listing)
    many = listing_of(rows)
    fill_store(folder, "large", write_manifest(folder / "large.parquet", many, folder="nowhere", stats=True), many)
    few = make_sparse_files(folder / "few", 2 * parts)
    fill_nights(folder, "one_night", few, nights=1, parts=1)
    fill_nights(folder, "many_nights", few, nights=nights, parts=parts)
