"""Headers of archives and arrays that claim what is not there: refused, or one reject, in bounded time and memory."""

import contextlib
import io
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import pytest

from featurepipe.errors import FeaturepipeError, Reject, SourceError
from featurepipe.images import open_source
from featurepipe.store.arrays import open_arrays


def octal(number, width):
    return b"%0*o\0" % (width - 1, number)


def header(name, size=0, kind=b"0", field=None):
    """A header of a tar; ``field`` is what stands where the size does."""
    field = octal(size, 12) if field is None else field
    block = bytearray(name.ljust(100, b"\0") + octal(0o644, 8) * 3 + field + octal(0, 12) + b" " * 8 + kind)
    block += bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    assert len(block) == 512
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def base256(number):
    return (number % 256**12).to_bytes(12, "big") if number < 0 else b"\x80" + number.to_bytes(11, "big")


def record(key, value):
    text = b" " + key + b"=" + value + b"\n"
    length = len(text) + 1
    while len(b"%d" % length) + len(text) != length:
        length += 1
    return b"%d" % length + text


def pax(content, kind=b"x"):
    return header(b"pax", len(content), kind) + padded(content)


IMAGE = header(b"a/1.png", 3) + padded(b"one")
END = bytes(1024)


def listed(tmp_path, content, name="s.tar"):
    (tmp_path / name).write_bytes(content)
    return open_source(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        IMAGE + header(b"x.txt", field=base256(-512)),
        IMAGE + header(b"x.txt", field=base256(-1)),
        IMAGE + header(b"x.png", field=base256(-(2**80))),
        IMAGE + header(b"x.png", field=base256(2**80)),
        IMAGE + header(b"x.png", field=b"77777777777\0"),
        IMAGE + header(b"x.txt", field=b"-0000001000\0"),
        IMAGE + header(b"x.txt", field=b"0x000000010\0"),
        IMAGE + pax(record(b"size", b"-1024")) + header(b"x.png"),
        IMAGE + pax(record(b"size", b"9" * 5000)) + header(b"x.png"),
        IMAGE + pax(record(b"size", b"9" * 19)) + header(b"x.png"),
        IMAGE + pax(record(b"size", b"1e3")) + header(b"x.png"),
        IMAGE + pax(b"0 path=x\n") + header(b"x.png"),
        IMAGE + pax(b"9" * 100_000) + header(b"x.png"),
        IMAGE + pax(b"99 path=x\n") + header(b"x.png"),
        IMAGE + pax(b"8 pathx\n") + header(b"x.png"),
        IMAGE + pax(record(b"path", b"x.png")) + header(b"x", field=base256(-512)),
        IMAGE + header(b"long", field=base256(2**40), kind=b"L"),
        IMAGE + header(b"long", field=base256(-512), kind=b"L"),
        IMAGE + header(b"long", 17 * 2**20, kind=b"x"),
        IMAGE + header(b"x.png", 10**6),
    ],
)
def test_a_tar_whose_headers_lead_astray_is_refused_with_the_byte(tmp_path, content):
    with pytest.raises(SourceError, match=r"s\.tar: truncated or damaged"):
        listed(tmp_path, content + END).scan()


def test_long_extended_headers_take_time_in_proportion(tmp_path):
    # Python's tarfile searches this one for digits from each of its digits: hours
    content = pax(record(b"comment", b"1" * 8_000_000)) + IMAGE + END
    assert listed(tmp_path, content).scan()["id"].to_pylist() == ["s.tar/a/1.png"]


def test_thousands_of_extended_headers_in_a_row_take_no_stack(tmp_path):
    long = header(b"long", 8, b"L") + padded(b"b/2.png\0")
    source = listed(tmp_path, (long + pax(record(b"mtime", b"1"))) * 3_000 + IMAGE + END)
    assert source.scan()["id"].to_pylist() == ["s.tar/b/2.png"]


def test_pax_size_and_path_count_for_the_next_member_only(tmp_path):
    content = pax(record(b"path", "ü/1.png".encode()) + record(b"size", b"3")) + header(b"x", 0) + padded(b"one")
    source = listed(tmp_path, content + header(b"y.png", 2) + padded(b"zz") + END)
    table = source.scan()
    assert table.select(["id", "size"]).to_pylist() == [
        {"id": "s.tar/ü/1.png", "size": 3},
        {"id": "s.tar/y.png", "size": 2},
    ]
    assert [source.read(locator) for locator in table["locator"].to_pylist()] == [b"one", b"zz"]


