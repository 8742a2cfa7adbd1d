"""Sources that change: what is listed and read is what is there now, whatever this process had open, or had listed, before."""

import io
import os
import pickle
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry as registered

from featurepipe.errors import Reject, SourceError, Unavailable
from featurepipe.images import open_source
from featurepipe.images.files import ASKED_AT_ONCE, is_chain, read_file


class Remembering(fsspec.AbstractFileSystem):
    """The local disk with listings kept in the process, and sizes taken from them, as several remote file systems do."""

    protocol = "remembering"
    root_marker = "/"

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path not in self.dircache:
            if not Path(path).is_dir():
                raise FileNotFoundError(path)
            kinds = {True: "directory", False: "file"}
            self.dircache[path] = [
                {"name": e.path, "size": e.stat().st_size, "mtime": e.stat().st_mtime, "type": kinds[e.is_dir()]}
                for e in os.scandir(path)
            ]
        entries = self.dircache[path]
        return entries if detail else [entry["name"] for entry in entries]

    def cat_file(self, path, start=None, end=None, **_):
        size = self.info(path)["size"]  # as fsspec's buffered files, which read no more than this
        with open(self._strip_protocol(path), "rb") as file:
            return file.read(size)

    def _open(self, path, mode="rb", **_):
        self.info(path)
        return open(self._strip_protocol(path), mode)

    def invalidate_cache(self, path=None):
        self.dircache.clear()


@pytest.fixture(autouse=True)
def remembering():
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    yield
    Remembering.clear_instance_cache()


def tar(path, members):
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    part.rename(path)  # another inode


def contents(source):
    table = source.scan()
    return {
        id_: source.read(locator)
        for id_, locator in zip(*(table[c].to_pylist() for c in ("id", "locator")), strict=True)
    }


@pytest.mark.parametrize("url", ["{}", "remembering://{}", "file://{}"])
def test_an_archive_that_is_replaced_is_opened_again_by_the_next_listing(tmp_path, url):
    tar(tmp_path / "s.tar", {"a.png": b"old"})
    with open_source(url.format(tmp_path / "s.tar")) as source:
        assert contents(source) == {"s.tar/a.png": b"old"}
        tar(tmp_path / "s.tar", {"b.png": b"new one"})
        assert contents(source) == {"s.tar/b.png": b"new one"}


def test_a_source_travels_with_what_it_listed_so_that_a_worker_opens_the_new_one(tmp_path):
    tar(tmp_path / "s.tar", {"a.png": b"1"})
    source = open_source(tmp_path / "s.tar")
    source.scan()
    before = pickle.dumps(source)
    assert pickle.dumps(source) == before
    source.scan()
    assert pickle.dumps(source) == before
    tar(tmp_path / "s.tar", {"a.png": b"2"})
    source.scan()
    assert pickle.dumps(source) != before
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 3), np.uint8))
    arrays = open_source(tmp_path / "a.npz")
    arrays.scan()
    before = pickle.dumps(arrays)
    np.savez(tmp_path / "a.npz", x=np.ones((3, 3, 3), np.uint8))
    assert [image.max() for image in contents(arrays).values()] == [1, 1, 1]
    assert pickle.dumps(arrays) != before


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_of_an_archive_that_changed_after_it_was_listed_are_rejects_or_their_own_content(tmp_path, kind):
    def write(members):
        if kind == "tar":
            tar(tmp_path / "s.tar", members)
            return
        with zipfile.ZipFile(tmp_path / "s.part", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        (tmp_path / "s.part").rename(tmp_path / "s.zip")

    write({"a.png": b"aaaa", "b.png": b"bbbb"})
    client = open_source(tmp_path / f"s.{kind}")
    first, second = client.scan()["locator"].to_pylist()
    worker = pickle.loads(pickle.dumps(client))
    write({"b.png": b"bbbb", "a.png": b"aaaa"})  # places exchanged: the same offsets hold the other images
    assert client.read(first) == b"aaaa"  # from the file that it listed, which it has open
    for locator in (first, second):
        with pytest.raises(Reject, match=r"^corrupt: .*(listed|match)"):
            worker.read(locator)


def test_arrays_that_shrank_after_they_were_listed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2, 2), np.uint8))
    client = open_source(tmp_path / "a.npz")
    last = client.scan()["locator"].to_pylist()[-1]
    worker = pickle.loads(pickle.dumps(client))
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(Reject, match=r"^missing: the arrays hold fewer images"):
        worker.read(last)


