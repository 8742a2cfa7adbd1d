"""The source of a job's run, with its labels: tried again while it cannot be had, and listed once in a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.annotations import column_named
from featurepipe.display import counted
from featurepipe.errors import Interrupted, Message, SourceError, unsearchable
from featurepipe.extraction.limits import ALL, ImagesGone
from featurepipe.features.reading import opened
from featurepipe.images import Source
from featurepipe.images.listing import SCHEMA, told
from featurepipe.images.regions import Payload
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.job import Job
from featurepipe.jobs.validation import keys_of
from featurepipe.progress import spoken
from featurepipe.store.labels import ColumnTable, LabelTable, join_labels, read_columns

T = TypeVar("T")
Wait = Callable[[float, StopRequest], None]
Meanwhile = Callable[[str], AbstractContextManager[object]]

_RETRIES_WHEN_GONE = 1
"""A share that is being mounted has one more chance; images that are gone do not come back within minutes."""
_DOUBLINGS = 40
"""After so many the wait is the longest one, whatever the first was; floats end at 1024."""
_LOOK = 0.25
"""Seconds between two looks at whether to stop."""


def wait(seconds: float, stop: StopRequest) -> None:
    """Sleeps, but no longer than until ``stop``."""
    until = time.monotonic() + seconds
    while not stop() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK))


@dataclass(frozen=True)
class RetryPolicy:
    """How long to insist on a source: tries whose distance doubles.

    Attributes:
        retries: tries after the first one.
        first_wait: seconds before the first of them.
        longest_wait: seconds that no wait exceeds.
        stop: ends the waiting.
        meanwhile: told of each failure, and what is so while it is waited for the next try.
        wait: how to wait.
    """

    retries: int
    first_wait: float
    longest_wait: float
    stop: StopRequest
    meanwhile: Meanwhile
    wait: Wait = wait

    def insist(self, attempt: Callable[[], T]) -> T:
        """Returns what ``attempt`` returns, and tries again while it raises `SourceError`; other errors do not heal.

        Where nothing is listed, or too much is gone, it tries once more only.

        Raises:
            SourceError: it failed at the last try too, or there is no time left.
            Interrupted: a signal came while waiting.
        """
        tried = 0
        while True:
            try:
                return attempt()
            except SourceError as error:
                self._before_next(tried, error)
                tried += 1

    def _before_next(self, tried: int, error: SourceError) -> None:
        retries = min(self.retries, _RETRIES_WHEN_GONE) if isinstance(error, ImagesGone) else self.retries
        if tried >= retries or self.stop.out_of_time:
            times = f" (tried {tried + 1} times)" if tried else ""
            raise SourceError(Message(error.message, times)) from error
        if not self.stop.signal_number:
            seconds = min(self.first_wait * 2.0 ** min(tried, _DOUBLINGS), self.longest_wait)
            why = error.message.spelled(keys_of("list"))
            with self.meanwhile(f"{why}; trying again in {spoken(seconds)}, {tried + 1} of {retries}"):
                self.wait(seconds, self.stop)
        if self.stop.signal_number:
            raise Interrupted(
                Message(f"stopped by {self.stop.name} while waiting for the source (", error.message, ")"),
                self.stop.signal_number,
            ) from error


class Listed(Source):
    """A source with its listing, so that all feature spaces of a night hold the same images, and one walk does for all.

    Args:
        source: the images.
        listing: what it lists.
    """

    def __init__(self, source: Source, listing: pa.Table) -> None:
        self._source, self._listing = source, listing
        self.name, self.location = source.name, source.location
        self.only_under = source.only_under

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as the source alone: a worker reads images and lists none."""
        return _itself, (self._source,)

    def scan(self) -> pa.Table:
        """Returns the listing."""
        return self._listing

    def read(self, locator: bytes) -> Payload:
        """Reads one image; see :meth:`Source.read`."""
        return self._source.read(locator)

    def close(self) -> None:
        """Releases what is held open."""
        self._source.close()


def _itself(source: Source) -> Source:
    return source


class JobSource:
    """The source of a job's run: opened and listed when it is first needed, and again after it failed.

    Args:
        job: the job.
        stop: a signal ends the listing at once.

    Attributes:
        seconds: what listing took.
    """

    def __init__(self, job: Job, stop: StopRequest) -> None:
        self._job, self._stop = job, stop
        self._listed: Listed | None = None
        self.seconds = 0.0

    def __call__(self) -> Listed:
        """The source.

        Raises:
            UsageError: the job names something that no source can be made of.
            SourceError: it cannot be opened or listed, or is empty.
            Interrupted: a signal came while listing.
        """
        if self._listed is None:
            start = time.monotonic()
            with self._stop.at_once(before="the source was listed"):
                self._listed = self._list()
            self.seconds += time.monotonic() - start
        return self._listed

    def forget(self) -> None:
        """Lets the source be listed again, since it has failed."""
        self._listed = None

    def _list(self) -> Listed:
        table = self._job.source
        try:
            source = opened(table.path, table)
            listing = source.scan()
        except OSError as error:
            raise SourceError(f"{table.path}: {error}") from error
        if not listing.num_rows and self._job.limits.max_gone != ALL:  # an empty folder, on which no share is mounted
            raise ImagesGone(f'{source.location} lists no image; if that is so on purpose: [limits] max_gone = "{ALL}"')
        return Listed(source, told(listing))


