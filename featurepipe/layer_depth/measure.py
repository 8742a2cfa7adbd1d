"""Measuring every column on every fold, several at once, each kept as soon as it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featurepipe.errors import Interrupted
from featurepipe.heads.families import SMALL_VALUES
from featurepipe.interrupt import stop_on_signals
from featurepipe.layer_depth.probes import Cell, measure_fold
from featurepipe.layer_depth.workers import end_with

if TYPE_CHECKING:
    from featurepipe.cluster import Team
    from featurepipe.layer_depth.folds import Fold
    from featurepipe.layer_depth.journal import Journal
    from featurepipe.layer_depth.study import Study
    from featurepipe.progress import Progress


@dataclass(frozen=True)
class Series:
    """All cells of one head on one set of columns, in the order of the folds.

    Attributes:
        network: ``pretrained`` or ``random``.
        columns: side by side.
        head: name of the family.
        cells: one a fold.
    """

    network: str
    columns: tuple[str, ...]
    head: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Work:
    """One column on one fold with the heads that are not measured yet."""

    key: str
    network: str
    columns: tuple[str, ...]
    fold: Fold
    heads: Sequence[str]


def measure(
    study: Study,
    sets: Sequence[tuple[str, tuple[str, ...]]],
    journal: Journal,
    *,
    jobs: int | None,
    progress: Progress,
    team: Team | None = None,
) -> list[Series]:
    """Measures sets of columns on all folds with all heads; what the journal has is not measured again.

    Args:
        study: what is compared on what.
        sets: (network, columns) each.
        journal: where cells are kept.
        jobs: processes at once; None for one per CPU. Where features are many, one that uses all CPUs.
        progress: advanced by one for each head on each fold.
        team: workers of a cluster to measure on instead, in any order; the journal stays here.

    Raises:
        Interrupted: SIGINT or SIGTERM; what was measured is kept, and the message says how much.
    """
    missing = _missing(study, sets, journal, progress)
    total = len(sets) * len(study.folds) * len(study.protocol.heads)
    left = sum(len(work.heads) for work in missing)
    try:
        with _stopped_at_once() if team is None else nullcontext():
            for work, cells in _measured(study, missing, jobs) if team is None else _on_team(study, missing, team):
                journal.add(work.key, cells)
                left -= len(cells)
                progress.advance(len(cells), f"{work.network} {'+'.join(work.columns)}")
    except Interrupted as error:
        kept = f"{total - left:,} of {total:,} fits are measured and kept"
        raise Interrupted(f"{error}: {kept}; the same command goes on from there", error.exit_code - 128) from error
    return [
        Series(network, columns, head, _cells(study, journal, study.key(network, columns), head))
        for network, columns in sets
        for head in study.protocol.heads
    ]


def _missing(
    study: Study, sets: Sequence[tuple[str, tuple[str, ...]]], journal: Journal, progress: Progress
) -> list[Work]:
    missing = []
    for network, columns in sets:
        key = study.key(network, columns)
        for fold in study.folds:
            heads = [h for h in study.protocol.heads if journal.get(key, h, fold.seed, fold.number) is None]
            progress.advance(len(study.protocol.heads) - len(heads))
            if heads:
                missing.append(Work(key, network, columns, fold, heads))
    return missing


def _cells(study: Study, journal: Journal, key: str, head: str) -> list[Cell]:
    found = (journal.get(key, head, fold.seed, fold.number) for fold in study.folds)
    return [cell for cell in found if cell is not None]


def _on_team(study: Study, missing: Sequence[Work], team: Team) -> Iterator[tuple[Work, list[Cell]]]:
    """Cells as workers answer. A signal ends it at once: what is measured is kept, what workers are at is measured again."""
    if not missing:
        return
    from featurepipe.layer_depth.on_cluster import measured_on

    with stop_on_signals() as asked:

        def stop() -> bool:
            if asked():
                raise Interrupted(f"stopped by {asked.name}", asked.signal_number or 2)
            return False

        yield from measured_on(team, study, missing, wide=is_wide(study), stop=stop)


@contextmanager
def _stopped_at_once() -> Iterator[None]:
    """A signal ends the block there and then, also in the middle of a long fit or of a journal's line, which is passed over."""
    with stop_on_signals() as asked, asked.raised():
        yield


def _measured(study: Study, missing: Sequence[Work], jobs: int | None) -> Iterator[tuple[Work, list[Cell]]]:
    """Cells as they come: small features side by side on one thread each, large ones one after the other on all."""
    if not missing:
        return
    count = jobs or os.cpu_count() or 1
    if count == 1 or len(missing) == 1 or is_wide(study):
        for work in missing:
            yield _one(study, work)
        return
    from joblib import Parallel, delayed, parallel_config

    ends = {"initializer": end_with, "initargs": (os.getpid(),)}
    with parallel_config("loky", n_jobs=count, inner_max_num_threads=1, **ends):
        done: Any = Parallel(return_as="generator_unordered")(delayed(_one)(study, work) for work in missing)
        yield from done


def is_wide(study: Study) -> bool:
    """Whether features are so many that one fit should have all cores."""
    return len(study.folds[0].train) * max(column.width for column in study.columns) > SMALL_VALUES


def _one(study: Study, work: Work) -> tuple[Work, list[Cell]]:
    return work, measure_fold(study.data(work.network, work.columns), work.fold, work.heads)
