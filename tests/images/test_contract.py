"""One contract, every source: subclass ``SourceContract`` and return a source with its content."""

import csv
import functools
import gzip
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featurepipe.images import SCHEMA, MemorySource, Source, open_source


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"train/cat/a.png": png(0), "train/cat/b.png": png(1), "train/dog/a.png": png(2), "val/cat/z.png": png(3)}
ARRAYS = np.random.default_rng(5).integers(0, 256, (4, 6, 5), dtype=np.uint8)
LABELS = ["3", "1", "0", "1"]


def same(read, expected):
    if isinstance(expected, np.ndarray):
        return isinstance(read, np.ndarray) and read.dtype == expected.dtype and np.array_equal(read, expected)
    return type(read) is bytes and read == expected


def write_files(root):
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


class SourceContract:
    """What every source promises; ``expected`` is [(id, label, split, payload)] in the listing's order."""

    size_known = True

    def make(self, tmp_path):
        raise NotImplementedError

    @pytest.fixture
    def made(self, tmp_path):
        source, expected = self.make(tmp_path)
        with source:
            yield source, expected

    def test_lists_what_is_there(self, made):
        source, expected = made
        table = source.scan()
        assert pa.schema(list(table.schema)[: len(SCHEMA)]) == SCHEMA
        assert all(name.startswith("column:") for name in table.column_names[len(SCHEMA) :])
        listed = list(zip(*(table[name].to_pylist() for name in ("id", "label", "split")), strict=True))
        assert listed == [row[:3] for row in expected]

    def test_ids_are_unique(self, made):
        ids = made[0].scan()["id"].to_pylist()
        assert len(set(ids)) == len(ids) > 0

    def test_lists_the_same_twice(self, made):
        assert made[0].scan().equals(made[0].scan())

    def test_reads_what_was_stored(self, made):
        source, expected = made
        for locator, (_, _, _, payload) in zip(source.scan()["locator"].to_pylist(), expected, strict=True):
            assert same(source.read(locator), payload)

    def test_sizes_are_those_of_the_content(self, made):
        source, expected = made
        known = [p.nbytes if isinstance(p, np.ndarray) else len(p) for *_, p in expected]
        assert source.scan()["size"].to_pylist() == (known if self.size_known else [-1] * len(known))

    def test_survives_pickling_unused_and_used(self, made):
        source, expected = made
        locators = source.scan()["locator"].to_pylist()
        source.read(locators[-1])
        copy = pickle.loads(pickle.dumps(source))
        with copy:
            assert same(copy.read(locators[0]), expected[0][3])
            assert copy.scan().equals(source.scan())

    def test_reads_from_threads(self, made):
        source, expected = made
        jobs = list(zip(source.scan()["locator"].to_pylist(), (row[3] for row in expected), strict=True)) * 25
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda job: same(source.read(job[0]), job[1]), jobs))

    def test_opens_again_after_close(self, made):
        source, expected = made
        locator = source.scan()["locator"][0].as_py()
        source.close()
        assert same(source.read(locator), expected[0][3])

    def test_is_a_source(self, made):
        source, _ = made
        assert isinstance(source, Source)
        assert source.name
        assert open_source(source) is source

    def test_says_where_it_is(self, made, tmp_path):
        location = made[0].location
        assert location.startswith((f"{tmp_path}/", "http://127.0.0.1", "memory:")) or location == str(tmp_path)
        assert pickle.loads(pickle.dumps(made[0])).location == location


def as_rows(prefix=""):
    return [(prefix + name, name.split("/")[1], name.split("/")[0], content) for name, content in sorted(FILES.items())]


class TestFolder(SourceContract):
    def make(self, tmp_path):
        write_files(tmp_path / "animals")
        return open_source(tmp_path / "animals"), as_rows()