def test_sparse_members_are_rejects_and_do_not_shift_what_follows(tmp_path):
    old = bytearray(header(b"hole.png", 512, b"S"))
    old[482] = 1  # a further block of the map follows
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    map_goes_on, map_ends = bytes(504) + b"\1" + bytes(7), bytes(512)
    new = pax(
        record(b"GNU.sparse.major", b"1")
        + record(b"GNU.sparse.name", b"new.png")
        + record(b"GNU.sparse.realsize", b"4398046511104")
    )
    content = (
        bytes(old) + map_goes_on + map_ends + bytes(512) + new + header(b"GNUSparseFile.0/new.png", 512) + bytes(512)
    )
    source = listed(tmp_path, content + IMAGE + END)
    table = source.scan()
    assert table["id"].to_pylist() == ["s.tar/hole.png", "s.tar/new.png", "s.tar/a/1.png"]
    *sparse, fine = table["locator"].to_pylist()
    for locator in sparse:
        with pytest.raises(Reject, match=r"^unreadable: is a sparse file"):
            source.read(locator)
    assert source.read(fine) == b"one"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_listed_as_tarfile_lists_them(tmp_path, tar_format):
    rng = np.random.default_rng(3)
    names = ["a.png", "d" * 90 + "/" + "e" * 60 + "/1.png", "fünf/2.png", "blank name.png", "-3.png", "x/y/z.PNG"]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append("/".join(["f" * 200] * 5) + "/4.png")
    with tarfile.open(tmp_path / "s.tar", "w", format=tar_format) as archive:
        archive.addfile(tarfile.TarInfo("a.png.d/"))
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = int(rng.integers(0, 2000))
            info.mtime, info.uname = 1e9 + 0.5, "näme"
            archive.addfile(info, io.BytesIO(rng.bytes(info.size)))
    source = open_source(tmp_path / "s.tar")
    table = source.scan()
    with tarfile.open(tmp_path / "s.tar") as archive:
        expected = {
            f"s.tar/{info.name}": archive.extractfile(info).read()
            for info in archive
            if info.isreg() and info.name.lower().endswith(".png")
        }
    got = {
        id_: source.read(locator)
        for id_, locator in zip(table["id"].to_pylist(), table["locator"].to_pylist(), strict=True)
    }
    assert got == expected
    assert len(got) == len(names)


def zip_of(name, data, **claims):
    """A zip of one stored member whose directory claims other numbers, in its zip64 field."""
    extra = struct.pack(
        "<HHQQQ", 1, 24, claims.get("size", len(data)), claims.get("stored", len(data)), claims.get("at", 0)
    )
    local = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0
    )
    files = local + name + data
    top = (zlib.crc32(data), 2**32 - 1, 2**32 - 1, len(name), len(extra), 0, 0, 0, 0, 2**32 - 1)
    table = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 45, 45, 0, claims.get("method", 0), 0, 0, *top) + name + extra
    return files + table + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(table), len(files), 0)


