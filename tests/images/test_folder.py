"""Local folders: labels and splits, odd names, links, and files that cannot be read."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from featurepipe.annotations import split_of
from featurepipe.errors import Reject, SourceError
from featurepipe.images import open_source
from featurepipe.images.listing import FolderLabels, ListingSummary, printable


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return open_source(root)


def listed(source, *columns):
    table = source.scan()
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def read(source, id_):
    table = source.scan()
    return source.read(table["locator"][table["id"].to_pylist().index(id_)].as_py())


def why(source, id_):
    with pytest.raises(Reject) as caught:
        read(source, id_)
    return str(caught.value)


def test_class_folders_give_labels(tmp_path):
    source = make(tmp_path, "cat/1.jpg", "cat/deep/er/2.JPG", "dog/1.Jpeg", "loose.png", "cat/notes.txt", "README")
    assert listed(source, "id", "label", "split") == [
        ("cat/1.jpg", "cat", None),
        ("cat/deep/er/2.JPG", "cat", None),
        ("dog/1.Jpeg", "dog", None),
        ("loose.png", None, None),
    ]
    assert source.name == tmp_path.name


def test_split_folders_above_the_classes(tmp_path):
    source = make(tmp_path, "train/cat/1.jpg", "valid/cat/1.jpg", "test/dog/1.jpg", "test/x.jpg", "y.jpg")
    assert listed(source, "id", "label", "split") == [
        ("test/dog/1.jpg", "dog", "test"),
        ("test/x.jpg", None, "test"),
        ("train/cat/1.jpg", "cat", "train"),
        ("valid/cat/1.jpg", "cat", "val"),
        ("y.jpg", None, None),
    ]


def test_a_class_may_be_called_test(tmp_path):
    source = make(tmp_path, "test/1.jpg", "train/1.jpg", "exam/1.jpg", ".git/1.jpg")
    assert listed(source, "label", "split") == [("exam", None), ("test", None), ("train", None)]


def test_hidden_folders_do_not_decide_about_splits(tmp_path):
    source = make(tmp_path, "test/a/1.jpg", "train/a/1.jpg", ".cache/1.jpg", "lost+found/1.jpg", "train/a/.2.jpg")
    assert listed(source, "label", "split") == [("a", "test"), ("a", "train")]


def write_store(root, format_="featurepipe-store"):
    for name in ("store.json", "spaces/tiny-0123/space.json", "spaces/tiny-0123/preview.jpg"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": format_, "version": 1}))


SPLITS = [("test/cat/1.jpg", "cat", "test"), ("train/cat/1.jpg", "cat", "train")]


@pytest.mark.parametrize("place", ["features", "deep/features", "train/features", "train/cat/features"])
def test_a_feature_store_inside_is_passed_over(tmp_path, place):
    source = make(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg")
    write_store(tmp_path / place)
    assert listed(source, "id", "label", "split") == SPLITS


def test_a_source_that_is_a_feature_store_too_keeps_its_splits(tmp_path):
    source = make(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg")
    (tmp_path / "spaces" / "tiny-0123").mkdir(parents=True)
    (tmp_path / "spaces" / "tiny-0123" / "space.json").write_text("{}")
    (tmp_path / "store.json").write_text('{"format": "featurepipe-store"}')
    assert listed(source, "id", "label", "split") == SPLITS


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"format": "shop"}'])
def test_any_other_store_json_hides_nothing(tmp_path, content):
    source = make(tmp_path, "shop/1.jpg")
    (tmp_path / "shop" / "store.json").write_bytes(content.encode("latin-1"))
    assert listed(source, "id", "label") == [("shop/1.jpg", "shop")]


def test_a_pipe_named_store_json_does_not_hang(tmp_path):
    source = make(tmp_path, "shop/1.jpg")
    os.mkfifo(tmp_path / "shop" / "store.json")
    assert listed(source, "id") == [("shop/1.jpg",)]


def test_folders_without_images_do_not_decide_about_splits(tmp_path):
    source = make(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg", "notes/readme.txt")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / "back").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to("nowhere")
    assert listed(source, "id", "label", "split") == SPLITS
    make(tmp_path, "empty/deeper/1.jpg")
    assert listed(source, "id", "label", "split")[1:] == [
        ("test/cat/1.jpg", "test", None),
        ("train/cat/1.jpg", "train", None),
    ]


def test_split_names():
    assert [split_of(n) for n in ("train", "val", "valid", "validation", "test", "Train", "dev")] == [
        *("train", "val", "val", "val", "test", "train", "val"),
    ]
    assert FolderLabels([]).of([]) == (None, None)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "JPG", "TiFf"])
def test_image_suffixes(tmp_path, suffix):
    assert listed(make(tmp_path, f"a.{suffix}", "b.svg", "c"), "id") == [(f"a.{suffix}",)]


def test_order_is_that_of_the_ids_bytes(tmp_path):
    names = ["a.jpg", "a/z.jpg", "a-b/1.jpg", "a0.jpg", "A.jpg", "é.jpg", "z.jpg", "\U0001f600.jpg", "a/b/c.jpg"]
    ids = [id_ for (id_,) in listed(make(tmp_path, *names), "id")]
    assert ids == sorted(names, key=str.encode)


def test_size_and_date(tmp_path):
    source = make(tmp_path, "a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(1, 1_700_000_000_123_456_789))
    assert listed(source, "size", "mtime_ns") == [(5, 1_700_000_000_123_456_789)]


def test_scan_opens_no_image(tmp_path, monkeypatch):
    source = make(tmp_path, "cat/1.jpg", "2.jpg")

    def forbidden(*args, **kwargs):
        raise AssertionError("scan opened a file")

    monkeypatch.setattr("builtins.open", forbidden)
    monkeypatch.setattr("os.open", forbidden)
    assert source.scan().num_rows == 2


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    source = make(tmp_path, "x.png/inside.jpg", "y.png", "z/w.dcm/1.dcm", "z/w.dcm/readme.txt")
    (tmp_path / "linked.tif").symlink_to("x.png")
    assert listed(source, "id", "label", "size") == [
        ("linked.tif/inside.jpg", "linked.tif", 16), ("x.png/inside.jpg", "x.png", 16), ("y.png", None, 5),
        ("z/w.dcm/1.dcm", "z", 13),
    ]  # fmt: skip
    assert ListingSummary.of(source.scan()).passed_over == {".txt": 1}
    (tmp_path / "empty.jpg").mkdir()
    assert why(source, "empty.jpg") == "unreadable: is a directory, no file"
    make(tmp_path / "splits", "train/a.png/1.jpg", "test/a.png/2.jpg")
    found = listed(open_source(tmp_path / "splits"), "id", "label", "split")
    assert found == [("test/a.png/2.jpg", "a.png", "test"), ("train/a.png/1.jpg", "a.png", "train")]
    make(tmp_path / "splits", "more.png/3.jpg")  # a class at the top, so that test and train are classes
    found = listed(open_source(tmp_path / "splits"), "label", "split")
    assert found == [("more.png", None), ("test", None), ("train", None)]


def test_links(tmp_path):
    source = make(tmp_path / "root", "cat/1.jpg")
    make(tmp_path / "elsewhere", "deep/2.jpg")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "linked.jpg").symlink_to("cat/1.jpg")
    (tmp_path / "root" / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "root" / "self.jpg").symlink_to("self.jpg")
    assert listed(source, "id", "label", "size") == [
        ("broken.jpg", None, -1),
        ("cat/1.jpg", "cat", 9),
        ("dog/deep/2.jpg", "dog", 10),
        ("linked.jpg", None, 9),
        ("self.jpg", None, -1),
    ]
    assert read(source, "linked.jpg") == b"cat/1.jpg"
    assert why(source, "broken.jpg") == "missing: a link to nowhere (-> nowhere.jpg)"
    assert why(source, "self.jpg") == "unreadable: Too many levels of symbolic links"
    (tmp_path / "root" / "class").symlink_to("nowhere")
    (tmp_path / "root" / "cat" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "round").symlink_to("round")
    (tmp_path / "root" / "notes").symlink_to("cat/1.jpg")
    summary = ListingSummary.of(source.scan())
    assert summary.passed_over == {"links to nothing": 2, "links to a folder around them": 1, "no suffix": 1}
    said = "passed over 4 files: links to nothing 2, links to a folder around them 1, no suffix 1"
    assert said in "\n".join(summary.lines("root", labels=False))


def test_link_loops_end(tmp_path):
    source = make(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    (tmp_path / "round").symlink_to("round")
    assert [id_ for (id_,) in listed(source, "id")] == [
        "a/1.jpg",
        "a/to_b/2.jpg",
        "b/2.jpg",
        "b/to_a/1.jpg",
    ]


@pytest.mark.slow
def test_a_tree_deeper_than_the_recursion_limit(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        assert listed(open_source(tmp_path), "id") == [("d/" * 1200 + "x.jpg",)]
    finally:  # shutil.rmtree, which pytest clears up with, is recursive itself
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_names_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path)
    names = [b"caf\xe9.jpg", b"caf\\xe9.jpg", b"caf\\\xe9.jpg", b"caf\\\\xe9.jpg", b"back\\slash.jpg", b"\xff\xfe.png"]
    Path(os.fsdecode(root + b"/cl\xe9")).mkdir()
    names.append(b"cl\xe9/plain.jpg")
    for name in names:
        with open(root + b"/" + name, "wb") as file:
            file.write(name)
    source = open_source(tmp_path)
    table = source.scan()
    ids = table["id"].to_pylist()
    assert sorted(source.read(locator) for locator in table["locator"].to_pylist()) == sorted(names)
    assert len(set(ids)) == len(names)
    assert {r"caf\xe9.jpg", r"caf\\xe9.jpg", r"back\slash.jpg", r"\xff\xfe.png", r"cl\xe9/plain.jpg"} <= set(ids)
    assert table["label"].to_pylist()[ids.index(r"cl\xe9/plain.jpg")] == r"cl\xe9"
    assert table["size"].to_pylist() == [len(source.read(locator)) for locator in table["locator"].to_pylist()]


def test_escaping_never_makes_two_names_one():
    pieces = ["\\", "x", "e9", "\udce9", "\\\\", "é", "\0", "x00", "\ud800", "ud800"]
    names = {a + b + c + d for a in pieces for b in pieces for c in pieces for d in pieces}
    shown = {printable(name) for name in names}
    assert len(shown) == len(names)
    assert all(text.encode() and "\0" not in text for text in shown)


def test_special_files_do_not_hang(tmp_path):
    source = make(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.jpg"))
        assert listed(source, "id", "size") == [("a.jpg", 5), ("pipe.jpg", -1), ("s.jpg", -1), ("zero.jpg", -1)]
        assert why(source, "pipe.jpg") == "unreadable: is a named pipe, no file"
        assert why(source, "zero.jpg") == "unreadable: is a device, no file"
        assert why(source, "s.jpg") == "unreadable: is a socket or a device, no file"


def test_an_unreadable_file_is_a_reject(tmp_path, monkeypatch):
    # Root may read everything, so the refusal is played.
    source = make(tmp_path, "secret.jpg", "plain.jpg")
    real = os.open

    def refuse(path, *args, **kwargs):
        if os.fspath(path).endswith("secret.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert why(source, "secret.jpg") == "unreadable: Permission denied"
    assert read(source, "plain.jpg") == b"plain.jpg"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_a_reject(tmp_path):
    source = make(tmp_path, "secret.jpg")
    (tmp_path / "secret.jpg").chmod(0)
    assert why(source, "secret.jpg") == "unreadable: Permission denied"


def test_an_unreadable_folder_is_listed_as_a_reject(tmp_path, monkeypatch):
    source = make(tmp_path, "cat/1.jpg", "locked/2.jpg", "zoo/3.jpg")
    real_scan, real_open = os.scandir, os.open

    def scan(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real_scan(path)

    def refuse(path, *args, **kwargs):
        if "locked" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "open", refuse)
    assert listed(source, "id", "size") == [("cat/1.jpg", 9), ("locked", -1), ("zoo/3.jpg", 9)]
    assert why(source, "locked") == "unreadable: Permission denied"


def test_a_file_that_goes_is_a_reject_and_a_folder_that_goes_an_error(tmp_path):
    source = make(tmp_path / "root", "a.jpg", "b.jpg")
    locators = source.scan()["locator"].to_pylist()
    (tmp_path / "root" / "a.jpg").unlink()
    with pytest.raises(Reject, match=r"^missing: "):
        source.read(locators[0])
    (tmp_path / "root" / "b.jpg").unlink()
    (tmp_path / "root").rmdir()
    with pytest.raises(SourceError, match="the folder has gone"):
        source.read(locators[0])
    with pytest.raises(SourceError, match="cannot be listed: No such file"):
        source.scan()


def test_an_empty_folder_lists_nothing(tmp_path):
    table = open_source(tmp_path).scan()
    assert table.num_rows == 0
    assert table["size"].to_pylist() == []


def test_a_relative_folder_keeps_working_after_a_change_of_directory(tmp_path, monkeypatch):
    make(tmp_path / "root", "a.jpg")
    monkeypatch.chdir(tmp_path)
    source = open_source("root")
    monkeypatch.chdir("/")
    assert read(source, "a.jpg") == b"a.jpg"


def test_listing_asks_the_system_once_for_each_folder_and_image(tmp_path):
    """A walk of millions of files is no dearer than a bare one, which `benchmarks.bench_rerun` times."""
    for folder in range(20):
        make(tmp_path / f"{folder:02d}", *(f"{index:02d}.jpg" for index in range(30)))
    calls = Counter()
    asks = {"stat", "lstat", "scandir", "open", "listdir", "access", "readlink"}

    def count(_frame, event, function):
        if event == "c_call" and function.__name__ in asks:
            calls[function.__name__] += 1

    source = open_source(tmp_path)
    sys.setprofile(count)
    try:
        listing = source.scan()
    finally:
        sys.setprofile(None)
    assert listing.num_rows == 600
    assert calls["stat"] + calls["lstat"] <= 600 + 2 * 21
    assert calls["scandir"] <= 2 * 21  # once for the rows, once to see which top folders hold images
    assert sum(calls.values()) - calls["scandir"] - calls["stat"] - calls["lstat"] == 0, calls