_STRANGERS_NAMED = 3


@dataclass
class LabelledSource:
    """This run's source with the labels of a file, if the job has one; images that the file lacks are unlabelled.

    The snapshot then holds them, so that newly labelled images are told from others as those of any source are.

    Attributes:
        source: opens the source, or has it open.
        earlier: the dataset's last snapshot, columns ``id`` and ``label``; None without one.
        table: the file's labels, once they are read; until then the labels are those of ``earlier``.
        asked: whether the job has a file; after ``read``, whether that has labels.
        roles: names of columns that the job's heads take. A file that has one of them and no labels leaves the images' own.
    """

    source: Callable[[], Listed]
    asked: bool
    roles: Collection[str] = ()
    earlier: pa.Table | None = None
    table: LabelTable | None = field(default=None, repr=False)

    def __call__(self) -> Listed:
        """The source; see `featurepipe.jobs.sources.JobSource`."""
        source = self.source()
        if not self.asked:
            return source
        listing = source.scan()
        place = listing.schema.get_field_index("label")
        return Listed(source, listing.set_column(place, SCHEMA.field("label"), self._labels(listing["id"])))

    def read(self, file: Path) -> dict[str, Any]:
        """Reads the file; what it says of images that are not there is a warning.

        Raises:
            SourceError: it is not there.
            UsageError: it cannot be read, or gives an image two labels.
        """
        check_labels(file)
        columns = read_columns(file)
        ids = self.source().scan()["id"]
        if column_named("label", columns.columns) is None and any(
            column_named(name, columns.columns) for name in self.roles
        ):
            return self._without_labels(file, columns, ids)
        self.table = columns.labels()
        labelled = pc.count(self._labels(ids)).as_py()
        strangers = pc.unique(self.table.ids.filter(pc.invert(pc.is_in(self.table.ids, value_set=pc.unique(ids)))))
        warnings = [_of_strangers(file, strangers, ids)] if len(strangers) else []
        text = f"{labelled:,} of {len(ids):,} images have a label in {file.name}"
        further = [f"further columns: {', '.join(self.table.ignored)}"] if self.table.ignored else []
        text = "; ".join([text, *self.table.notes, *further])
        facts = {
            "file": str(file),
            "labelled": labelled,
            "unknown": len(strangers),
            "ignored": list(self.table.ignored),
            "notes": list(self.table.notes),
        }
        return {**facts, "text": text, "warnings": warnings}

    def _without_labels(self, file: Path, table: ColumnTable, ids: pa.ChunkedArray) -> dict[str, Any]:
        """Lets the images have their own labels, and tells what the file has."""
        self.asked = False
        strangers = pc.unique(table.ids.filter(pc.invert(pc.is_in(table.ids, value_set=pc.unique(ids)))))
        labelled = pc.count(self.source().scan()["label"]).as_py()
        own = f"{file.name} has no column label: {labelled:,} of {len(ids):,} images have a label of their own"
        return {
            "file": str(file),
            "labelled": labelled,
            "unknown": len(strangers),
            "ignored": list(table.columns),
            "notes": [],
            "text": f"{own}; further columns: {', '.join(table.columns)}",
            "warnings": [_of_strangers(file, strangers, ids)] if len(strangers) else [],
        }

    def _labels(self, ids: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
        table = self.table
        if table is None:
            earlier = self.earlier
            if earlier is None:
                return pa.nulls(len(ids), pa.string())
            return earlier["label"].take(pc.index_in(ids, value_set=earlier["id"].combine_chunks()))
        if not pc.any(pc.is_in(ids, value_set=table.ids)).as_py():  # nobody has labelled anything yet
            return pa.nulls(len(ids), pa.string())
        return join_labels(ids, table)[0]


def check_labels(file: Path) -> None:
    """Raises `SourceError` if a labels file is not there, or not just now."""
    if not os.path.isfile(file):  # noqa: PTH113  # no PermissionError, whatever the version of Python
        raise SourceError(f"{file}: {unsearchable(file) or 'the labels are not there'}")


def _of_strangers(file: Path, strangers: pa.Array, ids: pa.ChunkedArray) -> str:
    named = ", ".join(strangers[:_STRANGERS_NAMED].to_pylist())
    more = ", ..." if len(strangers) > _STRANGERS_NAMED else ""
    like = f"; ids are like {ids[0].as_py()}" if len(ids) else ""
    return f"{file.name} labels {counted(len(strangers), 'id that the source does not list')}: {named}{more}{like}"
