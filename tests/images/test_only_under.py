"""``--only-under``: what a manifest names, or a link leads to, elsewhere is neither read nor asked about."""

import http.server
import io
import pickle
import threading
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from PIL import Image

from featurepipe.errors import Reject, UsageError
from featurepipe.images import open_source
from featurepipe.images.source import OnlyUnder


@pytest.fixture
def place(tmp_path):
    """A folder ``mine`` with an image, beside it a secret, and links from the one to the other."""
    (tmp_path / "mine" / "cat").mkdir(parents=True)
    (tmp_path / "mine-too").mkdir()
    for name in ("mine/cat/a.png", "secret.png", "mine-too/b.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "mine" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "mine" / "out").symlink_to(tmp_path / "mine-too")
    (tmp_path / "mine" / "inner.png").symlink_to("cat/a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "mine")
    return tmp_path


def read_or_reason(source, locator):
    try:
        return source.read(locator)
    except Reject as reject:
        return str(reject)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("mine/cat/a.png", True), ("mine/./cat/../cat/a.png", True), ("mine/inner.png", True), ("alias/cat/a.png", True),
        ("mine/cat/not-there.png", True), ("secret.png", False), ("mine/../secret.png", False), ("mine/link.png", False),
        ("mine/out/b.png", False), ("mine-too/b.png", False), ("mine/\0.png", False), ("mine", True), (".", False),
    ],
)  # fmt: skip
def test_local_files(place, path, allowed):
    bounds = OnlyUnder([place / "mine"])
    assert bounds.allows(f"{place}/{path}") is allowed
    assert bounds.allows(f"file://{place}/{path}") is allowed
    assert OnlyUnder([place / "alias"]).allows(f"{place}/{path}") is allowed
    assert OnlyUnder([f"{place}/mine/"]).allows(f"{place}/{path}") is allowed


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("s3://b/images/a.png", True), ("s3://b/images/x/y.png", True), ("s3://b/images-too/a.png", False),
        ("s3://b/a.png", False),
        ("s3://b/images/../a.png", False), ("s3://b/images/%2e%2e/a.png", False), ("s3://b/images/%252e%252E/a.png", False),
        ("s3://b/images/..\\a.png", False), ("s3://b/images/a.png::b.png", False), ("zip://a.png::s3://b/images/a.zip", False),
        ("s3://b/images/a..png", True), ("S3://b/images/a.png", False), ("http://b/images/a.png", False),
        ("s3://me@b/images/a.png", False), ("/etc/passwd", False), ("file:///etc/passwd", False),
    ],
)  # fmt: skip
def test_urls(url, allowed):
    assert OnlyUnder(["s3://b/images"]).allows(url) is allowed
    assert not OnlyUnder(["/data"]).allows(url)


def test_everything_below_the_root():
    assert OnlyUnder(["/"]).allows("/etc/passwd")


