"""Columns of labels files and manifests as classes, numbers, several labels, groups and weights."""

import datetime as dt
import json
import pickle
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featurepipe.errors import StoreError, UsageError, on_command_line
from featurepipe.images.listing import SCHEMA
from featurepipe.images.manifest import _texts, _too_large
from featurepipe.images.open import open_source
from featurepipe.store.labels import join_labels, read_labels
from featurepipe.store.options import RoleOptions
from featurepipe.store.roles import with_roles
from featurepipe.store.verify import verify_store

NAMES = ["a1", "a2", "b1", "b2"]
KEPT = {
    "patient": ["p", " q ", None, "p"],
    "age": ["3", "4.5", None, "-1e3"],
    "found": ["red|round", "round", "", None],
}


@pytest.fixture
def kept(store, space, rows):
    """A dataset whose manifest had further columns."""
    rows.write(store, space, NAMES, columns=("a:gap", "b:gap"))
    run_id = rows.snapshot(store, "d", NAMES)
    table = store.snapshot("d", run_id)
    for name, values in KEPT.items():
        table = table.append_column(f"column:{name}", pa.array(values, pa.string()))
    store.write_snapshot("d", store.new_run_id(), table)
    return store


def joined(store, labels=None, **roles):
    said = []
    return with_roles(store, store.features("d", "a:gap"), labels, RoleOptions(**roles), said.append), said


def test_a_snapshot_keeps_the_columns_of_a_manifest_and_gives_them_roles(kept):
    features, said = joined(kept, group="patient", target="Age")
    assert kept.further_columns("d") == list(KEPT)
    assert features.groups.tolist() == ["p", "q", None, "p"]
    np.testing.assert_array_equal(features.targets, [3, 4.5, np.nan, -1000])
    assert (features.weights, features.target_names, features.unlabelled) == (None, (), 1)
    assert features.select(labelled=True).groups.tolist() == ["p", "q", "p"]
    assert said == [
        "numbers to estimate: column age of dataset d",
        "groups: column patient of dataset d, 2 groups (1 image without one, each for itself), each on one side of every split",
        "dataset d: columns of its manifest without a role here: found",
    ]
    again = pickle.loads(pickle.dumps(features.take(np.array([3, 1]))))
    assert again.groups.tolist() == ["p", "q"]
    np.testing.assert_array_equal(again.targets, [-1000, 4.5])


def test_without_roles_nothing_changes_but_a_column_called_group_is_one(kept, rows):
    features, said = joined(kept)
    assert (features.groups, features.targets, features.weights) == (None, None, None)
    assert said == ["dataset d: columns of its manifest without a role here: patient, age, found"]
    assert features.table.column_names == ["id", "label", "split"]
    assert features.unused_columns == {"manifest": ["patient", "age", "found"]}
    assert pickle.loads(pickle.dumps(features.select(labelled=True))).unused_columns == features.unused_columns
    table = kept.snapshot("d").append_column("column:Group", pa.array(["g", "g", "h", None]))
    kept.write_snapshot("d", kept.new_run_id(), table)
    features, said = joined(kept)
    assert features.groups.tolist() == ["g", "g", "h", None]
    assert said[0].startswith("groups: column Group of dataset d, 2 groups")
    assert joined(kept, group="none")[0].groups is None


