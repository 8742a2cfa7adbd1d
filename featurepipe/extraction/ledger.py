"""The counts of a run, which must balance: every listed image is computed, known or rejected, whoever worked on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe import records
from featurepipe.errors import FeaturepipeError
from featurepipe.extraction.plan import KeySet, MissingColumns, Plan
from featurepipe.extraction.shards import COMPUTED, UNTOUCHED, Shard, ShardResult, ShardRun
from featurepipe.features.loader import Loaded, StageSeconds
from featurepipe.features.stream import Batches
from featurepipe.partitions import Codes, Entries, bucket_count, bucketed, copied, partitions, zeros
from featurepipe.store import Space
from featurepipe.store.keys import KEY_BYTES, KeyIndex, prefixes_of
from featurepipe.store.parts import PartInfo

FACTS = ["id", "size", "mtime_ns"]
_KEYED = np.dtype([("key", f"S{KEY_BYTES}"), ("kind", np.uint16)])


def committed(parts: Sequence[PartInfo], keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which of some keys, uint8 (n, 32), are in one of these parts, with whatever columns: bool (n,)."""
    return np.asarray(KeyIndex(parts=parts, on_damage=lambda _part, _error: None).contains(keys))


@dataclass
class ExtractionLedger:
    """What became of every row of a listing.

    Attributes:
        keys: uint8 (rows, 32), filled where ``has_key``.
        has_key: bool (rows,), which images could be read, now or before.
        reasons: why an image was rejected, by row.
        damage: what is wrong with an image that was kept on request although it is damaged, by row.
        computed: rows whose features were computed and handed to the store.
        known: rows whose features the store had, or gets from another row with the same bytes.
        copies: of these, the rows with the bytes of one that is among the computed.
        copied: how many copies there are of which bytes, where this process computed them.
        read: how many images were read.
        tried_again: how many of those could be read only at a further try.
        remarks: how many images were decoded in which way that is to be said, see `Loaded.remarks`.
        columns: for how many images each column was computed.
        seconds: wall-clock time of it all.
        busy: what all workers together have spent, where a cluster computed; else None.
        cluster: who computed there, and what, as plain JSON values; else None.
    """

    keys: np.ndarray
    has_key: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    computed: int = 0
    known: int = 0
    copies: int = 0
    copied: Counter[bytes] = field(default_factory=Counter, repr=False)
    read: int = 0
    tried_again: int = 0
    remarks: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: float | None = None
    cluster: dict[str, Any] | None = None

    @classmethod
    def of(cls, plan: Plan, missing: MissingColumns) -> Self:
        """The ledger of work that has not begun: what is known and what was rejected before is settled."""
        ledger = cls(copied(plan.keys), copied(plan.has_key), known=plan.known)
        ledger.reasons = {int(row): missing.reasons[plan.keys[row].tobytes()] for row in plan.rejected}
        damaged = KeySet(missing.damaged)
        for part in partitions(len(plan.keys)) if missing.damaged else ():
            settled = plan.has_key[part] & damaged.contains(plan.keys[part])
            first, last = np.searchsorted(plan.todo, [part.start, part.stop])
            settled[plan.todo[first:last] - part.start] = False
            rows = np.flatnonzero(settled) + part.start
            ledger.damage |= {int(row): missing.damaged[plan.keys[row].tobytes()] for row in rows}
        return ledger

    @property
    def accounted(self) -> int:
        """How many rows are computed, known or rejected."""
        return self.computed + self.known + len(self.reasons)

    def lose_copies(self, parts: Sequence[PartInfo]) -> None:
        """Counts copies of bytes that are in none of these parts as neither known nor copies: they are left, too."""
        if not self.copied:
            return
        keys = np.frombuffer(b"".join(self.copied), np.uint8).reshape(-1, KEY_BYTES)
        counts = np.fromiter(self.copied.values(), np.int64, len(keys))
        lost = int(counts[~committed(parts, keys)].sum())
        self.known -= lost
        self.copies -= lost

    def check(self) -> None:
        """Every listed image is accounted for, or the run fails.

        Raises:
            FeaturepipeError: the counts do not add up; a defect of ours that must not go unseen.
        """
        if self.accounted != len(self.keys):
            raise FeaturepipeError(
                f"{len(self.keys)} images were listed but {self.accounted} are accounted for ({self.computed} computed, "
                f"{self.known} known, {len(self.reasons)} rejected); no snapshot was written. Please report this as a bug"
            )


