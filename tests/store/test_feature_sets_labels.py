"""Labels given by the user: from where, joined how, refused when."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import UsageError
from featurepipe.store.views import with_told_labels

NAMES = ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jpg"]


@pytest.fixture
def features(store, space, rows):
    rows.write(store, space, NAMES)
    rows.snapshot(store, "d", NAMES)
    return store.features("d")


def test_labels_are_joined_by_id_not_by_position(features):
    new = features.with_labels({"dog/4.jpg": "w", "stranger": "x", "cat/2.jpg": "v", "cat/1.jpg": None})
    assert new.labels.tolist() == [None, "v", None, "w"]
    assert (new.unlabelled, new.unmatched, new.classes) == (2, 1, ["v", "w"])
    np.testing.assert_array_equal(new.numpy(labelled=True)[0], features.read(rows=np.array([1, 3])))
    assert features.labels.tolist() == list("ccdd")
    assert [y.tolist() for _, y in new.blocks(rows=3)] == [[None, "v", None], ["w"]]
    assert new.select(labelled=True).unmatched == 1


TABLE = pa.table(
    {"label": ["b", "", None, "b"], "id": [NAMES[2], NAMES[0], NAMES[1], "stranger"], "more": [1, 2, 3, 4]}
)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".CSV"])
@pytest.mark.parametrize("column", ["id", "path"])
def test_labels_come_from_files(features, tmp_path, suffix, column):
    table = TABLE.rename_columns(["label", column, "more"])
    path = tmp_path / f"labels{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in table.to_pylist()))
    else:
        path.write_text(f"label,{column},more\nb,dog/3.jpg,1\n,cat/1.jpg,2\n,cat/2.jpg,3\nb,stranger,4\n")
    for source in (path, str(path), table):
        new = features.with_labels(source)
        assert new.labels.tolist() == [None, None, "b", None]
        assert new.unmatched == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["3", "4"], ["3", "4"]),
        ([3, 4], ["3", "4"]),
        ([np.int64(3), np.float32(4)], ["3", "4"]),
        ([3.0, None], ["3", None]),
        ([True, False], ["True", "False"]),
        ([np.str_("x"), ""], ["x", None]),
        ([-2, 10**20], ["-2", "100000000000000000000"]),
        (["NA", "null"], ["NA", "null"]),
        (["007", "1.10"], ["007", "1.10"]),
    ],
)
def test_labels_become_text(features, given, text):
    assert features.with_labels(dict(zip(NAMES, given, strict=False))).labels.tolist()[:2] == text


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([7, 8], pa.int8()),
        pa.array([7.0, 8.0], pa.float32()),
        pa.array(["7", "8"], pa.large_string()),
        pa.array(["7", "8"]).dictionary_encode(),
    ],
)
def test_columns_of_tables_become_text(features, labels):
    table = pa.table({"id": pa.array(NAMES[:2]).dictionary_encode(), "label": labels})
    assert features.with_labels(table).labels.tolist() == ["7", "8", None, None]


def test_text_in_csv_stays_as_written(features, tmp_path):
    path = tmp_path / "l.csv"
    path.write_text('id,label\ncat/1.jpg,007\ncat/2.jpg,NA\ndog/3.jpg,""\ndog/4.jpg,"a,b"\n')
    assert features.with_labels(path).labels.tolist() == ["007", "NA", None, "a,b"]


@pytest.mark.parametrize("nan", [float("nan"), np.float32("nan"), "nan", "NaN"])
def test_nan_is_refused_with_its_place(features, nan):
    named = r"the label of 'cat/2\.jpg' \(row 2\) is '?NaN'?; .*if the image has no label, leave it empty \(None\)"
    with pytest.raises(UsageError, match=f"(?i)the mapping: {named}"):
        features.with_labels({NAMES[0]: "x", NAMES[1]: nan})


def test_nan_in_a_file_is_refused_with_its_place(features, tmp_path):
    pq.write_table(pa.table({"id": NAMES, "label": [1.0, 2.0, float("nan"), 1.0]}), tmp_path / "l.parquet")
    with pytest.raises(UsageError, match=r"l\.parquet: the label of 'dog/3\.jpg' \(row 3\) is NaN"):
        features.with_labels(tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text("id,label\ncat/1.jpg,x\ncat/2.jpg,nan\n")
    with pytest.raises(UsageError, match=r"l\.csv: the label of 'cat/2\.jpg' \(row 2\) is 'nan'"):
        features.with_labels(tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("label", "what"),
    [
        (3.5, r"the number 3\.5"),
        (float("inf"), "the number inf"),
        (["x"], "a list"),
        (b"x", "a bytes"),
        (2.0**60, "the n"),
    ],
)
def test_what_is_no_class_is_refused(features, label, what):
    with pytest.raises(UsageError, match=rf"the label of 'cat/1\.jpg' \(row 1\) is {what}.*text or whole numbers"):
        features.with_labels({NAMES[0]: label})


def test_an_id_has_one_label(features, tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("id,label\ncat/1.jpg,x\ndog/3.jpg,y\ncat/1.jpg,x\n")
    new = features.with_labels(path)
    assert new.labels.tolist() == ["x", None, "y", None]
    assert new.unmatched == 0
    path.write_text("id,label\ncat/1.jpg,x\ndog/3.jpg,y\ndog/3.jpg,\ncat/1.jpg,z\n")
    with pytest.raises(UsageError, match=r"l\.csv: 2 ids have several labels; 'cat/1\.jpg' has x and z"):
        features.with_labels(path)
    with pytest.raises(UsageError, match="the mapping: 1 id has several labels; '1' has a and b"):
        features.with_labels({1: "a", "1": "b"})


def test_labels_that_match_nothing_show_both_sides(features):
    labels = {"/data/cat/1.jpg": "x", "/data/cat/2.jpg": "y"}
    with pytest.raises(
        UsageError, match=r"none of the 2 ids in the mapping .*there '/data/cat/1\.jpg', here 'cat/1\.jpg'"
    ):
        features.with_labels(labels)
    with pytest.raises(UsageError, match="the mapping holds no labels"):
        features.with_labels({})
    assert features.take([]).with_labels(labels).unmatched == 2


def test_columns_that_are_missing_are_named(features, tmp_path):
    with pytest.raises(
        UsageError, match=r"the table: no column `label` among id, labels; nearest: labels\. Labels take two"
    ):
        features.with_labels(pa.table({"id": ["a"], "labels": ["x"]}))
    with pytest.raises(UsageError, match=r"the table: no column `id` among name, label\. It takes `id`"):
        features.with_labels(pa.table({"name": ["a"], "label": ["x"]}))
    with pytest.raises(UsageError, match="the table: row 2 has no id"):
        features.with_labels(pa.table({"id": ["a", None], "label": ["x", "y"]}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"", "no column `id` among none"),
        ("l.csv", b"id,label\na,b,c\n", "cannot read labels from"),
        ("l.csv", b"id,label\n\xff\xfe,b\n", "cannot read labels from"),
        ("l.parquet", b"PAR1", "cannot read labels from"),
        ("l.jsonl", b'{"id": "a", "label": "x"}\n{"id": ', r"l\.jsonl: line 2 is not JSON"),
        ("l.jsonl", b'{"id": "a", "label": "x"}\n{"id": "b"}', r"l\.jsonl: line 2 is no object"),
        ("l.txt", b"", r"must end in \.csv, \.parquet, \.jsonl"),
    ],
)
def test_files_that_hold_no_labels_are_usage_errors(features, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        features.with_labels(tmp_path / name)


def test_what_holds_no_labels_is_refused(features, tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        features.with_labels(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match=r"or a pandas DataFrame with them, not as list"):
        features.with_labels(["x"] * 4)


@pytest.mark.parametrize(
    "content",
    [
        b"id;label;patient\ncat/1.jpg;b;7\n",
        b"\xef\xbb\xbfFilename\tLabel\tpatient\ncat/1.jpg\tb\t7\n",
        b"path, label, patient\ncat/1.jpg, b, 7\n",
        "image,LABEL,patient\ncat/1.jpg,b,7\n".encode("utf-16"),
    ],
)
def test_labels_files_as_people_have_them(features, tmp_path, content):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    said = []
    found = with_told_labels(features, path, said.append)
    assert found.labels.tolist() == ["b", None, None, None]
    assert said == ["labels.csv: 1 label on 1 of 4 images; ignored columns: patient"]


def test_what_of_a_labels_file_is_not_used_is_told(features, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"id": "cat/1.jpg", "label": "b", "age": 3}\n{"id": "x", "label": "c", "sex": "f"}\n')
    said = []
    with_told_labels(features, path, said.append)
    assert said == ["labels.jsonl: 1 label on 1 of 4 images; ignored columns: age, sex; 1 id not among the images"]
    labels = {"cat/1.jpg": "b", "x": "c", "y": "c", "z": "c"}
    for rejected, told in (
        (["x"], "1 id of a rejected image; 2 ids not among the images"),
        (["x", "y", "z", "w"], "3 ids of rejected images"),
    ):
        found = with_told_labels(features, labels, said.append, lambda rejected=rejected: pa.array(rejected))
        assert found.unmatched == max(0, 3 - len(rejected))  # evaluate counts rejects by themselves
        assert said[-1] == f"the mapping: 1 label on 1 of 4 images; {told}"


def test_a_labels_file_that_contradicts_itself_names_both(features, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("file;label\ncat/1.jpg;b\ncat/1.jpg; c\n")
    with pytest.raises(UsageError, match=r"'cat/1.jpg' has b and c: an image has one label"):
        features.with_labels(path)


def test_whole_numbers_written_as_floats_are_whole_numbers_and_that_is_told(features, tmp_path):
    first, second, third = features.ids[:3]
    said = []
    path = tmp_path / "labels.csv"
    path.write_text(f"id,label\n{first},1.0\n{second},\n{third},2.0\n{first},1\n")
    found = with_told_labels(features, path, said.append)
    assert found.labels.tolist()[:3] == ["1", None, "2"]
    assert said == [
        "labels.csv: 2 labels on 2 of 4 images; labels are whole numbers written as floats, and taken as whole numbers: "
        "'1.0' as '1'"
    ]
    pq.write_table(
        pa.table({"id": [first, second, third], "label": pa.array([1, None, 2])}), tmp_path / "labels.parquet"
    )
    assert features.with_labels(tmp_path / "labels.parquet").labels.tolist() == found.labels.tolist()
    path.write_text(f"id,label\n{first},1.0\n{second},1.5\n")
    assert features.with_labels(path).labels.tolist()[:2] == ["1.0", "1.5"]