def test_a_manifest(place, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/yes/1.png": b"1", "/no/2.png": b"2"})
    rows = ["mine/cat/a.png", "secret.png", "mine/link.png", f"{place}/secret.png", "memory://yes/1.png", "memory://no/2.png",
            "file:///etc/hostname.png", "http://127.0.0.1:9/x.png", f"zip://x.png::{place}/mine/a.zip"]  # fmt: skip
    (place / "list.csv").write_text("path\n" + "\n".join(rows) + "\n")
    source = open_source(place / "list.csv", only_under=[place / "mine", "memory://yes"])
    table = source.scan()
    assert table["size"].to_pylist() == [14, -1, -1, -1, 1, -1, -1, -1, -1]
    worker = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(
        type(memory), "cat_file", lambda _self, path, **_: b"1" if path == "/yes/1.png" else pytest.fail(path)
    )
    for reader in (source, worker):
        got = [read_or_reason(reader, locator) for locator in table["locator"].to_pylist()]
        assert [got.pop(4), got.pop(0)] == [b"1", b"mine/cat/a.png"]
        for reason in got:
            assert reason.startswith("refused: a ")
            assert f"is not below {place}/mine or memory://yes, which --only-under asks for" in reason
    memory.rm("/yes", recursive=True)
    memory.rm("/no", recursive=True)


def test_sizes_that_a_manifest_gives_do_not_let_a_refused_row_pass_for_known(place):
    (place / "list.csv").write_text("path,size,mtime_ns\nmine/cat/a.png,14,5\nsecret.png,10,5\n")
    table = open_source(place / "list.csv", only_under=place / "mine").scan()
    assert table.select(["size", "mtime_ns"]).to_pylist() == [{"size": 14, "mtime_ns": 5}, {"size": -1, "mtime_ns": -1}]


@pytest.mark.parametrize("spec", ["mine", "mine/*.png"])
def test_links_in_a_folder_and_in_a_glob(place, spec):
    source = open_source(place / spec, only_under=str(place / "mine"))
    table = source.scan()
    got = {
        id_: read_or_reason(source, at)
        for id_, at in zip(*(table[c].to_pylist() for c in ("id", "locator")), strict=True)
    }
    refused = {Path(id_).name for id_, read in got.items() if isinstance(read, str)}
    assert refused == ({"link.png", "b.png"} if spec == "mine" else {"link.png"})


def test_what_makes_no_sense(place):
    with pytest.raises(
        UsageError, match=r"^memory://elsewhere is not below /data, .*add only_under='memory://elsewhere'"
    ):
        open_source("memory://elsewhere", only_under="/data")
    with pytest.raises(UsageError, match=r"names no folder"):
        OnlyUnder([])
    with pytest.raises(UsageError, match=r"is a chain"):
        OnlyUnder(["zip://::s3://b/a.zip"])
    with pytest.raises(UsageError, match=r"is open already"):
        open_source(open_source(place), only_under=place)


class _Redirecting(http.server.BaseHTTPRequestHandler):
    """Serves ``/mine/*.png``, sends who asks for ``/mine/away.png`` elsewhere, and notes what was asked for."""

    asked: ClassVar[list[str]] = []
    image: ClassVar[bytes] = b""

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/mine/away.png":
            self.send_response(302)
            self.send_header("Location", "/others/secret.png")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.image)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.image)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("kind", ["manifest", "paths"])
def test_a_server_that_redirects_is_not_followed(tmp_path, kind, monkeypatch):
    pytest.importorskip("aiohttp")
    content = io.BytesIO()
    Image.effect_noise((8, 8), 50).save(content, "PNG")
    monkeypatch.setattr(_Redirecting, "image", content.getvalue())
    monkeypatch.setattr(_Redirecting, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            mine = f"http://127.0.0.1:{server.server_port}/mine"
            urls = [f"{mine}/here.png", f"{mine}/away.png"]
            (tmp_path / "list.csv").write_text("\n".join(["path", *urls]))
            given = urls if kind == "paths" else str(tmp_path / "list.csv")
            with closing(open_source(given, only_under=[mine, tmp_path])) as source:
                here, away = source.scan()["locator"].to_pylist()
                assert source.read(here) == content.getvalue()
                with pytest.raises(Reject, match=r"^refused: the server redirects to another place"):
                    source.read(away)
            assert "/others/secret.png" not in _Redirecting.asked
            with closing(open_source(given)) as source:  # unbounded, as browsers do
                assert source.read(source.scan()["locator"].to_pylist()[1]) == content.getvalue()
            assert "/others/secret.png" in _Redirecting.asked
        finally:
            server.shutdown()
            thread.join()
            kind_of = fsspec.get_filesystem_class("http")
            for instance in list(kind_of._cache.values()):
                if (session := getattr(instance, "_session", None)) is not None:
                    kind_of.close_session(instance.loop, session)
            kind_of.clear_instance_cache()
