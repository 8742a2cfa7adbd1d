"""Features of a source without a store: the same loader, engine and batches as `extract`, in the listing's order."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from featurepipe.backbones.engine import Engine, Pending
from featurepipe.features.loader import Loaded, StageSeconds
from featurepipe.features.session import Session
from featurepipe.images import Source
from featurepipe.progress import Progress, Silent
from featurepipe.records import bottleneck
from featurepipe.store.keys import KEY_BYTES
from featurepipe.store.writer import Rounding

REMEMBERED_BYTES = 64 * 1024 * 1024
"""Features kept at hand for copies of an image; a copy that comes later is computed again."""

ROW_OBJECTS_BYTES = 512
"""What Python adds to one remembered vector."""

LONGEST_WAIT = 65_536
"""Rows that may wait for a batch to fill, as when thousands of copies follow one image."""


@dataclass(frozen=True)
class FeatureBatch:
    """What became of consecutive rows of a listing; every row is in ``rows`` or in ``rejects``.

    Attributes:
        rows: int64 (m,), the rows with features, ascending.
        keys: uint8 (m, 32), their keys.
        features: for each column (m, D), the values that a store would hold, float16 or float32.
        rejects: the other rows, ascending, each with the reason.
        damage: those of ``rows`` that were kept although they are damaged, ascending, each with what is wrong.
        remarks: how many images were decoded in which way that is to be said, see `Loaded.remarks`.
    """

    rows: np.ndarray
    keys: np.ndarray
    features: Mapping[str, np.ndarray]
    rejects: Sequence[tuple[int, str]]
    damage: Sequence[tuple[int, str]] = ()
    remarks: Mapping[str, int] = field(default_factory=dict)

    def vectors(self) -> np.ndarray:
        """The columns side by side, float32 (m, D)."""
        return np.concatenate([values.astype(np.float32, copy=False) for values in self.features.values()], axis=1)


class FeatureStream:
    """A network made ready, through which any number of sources can be streamed.

    The features are, bit for bit, those that `extract` stores for the same source, space and batch size. Two things are
    out of its reach: a copy of an image that comes long after it is computed anew (so equal only within the batch
    tolerance), and the order in which a store was filled, where a column stops fitting float16.

    Args:
        session: the network and its settings, loaded in this process.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def batches(
        self,
        source: Source,
        listing: pa.Table,
        *,
        clock: StageSeconds | None = None,
        stop: Callable[[], bool] = bool,
        progress: Progress | None = None,
        probes: pa.ChunkedArray | None = None,
    ) -> Iterator[FeatureBatch]:
        """Yields the features of every row of a listing, in its order, in bounded memory.

        Args:
            source: where the images are.
            listing: what it listed.
            clock: where the stages' time is added up.
            stop: asked between images; once true, no more are read, and the rows read so far are the last.
            progress: told how far it is, and of columns that float16 cannot hold.
            probes: locators of images all over the source, as in `Loader.load`.

        Raises:
            NonFiniteFeatures: the network gave NaN or infinity; names the images.
        """
        clock, progress = clock or StageSeconds(), progress or Silent()
        session = self.session
        wanted = tuple(map(str, session.columns))
        queue = _Queue(wanted, self._remembered_rows(), Rounding(session.settled.dtype, progress.say), listing["id"])
        batches = Batches(self._engine, queue.fill, batch_size=session.machine.batch_size, clock=clock)
        loader = session.loader(source, lambda _key: wanted, clock)
        with closing(loader.load(listing, np.arange(listing.num_rows), stop, probes=probes)) as loaded:
            for images in loaded:
                for image in images:
                    if queue.add(image):
                        batches.add(image)
                if len(queue) > LONGEST_WAIT:
                    batches.finish()
                progress.advance(len(images), f"{bottleneck(clock.totals)}-bound")
                yield from queue.take()
        batches.finish()
        yield from queue.take()

    def _engine(self, _columns: tuple[str, ...]) -> Engine:
        return self.session.engine(self.session.columns)

    def _remembered_rows(self) -> int:
        session = self.session
        width = sum(int(np.prod(session.backbone.feature_shape(column))) for column in session.columns)
        remembered = REMEMBERED_BYTES // (4 * width + ROW_OBJECTS_BYTES * len(session.columns))
        return max(session.machine.batch_size, remembered)