def test_a_labels_file_comes_first_and_what_is_not_used_of_it_is_named(kept, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("path,class,patient,Weight,note\na1,x,1,0.5,-\nb2,y,2,2,-\na2,x,1,1,-\nb1,y,,0,-\n")
    features, said = joined(kept, path, label="class", group="patient", weight="weight")
    assert features.labels.tolist() == ["x", "x", "y", "y"]
    assert features.groups.tolist() == ["1", "1", None, "2"]
    assert features.weights.tolist() == [0.5, 1, 0, 2]
    assert said[0] == "m.csv: 2 labels on 4 of 4 images"
    assert said[-2:] == [
        "m.csv: ignored columns: note", "dataset d: columns of its manifest without a role here: age, found",
    ]  # fmt: skip


def test_a_file_of_groups_alone_leaves_the_classes(kept, tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(json.dumps({"id": name, "group": n // 2}) for n, name in enumerate(NAMES)))
    features, _ = joined(kept, path)
    assert features.labels.tolist() == ["a", "a", "b", "b"]
    assert features.groups.tolist() == ["0", "0", "1", "1"]


def test_several_labels_of_one_column(kept):
    features, said = joined(kept, multilabel=("found",))
    assert features.target_names == ("red", "round")
    np.testing.assert_array_equal(features.targets, [[1, 1], [0, 1], [np.nan, np.nan], [np.nan, np.nan]])
    assert features.targets.dtype == np.float32
    assert features.unlabelled == 2
    assert said == [
        "several labels: red, round, of column found of dataset d; 2 images without any: unknown, and left out, not negative; "
        "write [] or none where an image has no label",
        "dataset d: columns of its manifest without a role here: patient, age",
    ]
    assert features.take(slice(1, 3)).targets[0].tolist() == [0, 1]


def test_json_lists_and_columns_of_zeros_and_ones_are_several_labels(kept, tmp_path):
    table = pa.table(
        {"id": NAMES, "tags": [["b", "a"], [], ["b"], None], "x": [1, 0, -1, None], "y": [True, None, False, True]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    features, _ = joined(kept, tmp_path / "t.parquet", multilabel=("tags",))
    assert features.target_names == ("a", "b")
    np.testing.assert_array_equal(features.targets, [[1, 1], [0, 0], [0, 1], [np.nan, np.nan]])
    features, said = joined(kept, tmp_path / "t.parquet", multilabel=("x", "y"))
    assert said[0].startswith("several labels: columns x, y of t.parquet; 3 of 8 entries are empty")
    assert features.target_names == ("x", "y")
    np.testing.assert_array_equal(features.targets, [[1, 1], [0, np.nan], [np.nan, 0], [np.nan, 1]])


@pytest.mark.parametrize(
    ("text", "roles", "said"),
    [
        (
            "id,age\na1,old\n",
            {"target": "age"},
            "column age of l.csv has 'old' for image 'a1', which is no finite number",
        ),
        ("id,age\na1,inf\n", {"target": "age"}, "has 'inf' for image 'a1', which is no finite number"),
        ("id,age\na1,\n", {"target": "age"}, "column age of l.csv is empty for all images"),
        ("id,age\na1,3\n", {"target": "aeg"}, "unknown column 'aeg'; there are age, patient, found"),
        (
            "id,age\na1,3\na1,4\n",
            {"target": "age"},
            "1 id has several values of age; 'a1' has 3 and 4: an image has one age",
        ),
        ("id,label,w\na1,x,-1\n", {"weight": "w"}, "has the weight -1 for image 'a1'; every image needs one from 0"),
        ("id,label,w\na1,x,1\n", {"weight": "w"}, "has no weight for image 'a2'"),
        (
            "id,x,y\na1,1,0\na2,maybe,1\n",
            {"multilabel": ("x", "y")},
            "holds 'maybe' for image 'a2'; a column for each label",
        ),
        ("id,t\na1,Cat|dog\na2,cat\n", {"multilabel": ("t",)}, "has one label in two forms, 'Cat' and 'cat'"),
        ('id,t\na1,"[""red"", 1.5]"\n', {"multilabel": ("t",)}, "write labels as red|round, or as"),
        ("id,t\na1,\n", {"multilabel": ("t",)}, "is empty for all images"),
        ("id,label,g\na1,x,\n", {"group": "g"}, "column g of l.csv is empty for all images"),
    ],
)
def test_bad_roles_name_column_value_and_image(kept, tmp_path, text, roles, said):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UsageError) as caught:
        joined(kept, tmp_path / "l.csv", **roles)
    assert said in str(caught.value)


def test_two_kinds_of_target_are_refused():
    with pytest.raises(UsageError, match="two kinds of target"):
        RoleOptions(target="age", multilabel=("found",))


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({"label": ""}, "label '' must be the name of a column"),
        ({"split_column": 3}, "split_column 3 must be the name of a column"),
        ({"multilabel": ()}, r"multilabel=\(\) must not be empty"),
        ({"label": "kind", "group": "kind"}, "group='kind' is the column of the classes"),
        ({"group": "label"}, "group='label' is the column of the classes"),
    ],
)
def test_names_that_are_none_are_refused(roles, said):
    assert RoleOptions(group="label", target="age").group == "label"
    with pytest.raises(UsageError, match=said):
        RoleOptions(**roles)


def test_a_dataset_without_further_columns_says_where_to_get_them(store, space, rows):
    rows.write(store, space, NAMES)
    rows.snapshot(store, "d", NAMES)
    with pytest.raises(UsageError, match="extracted without further columns") as caught:
        joined(store, group="patient")
    assert "labels" in str(caught.value)


def test_copies_and_groups_form_units(kept):
    features = kept.features("d", "a:gap").with_column("group", np.array(["p", "q", None, "q"], object))
    one, two, three, four = features.units()
    assert two == four
    assert len({int(one), int(two), int(three)}) == 3
    twins = features.take(np.array([0, 1, 0])).with_column("group", np.array(["p", "q", "q"], object))
    assert len(set(twins.units().tolist())) == 1  # a copy of an image in another group joins the two


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_manifests_list_further_columns_as_text(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    values = {
        "path": ["a.png", "b.png"],
        "patient": ["7", None],
        "age": [1.5, 2.0],
        "tags": [["x"], []],
        "long": ["y" * 1001, "z"],
    }
    if kind == "csv":
        path.write_text('path,patient,age,tags,long\na.png,7,1.5,"[""x""]",' + "y" * 1001 + "\nb.png,,2.0,[],z\n")
    elif kind == "parquet":
        pq.write_table(pa.table(values), path)
    else:
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    listing = open_source(path).scan()
    assert listing.column_names == [*SCHEMA.names, "column:patient", "column:age", "column:tags"]
    assert listing["column:patient"].to_pylist() == ["7", None]
    assert [float(text) for text in listing["column:age"].to_pylist()] == [1.5, 2.0]
    assert listing["column:tags"].to_pylist() == ['["x"]', "[]"]


def test_columns_of_features_and_pictures_are_neither_kept_nor_read(tmp_path):
    rng = np.random.default_rng(0)
    features = [rng.random(400, np.float32) for _ in range(70)]
    features[0] = features[0][:2]
    names = [f"{row}.png" for row in range(70)]
    pictures = [{"bytes": rng.bytes(9000), "name": name} for name in names]
    table = pa.table(
        {"path": names, "features": features, "picture": pictures, "at.x": range(70), "at": [[1.5, 2.0]] * 70}
    )
    pq.write_table(table, tmp_path / "m.parquet")
    assert _too_large(pq.read_metadata(tmp_path / "m.parquet")) == {"features", "picture"}
    (tmp_path / "m.jsonl").write_text(
        "\n".join(
            json.dumps({"path": name, "features": row.tolist(), "at.x": x, "at": [1.5, 2.0]})
            for x, (name, row) in enumerate(zip(names, features, strict=True))
        )
    )
    for name in ("m.parquet", "m.jsonl"):
        listing = open_source(tmp_path / name).scan()
        assert listing.column_names == [*SCHEMA.names, "column:at.x", "column:at"]
        assert listing["column:at.x"].to_pylist() == list(map(str, range(70)))
        assert listing["column:at"].to_pylist() == ["[1.5, 2.0]"] * 70


@example(["\x00", 0])
@given(
    st.lists(
        st.one_of(
            st.none(), st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False), st.lists(st.integers())
        )
    )
)
def test_columns_of_one_kind_are_texts_like_those_of_several(values):
    assert _texts(values).to_pylist() == [
        value if value is None or isinstance(value, str) else json.dumps(value) for value in values
    ]


@given(st.lists(st.lists(st.sampled_from(["red", "round", "ü b", "7"]), unique=True), min_size=1, max_size=6))
def test_lists_of_labels_come_back_from_the_matrix(lists):
    from featurepipe.store.roles import _Column, _listed

    if not any(lists):
        return
    column = _Column("t", pa.array([json.dumps(labels) for labels in lists]), "f")
    names, matrix = _listed(column, None)
    assert [sorted(np.array(names)[row == 1].tolist()) for row in matrix] == [sorted(labels) for labels in lists]


def test_a_file_of_near_duplicates_is_groups(kept, tmp_path):
    """As `featurepipe.duplicates` writes it: exact copies have numbers of their own, and are one image anyway."""
    columns = {
        "kind": ["exact", "exact", "near", "near"],
        "group": [0] * 4,
        "id": ["b1", "b2", "a1", "b2"],
        "label": [*"bbab"],
    }
    for name in ("g.parquet", "g.csv"):
        path = tmp_path / name
        if name.endswith("parquet"):
            pq.write_table(pa.table(columns), path)
        else:
            pa.csv.write_csv(pa.table(columns), path)
        features, said = joined(kept, group=str(path))
        assert features.groups.tolist() == ["0", None, None, "0"]
        assert features.labels.tolist() == ["a", "a", "b", "b"]
        assert said[0].startswith(f"groups: column group of {name}, 1 group (2 images without one, each for itself)")
    path.write_text("id,patient\na1,p\n")
    with pytest.raises(UsageError, match=r"unknown column 'group' in g\.csv; choices: patient"):
        joined(kept, group=str(path))


def test_a_group_is_one_however_its_number_is_written(kept, tmp_path):
    (tmp_path / "l.csv").write_text("id,group\na1,1\na2,1.0\nb1,nan\nb2,2.0\n")
    assert joined(kept, tmp_path / "l.csv")[0].groups.tolist() == ["1", "1", None, "2"]
    (tmp_path / "l.jsonl").write_text(
        '{"id": "a1", "group": 1}\n{"id": "a2", "group": 1.0}\n{"id": "b1", "group": NaN}\n'
    )
    assert joined(kept, tmp_path / "l.jsonl")[0].groups.tolist() == ["1", "1", None, None]
    (tmp_path / "l.csv").write_text("id,group\na1,P1\na2,p1\nb1,NA\n")
    features, said = joined(kept, tmp_path / "l.csv")
    assert features.groups.tolist() == ["P1", "p1", "NA", None]
    assert "'P1' and 'p1'" in said[0]
    assert "taken as a group: 'NA'" in said[0]


def test_an_empty_column_called_group_is_no_group(kept, tmp_path):
    (tmp_path / "l.csv").write_text("id,label,group\na1,x,\na2,y, \n")
    features, said = joined(kept, tmp_path / "l.csv")
    assert features.groups is None
    assert any("column group of l.csv is empty for all images" in line for line in said)
    assert not any("ignored" in line for line in said)
    with pytest.raises(UsageError, match="is empty for all images"):
        joined(kept, tmp_path / "l.csv", group="group")


@pytest.mark.parametrize("where", ["labels", "manifest"])
def test_columns_of_parquet_with_types_are_texts(kept, tmp_path, where):
    day = dt.date(2024, 5, 1)
    table = pa.table({
        "path" if where == "manifest" else "id": NAMES,
        "date": [day, day, None, day],
        "when": pa.array([1_714_548_600_000_000] * 4, pa.timestamp("us")),
        "price": [Decimal("1.50"), None, Decimal("-2.00"), Decimal("3.25")],
        "age": pa.array([1.0, float("nan"), None, 2.5]),
        "kind": pa.array(["u", "v", None, "u"]).dictionary_encode(),
        "none": pa.nulls(4),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    expected = {
        "date": ["2024-05-01", "2024-05-01", None, "2024-05-01"],
        "when": ["2024-05-01 07:30:00.000000"] * 4,
        "price": ["1.50", None, "-2.00", "3.25"],
        "age": ["1", None, None, "2.5"],
        "kind": ["u", "v", None, "u"],
        "none": [None] * 4,
    }
    if where == "manifest":
        listing = open_source(tmp_path / "t.parquet").scan()
        found = {name: listing[f"column:{name}"].to_pylist() for name in expected}
    else:
        from featurepipe.store.labels import read_columns

        columns = read_columns(tmp_path / "t.parquet")
        found = {name: columns.texts(name).to_pylist() for name in expected}
        np.testing.assert_array_equal(
            joined(kept, tmp_path / "t.parquet", target="price")[0].targets, [1.5, np.nan, -2, 3.25]
        )
    assert found == expected


def test_ids_that_are_no_image_here_are_refused(kept, tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("id,group\nX1,p\nX2,p\n")
    for asked in (None, "group", str(path)):
        with pytest.raises(UsageError, match=r"none of the 2 ids in l\.csv is an id of these features: there 'X1'"):
            joined(kept, None if asked == str(path) else path, group=asked)


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("units/{}", "leave out 'units/' in front of them"),
        ("/data/all/{}", "leave out '/data/all/' in front of them"),
        ("{}.png", "leave out the suffixes"),
        ("x-{}", "write them as the dataset has them"),
    ],
)
def test_what_makes_ids_match_is_said(kept, tmp_path, written, advice):
    path = tmp_path / "l.csv"
    path.write_text("".join(f"{line}\n" for line in ("id,group", *(f"{written.format(name)},p" for name in NAMES))))
    with pytest.raises(UsageError) as caught:
        joined(kept, path)
    there = written.format("a1")
    assert str(caught.value) == (
        f"none of the 4 ids in l.csv is an id of these features: there {there!r}, here 'a1'; {advice}"
    )


@pytest.mark.parametrize(
    ("ids", "advice"),
    [
        (["b/2.png", "a/1.png", "c/3.png"], "write 'units/x/' in front of them"),
        (["x/a/1.png", "x/b/2.png"], "write 'units/' in front of them"),
        (["units/x/a/1", "units/x/b/2", "units/x/c/3"], "write the suffixes as well"),
        (
            ["all/units/x/a/1.png", "all/units/x/c/3.png", "all/units/x/other.png"],
            "",
        ),  # two of three are not nearly all
    ],
)
def test_ids_of_features_may_be_the_longer_ones(ids, advice):
    here = pa.array(["units/x/a/1.png", "units/x/b/2.png", "units/x/c/3.png"])
    with pytest.raises(UsageError) as caught:
        join_labels(pa.chunked_array([here]), read_labels(dict.fromkeys(ids, "one")))
    assert str(caught.value).endswith(f"; {advice or 'write them as the dataset has them'}")


def test_views_side_by_side_have_the_same_roles(kept):
    features, _ = joined(kept, group="patient")
    other = kept.features("d", "b:gap")
    for one, two, side in ((features, other, "right"), (other, features, "left")):
        with pytest.raises(UsageError, match=f"those on the {side} have no group"):
            one + two
    unknown = np.array([[1, np.nan], [0, 1], [np.nan, np.nan], [0, 0]], np.float32)
    both = [view.with_column("target", unknown, names=["x", "y"]) for view in (kept.features("d", "a:gap"), other)]
    np.testing.assert_array_equal((both[0] + both[1]).targets, unknown)
    changed = both[1].with_column("target", np.nan_to_num(unknown), names=["x", "y"])
    with pytest.raises(UsageError, match="2 images have another target, such as 'a1'"):
        both[0] + changed


def test_the_map_of_a_page_has_the_classes_that_were_compared(kept, tmp_path):
    from featurepipe.reporting.from_store import _mapped

    (tmp_path / "g.csv").write_text("id,group\na1,p\n")
    document = {
        "dataset": "d", "details": {"column": "a:gap"}, "space": {"fingerprint": kept.features("d", "a:gap").space_fingerprint},
        "provenance": {"snapshot": kept.snapshot_ids("d")[-1], "options": {"label": None}},
    }  # fmt: skip
    found = _mapped(kept, document, tmp_path / "g.csv", print)
    assert list(found.labels) == ["a", "a", "b", "b"]
    document["provenance"]["options"]["label"] = "patient"
    assert list(_mapped(kept, document, None, print).labels) == ["p", "q", None, "p"]


def test_verify_reads_further_columns(kept):
    path = kept.path / "snapshots" / "d" / f"{kept.snapshot_ids('d')[-1]}.parquet"
    assert verify_store(kept).clean
    footer = pq.read_metadata(path)
    place = next(n for n in range(footer.num_columns) if footer.schema.column(n).path == "column:age")
    column = footer.row_group(0).column(place)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    assert [problem.part for problem in verify_store(kept).problems] == [str(path.relative_to(kept.path))]


def test_further_columns_of_a_snapshot_that_cannot_be_read_are_an_error_and_not_none(kept):
    path = kept.path / "snapshots" / "d" / f"{kept.snapshot_ids('d')[-1]}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=f"^cannot read snapshot {path}: "):
        kept.further_columns("d")


def test_splits_of_other_names_are_said_to_be_named(kept, tmp_path):
    (tmp_path / "f.csv").write_text("id,label,Fold\na1,x,one\na2,y,two\nb1,x,one\nb2,y,two\n")
    features, said = joined(kept, tmp_path / "f.csv", split_column="fold")
    assert features.splits.tolist() == ["one", "two", "one", "two"]
    line = "none of these splits is train, val or test: name the one to train on or to test with --split one"
    assert said.count(line) == 1


def test_splits_of_any_column_by_their_usual_names(kept, tmp_path):
    (tmp_path / "f.csv").write_text("id,label,Fold,split\na1,x,training,a\na2,y,TEST,b\nb1,x,extra,c\nb2,y,,d\n")
    features, said = joined(kept, tmp_path / "f.csv", split_column="fold")
    assert features.splits.tolist() == ["train", "test", "extra", None]
    assert said[0] == "splits: column Fold of f.csv: extra 1, test 1, train 1, none 1 (TEST as test, training as train)"
    assert not [line for line in said if "none of these splits" in line]
    assert "f.csv: ignored columns: split" in said
    assert len(features.select(split="train")) == 1
    none, said = joined(kept, split_column="none")
    assert none.split_names() == []


def test_splits_of_the_manifest_count_rejects_too(zoo, monkeypatch):
    rows = [*zoo.images(None, 4), zoo.image("bad", "cat-bad", "cat", None, is_usable=False)]
    zoo.write(rows)
    table = zoo.store.snapshot("zoo").append_column(
        "column:fold", pa.array(["train"] * 8 + ["Validation"] * 4 + ["test"])
    )
    zoo.store.write_snapshot("zoo", zoo.store.new_run_id(), table)
    view = zoo.store.features("zoo", "a:gap")
    features = with_roles(zoo.store, view, None, RoleOptions(split_column="fold"), print)
    assert features.counts()["splits"] == {"train": 8, "val": 4}
    assert (features.rejects, features.select(split="validation").rejected) == ({"test": 1}, 0)
    many = pa.table({"id": [row.id for row in rows], "n": list(range(13))})
    monkeypatch.setattr("featurepipe.store.roles._MOST_SPLITS", 10)
    with pytest.raises(
        UsageError, match="split_column='n': column n of the table has 12 different values, such as '0', '1'"
    ):
        with_roles(zoo.store, view, many, RoleOptions(split_column="n"), print)
    again = with_roles(zoo.store, features, None, RoleOptions(split_column="none"), print)
    assert (again.split_names(), again.rejects) == ([], {None: 1})


def test_a_column_that_was_asked_for_in_training_is_taken_where_it_is_there(kept, tmp_path):
    trained = {"label": "kind", "group": "patient", "split_column": "fold"}

    def found(labels=None, **roles):
        view = kept.features("d", "a:gap")
        return with_roles(kept, view, labels, RoleOptions(**roles), lambda _: None, trained=trained)

    assert found().groups.tolist() == ["p", "q", None, "p"]
    assert found().labels.tolist() == ["a", "a", "b", "b"]
    assert found(group="none").groups is None
    (tmp_path / "k.csv").write_text("id,kind,label,fold\na1,k,l,train\na2,k,l,test\nb1,m,n,test\nb2,m,n,test\n")
    features = found(tmp_path / "k.csv")
    assert features.labels.tolist() == ["k", "k", "m", "m"]
    assert features.splits.tolist() == ["train", "test", "test", "test"]
    assert found(dict.fromkeys(NAMES, "z")).classes == ["z"]
    assert found(tmp_path / "k.csv", label="label").classes == ["l", "n"]
    assert found(tmp_path / "k.csv", target="age", group="none").targets[0] == 3


def test_what_is_not_known_of_several_labels_is_counted_in_all_forms(kept, tmp_path):
    def said_of(text, *columns):
        (tmp_path / "t.csv").write_text(text)
        features, said = joined(kept, tmp_path / "t.csv", multilabel=columns)
        return features.targets.tolist(), next(line for line in said if line.startswith("several"))

    unknown = [pytest.approx(np.nan, nan_ok=True)] * 2
    rows, said = said_of("id,t\na1,x|y\na2,none\nb1,[]\nb2,\n", "t")
    assert rows == [[1, 1], [0, 0], [0, 0], unknown]
    assert said.endswith(
        "; 1 image without any: unknown, and left out, not negative; write [] or none where an image has no label"
    )
    rows, said = said_of('id,t\na1,"[""x"", ""y""]"\na2,[]\nb1,"[""y""]"\nb2,\n', "t")
    assert rows == [[1, 1], [0, 0], [0, 1], unknown]
    assert "; 1 image without any: unknown" in said
    rows, said = said_of("id,x,y\na1,1,0\na2,,1\nb1,,\nb2,0,0\n", "x", "y")
    assert rows == [[1, 0], [unknown[0], 1], unknown, [0, 0]]
    assert said.endswith(
        "; 3 of 8 entries are empty, 1 image without any: unknown, and left out label by label, not negative; write 0 where an "
        "image has not the label"
    )
    assert "unknown" not in said_of("id,x\na1,1\na2,0\nb1,1\nb2,0\n", "x")[1]


@pytest.mark.parametrize(
    ("text", "roles", "said"),
    [
        (
            "id,age\na1,old\na2,3\nb1,n/a\nb2,?\n",
            {"target": "age"},
            "has 'old' for image 'a1', 'n/a' for image 'b1', '?' for image 'b2', which are no finite numbers; leave it empty "
            "where it is not known; or learn classes from it with label='age'",
        ),
        (
            'id,age\na1,"1,5"\na2,"2,5"\n',
            {"target": "age"},
            "'2,5' for image 'a2', which are no finite numbers; write a dec",
        ),
        ('id,age\na1,"1,500"\n', {"target": "age"}, "write no separator of thousands, or a decimal point"),
        ("id,t\na1,red;big\na2,big\n", {"multilabel": ("t",)}, "has labels such as 'red;big', which look like several"),
        ("id,t\na1,caf\u00e9\na2,cafe\u0301\n", {"multilabel": ("t",)}, "has one label in two forms"),
        ("id,t\na1,none\na2,[]\n", {"multilabel": ("t",)}, "has no label for any image"),
        ("id,x\na1,1\na2,0\n", {"multilabel": ("x", "X")}, "column x is named twice; name each once"),
        ("id,age\na1,1_000\n", {"target": "age"}, "has '1_000' for image 'a1'"),
        ("id,age\na1,1e999\n", {"target": "age"}, "has '1e999' for image 'a1'"),
        ("id,label,w\na1,x,0\na2,x,0\nb1,y,0.0\nb2,y,0\n", {"weight": "w"}, "is 0 for all images"),
        ("id,label,w\na1,x,nan\n", {"weight": "w"}, "has 'nan' for image 'a1'"),
        ("id,label,Group,GROUP\na1,x,1,2\n", {}, "several columns may be 'group': 'Group', 'GROUP'"),
        ("id,label,f\na1,x,\n", {"split_column": "f"}, "column f of l.csv is empty for all images"),
        (
            "id,label,f\na1,x,\n",
            {"split_column": "folds"},
            "unknown column 'folds'; there are found, f, label, patient, age",
        ),
    ],
)
def test_more_bad_roles(kept, tmp_path, text, roles, said):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UsageError) as caught:
        joined(kept, tmp_path / "l.csv", **roles)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("role", "values", "more", "said"),
    [
        ("weight", [1, 2, 3], {}, "3 values of weight for 4 images"),
        ("weight", [1, 2, 3, -1], {}, "the weight of row 3 is -1.0; every image needs a finite one from 0"),
        ("weight", [1, 2, np.nan, 1], {}, "the weight of row 2 is None"),
        ("weight", [0, 0, 0, 0], {}, "all weights are 0"),
        ("weight", ["a", "b", "c", "d"], {}, "values of weight are numbers"),
        ("target", [1, 2, np.inf, 1], {}, "the target of row 2 is inf"),
        ("target", [[0, 1]] * 3 + [[0, 2]], {"names": ["x", "y"]}, "row 3 has 2 for 'y'"),
        ("target", [[0, 1]] * 4, {}, "K distinct names"),
        ("target", [[0, 1]] * 4, {"names": ["x", "x"]}, "K distinct names"),
        ("group", [[0, 1]] * 4, {}, "several values of group for each image"),
        ("label", ["a"] * 4, {}, "use with_labels"),
        ("wieght", [1] * 4, {}, "unknown role 'wieght'; nearest: weight"),
    ],
)
def test_columns_given_in_python_are_checked(kept, role, values, more, said):
    with pytest.raises(UsageError, match=said):
        kept.features("d", "a:gap").with_column(role, values, **more)


def test_columns_given_in_python(kept):
    view = kept.features("d", "a:gap")
    assert view.with_column("group", [1.0, 2.0, np.nan, 1.0], column="patient").groups.tolist() == ["1", "2", None, "1"]
    mixed = view.with_column("group", np.array([1, "b", None, ""], object), column="patient")
    assert (mixed.groups.tolist(), mixed.take([0, 1]).group_column) == (["1", "b", None, None], "patient")
    assert view.with_column("split", ["train", None, "test", ""]).split_names() == ["test", "train"]
    both = view.with_column("target", [[1, 0], [0, np.nan], [True, True], [0, 1]], names=["x", "y"])
    assert both.targets[:, 0].tolist() == [1, 0, 1, 0]
    assert view.with_column("weight", pa.chunked_array([[1, 2], [3, 4]])).weights.tolist() == [1, 2, 3, 4]


def test_roles_are_joined_in_python(kept, tmp_path, capsys):
    from featurepipe.store import join_roles

    (tmp_path / "l.csv").write_text("id,x,y,w,fold\na1,1,0,2,train\na2,0,1,1,test\nb1,1,1,1,test\nb2,0,,3,train\n")
    view = kept.features("d", "a:gap")
    found = join_roles(view, tmp_path / "l.csv", multilabel="x,y", group="patient", split_column="fold", weight="w")
    np.testing.assert_array_equal(found.targets, [[1, 0], [0, 1], [1, 1], [0, np.nan]])
    assert (found.target_names, found.groups.tolist()) == (("x", "y"), ["p", "q", None, "p"])
    assert (found.weights.tolist(), found.splits.tolist()) == ([2, 1, 1, 3], ["train", "test", "test", "train"])
    assert "columns of its manifest without a role here: age, found" in capsys.readouterr().err
    assert join_roles(view, target="age", silent=True).targets[1] == 4.5
    assert capsys.readouterr().err == ""


def test_classes_that_look_alike_are_named(kept, tmp_path):
    (tmp_path / "l.csv").write_text("id,label,kind\na1,Cat,x\na2,cat,X y\nb1,NA,x y\nb2,dog,x\n")
    _, said = joined(kept, tmp_path / "l.csv")
    assert said[0] == (
        "l.csv: 4 labels on 4 of 4 images; taken as a class: 'NA'; leave the label empty where there is none; taken as classes "
        "of their own, though they look alike: 'Cat' and 'cat'"
    )
    (tmp_path / "j.csv").write_text('id,t\na1,"[""a, b""]"\na2,"[""a"", ""b""]"\nb1,[]\n')
    assert joined(kept, tmp_path / "j.csv", multilabel=("t",))[0].target_names == ("a", "a, b", "b")


def test_a_file_without_the_class_has_its_other_columns_proposed(kept):
    table = pa.table({"id": NAMES, "klass": list("xxyy"), "series": list("sstt")})
    with pytest.raises(UsageError) as found:
        joined(kept, table)
    assert found.value.spelled(on_command_line) == (
        "the table: no column `label` among klass, series; if another is the class: --label klass or --label series",
    )
    with pytest.raises(UsageError, match="unknown column 'klas'; there are klass, "):
        joined(kept, table, label="klas")


def test_ids_of_rejected_images_are_told_apart_from_ids_of_none(store, space, rows):
    rows.write(store, space, NAMES, columns=("a:gap",))
    run_id = rows.snapshot(store, "d", NAMES)
    table = store.snapshot("d", run_id)
    status = table.column_names.index("status")
    broken = table.slice(3).set_column(status, "status", pa.array(["rejected"])).to_pylist()
    table = pa.concat_tables([table.slice(0, 3), pa.Table.from_pylist(broken, schema=table.schema)])
    store.write_snapshot("d", store.new_run_id(), table)
    _, said = joined(store, {NAMES[0]: "x", NAMES[1]: "y", NAMES[3]: "x", "nowhere": "y"})
    assert said[0] == "the mapping: 2 labels on 2 of 3 images; 1 id of a rejected image; 1 id not among the images"
