"""What happened to each image: every kind by name, and random piles against a slow, obvious reference."""

import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurepipe.extraction.plan import KINDS, count_changes, kinds_of
from featurepipe.store.snapshots import SCHEMA

FIELDS = ("id", "key", "label", "split", "size", "mtime_ns", "status")


def snapshot(rows):
    """A snapshot without reasons; keys are given as one letter, None for unreadable."""
    columns = {name: [row[place] for row in rows] for place, name in enumerate(FIELDS)}
    columns["key"] = [None if key is None else key.encode() * 32 for key in columns["key"]]
    return pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()})


def image(id_, key="k", label=None, split=None, size=1, mtime_ns=1, status="ok"):
    return (id_, key, label, split, size, mtime_ns, status)


def bad(id_, key="b", **others):
    return image(id_, key, status="rejected", **others)


def changes(last, new):
    """The counts that are not zero."""
    found = count_changes(None if last is None else snapshot(last), snapshot(new))
    assert list(found) == [*KINDS, "deleted"]
    return {kind: count for kind, count in found.items() if count}


def reference(last, new):
    """The same, image by image, as the module's description says it."""
    before, after = ({row[0]: dict(zip(FIELDS, row, strict=True)) for row in rows} for rows in (last, new))
    both = before.keys() & after.keys()
    listed_twice = {row[id_]["key"] for row in (before, after) for id_ in both} - {None}
    gone = [row for id_, row in before.items() if id_ not in after]
    to_move = Counter(row["key"] for row in gone)
    were_gone, seen, counts = set(to_move), set(), Counter()
    for id_, now in after.items():
        then = before.get(id_)
        key = now["key"]
        if now["status"] == "rejected":
            kind = "new_rejected" if then is None else "corrupted" if then["status"] == "ok" else "still_rejected"
        elif then is not None:
            kind = (
                "repaired" if then["status"] == "rejected"
                else "changed" if then["key"] != key
                else "relabelled" if (then["label"], then["split"]) != (now["label"], now["split"])
                else "touched" if (then["size"], then["mtime_ns"]) != (now["size"], now["mtime_ns"])
                else "unchanged"
            )  # fmt: skip
        elif to_move[key]:
            kind = "moved"
            to_move[key] -= 1
        elif key in listed_twice or key in were_gone:
            kind = "copied"
        else:
            kind = "copied" if key in seen else "new"
            seen.add(key)
        counts[kind] += 1
    counts["deleted"] = len(gone) - counts["moved"]
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.parametrize(
    ("then", "now", "kind"),
    [
        (image("a"), image("a"), "unchanged"),
        (image("a"), image("a", mtime_ns=2), "touched"),
        (image("a"), image("a", size=2), "touched"),
        (image("a"), image("a", label="cat"), "relabelled"),
        (image("a", label="cat"), image("a"), "relabelled"),
        (image("a", label="cat"), image("a", label="dog", mtime_ns=2), "relabelled"),
        (image("a", split="train"), image("a", split="test"), "relabelled"),
        (image("a"), image("a", "l"), "changed"),
        (image("a", label="cat"), image("a", "l", label="dog"), "changed"),
        (image("a"), bad("a"), "corrupted"),
        (image("a"), bad("a", None), "corrupted"),
        (bad("a"), image("a"), "repaired"),
        (bad("a", None), image("a"), "repaired"),
        (bad("a"), bad("a"), "still_rejected"),
        (bad("a"), bad("a", "c"), "still_rejected"),
        (bad("a", None), bad("a", None), "still_rejected"),
    ],
)
def test_an_image_under_its_old_id(then, now, kind):
    assert changes([then], [now]) == {kind: 1}
    neighbours = [image(f"n{number}", "n") for number in range(3)]
    assert changes([*neighbours, then], [now, *neighbours[::-1]]) == Counter({kind: 1}) + Counter(unchanged=3)