class _Feature:
    """One image's features by column, (D,) each, once they are computed."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] | None = None


@dataclass(slots=True)
class _Row:
    """A row on its way: with a feature that is or will be computed, or rejected."""

    row: int
    key: bytes
    feature: _Feature | None
    reason: str | None
    damage: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.feature is None or self.feature.values is not None


class _Queue:
    """Rows in the listing's order: they enter when loaded, get their features batch by batch, and leave from the head.

    Which copies share a feature depends on the order of the rows alone, never on timing.

    Args:
        columns: names of the columns.
        remembered: for how many images the feature is kept at hand for copies.
        rounding: gives features their stored values.
        ids: the listing's ids.
    """

    def __init__(self, columns: Sequence[str], remembered: int, rounding: Rounding, ids: pa.ChunkedArray) -> None:
        self._columns, self._remembered, self._rounding, self._ids = columns, remembered, rounding, ids
        self._rows: deque[_Row] = deque()
        self._recent: OrderedDict[bytes, _Feature] = OrderedDict()
        self._under_way: dict[int, _Feature] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, image: Loaded) -> bool:
        """Enters a row; tells whether its features are to be computed."""
        if image.reason is not None or image.key is None:
            self._rows.append(_Row(image.row, b"", None, image.reason))
            return False
        feature = self._recent.get(image.key)
        is_new = feature is None
        if feature is None:
            feature = self._recent[image.key] = self._under_way[image.row] = _Feature()
            if len(self._recent) > self._remembered:
                self._recent.popitem(last=False)
        self._recent.move_to_end(image.key)
        self._rows.append(_Row(image.row, image.key, feature, None, image.damage, image.remarks))
        return is_new

    def fill(self, images: Sequence[Loaded], features: Mapping[str, np.ndarray]) -> None:
        """Gives the images of one batch their features."""
        ids = self._ids.take(pa.array([image.row for image in images])).to_pylist()
        stored = {column: self._rounding(column, features[column], ids) for column in self._columns}
        for place, image in enumerate(images):
            # Copies, so that one remembered row does not keep its whole batch in memory.
            self._under_way.pop(image.row).values = {name: values[place].copy() for name, values in stored.items()}

    def take(self) -> Iterator[FeatureBatch]:
        """Yields the rows at the head that are done, as one batch, if there are any."""
        done: list[_Row] = []
        while self._rows and self._rows[0].done:
            done.append(self._rows.popleft())
        if done:
            yield self._batch(done)

    def _batch(self, rows: Sequence[_Row]) -> FeatureBatch:
        usable = [(row, row.feature.values) for row in rows if row.feature is not None and row.feature.values]
        keys = np.frombuffer(b"".join(row.key for row, _ in usable), np.uint8).reshape(-1, KEY_BYTES)
        return FeatureBatch(
            rows=np.array([row.row for row, _ in usable], dtype=np.int64),
            keys=keys,
            features={name: _stacked([values[name] for _, values in usable]) for name in self._columns},
            rejects=[(row.row, row.reason) for row in rows if row.reason is not None],
            damage=[(row.row, row.damage) for row in rows if row.damage is not None],
            remarks=Counter(remark for row in rows for remark in row.remarks),
        )


def _stacked(vectors: Sequence[np.ndarray]) -> np.ndarray[Any, Any]:
    """(m, D); float32 where some of the vectors are."""
    return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)


Missing = tuple[str, ...]
Sink = Callable[[list[Loaded], dict[str, np.ndarray]], None]
"""Takes the images of one batch (their pixels are gone) and their features by column, float32 (N, D), in the images' order."""


class Batches:
    """Collects loaded images into batches, runs them, and hands the features to a sink, batch after batch.

    Images that lack different columns (some have one already) go into different batches, so that nothing is computed
    twice; nearly always all images lack the same ones.

    Args:
        make_engine: builds the network for a set of missing columns, once per set.
        sink: where features go.
        batch_size: images per forward.
        clock: where the stages' time is added up.
    """

    def __init__(
        self, make_engine: Callable[[Missing], Engine], sink: Sink, *, batch_size: int, clock: StageSeconds
    ) -> None:
        self._make_engine, self._sink = make_engine, sink
        self._batch_size, self._clock = batch_size, clock
        self._engines: dict[Missing, Engine] = {}
        self._batches: dict[Missing, list[Loaded]] = {}
        self._pending: deque[tuple[list[Loaded], Pending]] = deque()

    def add(self, image: Loaded) -> None:
        """Takes one image with pixels, and runs its batch if that is full."""
        batch = self._batches.setdefault(image.missing, [])
        batch.append(image)
        if len(batch) == self._batch_size:
            self._run(image.missing)

    def finish(self) -> None:
        """Runs what is left and waits for everything under way."""
        for missing in list(self._batches):
            self._run(missing)
        self._drain()

    def _drain(self) -> None:
        while self._pending:
            self._collect()

    def _engine(self, missing: Missing) -> Engine:
        if missing not in self._engines:
            self._drain()  # tracing a network patches torch for all threads, so nothing may run meanwhile
            with self._clock.stage("forward"):
                self._engines[missing] = self._make_engine(missing)
        return self._engines[missing]

    def _run(self, missing: Missing) -> None:
        images = self._batches.pop(missing)
        pixels = torch.stack([image.pixels for image in images if image.pixels is not None])
        for image in images:
            image.pixels = None
        engine = self._engine(missing)
        with self._clock.stage("forward"):
            self._pending.append((images, engine.submit(pixels)))
        while len(self._pending) > engine.streams:
            self._collect()

    def _collect(self) -> None:
        images, pending = self._pending.popleft()
        with self._clock.stage("forward"):
            features = pending.result()
        with self._clock.stage("write"):
            self._sink(images, features)