class Bookkeeping:
    """Enters every loaded image into a ledger, and passes on those that are to be computed.

    Args:
        ledger: kept as images go by.
        batches: what computes.
        missing: what is wrong with bytes that are kept, and the keys being computed in this run; kept up to date here.
    """

    def __init__(self, ledger: ExtractionLedger, batches: Batches, missing: MissingColumns) -> None:
        self._ledger, self._batches, self._damaged, self._claimed = ledger, batches, missing.damaged, missing.claimed

    def take(self, images: Iterable[Loaded]) -> None:
        """Enters each image, and runs the batches that are full."""
        for image in images:
            self._enter(image)
            if image.pixels is not None and image.key is not None and image.key not in self._claimed:
                self._claimed.add(image.key)
                self._ledger.computed += 1
                self._ledger.columns.update(image.missing)
                self._batches.add(image)
            elif image.reason is None:
                self._ledger.known += 1
                if image.key is not None and image.key in self._claimed:
                    self._ledger.copies += 1
                    self._ledger.copied[image.key] += 1

    def _enter(self, image: Loaded) -> None:
        self._ledger.read += 1
        if image.key is not None:
            self._ledger.keys[image.row] = np.frombuffer(image.key, dtype=np.uint8)
        self._ledger.has_key[image.row] = image.key is not None
        self._ledger.remarks.update(image.remarks)
        if image.reason is not None:
            self._ledger.reasons[image.row] = image.reason
        elif image.key is not None and (damage := image.damage or self._damaged.get(image.key)):
            self._ledger.damage[image.row] = self._damaged[image.key] = damage