def test_a_folder_and_a_glob_list_what_came_since(tmp_path):
    (tmp_path / "pile").mkdir()
    for number in range(2):
        (tmp_path / "pile" / f"{number}.png").write_bytes(b"x")
        tar(tmp_path / f"{number}.tar", {"a.png": b"x"})
    assert len(contents(open_source(f"remembering://{tmp_path}/pile"))) == 2
    assert len(contents(open_source(f"remembering://{tmp_path}/*.tar"))) == 2
    (tmp_path / "pile" / "2.png").write_bytes(b"x")
    tar(tmp_path / "2.tar", {"a.png": b"x"})
    assert len(contents(open_source(f"remembering://{tmp_path}/pile"))) == 3
    assert len(contents(open_source(f"remembering://{tmp_path}/*.tar"))) == 3


def test_a_reader_that_listed_before_finds_new_and_longer_files(tmp_path):
    """A worker never lists; what its file system remembers is of an earlier run."""
    (tmp_path / "a.png").write_bytes(b"short")
    url = f"remembering://{tmp_path}"
    fsspec.filesystem("remembering").ls(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"a longer one")
    (tmp_path / "b.png").write_bytes(b"new")
    assert read_file(f"{url}/b.png") == b"new"
    fsspec.filesystem("remembering").ls(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"and now a still longer one")
    assert read_file(f"{url}/a.png", len(b"and now a still longer one")) == b"and now a still longer one"
    with pytest.raises(Reject, match=r"^missing"):
        read_file(f"{url}/c.png")


def test_a_file_that_changed_since_it_was_listed_is_read_as_it_is_now(tmp_path):
    (tmp_path / "a.png").write_bytes(b"short")
    source = open_source(f"file://{tmp_path}")
    (locator,) = source.scan()["locator"].to_pylist()
    (tmp_path / "a.png").write_bytes(b"a longer one")
    assert source.read(locator) == b"a longer one"


def test_a_read_that_is_cut_off_is_to_be_tried_again(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/cut/a.png", b"all of it")
    source = open_source("memory://cut")
    (locator,) = source.scan()["locator"].to_pylist()
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", lambda *_, **__: b"all")
        with pytest.raises(Unavailable, match=r"^unreadable: 3 bytes came of 9"):
            source.read(locator)
    assert source.read(locator) == b"all of it"
    memory.pipe("/cut/s.tar", b"x" * 2000)
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "open", lambda *_, **__: io.BytesIO(b"x" * 100))
        with pytest.raises(SourceError, match=r"s\.tar: 100 bytes came of 2,000"):
            open_source("memory://cut/s.tar").scan()
    memory.rm("/cut", recursive=True)


def test_a_local_file_that_is_being_written_is_to_be_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"half")
    real, sizes = os.fstat, []

    def grows(descriptor):
        found = real(descriptor)
        sizes.append(found.st_size)
        if len(sizes) == 1:
            with open(tmp_path / "a.png", "ab") as file:
                file.write(b" and more")
        return found

    monkeypatch.setattr("featurepipe.images.files.os.fstat", grows)
    with pytest.raises(Unavailable, match=r"^unreadable: is being written: 4 bytes, then 13"):
        read_file(str(tmp_path / "a.png"))
    monkeypatch.undo()
    assert read_file(str(tmp_path / "a.png")) == b"half and more"


NAMES = {
    "a.png": b"0",
    "a.png::b.png": b"1",
    "c::d.png": b"2",
    "zip::e.png": b"3",
    "simplecache::": b"",
    "x/::.png": b"4",
}


