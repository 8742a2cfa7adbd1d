"""Text in CSV files that no spreadsheet runs, numbers left alone."""

import csv
import io

import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurepipe.display import neutralised, neutralised_text
from featurepipe.prediction.files import predictions_file, schema_of

FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "＝1",
    "-",
    "--",
    "=",
    "-1-1",
]
PLAIN = ["a=b.png", "-1", "+4.5", "-1e-3", "-.5", "", "dir/=x.png", "'=1", "cat", None, "a\tb", "3"]


@pytest.mark.parametrize("make", [pa.table, pa.record_batch])
def test_formulas_get_an_apostrophe_and_nothing_else_changes(make):
    rows = make({"id": FORMULAS + PLAIN, "n": range(len(FORMULAS + PLAIN))})
    found, changed = neutralised(rows)
    assert changed == len(FORMULAS)
    assert found["id"].to_pylist() == [f"'{text}" for text in FORMULAS] + PLAIN
    assert found.schema == rows.schema
    assert neutralised(found) == (found, 0)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_no_cell_of_any_text_begins_a_formula(texts):
    found, changed = neutralised(pa.table({"id": texts}))
    file = io.BytesIO()
    pyarrow.csv.write_csv(found, file)
    cells = found["id"].to_pylist()
    assert not [cell for cell in cells if cell[:1] in "=@\t\r\n" and cell]
    assert changed == sum(one != other for one, other in zip(texts, cells, strict=True))
    assert all(one in (other, f"'{other}") for one, other in zip(cells, texts, strict=True))


@pytest.mark.parametrize("raw", [False, True])
def test_predictions_say_how_many_cells_were_changed(tmp_path, raw):
    batch = pa.RecordBatch.from_arrays(
        [pa.array(["=HYPERLINK(1)", "b.png"]), pa.array(["@a", None]), pa.array([1.0, None], pa.float32()),
         pa.array([None, "=gone"]), pa.array([1.0, None], pa.float32())],
        schema=schema_of(["@a"]),
    )  # fmt: skip
    with predictions_file(tmp_path / "x.csv", ["@a"], raw_ids=raw) as write:
        write(batch)
    rows = list(csv.reader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row[:2] for row in rows[1:]] == (
        [["=HYPERLINK(1)", "@a"], ["b.png", ""]] if raw else [["'=HYPERLINK(1)", "'@a"], ["b.png", ""]]
    )
    assert write.neutralised == (0 if raw else 3)
    with predictions_file(tmp_path / "x.jsonl", ["@a"]) as write:
        write(batch)
    assert '"id": "=HYPERLINK(1)"' in (tmp_path / "x.jsonl").read_text()
    assert write.neutralised == 0


def test_what_is_said():
    assert neutralised_text(0, "x.csv") == ""
    assert neutralised_text(1, "x.csv").startswith("1 cell of x.csv would have been a formula in a spreadsheet")