@dataclass
class WorkerTotals:
    """What one worker process has done in a run."""

    last: ShardRun
    shards: int = 0
    images: int = 0
    parts: int = 0
    bytes: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)

    def add(self, images: int, run: ShardRun) -> None:
        """Adds a shard."""
        self.shards += 1
        self.images += images
        self.parts += run.parts
        self.bytes += run.bytes
        self.seconds += run.seconds
        self.stages.update(run.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the run record."""
        return {
            "worker": self.last.worker,
            "host": self.last.host,
            "pid": self.last.pid,
            "device": self.last.device,
            "threads": self.last.threads,
            "slices": self.shards,  # the key that records have
            "images": self.images,
            "parts": self.parts,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "verdict": records.verdict(self.stages, self.seconds, device=self.last.device),
        }


class ShardLedger:
    """Enters what workers bring back of shards into the ledger of the run.

    Copies of an image may lie in two shards and be computed in both. Then one counts as computed, and the others as known, as
    on one machine.

    Args:
        plan: what is to be done.
        ledger: of the run; its counts are right once `close` was called.
        clock: where the stages' time is added up.

    Attributes:
        error: the first error that a worker answered with, or None.
        workers: what each worker process has done, by name, host and process.
    """

    def __init__(self, plan: Plan, ledger: ExtractionLedger, clock: StageSeconds) -> None:
        self._plan, self._ledger, self._clock = plan, ledger, clock
        self._kind = zeros((len(ledger.keys),), np.uint16)
        self._kinds: dict[tuple[str, ...], int] = {}
        self.error: FeaturepipeError | None = None
        self.workers: dict[tuple[str, str, int], WorkerTotals] = {}

    def take(self, shard: Shard, result: ShardResult) -> list[Loaded]:
        """Enters the rows of a shard that were worked on; returns the rejected and the damaged ones."""
        ledger = self._ledger
        rows = self._plan.todo[shard.start : shard.start + shard.rows]
        reached = result.status != UNTOUCHED
        ledger.keys[rows[result.has_key]] = result.keys
        ledger.has_key[rows[reached]] = result.has_key[reached]
        ledger.read += int(reached.sum())
        codes = np.array([0] * COMPUTED + [self._code(kind) for kind in result.kinds], np.uint16)
        self._kind[rows] = codes[result.status]
        rejected = {int(rows[place]): reason for place, reason in result.reasons.items()}
        ledger.reasons.update(rejected)
        damaged = {int(rows[place]): damage for place, damage in result.damage.items()}
        ledger.damage.update(damaged)
        self._note(int(reached.sum()), result)
        keys = ledger.keys
        return [
            Loaded(row, keys[row].tobytes() if ledger.has_key[row] else None, reason=reason)
            for row, reason in rejected.items()
        ] + [Loaded(row, keys[row].tobytes(), damage=damage) for row, damage in damaged.items()]

    def close(self) -> None:
        """Counts what was computed, each key once; everything else that could be read was known, or a copy of it."""
        ledger, todo = self._ledger, self._plan.todo
        ledger.computed = ledger.copies = 0
        counts = np.zeros(len(self._kinds) + 1, np.int64)
        for entries, _ in bucketed(self._keyed(), len(todo), bucket_count(len(todo)), _KEYED):
            made = entries["kind"] > 0
            computed, others = entries[made], entries[~made]
            keys, places = np.unique(computed["key"], return_index=True)
            ledger.computed += len(keys)
            ledger.copies += len(computed) - len(keys)
            ledger.copies += int(np.isin(others["key"], keys).sum()) if len(others) else 0
            counts += np.bincount(computed["kind"][places], minlength=len(counts))
        ledger.known = self._plan.known + self._usable() - ledger.computed
        for kind, code in self._kinds.items():
            ledger.columns.update(dict.fromkeys(kind, int(counts[code])))

    def _keyed(self) -> Iterator[tuple[Entries, Codes]]:
        """Keys and kinds of the rows that were computed, or are copies as a worker saw them, and what the keys begin with."""
        todo, ledger = self._plan.todo, self._ledger
        for part in partitions(len(todo)):
            rows = todo[part]
            rows = rows[(self._kind[rows] > 0) | ledger.has_key[rows]]
            keys, entries = ledger.keys[rows], np.empty(len(rows), _KEYED)
            entries["key"], entries["kind"] = keys.view(f"S{KEY_BYTES}").ravel(), self._kind[rows]
            yield entries, prefixes_of(keys)

    def _usable(self) -> int:
        """Rows that workers have worked on and not rejected."""
        before = len(self._plan.rejected)
        return self._ledger.read - (len(self._ledger.reasons) - before)

    def _code(self, kind: tuple[str, ...]) -> int:
        return self._kinds.setdefault(kind, len(self._kinds) + 1)

    def _note(self, images: int, result: ShardResult) -> None:
        run = result.run
        who = (run.worker, run.host, run.pid)
        self.workers.setdefault(who, WorkerTotals(run)).add(images, run)
        for stage, seconds in run.stages.items():
            self._clock.add(stage, seconds)
        self._ledger.tried_again += run.tried_again
        self._ledger.remarks.update(run.remarks)
        self.error = self.error or result.error

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the run record."""
        workers = [worker.as_dict() for _, worker in sorted(self.workers.items())]
        return {"slices": sum(worker["slices"] for worker in workers), "workers": workers}

    @property
    def seconds(self) -> float:
        """What all workers have spent on shards."""
        return sum(worker.seconds for worker in self.workers.values())


class RejectLog:
    """Collects rejects and writes them to the space every so often, and at the end of the block that it is entered for."""

    def __init__(self, listing: pa.Table, space: Space, dataset: str, run_id: str, every: int = 256) -> None:
        self._listing, self._space, self._dataset, self._run_id, self._every = listing, space, dataset, run_id, every
        self._rows: list[dict[str, Any]] = []
        known = space.rejects(dataset=dataset).select([*FACTS, "reason"]).to_pylist()
        self._known = {tuple(row.values()) for row in known}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()

    def take(self, images: Iterable[Loaded]) -> None:
        """Notes the rejected ones, and those kept although they are damaged."""
        for image in images:
            if (reason := image.reason or image.damage) is not None:
                facts = self._listing.select(FACTS).slice(image.row, 1).to_pylist()[0]
                if (*facts.values(), reason) in self._known:
                    continue  # what cannot be read has no key, is tried every time, and need not be noted every time
                self._rows.append({**facts, "key": image.key, "reason": reason, "run_id": self._run_id})
        if len(self._rows) >= self._every:
            self.write()

    def write(self) -> None:
        """Hands the collected rejects to the space."""
        if self._rows:
            self._space.add_rejects(self._rows, dataset=self._dataset)
            self._rows = []