class TestMemoryFileSystem(SourceContract):
    @pytest.fixture(autouse=True)
    def files(self):
        file_system = fsspec.filesystem("memory")
        for name, content in FILES.items():
            file_system.pipe(f"/contract/animals/{name}", content)
        yield
        file_system.rm("/contract", recursive=True)

    def make(self, tmp_path):
        return open_source("memory://contract/animals"), as_rows()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A web server on tmp_path/web; yields its address."""
    root = tmp_path / "web"
    root.mkdir()
    handler = functools.partial(QuietHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()
        thread.join()
    http_file_system = fsspec.get_filesystem_class("http")
    for instance in list(http_file_system._cache.values()):
        session = getattr(instance, "_session", None)
        if session is not None:
            http_file_system.close_session(instance.loop, session)
    http_file_system.clear_instance_cache()


class TestWebServer(SourceContract):
    size_known = False  # a directory page has no sizes

    @pytest.fixture
    def made(self, web):
        address, root = web
        write_files(root / "animals")
        return open_source(f"{address}/animals/"), as_rows()


class TestArchiveOnWebServer(SourceContract):
    @pytest.fixture
    def made(self, web):
        address, root = web
        write_zip(root / "animals.zip")
        with open_source(f"{address}/animals.zip") as source:
            yield source, as_rows("animals.zip/")


def write_zip(path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in sorted(FILES.items()):
            archive.writestr(name, content)


class TestZip(SourceContract):
    method = zipfile.ZIP_DEFLATED

    def make(self, tmp_path):
        write_zip(tmp_path / "animals.zip", self.method)
        return open_source(str(tmp_path / "animals.zip")), as_rows("animals.zip/")


class TestStoredZip(TestZip):
    method = zipfile.ZIP_STORED


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_shard(path, first, mode="w"):
    """A WebDataset shard; labels after the image, before it, in JSON, and missing."""
    images = [png(first + offset) for offset in range(4)]
    with tarfile.open(path, mode) as archive:
        add(archive, "000.png", images[0])
        add(archive, "000.cls", b"7\n")
        add(archive, "001.json", json.dumps({"label": "owl"}).encode())
        add(archive, "001.png", images[1])
        add(archive, "002.json", json.dumps({"cls": 2}).encode())
        add(archive, "002.left.png", images[2])
        add(archive, "003.png", images[3])
    members = ("000.png", "001.png", "002.left.png", "003.png")
    labels = ("7", "owl", "2", None)
    return [(f"{path.name}/{m}", lb, None, i) for m, lb, i in zip(members, labels, images, strict=True)]


class TestTar(SourceContract):
    name, mode = "shard.tar", "w"

    def make(self, tmp_path):
        rows = write_shard(tmp_path / self.name, 10, self.mode)
        return open_source(tmp_path / self.name), rows


class TestTarGz(TestTar):
    name, mode = "shard.tar.gz", "w:gz"


class TestTgz(TestTar):
    name, mode = "shard.tgz", "w:gz"


class TestTarOfFolders(SourceContract):
    def make(self, tmp_path):
        with tarfile.open(tmp_path / "animals.tar", "w") as archive:
            for name, content in sorted(FILES.items()):
                add(archive, name, content)
        return open_source(tmp_path / "animals.tar"), as_rows("animals.tar/")


class TestGlobOfTars(SourceContract):
    def make(self, tmp_path):
        rows = write_shard(tmp_path / "b-1.tar", 20) + write_shard(tmp_path / "b-2.tar", 30)
        write_shard(tmp_path / "other.tar", 40)
        return open_source(str(tmp_path / "b-*.tar")), rows


class ManifestContract(SourceContract):
    suffix = ""

    def write(self, path, rows):
        raise NotImplementedError

    def make(self, tmp_path):
        write_files(tmp_path / "animals")
        (tmp_path / "lists").mkdir()
        rows = [
            {"path": f"../animals/{name}", "id": f"n{i}", "label": "NA" if i else None, "split": "val", "extra": i}
            for i, name in enumerate(sorted(FILES, reverse=True))
        ]
        path = tmp_path / "lists" / f"list.{self.suffix}"
        self.write(path, rows)
        content = [FILES[name] for name in sorted(FILES, reverse=True)]
        return open_source(path), [(r["id"], r["label"], "val", c) for r, c in zip(rows, content, strict=True)]


class TestCsv(ManifestContract):
    suffix = "csv"

    def write(self, path, rows):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


class TestParquet(ManifestContract):
    suffix = "parquet"

    def write(self, path, rows):
        pq.write_table(pa.Table.from_pylist(rows), path)


class TestJsonl(ManifestContract):
    suffix = "jsonl"

    def write(self, path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_idx(path, array):
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def array_rows(prefix, split=None, labels=LABELS, start=0):
    return [(f"{prefix}/{i:06d}", labels[i], split, ARRAYS[i + start]) for i in range(4 - start)]


class TestIdx(SourceContract):
    def make(self, tmp_path):
        write_idx(tmp_path / "digits-images-idx3-ubyte", ARRAYS)
        write_idx(tmp_path / "digits-labels-idx1-ubyte", np.array(LABELS, np.uint8))
        return open_source(tmp_path / "digits-images-idx3-ubyte"), array_rows("digits-images-idx3-ubyte")


class TestIdxFolder(SourceContract):
    def make(self, tmp_path):
        for name in ("train", "t10k"):
            write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", ARRAYS)
            write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.array(LABELS, np.uint8))
        write_idx(tmp_path / "train-images-idx3-ubyte", ARRAYS)  # torchvision keeps both
        return open_source(tmp_path), array_rows("test", "test") + array_rows("train", "train")


class TestNpz(SourceContract):
    def make(self, tmp_path):
        np.savez_compressed(tmp_path / "digits.npz", X=ARRAYS, y=np.array(LABELS))
        return open_source(tmp_path / "digits.npz"), array_rows("digits")


class TestNpzOfSplits(SourceContract):
    def make(self, tmp_path):
        turned = np.asfortranarray(ARRAYS)  # stored column by column
        np.savez(tmp_path / "d.npz", x_train=turned, y_train=np.array(LABELS, int), x_test=ARRAYS[1:])
        return open_source(tmp_path / "d.npz"), array_rows("test", "test", [None] * 3, 1) + array_rows("train", "train")


def read_pretend_h5(path):
    arrays = np.load(path)  # any mapping of names to things that can be sliced
    return {name: arrays[name] for name in arrays}


class TestH5ThroughReader(SourceContract):
    def make(self, tmp_path):
        np.savez(tmp_path / "d.npz", images=ARRAYS, labels=np.array(LABELS, "S1"))
        path = Path(tmp_path / "d.npz").rename(tmp_path / "d.h5")
        return open_source(path, array_readers={".h5": read_pretend_h5}), array_rows("d")


class TestMapping(SourceContract):
    def make(self, tmp_path):
        (tmp_path / "p.png").write_bytes(FILES["train/dog/a.png"])
        items = {"z": FILES["train/cat/a.png"], "a": ARRAYS[0], "p": tmp_path / "p.png"}
        payloads = [items["z"], items["a"], FILES["train/dog/a.png"]]
        return open_source(items), [(i, None, None, p) for i, p in zip(items, payloads, strict=True)]


class TestPaths(SourceContract):
    def make(self, tmp_path):
        write_files(tmp_path)
        paths = [tmp_path / name for name in sorted(FILES, reverse=True)]
        return open_source(paths), [(str(p), None, None, p.read_bytes()) for p in paths]


class TestArray(SourceContract):
    def make(self, tmp_path):
        return MemorySource(ARRAYS, labels=[3, 1, 0, 1]), [
            (f"{i:06d}", LABELS[i], None, ARRAYS[i]) for i in range(len(ARRAYS))
        ]


def read_in_child(source, locator):
    return source.read(locator)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_handle(tmp_path):
    rows = write_shard(tmp_path / "s.tar.gz", 50, "w:gz")
    with open_source(tmp_path / "s.tar.gz") as source:
        locators = source.scan()["locator"].to_pylist()
        with get_context("fork").Pool(1) as pool:
            assert pool.starmap(read_in_child, [(source, locator) for locator in locators]) == [r[3] for r in rows]
        assert source.read(locators[0]) == rows[0][3]
