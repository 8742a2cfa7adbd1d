"""Which failures may be over in a moment, for every kind of source, and what is never taken for "deleted"."""

import errno
import io
import os
import tarfile
import zipfile
from types import SimpleNamespace

import aiohttp
import fsspec
import numpy as np
import pytest
from fsspec.exceptions import FSTimeoutError

from featurepipe.errors import Reject, SourceError, Unavailable
from featurepipe.images import open_source
from featurepipe.images.files import is_passing, unreadable

INPUT_OUTPUT = OSError(errno.EIO, "Input/output error")


class GcsError(Exception):
    def __init__(self, code):
        super().__init__("no")
        self.code = code


class AzureError(Exception):
    def __init__(self, status_code):
        super().__init__("no")
        self.status_code = status_code


def answered(status):
    return aiohttp.ClientResponseError(SimpleNamespace(real_url="http://x"), (), status=status, message="no")


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (INPUT_OUTPUT, True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), True),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (TimeoutError("no answer"), True),
        (FSTimeoutError(), True),
        (answered(503), True),
        (answered(500), True),
        (answered(429), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("not all of it"), True),
        (GcsError(502), True),
        (GcsError(403), False),
        (AzureError(503), True),
        (AzureError(403), False),
        (answered(403), False),
        (answered(401), False),
        (aiohttp.InvalidURL("x"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), False),
        (OSError("something"), False),
        (ValueError("embedded null byte"), False),
    ],
)
def test_what_may_be_over_in_a_moment(error, passing):
    assert is_passing(error) is passing
    reject = unreadable(error)
    assert isinstance(reject, Unavailable) is passing
    assert isinstance(reject, Reject)
    assert str(reject).startswith("unreadable: ")


def test_a_reason_says_what_the_system_said():
    assert str(unreadable(INPUT_OUTPUT)) == "unreadable: Input/output error"
    assert str(unreadable(TimeoutError("no answer"))) == "unreadable: TimeoutError: no answer"
    assert str(unreadable(answered(503))).startswith("unreadable: ClientResponseError: 503")


def first(source):
    return source.scan()["locator"][0].as_py()


def test_a_file_on_a_failing_disk(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"a")
    source = open_source(tmp_path)
    locator, real = first(source), os.open

    def fail(path, *args, **options):
        if str(path).endswith("a.jpg"):
            raise INPUT_OUTPUT
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(Unavailable, match="unreadable: Input/output error"):
            source.read(locator)
    assert source.read(locator) == b"a"


def test_a_remote_file_behind_a_busy_server(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/busy/a.jpg", b"x")
    source = open_source("memory://busy")
    locator = first(source)
    for error, kind in ((answered(503), Unavailable), (answered(403), Reject)):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), "cat_file", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(Reject) as caught:
                source.read(locator)
        assert type(caught.value) is kind
    assert source.read(locator) == b"x"
    memory.rm("/busy", recursive=True)


@pytest.fixture(params=["tar", "zip"])
def archive(request, tmp_path):
    path = tmp_path / f"images.{request.param}"
    if request.param == "tar":
        with tarfile.open(path, "w") as file:
            info = tarfile.TarInfo("cat/a.jpg")
            info.size = 3
            file.addfile(info, io.BytesIO(b"cat"))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("cat/a.jpg", b"cat")
    return path


def test_an_archive_on_a_share_that_was_mounted_anew(archive, monkeypatch):
    """A handle from before fails for ever, so that the next try opens the file again."""
    source = open_source(archive)
    locator, real, stale = first(source), os.pread, []

    def pread(descriptor, *args):
        if not stale or descriptor in stale:
            stale.append(descriptor)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(descriptor, *args)

    keep = os.open(os.devnull, os.O_RDONLY)  # so that the number of the old handle is not given again
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(Unavailable, match="unreadable: Stale file handle"):
        source.read(locator)
    os.dup2(keep, stale[0])
    assert source.read(locator) == b"cat"
    os.close(stale[0])
    os.close(keep)
    source.close()


def test_an_archive_that_fails_while_it_is_listed(archive, monkeypatch):
    def pread(*_):
        raise INPUT_OUTPUT

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(SourceError, match=f"{archive}: cannot be read: Input/output error"):
        open_source(archive).scan()


def test_arrays_that_fail(tmp_path):
    class Failing:
        shape, dtype = (2, 4, 4), np.dtype(np.uint8)

        def __getitem__(self, _index):
            raise INPUT_OUTPUT

    (tmp_path / "a.h5").touch()
    source = open_source(tmp_path / "a.h5", array_readers={".h5": lambda _path: {"images": Failing()}})
    with pytest.raises(Unavailable, match="unreadable: Input/output error"):
        source.read(first(source))


@pytest.mark.parametrize("where", ["scandir", "stat"])
def test_a_folder_that_cannot_be_listed_now_is_no_empty_one(tmp_path, monkeypatch, where):
    """All that lies below would be taken for deleted."""
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    before = source.scan()
    real = os.scandir
    failing = OSError(errno.ESTALE, "Stale file handle", str(tmp_path / "dog"))

    class Stale:
        name, path = "dog", str(tmp_path / "dog")

        def is_dir(self):
            return True

        def stat(self):
            raise failing

    class Listing(list):
        def __enter__(self):
            return iter(self)

        def __exit__(self, *_):
            pass

    def scandir(path):
        if where == "scandir" and str(path).endswith("dog"):
            raise failing
        return Listing(Stale() if where == "stat" and entry.name == "dog" else entry for entry in real(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(SourceError, match="/dog: cannot be listed: Stale file handle"):
            source.scan()
    assert source.scan().equals(before)
