"""Parts and snapshots that somebody changed, checksums and all: named, set aside, and computed anew."""

import shutil
import time
import zlib

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.cli import main
from featurepipe.errors import CorruptPart, StoreError, UsageError
from featurepipe.heads.bundle.bundle import write_bundle
from featurepipe.monitoring.drift import drift
from featurepipe.monitoring.duplicates import duplicates
from featurepipe.store import FeatureStore, compact_store, describe, export, verify_store
from featurepipe.store import space as space_module
from featurepipe.store.parts import read_part

NAMES = ["a1", "a2", "b1", "b2", "b3"]


@pytest.fixture
def two(store, space, rows):
    """A store with two parts, the first of two rows, and their snapshot."""
    rows.write(store, space, NAMES[:2], columns=("a:gap", "b:gap"), dataset="d")
    rows.write(store, space, NAMES[2:], columns=("a:gap", "b:gap"), dataset="d")
    rows.snapshot(store, "d", NAMES)
    return store


def reopened(store):
    return FeatureStore(store.path, create=False)


def first_part(store):
    return min(store.path.glob("spaces/*/parts/*.h5"))


def replaced(path, **arrays):
    """Writes a part anew with other arrays and their checksums; ``None`` leaves one out."""
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
        found = {name: file[name][()] for name in ("key", "id", "size", "mtime_ns")}
        found |= {f"features/{name}": values[()] for name, values in file["features"].items()}
    path.unlink()
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        for name, values in (found | arrays).items():
            if values is not None:
                written = file.create_dataset(name, data=values)
                written.attrs["crc32"] = np.uint32(zlib.crc32(np.ascontiguousarray(values).tobytes()))
    return path


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"features/a:gap": np.array([[1, np.nan, 0, 0], [0] * 4], "f2")}, "features/a:gap", "NaN or infinity"),
        ({"features/a:gap": np.array([[1, -np.inf, 0, 0], [0] * 4], "f4")}, "features/a:gap", "NaN or infinity"),
        ({"features/b:gap": np.ones((2, 3), "f2")}, "features/b:gap", "3 values a row, and 4 in most rows"),
        ({"features/b:gap": np.ones((2, 0), "f2")}, "header", "wrong shape, dtype or place of features/b:gap"),
        ({"id": np.array([b"a1", b"\xff\xfe"])}, "id", "no text in UTF-8"),
    ],
)
def test_verify_names_a_part_that_no_run_has_written_and_extraction_fills_the_gap(two, change, where, what):
    path = replaced(first_part(two), **change)
    found = [problem for problem in verify_store(reopened(two)).problems if problem.part == path.stem]
    assert [(problem.dataset, what in problem.what) for problem in found] == [(where, True)]
    assert not path.exists()
    (space,) = reopened(two).spaces()
    assert space.known_files(dataset="d")["id"].to_pylist() == NAMES[2:]  # the others are computed again