@pytest.mark.parametrize(
    ("last", "new", "expected"),
    [
        (None, [image("a", "x"), image("b", "y"), bad("c")], {"new": 2, "new_rejected": 1}),
        (None, [image("a"), image("b"), image("c")], {"new": 1, "copied": 2}),
        ([image("a")], [image("b")], {"moved": 1}),
        ([image("a")], [image("a"), image("b")], {"unchanged": 1, "copied": 1}),
        ([image("a"), image("b")], [image("a"), image("c")], {"unchanged": 1, "moved": 1}),
        ([image("a"), image("b")], [image("a"), image("c"), image("d")], {"unchanged": 1, "moved": 1, "copied": 1}),
        ([image("a"), image("b"), image("c")], [image("a"), image("d")], {"unchanged": 1, "moved": 1, "deleted": 1}),
        ([image("a")], [image("b"), image("c")], {"moved": 1, "copied": 1}),
        ([image("a"), image("b")], [image("c"), image("d")], {"moved": 2}),
        ([image("a"), image("b")], [image("c")], {"moved": 1, "deleted": 1}),
        ([image("a")], [image("b", "x")], {"new": 1, "deleted": 1}),
        ([image("a", "x")], [image("a", "y"), image("b", "y")], {"changed": 1, "copied": 1}),
        ([image("a", "x")], [image("a", "y"), image("b", "x")], {"changed": 1, "copied": 1}),
        ([image("a", "x"), image("b", "y")], [image("a", "y"), image("b", "x")], {"changed": 2}),
        ([image("a", "x"), image("b", "y")], [image("b", "x")], {"changed": 1, "deleted": 1}),
        ([bad("a")], [bad("z")], {"new_rejected": 1, "deleted": 1}),
        ([bad("a")], [image("z", "b")], {"moved": 1}),
        ([bad("a", None)], [image("z")], {"new": 1, "deleted": 1}),
        ([image("a"), image("b")], [], {"deleted": 2}),
        ([], [], {}),
        (None, [], {}),
    ],
)
def test_images_under_new_ids(last, new, expected):
    assert changes(last, new) == expected


def test_the_first_of_several_in_the_order_of_the_listing_is_the_new_one():
    rows = [image("z"), image("b", "o"), image("a"), image("m")]
    kinds = [KINDS[place] for place in kinds_of(None, snapshot(rows))]
    assert kinds == ["new", "new", "copied", "copied"]
    kinds = [KINDS[place] for place in kinds_of(snapshot([image("x"), image("y")]), snapshot(rows))]
    assert kinds == ["moved", "new", "moved", "copied"]


def test_keys_that_differ_in_the_last_byte_only_are_told_apart():
    one, two = b"k" * 31 + b"1", b"k" * 31 + b"2"
    last, new = snapshot([image("a"), image("b")]), snapshot([image("a"), image("c")])
    last = last.set_column(1, "key", pa.array([one, two], pa.binary(32)))
    assert count_changes(last, new.set_column(1, "key", pa.array([one, two], pa.binary(32))))["moved"] == 1
    found = count_changes(last, new.set_column(1, "key", pa.array([two, one], pa.binary(32))))
    assert (found["changed"], found["copied"], found["deleted"]) == (1, 1, 1)


@st.composite
def piles(draw):
    """Few names and fewer keys, so that all that can happen does."""
    ids = draw(st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=9))
    rows = []
    for id_ in ids:
        key = draw(st.sampled_from(["k", "l", "m", None]))
        status = "rejected" if key is None else draw(st.sampled_from(["ok", "ok", "ok", "rejected"]))
        label, split = (draw(st.sampled_from([None, "x", "y"])) for _ in range(2))
        rows.append(image(id_, key, label, split, draw(st.integers(1, 2)), draw(st.integers(1, 2)), status))
    return rows


@settings(max_examples=200)
@given(last=piles(), new=piles())
def test_random_piles_agree_with_the_reference_and_add_up(last, new):
    found = changes(last, new)
    assert found == reference(last, new)
    counts = Counter(found)
    assert sum(counts.values()) - counts["deleted"] == len(new)
    appeared = counts["new"] + counts["copied"] + counts["new_rejected"]
    assert len(last) - counts["deleted"] + appeared == len(new)


def test_tables_in_many_chunks_are_as_good():
    rows = [image(f"{number:03d}", "klm"[number % 3]) for number in range(40)]
    last, new = rows[:30], [*rows[10:20], *rows[30:]]
    chunked = [pa.concat_tables([snapshot([row]) for row in some]) for some in (last, new)]
    assert count_changes(*chunked) == count_changes(snapshot(last), snapshot(new))


@pytest.mark.slow
def test_a_million_rows_take_a_second_of_work():
    rng = np.random.default_rng(0)
    count = 1_000_000
    key_bytes = rng.integers(0, 256, (count, 32), dtype=np.uint8)

    def table(ids, keys):
        return pa.table({
            "id": ids,
            "key": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(keys)]),
            "label": pa.array(["cat"] * count), "split": pa.nulls(count, pa.string()),
            "size": np.ones(count, np.int64), "mtime_ns": np.arange(count), "status": pa.array(["ok"] * count),
        })  # fmt: skip

    ids = [f"class/image-{number:08d}.jpg" for number in range(count)]
    last = table(pa.array(ids), key_bytes)
    half = pa.array([f"moved/{id_}" for id_ in ids[: count // 2]] + ids[count // 2 :])
    new = table(half, key_bytes)
    before = time.process_time()
    found = count_changes(last, new)
    seconds = time.process_time() - before
    assert (found["moved"], found["unchanged"], found["deleted"]) == (count // 2, count // 2, 0)
    assert seconds < 3