@pytest.mark.parametrize(
    "claims",
    [
        {"at": 2**63 + 5}, {"at": 2**64 - 1}, {"at": 2**63 - 1}, {"at": 10**6}, {"size": 2**64 - 1}, {"stored": 2**64 - 1},
        {"stored": 2**40}, {"size": 2**40, "method": 8}, {"size": 2**63, "stored": 2**63, "method": 8}, {"method": 0xFFFF},
    ],
)  # fmt: skip
def test_a_zip_member_that_claims_what_is_not_there_is_a_reject(tmp_path, claims):
    source = listed(tmp_path, zip_of(b"a.png", b"hello", **claims), "z.zip")
    (locator,) = source.scan()["locator"].to_pylist()
    tracemalloc.start()
    with pytest.raises(Reject):
        source.read(locator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_zip_in_order_is_read(tmp_path):
    source = listed(tmp_path, zip_of(b"a.png", b"hello"), "z.zip")
    assert source.read(source.scan()["locator"][0].as_py()) == b"hello"


def test_a_byte_changed_anywhere_in_an_archive_never_ends_in_another_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "o.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", b"zero" * 9)
        archive.writestr("a/1.png", b"one")
    with tarfile.open(tmp_path / "o.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("ä/0.png", "1.png", "1.json"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"{ }"))
    rng = np.random.default_rng(9)
    for kind in ("zip", "tar"):
        whole = (tmp_path / f"o.{kind}").read_bytes()
        for number in range(300):
            changed = bytearray(whole)
            changed[rng.integers(len(whole))] = rng.integers(256)
            changed[rng.integers(len(whole))] ^= 0x80
            (tmp_path / f"{number}.{kind}").write_bytes(changed)
            with open_source(tmp_path / f"{number}.{kind}") as source, contextlib.suppress(SourceError):
                for locator in source.scan()["locator"].to_pylist():
                    with contextlib.suppress(Reject):
                        source.read(locator)


def npy(shape, data=b"", descr="|u1"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy((3_000_000_000, 28, 28)), "x.npy: truncated"),
        (npy((3_000_000_000, 0, 28)), r"claims 3,000,000,000 images of 0 bytes"),
        (npy((3_000_000_000, 28, 28), descr="|V0"), r"claims 3,000,000,000 images of 0 bytes"),
        (npy((-1, 28, 28), b"x" * 784), "which no array has"),
        (npy((2, 2**20, 2**20)), "x.npy: truncated"),
        (npy((2, 2**40, 2**40)), "x.npy: truncated"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000, r"not a readable \.npz"),
        (b"\x93NUMPY\1\0\xff\xff{", r"not a readable \.npz"),
    ],
)
def test_an_npz_that_claims_what_is_not_there_is_refused(tmp_path, content, says):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(SourceError, match=says):
        open_source(tmp_path / "a.npz").scan()


def test_idx_images_of_no_pixels_are_refused(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 2**32 - 1, 0, 28))
    with pytest.raises(SourceError, match="claims 4,294,967,295 images of 0 bytes"):
        open_source(tmp_path / "t10k-images-idx3-ubyte").scan()


@pytest.mark.parametrize("shape", [(3 * 10**9, 28, 28), (10**9, 0, 3), (5000, 9, 3)])
def test_an_hdf5_dataset_of_rows_that_were_never_written_is_refused(tmp_path, shape):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape, np.uint8, chunks=(1, 28, 3) if shape[1] == 28 else None)
    with pytest.raises(SourceError, match=r"claims [\d,]+ images of \d+ bytes, and the file holds 0 bytes"):
        open_source(tmp_path / "a.h5", array_readers={".h5": open_arrays}).scan()


def test_labels_of_an_array_that_are_not_text_are_escaped(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4), np.uint8), y=np.array([b"\xff", b"cat"]))
    assert open_source(tmp_path / "a.npz").scan()["label"].to_pylist() == [r"\xff", "cat"]


def test_a_byte_changed_anywhere_in_an_array_file_never_ends_in_another_error(tmp_path):
    np.savez_compressed(tmp_path / "o.npz", x=np.zeros((2, 3, 3), np.uint8), y=np.array(["a", "b"]))
    with h5py.File(tmp_path / "o.h5", "w") as file:
        file["x"], file["y"] = np.zeros((2, 3, 3), np.uint8), [3, 4]
    rng = np.random.default_rng(2)
    for kind in ("npz", "h5"):
        whole = (tmp_path / f"o.{kind}").read_bytes()
        for number in range(100):
            changed = bytearray(whole)
            for _ in range(3):
                changed[rng.integers(len(whole))] = rng.integers(256)
            (tmp_path / f"{number}.{kind}").write_bytes(changed)
            with contextlib.suppress(FeaturepipeError):
                source = open_source(tmp_path / f"{number}.{kind}", array_readers={".h5": open_arrays})
                for locator in source.scan()["locator"].to_pylist():
                    with contextlib.suppress(Reject):
                        source.read(locator)


def test_arrays_without_rows_stay_empty_listings(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 4, 4), np.uint8))
    assert open_source(tmp_path / "a.npz").scan().num_rows == 0


def test_files_and_members_above_the_budget_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a.png").write_bytes(b"x" * 2000)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"x" * 2000)
    listed(tmp_path, header(b"a.png", 2000) + padded(b"x" * 2000) + END)
    monkeypatch.setenv("FEATUREPIPE_MAX_FILE_BYTES", "1999")
    for spec in ("pile", "z.zip", "s.tar"):
        source = open_source(tmp_path / spec)
        with pytest.raises(Reject, match=r"^budget: 2,000 bytes"):
            source.read(source.scan()["locator"][0].as_py())
