"""The labels of tonight: those of the job's labels file, joined to what its source lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import SourceError
from featurepipe.images.listing import SCHEMA
from featurepipe.jobs.sources import Listed
from featurepipe.store.labels import LabelTable, join_labels, read_labels

_STRANGERS_NAMED = 3


@dataclass
class LabelledSource:
    """Tonight's source with the labels of a file, if the job has one; images that the file lacks are unlabelled.

    The snapshot then holds them, so that newly labelled images are told from others as those of any source are.

    Attributes:
        source: opens the source, or has it open.
        earlier: the dataset's last snapshot, columns ``id`` and ``label``; None without one.
        table: the file's labels, once they are read; until then the labels are those of ``earlier``.
        asked: whether the job has a file.
    """

    source: Callable[[], Listed]
    asked: bool
    earlier: pa.Table | None = None
    table: LabelTable | None = field(default=None, repr=False)

    def __call__(self) -> Listed:
        """The source; see `featurepipe.jobs.sources.TonightsSource`."""
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
        self.table = read_labels(file)
        ids = self.source().scan()["id"]
        labelled = pc.count(self._labels(ids)).as_py()
        strangers = pc.unique(self.table.ids.filter(pc.invert(pc.is_in(self.table.ids, value_set=pc.unique(ids)))))
        warnings = [_of_strangers(file, strangers, ids)] if len(strangers) else []
        text = f"{labelled:,} of {len(ids):,} images have a label in {file.name}"
        if self.table.ignored:
            text += f"; ignored columns: {', '.join(self.table.ignored)}"
        facts = {
            "file": str(file),
            "labelled": labelled,
            "unknown": len(strangers),
            "ignored": list(self.table.ignored),
        }
        return {**facts, "text": text, "warnings": warnings}

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
    if not file.is_file():
        raise SourceError(f"{file}: the labels are not there")


def _of_strangers(file: Path, strangers: pa.Array, ids: pa.ChunkedArray) -> str:
    named = ", ".join(strangers[:_STRANGERS_NAMED].to_pylist())
    more = ", ..." if len(strangers) > _STRANGERS_NAMED else ""
    like = f"; ids are like {ids[0].as_py()}" if len(ids) else ""
    return f"{file.name} labels {len(strangers):,} ids that the source does not list: {named}{more}{like}"