def test_two_colons_are_part_of_a_name(tmp_path):
    for name, content in NAMES.items():
        (tmp_path / "pile" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "pile" / name).write_bytes(content)
    images = {name: content for name, content in NAMES.items() if name.endswith(".png")}
    for url in (f"file://{tmp_path}/pile", str(tmp_path / "pile")):
        assert contents(open_source(url)) == images
    rows = "".join(f"file://{tmp_path}/pile/{name}\n{tmp_path}/pile/{name}\npile/{name}\n" for name in images)
    (tmp_path / "list.csv").write_text(f"path\n{rows}")
    assert sorted(contents(open_source(tmp_path / "list.csv")).values()) == sorted([*images.values()] * 3)
    tar(tmp_path / "s::1.tar", {"a.png": b"in"})
    for url in (f"file://{tmp_path}/s::1.tar", f"file://{tmp_path}/*.tar"):
        assert contents(open_source(url)) == {"s::1.tar/a.png": b"in"}


@pytest.mark.parametrize(
    ("url", "chain"),
    [
        ("zip://*.png::a.zip", True), ("zip://x::s3://b/a.zip", True), ("simplecache::s3://b/x", True),
        ("tar://x::file:///a.tar", True), ("s3://b/a::b.png", False), ("http://h/a::http://h/b", False),
        ("memory://a::b", False), ("nosuch::s3://b/x", False), ("s3://b/a.png", False),
    ],
)  # fmt: skip
def test_what_is_a_chain_of_file_systems(url, chain):
    assert is_chain(url) is chain


def test_chains_are_read_as_before_and_see_that_the_archive_changed(tmp_path):
    def write(names):
        with zipfile.ZipFile(tmp_path / "part", "w") as archive:
            for name in names:
                archive.writestr(f"pile/{name}.png", name)
        (tmp_path / "part").rename(tmp_path / "a.zip")

    for names in ("ab", "cde"):
        write(names)
        for url in (f"zip://pile::{tmp_path}/a.zip", f"zip://pile::file://{tmp_path}/a.zip"):
            assert contents(open_source(url)) == {f"{name}.png": name.encode() for name in names}
        assert contents(open_source(f"zip://::{tmp_path}/a.zip")) == {f"pile/{n}.png": n.encode() for n in names}
    for names in ("x", "yz"):
        for name in names:
            tar(tmp_path / f"{name}.tar", {f"{name}.png": b"1"})
        expected = [f"{name}.tar/{name}.png" for name in sorted(path.stem for path in tmp_path.glob("*.tar"))]
        assert list(contents(open_source(f"simplecache::file://{tmp_path}/*.tar"))) == expected


def test_rows_of_file_systems_that_cannot_be_read_are_rejects_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"fine")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(registered, "s3", raising=False)  # else fsspec has the class from another test
    rows = [
        "s3://b/x.png",
        "nosuch://x.png",
        "reference://x.png",
        "zip://x.png",
        "://x.png",
        "http:///x.png",
        "ftp://[x.png",
    ]
    (tmp_path / "list.csv").write_text("path\na.png\n" + "\n".join(rows) + "\n")
    source = open_source(tmp_path / "list.csv")
    fine, missing, *others = source.scan()["locator"].to_pylist()
    assert source.read(fine) == b"fine"
    with pytest.raises(
        Reject, match=r"^unreadable: s3:// cannot be read here, since a library .* s3fs .*featurepipe\[remote\]"
    ):
        source.read(missing)
    for locator in others:
        with pytest.raises(Reject, match=r"^(unreadable|missing)"):
            source.read(locator)
    with pytest.raises(SourceError, match=r"^s3:// cannot be read here, since a library is not installed: .*s3fs"):
        open_source("s3://b/pile")


def test_urls_of_a_manifest_are_asked_for_at_the_same_time(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    together = threading.Barrier(ASKED_AT_ONCE)
    real = type(memory).info

    def info(self, path, **options):
        together.wait(timeout=60)  # broken, unless so many wait here at once
        return real(self, path, **options)

    memory.pipe({f"/many/{number}.png": b"x" * number for number in range(ASKED_AT_ONCE)})
    monkeypatch.setattr(type(memory), "info", info)
    (tmp_path / "here.png").write_bytes(b"local")
    rows = [f"memory://many/{number}.png" for number in range(ASKED_AT_ONCE)]
    (tmp_path / "list.csv").write_text("path\nhere.png\n" + "\n".join(rows) + "\n")
    assert open_source(tmp_path / "list.csv").scan()["size"].to_pylist() == [5, *range(ASKED_AT_ONCE)]
    monkeypatch.undo()
    memory.rm("/many", recursive=True)
