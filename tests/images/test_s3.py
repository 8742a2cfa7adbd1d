"""Sources on S3, through s3fs, against a server on loopback: what users have there, and how it fails."""

import contextlib
import csv
import io
import json
import pickle
import tarfile
import threading
import zipfile

import boto3
import fsspec
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from featurepipe.errors import Reject, SourceError, Unavailable
from featurepipe.images import open_source
from featurepipe.images.regions import Box, Region

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist in our records.</Message></Error>"


class Server:
    """moto's S3, in this process, that can be told to fail.

    Attributes:
        busy: how often each path is still answered with 503, by its end.
        cut: how many bytes of an object come before the connection ends, by the end of its path.
        asked: (method, path) of each request.
    """

    def __init__(self):
        self._application = DomainDispatcherApplication(create_backend_app)
        self.forget()

    def forget(self):
        self.busy, self.cut, self.asked = {}, {}, []

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        self.asked.append((environ["REQUEST_METHOD"], path))
        if "Credential=stranger" in environ.get("HTTP_AUTHORIZATION", ""):
            return self._error(environ, start_response, "403 Forbidden", DENIED)
        if left := next((end for end in self.busy if path.endswith(end) and self.busy[end]), None):
            self.busy[left] -= 1
            return self._error(environ, start_response, "503 Slow Down", BUSY)
        answer = self._application(environ, start_response)
        cut = next((self.cut[end] for end in self.cut if path.endswith(end)), None)
        return answer if cut is None or environ["REQUEST_METHOD"] != "GET" else [b"".join(answer)[:cut]]

    @staticmethod
    def _error(environ, start_response, status, body):
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


@pytest.fixture(scope="module")
def serving():
    application = Server()
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield application, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(serving, monkeypatch, tmp_path):
    application, address = serving
    for name, value in {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "x", "AWS_MAX_ATTEMPTS": "1",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # of 5, each of which waits for longer
    s3fs.S3FileSystem.clear_instance_cache()
    application.forget()
    yield application
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server):
    client = boto3.client("s3")
    client.create_bucket(Bucket="pile")
    yield lambda name, content: client.put_object(Bucket="pile", Key=name, Body=content)
    server.forget()
    for found in client.list_objects_v2(Bucket="pile").get("Contents", ()):
        client.delete_object(Bucket="pile", Key=found["Key"])


def tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_boxes_of_images_there(bucket, server, tmp_path):
    files = {f"train2017/{name}.png": name.encode() * 9 for name in "ab"}
    for name, content in files.items():
        bucket(name, content)
    document = {
        "images": [{"id": n, "file_name": f"{name}.png"} for n, name in enumerate("ab")],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": n, "category_id": 1, "bbox": [n, 2, 3, 4]} for n in (1, 0, 1)],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    bucket("annotations/instances_train2017.json", (tmp_path / "boxes.json").read_bytes())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    bucket("images.zip", archive.getvalue())
    (tmp_path / "boxes.csv").write_text("path,box\na.png,0 2 3 4\nb.png,1 2 3 4\nb.png,1 2 3 4\n")
    for spec, images in (
        ("s3://pile/annotations/instances_train2017.json", None), (tmp_path / "boxes.json", "s3://pile/train2017"),
        (tmp_path / "boxes.json", "s3://pile/images.zip"), (tmp_path / "boxes.csv", "s3://pile/train2017/"),
    ):  # fmt: skip
        with pickle.loads(pickle.dumps(open_source(spec, images=images))) as source:
            assert contents(source) == {
                "a.png#1": Region(b"a" * 9, Box(0, 2, 3, 4)), "b.png#1": Region(b"b" * 9, Box(1, 2, 3, 4)),
                "b.png#2": Region(b"b" * 9, Box(1, 2, 3, 4)),
            }  # fmt: skip
            assert source.scan()["size"].to_pylist() == [9, 9, 9]


def contents(source):
    table = source.scan()
    return {
        id_: source.read(locator)
        for id_, locator in zip(*(table[c].to_pylist() for c in ("id", "locator")), strict=True)
    }


def test_a_folder(bucket, server):
    files = {
        "train/cat/a b.png": b"1",
        "train/dog/ü.png": b"22",
        "val/cat/x::y.png": b"333",
        "val/cat/q?1#2.png": b"4444",
    }
    for name, content in {**files, "notes.txt": b"", ".hidden/a.png": b""}.items():
        bucket(name, content)
    with open_source("s3://pile/") as source:
        assert contents(source) == files
        table = source.scan()
        assert table["size"].to_pylist() == [len(files[id_]) for id_ in table["id"].to_pylist()]
        assert min(table["mtime_ns"].to_pylist()) > 0
        assert set(zip(table["label"].to_pylist(), table["split"].to_pylist(), strict=True)) == {
            ("cat", "train"), ("dog", "train"), ("cat", "val"),
        }  # fmt: skip
        worker = pickle.loads(pickle.dumps(source))
    assert worker.read(table["locator"][0].as_py()) == b"1"


def test_what_came_and_changed_between_two_runs_of_one_process(bucket):
    bucket("a.png", b"old")
    assert contents(open_source("s3://pile")) == {"a.png": b"old"}
    bucket("a.png", b"a new and longer one")
    bucket("b.png", b"new")
    assert contents(open_source("s3://pile")) == {"a.png": b"a new and longer one", "b.png": b"new"}


def test_a_manifest_there_and_one_here(bucket, server, tmp_path):
    for number in range(12):
        bucket(f"images/{number}.png", b"x" * number)
    rows = io.StringIO()
    csv.writer(rows).writerows([["path", "label"], *([f"images/{number}.png", number % 2] for number in range(12))])
    bucket("list.csv", rows.getvalue().encode())
    there = open_source("s3://pile/list.csv")
    assert [len(content) for content in contents(there).values()] == list(range(12))
    (tmp_path / "here.csv").write_text("path\ns3://pile/images/3.png\ns3://pile/images/none.png\ns3://nowhere/1.png\n")
    here = open_source(tmp_path / "here.csv")
    table = here.scan()
    assert table["size"].to_pylist() == [3, -1, -1]
    fine, *missing = table["locator"].to_pylist()
    assert here.read(fine) == b"xxx"
    for locator in missing:
        with pytest.raises(Reject, match=r"^missing: no such file"):
            here.read(locator)


def test_shards_and_one_that_is_replaced(bucket):
    for number in range(2):
        bucket(f"shards/{number}.tar", tar({f"{number}.png": b"old", f"{number}.cls": b"7"}))
    with open_source("s3://pile/shards/*.tar") as source:
        assert contents(source) == {"0.tar/0.png": b"old", "1.tar/1.png": b"old"}
        assert source.scan()["label"].to_pylist() == ["7", "7"]
        before = pickle.dumps(source)
        bucket("shards/1.tar", tar({"1.png": b"new", "1.cls": b"7"}))  # of the same size: another ETag
        assert contents(source) == {"0.tar/0.png": b"old", "1.tar/1.png": b"new"}
        assert pickle.dumps(source) != before
    bucket("shards/2.tar", tar({"2.png": b"two"}))
    assert len(contents(open_source("s3://pile/shards/*.tar"))) == 3
    assert contents(open_source("s3://pile/shards/2.tar")) == {"2.tar/2.png": b"two"}


@pytest.mark.parametrize("path", ["s3://pile", "s3://pile/list.csv", "s3://pile/*.tar", "s3://pile/a.tar"])
def test_wrong_credentials_are_one_line(bucket, monkeypatch, path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SourceError, match=r"^s3://pile.*(Access|key|Forbidden)") as caught:
        open_source(path).scan()
    assert "\n" not in str(caught.value)


def test_rows_with_wrong_credentials_are_rejects_that_say_so(bucket, monkeypatch, tmp_path):
    bucket("a.png", b"x")
    (tmp_path / "list.csv").write_text("path\ns3://pile/a.png\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    s3fs.S3FileSystem.clear_instance_cache()
    source = open_source(tmp_path / "list.csv")
    with pytest.raises(Reject, match=r"^unreadable: ") as caught:
        source.read(source.scan()["locator"][0].as_py())
    assert not isinstance(caught.value, Unavailable)


def test_a_busy_server_is_asked_again_and_else_the_image_is_unavailable(bucket, server):
    bucket("a.png", b"x")
    source = open_source("s3://pile")
    locator = source.scan()["locator"][0].as_py()
    server.busy["/a.png"] = 1
    with contextlib.suppress(Unavailable):  # s3fs itself asks again for the object, but not always for its size
        assert source.read(locator) == b"x"
    assert source.read(locator) == b"x"
    server.busy["/a.png"] = 1000
    with pytest.raises(Unavailable, match=r"^unreadable: "):
        source.read(locator)
    server.busy.clear()
    assert source.read(locator) == b"x"


def test_a_busy_server_while_listing_is_no_empty_folder(bucket, server):
    bucket("a.png", b"x")
    server.busy["/pile"] = 1000
    with pytest.raises(SourceError, match=r"^s3://pile: cannot be opened: "):
        open_source("s3://pile").scan()


def test_an_object_that_is_cut_off_while_it_is_read_is_unavailable(bucket, server):
    bucket("a.png", b"x" * 100_000)
    bucket("s.tar", tar({"a.png": b"y" * 100_000}))
    source = open_source("s3://pile")
    locator = source.scan()["locator"][0].as_py()
    server.cut["/a.png"] = 1000
    with pytest.raises(Unavailable, match=r"^unreadable: "):
        source.read(locator)
    server.cut = {"/s.tar": 1000}
    with pytest.raises(SourceError, match=r"^s3://pile/s.tar: cannot be read: "):
        open_source("s3://pile/s.tar").scan()
    server.cut.clear()
    assert source.read(locator) == b"x" * 100_000


def test_an_object_that_is_replaced_after_it_was_listed_is_read_as_it_is_and_one_that_is_gone_is_missing(bucket):
    bucket("a.png", b"as listed")
    bucket("b.png", b"b")
    source = open_source("s3://pile")
    first, second = source.scan()["locator"].to_pylist()
    bucket("a.png", b"another size")
    fsspec.filesystem("s3").rm("s3://pile/b.png")
    assert source.read(first) == b"another size"
    with pytest.raises(Reject, match=r"^missing: no such file"):
        source.read(second)


def test_no_bucket_of_that_name(server):
    with pytest.raises(SourceError, match=r"^s3://nowhere: cannot be opened: FileNotFoundError"):
        open_source("s3://nowhere")
