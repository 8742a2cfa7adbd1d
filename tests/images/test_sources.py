"""Manifests, archives, arrays, URLs and what ``open_source`` says about everything else."""

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.images import MemorySource, key_of, open_source
from featurepipe.images.archives import ArchiveSource
from featurepipe.images.files import details_of
from featurepipe.images.folder import RemoteFolderSource
from featurepipe.images.listing import BATCH_ROWS, check_unique, table_of
from featurepipe.images.manifest import ManifestSource


def rows_of(source, *columns):
    table = source.scan()
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def first(source):
    return source.read(source.scan()["locator"][0].as_py())


# --- listings ---------------------------------------------------------------------------------------------------------


def row(id_):
    return (id_, None, None, 1, 2, b"x")


def test_tables_are_built_in_batches():
    table = table_of(row(str(i)) for i in range(BATCH_ROWS + 1))
    assert [chunk.num_rows for chunk in table.to_batches()] == [BATCH_ROWS, 1]
    assert table["id"].to_pylist() == [str(i) for i in range(BATCH_ROWS + 1)]


def test_duplicates_are_named():
    ids = ["b", "a", "c", "a", "b", "d", "d", "e", "e"]
    with pytest.raises(
        SourceError, match=r"^here: 4 ids occur more than once: 'b', 'a', 'd', \.\.\.; add an `id` column"
    ):
        check_unique(table_of(map(row, ids)), "here")
    assert check_unique(table_of(map(row, "abc")), "here").num_rows == 3


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_stable():
    assert key_of(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert key_of(array).hex() == "87fe48a8d0988d7a8c4987a9ab3802da9a764b2eb4a2006b21e3ae4eebf96a80"
    assert key_of(np.asfortranarray(array)) == key_of(array)
    others = [array.reshape(3, 2), array.astype(np.int8), array.astype(np.uint16), array[:, ::-1], array.tobytes()]
    assert len({key_of(array), *map(key_of, others)}) == 6


# --- manifests --------------------------------------------------------------------------------------------------------


def test_a_missing_path_column_names_what_is_there(tmp_path):
    for name, content in (("m.csv", "Paths,label\na,b\n"), ("m.jsonl", '{"Paths": "a", "label": "b"}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="no column `path` among Paths, label; nearest: Paths"):
            open_source(tmp_path / name).scan()


def test_ids_default_to_the_path_as_written_and_missing_files_are_rejects(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "m.csv").write_text(f"path,label\na.jpg,1\n./a.jpg,\n{tmp_path}/a.jpg,01\ngone.jpg,x\n")
    source = open_source(tmp_path / "m.csv")
    assert rows_of(source, "id", "label", "size") == [
        ("a.jpg", "1", 5),
        ("./a.jpg", None, 5),
        (f"{tmp_path}/a.jpg", "01", 5),
        ("gone.jpg", "x", -1),
    ]
    locators = source.scan()["locator"].to_pylist()
    assert [source.read(locator) for locator in locators[:3]] == [b"12345"] * 3
    with pytest.raises(Reject, match=r"^missing: no such file$"):
        source.read(locators[3])
    assert source.name == "m"


def test_sizes_and_dates_in_the_manifest_spare_the_stat(tmp_path, monkeypatch):
    monkeypatch.setattr("featurepipe.images.manifest.stat_files", lambda paths: pytest.fail("stat"))
    (tmp_path / "m.csv").write_text("path,size,mtime_ns\na.jpg,7,8\nb.jpg,,\n")
    assert rows_of(open_source(tmp_path / "m.csv"), "size", "mtime_ns") == [(7, 8), (-1, -1)]


def test_duplicate_ids_in_a_manifest(tmp_path):
    (tmp_path / "m.csv").write_text("path\na.jpg\na.jpg\n")
    with pytest.raises(SourceError, match=r"1 id occurs more than once: 'a\.jpg'; add an `id` column"):
        open_source(tmp_path / "m.csv").scan()


def test_labels_are_strings_whatever_they_look_like(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a", "label": 3}\n\n{"path": "b", "label": "x"}\n{"path": "c"}\n')
    assert rows_of(open_source(tmp_path / "m.jsonl"), "label") == [("3",), ("x",), (None,)]
    (tmp_path / "m.csv").write_text('path,label\na,007\nb,NA\nc,null\nd,1.50\n"e,f",true\n')
    assert rows_of(open_source(tmp_path / "m.csv"), "id", "label") == [
        ("a", "007"),
        ("b", "NA"),
        ("c", "null"),
        ("d", "1.50"),
        ("e,f", "true"),
    ]
    columns = {"path": ["a", "b"], "label": pa.array([1, 2]).dictionary_encode()}
    pa.parquet.write_table(pa.table(columns), tmp_path / "m.parquet")
    assert rows_of(open_source(tmp_path / "m.parquet"), "label") == [("1",), ("2",)]


@pytest.mark.slow
def test_a_column_whose_type_changes_after_the_first_block(tmp_path):
    lines = [f"p{i},{i}\n" for i in range(200_000)]
    (tmp_path / "m.csv").write_text(
        "path,extra,size,mtime_ns\n".replace("extra", "other")
        + "".join(line.replace("\n", ",1,1\n") for line in [*lines, "last,not a number\n"])
    )
    assert open_source(tmp_path / "m.csv").scan()["id"][-1].as_py() == "last"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.csv", b"path,label\na\n", "cannot be read as csv"),
        ("m.csv", b"path\n\n", None),
        ("m.csv", b"", "no column `path` among none; name the one of paths with"),
        ("m.csv", b"foo,bar\n1,2\n", "no column `path` among foo, bar; name the one of paths with"),
        ("m.csv", b"path\n\xff\xfe\n", "cannot be read as csv"),
        ("m.parquet", b"not parquet", "cannot be read as parquet"),
        ("m.jsonl", b'{"path": 1\n', "line 1 is not JSON"),
        ("m.jsonl", b'{"path": "a"}\n[1]\n', "line 2 is a list, not an object"),
        ("m.jsonl", b'{"path": "a"}\n{"id": "b"}\n', "line 2 has no path"),
        ("m.jsonl", b'{"path": ' + b"[" * 100_000, "recursion"),
        ("m.jsonl", b'{"path": "a", "size": 1e999, "mtime_ns": 1}', None),  # a column `size` of the user's own
        ("m.jsonl", b'{"path": "a", "size": 1' + b"0" * 30 + b', "mtime_ns": 1}', "cannot be read as jsonl: .*range"),
        ("m.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "cannot be read as parquet"),
    ],
)
def test_damaged_manifests(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path / name)
    if says is None:
        assert source.scan().num_rows <= 1
        return
    with pytest.raises((SourceError, UsageError), match=says):
        source.scan()


def test_nul_and_lone_surrogates_in_a_manifest_are_escaped(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    rows = [
        {"path": "a.jpg", "id": "a\0b", "label": "\ud800", "split": "\udfff"},
        {"path": "a.jpg", "id": "\udcc3\udca9", "label": "a\0"},  # not "é", although its bytes are
        {"path": "\ud800.jpg"},
        {"path": "\0.jpg"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path / "m.jsonl")
    assert rows_of(source, "id", "label", "split", "size") == [
        (r"a\x00b", r"\ud800", r"\udfff", 1),
        (r"\xc3\xa9", r"a\x00", None, 1),
        (r"\ud800.jpg", None, None, -1),
        (r"\x00.jpg", None, None, -1),
    ]
    locators = source.scan()["locator"].to_pylist()
    assert source.read(locators[0]) == b"x"
    for locator, code in ((locators[2], "missing"), (locators[3], "unreadable")):
        with pytest.raises(Reject, match=f"^{code}: "):
            source.read(locator)


def test_nul_and_lone_surrogates_are_escaped_in_labels_of_every_source(tmp_path):
    path = tar_of(tmp_path / "a.tar", {"0.jpg": b"x", "0.json": rb'{"label": "\ud800"}', "1.jpg": b"", "1.cls": b"\0"})
    assert rows_of(open_source(path), "label") == [(r"\ud800",), (r"\x00",)]
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 2, 2), np.uint8), y=np.array(["a\0b"]))
    assert rows_of(open_source(tmp_path / "a.npz"), "label") == [(r"a\x00b",)]
    assert rows_of(MemorySource({"\0": b"x"}, labels=["\ud800"]), "id", "label") == [(r"\x00", r"\ud800")]


def test_a_manifest_of_urls(tmp_path):
    fsspec.filesystem("memory").pipe("/urls/a.jpg", b"remote")
    (tmp_path / "m.csv").write_text("path\nmemory://urls/a.jpg\nmemory://urls/b.jpg\n")
    source = open_source(tmp_path / "m.csv")
    assert rows_of(source, "size") == [(6,), (-1,)]
    assert first(source) == b"remote"
    with pytest.raises(Reject, match=r"^missing"):
        source.read(source.scan()["locator"][1].as_py())


def test_a_manifest_behind_a_url():
    fsspec.filesystem("memory").pipe({"/m/list/m.csv": b"path,label\n../a.jpg,x\n", "/m/a.jpg": b"remote"})
    source = open_source("memory://m/list/m.csv")
    assert isinstance(source, ManifestSource)
    assert first(source) == b"remote"


@pytest.mark.slow
def test_a_million_rows_are_listed_in_bounded_memory(tmp_path):
    count = 1_000_000
    table = pa.table(
        {
            "path": [f"images/class_{i % 100:03d}/{i:09d}.jpg" for i in range(count)],
            "size": pa.array(range(count), pa.int64()),
            "mtime_ns": pa.array(range(count), pa.int64()),
        }
    )
    pa.csv.write_csv(table, tmp_path / "m.csv")
    code = (
        "import resource, sys\n"
        "from featurepipe.images import open_source\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "table = open_source(sys.argv[1]).scan()\n"
        "print(table.num_rows, table['id'][-1], table.nbytes / 2**20, peak() - before)\n"
    )
    # A process of its own, because the peak of this one has seen other tests.
    command = [sys.executable, "-c", code, str(tmp_path / "m.csv")]
    rows, last, listing_mib, grown_mib = subprocess.run(command, check=True, capture_output=True).stdout.split()
    assert (int(rows), last) == (count, b"images/class_099/000999999.jpg")
    assert float(listing_mib) < 100
    assert float(grown_mib) < 400  # measured: 260; a list of a million dictionaries alone takes more


# --- archives ---------------------------------------------------------------------------------------------------------


def tar_of(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


MEMBERS = {f"cat/{i}.jpg": bytes([i]) * 3000 for i in range(20)}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_truncated_archives_are_named(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
    else:
        tar_of(path, MEMBERS, "w:gz" if suffix == "tar.gz" else "w")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError, match=rf"a\.{suffix}"):
        open_source(path).scan()


def test_a_tar_cut_between_two_members_is_truncated(tmp_path):
    path = tar_of(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes()[: 10 * (512 + 3072)])
    with pytest.raises(SourceError, match="truncated or damaged at byte 35840"):
        open_source(path).scan()


def test_a_tar_with_a_damaged_header_is_not_taken_for_a_shorter_one(tmp_path):
    path = tar_of(tmp_path / "a.tar", MEMBERS)
    data = bytearray(path.read_bytes())
    data[5 * (512 + 3072) + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SourceError, match="truncated or damaged at byte 17920"):
        open_source(path).scan()


def test_an_encrypted_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"x")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.zip: 'a\.jpg' is encrypted"):
        open_source(tmp_path / "a.zip").scan()


def test_a_damaged_zip_member_is_a_reject(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
            archive.writestr("a.jpg", bytes(range(200)))
        data = bytearray((tmp_path / "a.zip").read_bytes())
        data[60] ^= 0xFF
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(Reject, match=r"^corrupt: "):
            first(open_source(tmp_path / "a.zip"))


def test_a_damaged_zip_header_costs_its_own_member_only(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"first")
        archive.writestr("b.jpg", b"second")
        second = archive.getinfo("b.jpg").header_offset
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[second + 2] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    source = open_source(tmp_path / "a.zip")
    good, bad = source.scan()["locator"].to_pylist()
    assert source.read(good) == b"first"
    with pytest.raises(Reject, match=rf"^corrupt: the archive has no member at byte {second};"):
        source.read(bad)


def test_a_zip_with_a_damaged_end_record_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"x")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rfind(b"PK\5\6") + 16] ^= 0x80  # where the directory begins
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.zip: not a readable zip archive .*: its directory is not where it says"):
        open_source(tmp_path / "a.zip").scan()


def test_an_odd_zip_compression_is_a_reject(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.jpg", b"x" * 100)
    with pytest.raises(Reject, match="unsupported: zip compression method 14"):
        first(open_source(tmp_path / "a.zip"))


def test_members_cannot_escape_and_hidden_ones_are_ignored(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("__MACOSX/cat/._1.jpg", "cat/.hidden.jpg", "../../evil.jpg", "cat/1.jpg", "cat/notes.txt"):
            archive.writestr(name, name)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(tmp_path / "a.zip")
    assert rows_of(source, "id", "label") == [("a.zip/cat/1.jpg", "cat")]
    assert first(source) == b"cat/1.jpg"
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_a_tar_are_rejects(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("./a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    source = open_source(tmp_path / "a.tar")
    assert rows_of(source, "id", "size") == [("a.tar/a.jpg", -1)]
    with pytest.raises(Reject, match="unreadable: is a link inside the archive"):
        first(source)


def test_members_carry_the_archives_date(tmp_path):
    path = tar_of(tmp_path / "a.tar", {"a.jpg": b"x"})
    assert rows_of(open_source(path), "mtime_ns") == [(path.stat().st_mtime_ns,)]


def test_same_named_archives_and_members_are_duplicates(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        tar_of(tmp_path / folder / "s.tar", {"0.jpg": b"x"})
    with pytest.raises(SourceError, match=r"'s\.tar/0\.jpg'; rename one of the archives"):
        open_source(str(tmp_path / "*" / "s.tar")).scan()


def test_names_that_are_not_utf8_in_a_tar(tmp_path):
    path = tar_of(tmp_path / "a.tar", {"caf\udce9.jpg": b"x"})
    assert rows_of(open_source(path), "id") == [("a.tar/caf\\xe9.jpg",)]


@pytest.mark.parametrize(
    ("name", "label"),
    [("0.json", b"{"), ("0.json", b"[" * 100_000), ("0.json", b" " * 2**21), ("0.cls", b"\xff"), ("0.json", b"\0" * 9)],
)
def test_an_image_whose_label_cannot_be_read_is_a_reject_and_the_others_are_listed(tmp_path, name, label):
    path = tar_of(tmp_path / "a.tar", {"0.jpg": b"x", name: label, "1.jpg": b"y", "1.cls": b"7"})
    source = open_source(path)
    assert rows_of(source, "id", "label") == [("a.tar/0.jpg", None), ("a.tar/1.jpg", "7")]
    damaged, fine = source.scan()["locator"].to_pylist()
    with pytest.raises(Reject, match=r"^unreadable: its label \(\.cls or \.json\) cannot be read"):
        source.read(damaged)
    assert source.read(fine) == b"y"


def test_an_archive_that_goes_is_an_error(tmp_path):
    path = tar_of(tmp_path / "a.tar", {"0.jpg": b"x"})
    source = open_source(path)
    locator = source.scan()["locator"][0].as_py()
    source.close()
    path.unlink()
    for attempt in (lambda: source.read(locator), source.scan):
        with pytest.raises(SourceError, match=r"a\.tar: no such file"):
            attempt()


def test_members_behind_the_end_of_an_archive_that_shrank_are_rejects(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    for path in (tar_of(tmp_path / "a.tar", MEMBERS), tmp_path / "a.zip"):
        source = open_source(path)
        locators = source.scan()["locator"].to_pylist()
        path.write_bytes(path.read_bytes()[:5000])
        assert source.read(locators[0]) == next(iter(MEMBERS.values()))
        with pytest.raises(Reject, match=r"^truncated: the archive ends inside this member$"):
            source.read(locators[19])


# --- arrays -----------------------------------------------------------------------------------------------------------


def idx(path, array, claimed=None):
    shape = claimed or array.shape
    data = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


IMAGES = np.zeros((3, 4, 4), np.uint8)


def test_idx_errors(tmp_path):
    idx(tmp_path / "train-images-idx3-ubyte", IMAGES, claimed=(9, 4, 4))
    with pytest.raises(SourceError, match=r"truncated: 64 bytes, but \(9, 4, 4\) takes 160"):
        open_source(tmp_path).scan()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"hello, not IDX")
    with pytest.raises(SourceError, match="not an IDX file"):
        open_source(tmp_path).scan()
    idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(SourceError, match="2 labels for 3 images"):
        open_source(tmp_path).scan()


def test_idx_without_labels_and_behind_a_url(tmp_path):
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", IMAGES)
    expected = [(f"test/00000{i}", None, "test", 16) for i in range(3)]
    assert rows_of(open_source(tmp_path), "id", "label", "split", "size") == expected
    memory = fsspec.filesystem("memory")
    memory.pipe("/idx/t10k-images-idx3-ubyte.gz", (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([5, 6, 7], np.uint8))
    memory.pipe("/idx/t10k-labels-idx1-ubyte.gz", (tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with open_source("memory://idx") as source:
        assert rows_of(source, "label", "split") == [("5", "test"), ("6", "test"), ("7", "test")]


def test_npz_errors(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=IMAGES, y=np.zeros(3))
    with pytest.raises(UsageError, match="no image array among pictures, y; call it x or images"):
        open_source(tmp_path / "a.npz").scan()
    np.savez(tmp_path / "a.npz", x=IMAGES.reshape(3, 16))
    with pytest.raises(UsageError, match=r"array 'x' has shape \(3, 16\)"):
        open_source(tmp_path / "a.npz").scan()
    np.savez(tmp_path / "a.npz", x=np.array([[[None]]]))
    with pytest.raises(SourceError, match="never unpickled"):
        open_source(tmp_path / "a.npz").scan()
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"not a readable \.npz"):
        open_source(tmp_path / "a.npz").scan()


def test_npz_label_shapes_and_names(tmp_path):
    # as MedMNIST names and shapes them
    np.savez(tmp_path / "a.npz", train_images=IMAGES, train_labels=np.array([[1], [2], [3]]), val_images=IMAGES[:1])
    assert rows_of(open_source(tmp_path / "a.npz"), "id", "label", "split") == [
        ("train/000000", "1", "train"),
        ("train/000001", "2", "train"),
        ("train/000002", "3", "train"),
        ("val/000000", None, "val"),
    ]


def test_h5_needs_a_reader(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no reader for \.h5; pass array_readers"):
        open_source(tmp_path / "a.h5")


def test_h5_items_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.hdf5").write_bytes(b"")
    asked = []

    class Dataset:
        shape, dtype = (1000, 4, 4), np.dtype(np.uint8)

        def __getitem__(self, index):
            asked.append(index)
            return np.full((4, 4), index, np.uint8)

    source = open_source(tmp_path / "a.hdf5", array_readers={".h5": lambda path: {"x": Dataset()}})
    locators = source.scan()["locator"].to_pylist()
    assert asked == []
    assert source.read(locators[7])[0, 0] == 7
    assert asked == [7]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_arrays_in_memory():
    source = open_source(np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3))
    assert rows_of(source, "id", "size", "mtime_ns") == [("000000", 60, -1), ("000001", 60, -1)]
    assert first(source).tolist() == np.arange(60).reshape(4, 5, 3).tolist()


def test_memory_errors():
    with pytest.raises(UsageError, match=r"shape \(4, 4\) holds no images"):
        open_source(np.zeros((4, 4), np.uint8))
    with pytest.raises(UsageError, match="a int is no image"):
        MemorySource([1]).scan()
    with pytest.raises(UsageError, match="1 labels for 2 images"):
        MemorySource([b"a", b"b"], labels=["x"])
    with pytest.raises(SourceError, match=r"'a\.jpg'; give a mapping"):
        MemorySource(["a.jpg", "a.jpg"]).scan()


def test_labels_in_memory():
    assert rows_of(MemorySource({"a": b"1", "b": b"2"}, labels={"b": 4}), "id", "label") == [("a", None), ("b", "4")]


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_a_remote_folder_says_what_its_file_system_knows():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/remote/train/cat/a.jpg": b"123", "/remote/train/.x/b.jpg": b"4", "/remote/n.txt": b"5"})
    source = open_source("memory://remote/")
    assert isinstance(source, RemoteFolderSource)
    (found,) = rows_of(source, "id", "label", "split", "size", "mtime_ns")
    created = memory.info("/remote/train/cat/a.jpg")["created"]
    seconds = created if isinstance(created, float) else created.timestamp()
    assert found == ("train/cat/a.jpg", "cat", "train", 3, round(seconds * 1e6) * 1000)


def test_remote_folders_without_images_do_not_decide_about_splits():
    file_system = fsspec.filesystem("memory")
    for name in ("train/cat/1.jpg", "test/cat/1.jpg", "features/store.json", "features/spaces/a/parts/b.h5"):
        file_system.pipe(f"/splits/{name}", b"x")
    assert rows_of(open_source("memory://splits"), "id", "label", "split") == [
        ("test/cat/1.jpg", "cat", "test"),
        ("train/cat/1.jpg", "cat", "train"),
    ]


def test_dates_of_several_file_systems():
    from datetime import datetime

    date = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    expected = 1_704_164_645_000_000_000
    assert details_of({"size": 3, "LastModified": date}) == (3, expected)  # s3fs
    assert details_of({"size": 3, "updated": "2024-01-02T03:04:05Z"}) == (3, expected)  # gcsfs
    assert details_of({"size": 3, "mtime": expected / 1e9}) == (3, expected)  # local, sftp
    assert details_of({"size": None}) == (-1, -1)  # http
    assert details_of({"size": 1, "created": "yesterday"}) == (1, -1)


def test_remote_failures(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/flaky/a.jpg", b"x")
    source = open_source("memory://flaky")
    locator = source.scan()["locator"][0].as_py()

    def fail(self, path, **kwargs):
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", fail)
        with pytest.raises(Reject, match="unreadable: TimeoutError: no answer"):
            source.read(locator)
    memory.rm("/flaky/a.jpg")
    with pytest.raises(Reject, match="missing: no such file"):
        source.read(locator)


# --- open_source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("no/such/folder", SourceError, "no/such/folder: no such file or folder"),
        ("no/such/*.tar", SourceError, r"no/such/\*\.tar: no file matches"),
        ("memory://nowhere/at/all", SourceError, "memory://nowhere/at/all: cannot be opened: FileNotFoundError"),
        ("gopher://x/y", SourceError, "gopher://x/y: cannot be opened: ValueError: Protocol not known: gopher"),
        (7, UsageError, "cannot read images from a int; give a folder of images"),
        (b"bytes", UsageError, "cannot read images from bytes; give a mapping"),
    ],
)
def test_what_cannot_be_opened(spec, error, says):
    with pytest.raises(error, match=says):
        open_source(spec)


def test_an_unknown_suffix_names_the_choices(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a\.rar'; give a folder of images, a manifest \(\.csv"):
        open_source(tmp_path / "a.rar")


def test_one_image_and_a_glob_of_images(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    assert rows_of(open_source(tmp_path / "a.jpg"), "id") == [(str(tmp_path / "a.jpg"),)]
    globbed = open_source(str(tmp_path / "*.jpg"))
    assert [Path(id_).name for (id_,) in rows_of(globbed, "id")] == ["a.jpg", "b.jpg"]
    (tmp_path / "c.txt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a glob names archives"):
        open_source(str(tmp_path / "*"))


def test_a_name_with_glob_characters_is_taken_literally(tmp_path):
    tar_of(tmp_path / "a[1].tar", {"0.jpg": b"x"})
    source = open_source(tmp_path / "a[1].tar")
    assert isinstance(source, ArchiveSource)
    assert first(source) == b"x"


def test_upper_case_suffixes(tmp_path):
    (tmp_path / "M.JSONL").write_text(json.dumps({"path": "a.jpg"}) + "\n")
    assert rows_of(open_source(tmp_path / "M.JSONL"), "id") == [("a.jpg",)]
    tar_of(tmp_path / "A.TAR.GZ", {"0.jpg": b"x"}, "w:gz")
    assert first(open_source(tmp_path / "A.TAR.GZ")) == b"x"


def test_locations_tell_sources_of_equal_name_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()
    for name in ("a.tar", "b.tar"):
        tar_of(tmp_path / name, {"0.jpg": b"x"})
    Path("list.csv").write_text("path\n")
    Path("x.npz").write_bytes(b"")
    Path("x.jpg").write_bytes(b"")
    for spec in ("cats", "a.tar", "*.tar", "list.csv", "x.npz", "x.jpg", "x*.jpg"):
        assert open_source(spec).location == str(tmp_path / spec)
    idx(Path("cats/train-images-idx3-ubyte"), np.zeros((1, 2, 2), np.uint8))
    assert open_source("cats").location == str(tmp_path / "cats")
    assert open_source({"a": b"x"}).location == "memory:memory"
    assert MemorySource([b"x"], name="birds").location == "memory:birds"
    fsspec.filesystem("memory").pipe("/places/cats/1.jpg", b"x")
    assert open_source("memory://places/cats/").location == "memory://places/cats"


@pytest.mark.parametrize(
    ("spec", "location"),
    [
        ("ftp://ann:p@ss@example.org/a@b/c.csv", "ftp://example.org/a@b/c.csv"),
        ("https://token@example.org/c.jsonl", "https://example.org/c.jsonl"),
        ("s3://bucket/d.parquet", "s3://bucket/d.parquet"),
    ],
)
def test_locations_hold_no_password(spec, location):
    assert ManifestSource(spec).location == location
