"""Labels as text, numbers on a scale, several names in one label, and CSV files with other separators."""

import csv
import io

import numpy as np
import pandas as pd
import pytest

from featurepipe.annotations import (
    check_classes,
    column_named,
    is_missing,
    label_text,
    numbers_on_a_scale,
    path_column,
    read_csv,
    several_names,
)
from featurepipe.errors import UsageError


@pytest.mark.parametrize("label", [None, np.nan, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT")])
def test_missing_labels(label):
    assert is_missing(label)
    assert label_text(label)[0] is None


@pytest.mark.parametrize("label", ["", "nan", 0, False, "None", [np.nan], np.zeros(2)])
def test_labels_that_are_not_missing(label):
    assert not is_missing(label)


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ([f"{20 + 1.37 * i:.2f}" for i in range(40)], 40),
        ([str(i / 10) for i in range(1, 100)], 300),
        ([str(1900 + 3 * i) for i in range(50)], 60),
        (["-1.5", "0.25", "1e3"], 3),
    ],
)
def test_measured_numbers_are_refused(values, images):
    assert numbers_on_a_scale(values, images).startswith(f"{len(values)} different numbers from ")
    with pytest.raises(UsageError, match=r"numbers to be estimated \(regression\), not classes"):
        check_classes(values, images, print)


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ([str(i) for i in range(10)], 20),
        ([str(i) for i in range(1, 201)], 201),
        ([f"{i:03d}" for i in range(1000)], 5000),
        (["1.8", "2.8", "4.0", "5.6"], 400),
        (["2019", "2020", "2021"], 30),
        (["3", "7"], 2),
        ([*map(str, range(40)), "none"], 41),
        (["nan", "inf", "x"], 3),
    ],
)
def test_codes_of_classes_are_not(values, images):
    assert numbers_on_a_scale(values, images) is None


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["a", "b", "a|b"], "1 label holds several names separated by '|', such as 'a|b'"),
        (["x|y"], "1 label holds"),
        (["red;round", "red;square"], "2 labels hold several names separated by ';', such as 'red;round'"),
        (["cat", "cat, dog"], "1 label holds several names separated by ','"),
        (["Washington, D.C.", "Paris, Texas", "cat"], None),
        (["|", "a|", "b"], None),
    ],
)
def test_several_names_in_one_label(classes, says):
    found = several_names(classes)
    assert found is None if says is None else found.startswith(says)


def test_columns_are_found_by_their_usual_names():
    assert path_column(["image", "PATH", "path"]) == "path"
    assert path_column(["image", "Image-Path"]) == "Image-Path"
    assert path_column(["picture", "label"]) is None
    assert column_named("label", ["Label", "label"]) == "label"


@pytest.mark.parametrize(
    ("content", "separator", "rows"),
    [
        (b"id,label\n1,a\n", ",", [["1", "a"]]),
        (b'"id";"label"\n"1;2";"a\nb"\n', ";", [["1;2", "a\nb"]]),
        (b"label\tid\n a\t1 \n", "\t", [[" a", "1 "]]),
        (b'id, label\n1, "a, b"\n', ",", [["1", "a, b"]]),
        (b"sep=|\nid|x\n1|\n", "|", [["1", None]]),
    ],
)  # fmt: skip
def test_separators(content, separator, rows):
    table = read_csv(io.BytesIO(content), ("id", "label"))
    assert table.separator == separator
    assert [fields for _, fields in table.rows] == rows


def test_lines_are_counted_as_an_editor_does():
    table = read_csv(io.BytesIO(b'\nid,label\n\n1,"a\nb"\n2,c\n3\n'), ("id",))
    assert [next(table.rows)[0], next(table.rows)[0]] == [5, 6]
    with pytest.raises(csv.Error, match="line 7: 1 fields"):
        next(table.rows)
