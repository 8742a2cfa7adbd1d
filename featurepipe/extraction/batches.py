"""From loaded images to computed features: batches, engines, and what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from featurepipe.backbones.engine import Engine, Pending
from featurepipe.extraction.load_task import Loaded
from featurepipe.extraction.stream import StageSeconds

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
