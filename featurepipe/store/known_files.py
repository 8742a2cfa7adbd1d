"""Which files a space knows from its parts and rejects, with their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import CorruptPart
from featurepipe.store.keys import keys_to_arrow
from featurepipe.store.parts import PartInfo, read_array

KNOWN_FILES = pa.schema([("id", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("key", pa.binary(32))])
_ROWS_AT_ONCE = 1 << 18


def known_files(
    parts: Sequence[PartInfo],
    rejects: pa.Table,
    ids: pa.ChunkedArray | None,
    on_damage: Callable[[PartInfo, CorruptPart], None],
) -> pa.Table:
    """Lists files; see ``Space.known_files``.

    Args:
        parts: Where to look, the first committed first.
        rejects: Also known, and later than all parts.
        ids: Only files with one of these ids; None for all.
        on_damage: Told of each part that is damaged, and whose files then are not known.
    """
    found = [KNOWN_FILES.empty_table()]
    waiting: list[pa.Table] = []
    for table in _of_parts(parts, on_damage):
        waiting.append(table)
        if sum(map(len, waiting)) >= max(_ROWS_AT_ONCE, 0 if ids is None else len(ids)):
            found.append(_chosen(waiting, ids))
            waiting = []
    rejected = rejects.select(KNOWN_FILES.names).filter(rejects["key"].is_valid())
    return _last_of_each(pa.concat_tables([*found, _chosen([*waiting, rejected], ids)]))


def _of_parts(parts: Sequence[PartInfo], on_damage: Callable[[PartInfo, CorruptPart], None]) -> Iterator[pa.Table]:
    for part in parts:
        try:
            yield pa.table(
                [
                    pa.array(read_array(part, "id")).cast(pa.string()),
                    pa.array(read_array(part, "size")),
                    pa.array(read_array(part, "mtime_ns")),
                    keys_to_arrow(read_array(part, "key")),
                ],
                schema=KNOWN_FILES,
            )
        except CorruptPart as error:
            on_damage(part, error)


def _chosen(tables: Sequence[pa.Table], ids: pa.ChunkedArray | None) -> pa.Table:
    """The rows with one of the ids; of many tables at once, since each look-up starts by hashing all the ids."""
    table = pa.concat_tables(tables)
    return table if ids is None else table.filter(pc.is_in(table["id"], value_set=ids))


def _last_of_each(files: pa.Table) -> pa.Table:
    numbered = files.append_column("row", pa.array(np.arange(len(files))))
    last = numbered.group_by(["id", "size", "mtime_ns"]).aggregate([("row", "max")])
    return files.take(last["row_max"].sort())