def test_ids_that_are_no_text_make_a_part_damaged_for_those_who_look_for_known_files(two):
    path = replaced(first_part(two), id=np.array([b"a1", b"\xff\xfe"]))
    (space,) = reopened(two).spaces()
    assert space.known_files(dataset="d")["id"].to_pylist() == NAMES[2:]
    assert list(space.damaged) == [path.name]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_reach_no_result(two, tmp_path, value, monkeypatch):
    replaced(first_part(two), **{"features/a:gap": np.full((2, 4), value, "f2")})
    features = reopened(two).features("d", "a")
    with pytest.raises(CorruptPart, match="a:gap is damaged: it holds NaN or infinity"):
        export(features, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
    with pytest.raises(UsageError, match="Input X contains"):
        duplicates(reopened(two), node="a", near="auto", silent=True)
    monkeypatch.chdir(two.path.parent)
    for arguments in (["train", "--head", "centroid", "--node", "a", "--min-class-size", "1", "--out", "b"],):
        assert main([arguments[0], two.path.name, *arguments[1:]]) == 2


def test_drift_refuses_values_that_are_not_finite(store, space, rows):
    old, new = [f"a{n}" for n in range(12)], [f"b{n}" for n in range(12)]
    rows.write(store, space, old, dataset="d")
    rows.snapshot(store, "d", old)
    rows.write(store, space, new, dataset="d")
    rows.snapshot(store, "d", old + new)
    replaced(first_part(store), **{"features/a:gap": np.full((12, 4), np.inf, "f2")})
    with pytest.raises(UsageError, match="Input X contains infinity"):
        drift(reopened(store), dataset="d", silent=True)


def test_duplicates_of_a_dataset_without_a_usable_image_are_none(two, rows):
    rows.snapshot(two, "d", NAMES, status=["rejected"] * 5)
    found = duplicates(reopened(two), node="a", near="auto", silent=True)
    assert (found["images"], found["near"]["pairs"]) == (0, 0)


def test_what_else_lies_in_a_part_is_passed_over(two):
    """Arrays of other programs, links out of the file, and groups that lie thousands deep in each other."""
    path = first_part(two)
    with h5py.File(path, "r+") as file:
        file["elsewhere"] = np.arange(3)
        file["features/links:gap"] = h5py.SoftLink("/features/a:gap")
        file["features/far:gap"] = h5py.ExternalLink("/dev/zero", "x")
        file["features/loop"] = file["/"]
        group = file.create_group("deep")
        for _ in range(3000):
            group = group.create_group("g")
    started = time.monotonic()
    assert sorted(read_part(path).columns) == ["a:gap", "b:gap"]
    assert time.monotonic() - started < 20  # hours, if each were visited by its path
    assert verify_store(reopened(two)).problems == []
    compact_store(reopened(two))
    assert reopened(two).features("d", ["a", "b"]).numpy()[0].shape == (5, 8)


@pytest.mark.parametrize("name", ["key", "features/a:gap"])
@pytest.mark.parametrize("link", [h5py.SoftLink("/elsewhere"), h5py.ExternalLink("other.h5", "/x")])
def test_an_array_that_is_reached_by_a_link_is_missing(two, name, link):
    path = first_part(two)
    with h5py.File(path, "r+") as file:
        values = file[name][()]
        del file[name]
        file["elsewhere"] = values
        file["elsewhere"].attrs["crc32"] = np.uint32(zlib.crc32(values.tobytes()))
        file[name] = link
    if name == "key":
        with pytest.raises(CorruptPart, match="key"):
            read_part(path)
    else:
        assert list(read_part(path).columns) == ["b:gap"]


@pytest.mark.parametrize("version", [None, "2", 0, -1, 1.5, np.nan])
def test_a_part_without_a_number_for_its_version_is_damaged(two, version):
    path = first_part(two)
    with h5py.File(path, "r+") as file:
        del file.attrs["format_version"]
        if version is not None:
            file.attrs["format_version"] = version
    with pytest.raises(CorruptPart, match="format version"):
        read_part(path)


@pytest.mark.parametrize("name", ["99991231T235959999999Z-ffffffff", "29990231T000000000000Z-aaaaaaaa"])
@pytest.mark.parametrize("pattern", ["snapshots/d/*.parquet", "spaces/*/parts/*.h5"])
def test_a_name_after_which_no_run_can_come_is_said(two, pattern, name):
    (path, *_) = two.path.glob(pattern)
    shutil.copy(path, path.with_name(f"{name}{path.suffix}"))
    with pytest.raises(StoreError, match=f"named after {name}, and no run can come later"):
        reopened(two).new_run_id()


def test_a_copy_of_a_snapshot_is_never_the_current_one(two, rows):
    (path,) = two.path.glob("snapshots/d/*.parquet")
    for copy in ("zzz.parquet", f"{path.stem} (1).parquet", f"copy of {path.name}"):
        shutil.copy(path, path.with_name(copy))
    newest = rows.snapshot(two, "d", NAMES[:2])
    assert reopened(two).snapshot_ids("d") == [path.stem, newest]
    assert reopened(two).snapshot("d")["id"].to_pylist() == NAMES[:2]
    assert "snapshots/d/zzz.parquet" in verify_store(reopened(two)).leftovers


@pytest.mark.parametrize("name", ["a b", "\x1b[31m\n", b"\xff".decode("utf-8", "surrogateescape")])
def test_a_folder_that_is_no_dataset_stops_nothing(two, name, capfd):
    shutil.copytree(two.path / "snapshots" / "d", two.path / "snapshots" / name)
    assert reopened(two).datasets() == [reopened(two).only_dataset()] == ["d"]
    (leftover,) = verify_store(reopened(two)).leftovers
    assert leftover.startswith(f"snapshots/{name}/")
    for command in ("info", "verify", "gc"):
        assert main([command, str(two.path)]) == 0
    assert "\x1b" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("column", "values", "what"),
    [
        ("status", ["odd"] * 5, "not \\['odd'\\]"),
        ("status", [None] * 5, "not \\['None'\\]"),
        ("key", [None] * 5, "every usable image a key"),
        ("id", [None] * 5, "every row needs an id"),
    ],
)
def test_a_snapshot_whose_rows_contradict_themselves_is_named_with_what_to_do(two, rows, column, values, what, capfd):
    newest = rows.snapshot(two, "d", NAMES[::-1])
    path = two.path / "snapshots" / "d" / f"{newest}.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    path.unlink()
    pq.write_table(table.set_column(place, column, pa.array(values, table.schema.types[place])), path)
    with pytest.raises(StoreError, match=f"{what}.*move it out of the store"):
        reopened(two).snapshot("d")
    assert [problem.part for problem in verify_store(reopened(two)).problems] == [str(path.relative_to(two.path))]
    assert main(["verify", str(two.path)]) == 1
    assert "extract again" not in capfd.readouterr().out  # which would meet the same snapshot
    path.unlink()
    assert reopened(two).snapshot("d")["id"].to_pylist() == NAMES


