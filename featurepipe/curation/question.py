"""What every question asked of stored features has in common: what it is asked of, and where its answer goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurepipe.curation.options import QuestionOptions
from featurepipe.display import named_columns, neutralised_text
from featurepipe.errors import StoreMoved, UsageError
from featurepipe.monitoring.duplicates import checked_file, write_table
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.labels import LabelSource
from featurepipe.store.options import RowOptions
from featurepipe.store.roles import with_roles

PAGE = ".html"


@dataclass(frozen=True)
class Question:
    """A question asked of the features of a dataset.

    Attributes:
        store: The feature store.
        dataset: The dataset's name.
        snapshot: Run id of the snapshot whose images are meant, or of a job's run.
        features: Its images.
        options: As they were asked for.
        targets: The files of the answer.
        silent: Whether nothing is said on the way.
        started: Value of `time.monotonic`.
    """

    store: FeatureStore
    dataset: str
    snapshot: str
    features: FeatureSet
    options: QuestionOptions
    targets: tuple[Path, ...]
    silent: bool
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls, store: FeatureStore | str | PathLike[str], options: QuestionOptions, what: str, *, silent: bool
    ) -> Question:
        """Settles what a question is asked of.

        Args:
            store: The feature store or its path.
            options: As they were asked for.
            what: What the file of the answer holds, for messages, such as ``look-alikes``.
            silent: Say nothing on the way.

        Raises:
            UsageError: A dataset, column, space or snapshot is unknown, or the answer cannot be written there.
            StoreError: There is no store, or features of some images are missing.
            StoreMoved: A snapshot was written meanwhile; `featurepipe.store.locks.starts_again` asks once more.
        """
        targets = tuple(checked_file(to, what, [PAGE]) for to in options.to or ())
        if again := [one for one, count in Counter(target.resolve() for target in targets).items() if count > 1]:
            raise UsageError(f"{again[0]} is given more than once; one answer would replace the other", option="to")
        kept = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
        name = options.dataset or kept.only_dataset()
        current = kept.snapshot_ids(name)[-1:]
        features = kept.features(name, node=options.node, backbone=options.backbone, snapshot=options.snapshot)
        if options.snapshot is None and kept.snapshot_ids(name)[-1:] != current:
            raise StoreMoved(f"dataset {name} has another snapshot by now")
        return cls(kept, name, options.snapshot or current[0], features, options, targets, silent)

    def rows(self, roles: RowOptions, labels: LabelSource | None, split: str | None) -> FeatureSet:
        """The images with their classes, splits and other roles of columns.

        Args:
            roles: What the columns are.
            labels: A mapping or file of labels, instead of the dataset's.
            split: Only images of this split.

        Raises:
            UsageError: A column is unknown, or its values do not suit its role.
        """
        every = with_roles(self.store, self.features, labels, roles, self.say, snapshot=self.options.snapshot)
        return every if split is None else every.select(split=split)

    def say(self, line: str) -> None:
        """Tells people what happens, unless nothing is to be said."""
        announcer(silent=self.silent)(line)

    def written(
        self, answer: Callable[[], pa.Table], document: Callable[[], Mapping[str, Any]], *, queries: Any = None
    ) -> list[str]:
        """Writes the answer to each file asked for: a page of what ``document`` gives, or the table that ``answer`` gives.

        Args:
            answer: Makes the table of a file.
            document: Makes what a page shows; see `featurepipe.reporting.report.write_report`.
            queries: As `featurepipe.reporting.from_store.image_page` takes them.

        Returns:
            What people must be told about the files.
        """
        options, told = self.options, []
        for target in sorted(self.targets, key=lambda one: one.suffix.lower() == PAGE):  # a page needs the images, too
            if target.suffix.lower() != PAGE:
                told.append(neutralised_text(write_table(answer(), target, raw_ids=options.raw_ids), target))
                continue
            from featurepipe.reporting.from_store import image_page  # which loads what reads images

            image_page(
                self.store, document(), target, options, source=options.source, dataset=self.dataset,
                snapshot=self.snapshot, queries=queries, silent=self.silent,
            )  # fmt: skip
        return [said for said in told if said]

    def told(self, **found: Any) -> dict[str, Any]:
        """The result of a command: what was ``found``, between what it was asked of and how it was asked."""
        return {
            "dataset": self.dataset,
            "snapshot": self.snapshot,
            "column": self.features.column,
            "bottleneck": self.features.origin.bottleneck,
            "space": self.features.origin.space,
            **found,
            "file": str(self.targets[0]) if self.targets else None,
            "files": [str(target) for target in self.targets],
            "options": as_asked(self.options),
            "seconds": round(time.monotonic() - self.started, 3),
        }


def more_text(left: int, files: Sequence[str], why: str = "", *, has_limit: bool = False) -> list[str]:
    """Says that an answer has more rows than are listed, and how to have all: the ways that were not taken.

    Args:
        left: Rows that are not listed.
        files: That the answer was written to.
        why: What a table of all is for, such as ``to be corrected``.
        has_limit: Whether ``--limit`` says how many are listed.
    """
    if left <= 0:
        return []
    tables = [name for name in files if Path(name).suffix.lower() != PAGE]
    if tables:
        return [f"... {left:,} more, all in {tables[0]}"]
    listed = "list more of them with --limit N, or " if has_limit else ""
    page = " (may be given beside the page)" if files else ""
    return [f"... {left:,} more; {listed}write all of them{f', {why}' if why else ''}: --to FILE.csv{page}"]


DISTANCES = {
    "cosine": "Distances are cosine distances: 0 is the same direction of two images' features, 1 is unrelated.",
    "euclidean": "Distances are Euclidean distances between two images' features.",
}
"""What the distances on a page are, in a sentence."""


def column_text(found: Mapping[str, Any]) -> str:
    """The column of an answer, as people know it."""
    return named_columns(found["column"].split("+"), found.get("bottleneck"))


def files_text(files: Sequence[str]) -> list[str]:
    """Names the files that an answer was written to."""
    return [f"file {name}" for name in files]