def test_info_goes_on_without_a_dataset_whose_snapshot_cannot_be_read(two, rows):
    run_id = rows.snapshot(two, "other", NAMES)
    path = two.path / "snapshots" / "other" / f"{run_id}.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    found = describe(reopened(two))
    assert [dataset["name"] for dataset in found["datasets"]] == ["d"]
    assert list(found["set_aside"]) == [f"snapshots/other/{run_id}.parquet"]


@pytest.mark.parametrize("name", ["mine", "\x1b[31mtiny", "tiny-0123456789ab"])
def test_a_renamed_space_is_named_and_its_features_are_not_computed_again(two, space, name):
    space.path.rename(space.path.with_name(name))
    assert reopened(two).spaces() == []
    assert list(reopened(two).set_aside()) == [f"spaces/{name}/space.json"]
    with pytest.raises(StoreError, match=f"set aside.*rename the folder to {space.name}"):
        reopened(two).features("d", "a")
    with pytest.raises(StoreError, match=f"holds this feature space; rename the folder to {space.name}"):
        reopened(two).open_space(space.fields, backbone="tiny")
    space.path.with_name(name).rename(space.path)
    assert len(reopened(two).features("d", "a")) == 5


def test_a_space_that_another_process_makes_meanwhile_is_opened(two, monkeypatch):
    """Between the look whether it is there and the look for a renamed one."""
    fields, refuse = {"dtype": "float32", "net": "racing"}, space_module._refuse_other_folder
    rivals = []

    def after_a_rival(path, identity):
        if not rivals:
            rivals.append(path)
            reopened(two).open_space(fields, backbone="racing")
        refuse(path, identity)

    monkeypatch.setattr(space_module, "_refuse_other_folder", after_a_rival)
    opened = reopened(two).open_space(fields, backbone="racing")
    assert rivals == [opened.path]
    assert [space.name for space in reopened(two).spaces() if space.backbone == "racing"] == [opened.name]


def test_a_copy_of_a_space_in_a_folder_of_another_name_changes_nothing(two, space):
    shutil.copytree(space.path, space.path.with_name("copy"))
    assert [found.name for found in reopened(two).spaces()] == [space.name]
    assert [problem.part for problem in verify_store(reopened(two)).problems] == ["spaces/copy/space.json"]


def test_drift_says_which_columns_nobody_has_any_more(zoo):
    """Of which no part that can be read is left: their width is not known, either."""
    zoo.write(zoo.images("train", 12))
    bundle = zoo.bundle(zoo.images("train", 12))
    zoo.write(zoo.images("train", 12) + zoo.images("test", 12))
    write_bundle(zoo.store.path.parent / "bundle", bundle)
    for path in zoo.store.path.glob("spaces/*/parts/*.h5"):
        replaced(path, **{"features/b:gap": None})
    found = drift(reopened(zoo.store), columns=["a"], bundle=zoo.store.path.parent / "bundle", silent=True)
    assert [test["column"] for test in found["columns"]] == ["a:gap"]
    (said,) = found["warnings"]
    assert said.startswith("classes predicted from a:gap + b:gap of tiny-")
    assert said.endswith("not compared, since 0 of 36 of the new images have them")
