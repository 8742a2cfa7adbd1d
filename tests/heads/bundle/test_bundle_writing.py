"""A bundle takes its place whole: the old one or the new one is there, whatever happens; and nothing else is touched."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from featurepipe.errors import BundleError
from featurepipe.heads.bundle import files
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.files import check_bundle_target

# Loads what it needs once; for each line it is sent, forks a child that writes two bundles to one place in turn for ever.
WRITER = """
import os, sys
from featurepipe.heads.bundle import files
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle

two = read_bundle(sys.argv[1]), read_bundle(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)
        continue
    if line.strip() == "renames":
        files.exchange = lambda one, other: False
    while True:
        for bundle in two:
            write_bundle(sys.argv[3], bundle)
"""


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def test_an_old_bundle_is_replaced_and_nothing_is_left_over(bundle, tmp_path):
    first = write_bundle(tmp_path / "deep" / "er" / "b", bundle)
    assert first == tmp_path / "deep" / "er" / "b"
    second = write_bundle(first, dataclasses.replace(bundle, temperature=2.5))
    assert read_bundle(second).temperature == 2.5
    assert [entry.name for entry in first.parent.iterdir()] == ["b"]
    link = tmp_path / "link"
    link.symlink_to(first)
    assert write_bundle(link, dataclasses.replace(bundle, temperature=3.5)) == first
    assert link.is_symlink()
    assert read_bundle(link).temperature == 3.5


def test_replacing_without_an_exchange_of_names(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    for temperature in (1.0, 2.0):
        write_bundle(tmp_path / "b", dataclasses.replace(bundle, temperature=temperature))
    assert read_bundle(tmp_path / "b").temperature == 2.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]
    (tmp_path / "b").rename(tmp_path / ".b.previous")  # as a kill between the two renames leaves it
    assert read_bundle(tmp_path / "b").temperature == 2.0
    write_bundle(tmp_path / "b", bundle)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]
    assert read_bundle(tmp_path / "b").temperature == 1.7


def test_the_exchange_swaps_and_says_when_it_cannot(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert files.exchange(tmp_path / "one", tmp_path / "other")
    assert [entry.name for entry in (tmp_path / "one").iterdir()] == ["other"]
    with pytest.raises(OSError, match="No such file"):
        files.exchange(tmp_path / "one", tmp_path / "none")


def test_what_is_no_bundle_is_refused_and_untouched(bundle, folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"mine")
    foreign = tmp_path / "store"
    foreign.mkdir()
    (foreign / "bundle.json").write_text('{"format": "of somebody else"}')
    for place in ("photos", "file", "store"):
        with pytest.raises(BundleError, match=f"{place} is there and is no bundle .*left alone.*give another path"):
            write_bundle(tmp_path / place, bundle)
        with pytest.raises(BundleError, match="left alone"):
            check_bundle_target(tmp_path / place)
    assert content(tmp_path / "photos") == {"cat.png": b"cat"}
    assert (tmp_path / "file").read_bytes() == b"mine"
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    with pytest.raises(BundleError, match=r"holds notes\.txt beside the old bundle"):
        write_bundle(folder, bundle)
    assert content(folder) == before
    (tmp_path / "empty").mkdir()
    assert read_bundle(write_bundle(tmp_path / "empty", bundle)).temperature == 1.7


@pytest.mark.parametrize("moment", ["write_manifest", "read_bundle", "record_file"])
def test_a_failure_leaves_the_old_bundle_and_no_rest(bundle, folder, monkeypatch, moment):
    before = content(folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"featurepipe.heads.bundle.bundle.{moment}", fail)
    with pytest.raises(
        BundleError, match=r"cannot write the bundle .*No space left on device; what was there is unchanged"
    ):
        write_bundle(folder, dataclasses.replace(bundle, temperature=9.0))
    assert content(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["bundle"]


def test_everything_is_on_disk_before_it_takes_its_place(bundle, tmp_path, monkeypatch):
    synced, renamed = [], []
    real_sync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda d: (synced.append(Path(f"/proc/self/fd/{d}").readlink().name), real_sync(d))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (renamed.append(list(synced)), real_rename(a, b))[1])
    write_bundle(tmp_path / "b", bundle)
    (before,) = renamed
    assert {"bundle.json", "head.skops", "seen.safetensors"} < set(before)
    assert before[-1].endswith(".tmp")
    assert synced[-1] == tmp_path.name


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(bundle, tmp_path):
    target = tmp_path / "b"
    two = [write_bundle(tmp_path / str(t), dataclasses.replace(bundle, temperature=t)) for t in (1.0, 2.0)]
    write_bundle(target, dataclasses.replace(bundle, temperature=1.0))
    generator = random.Random(7)
    command = [sys.executable, "-c", WRITER, *map(str, two), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout.readline() == "ready\n"
        for number in range(300):  # 30 where the machine is quick; later kills leave slow ones more time
            if number >= 30 and set(found) == {1.0, 2.0}:
                break
            way = ("exchange", "renames")[number % 2]
            writer.stdin.write(f"{way}\n")
            writer.stdin.flush()
            child = int(writer.stdout.readline())
            time.sleep(generator.uniform(0.02, 0.25) * (1 + number // 30))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "ended\n"
            assert target.exists() or way == "renames"
            found.append(read_bundle(target).temperature)
    assert set(found) == {1.0, 2.0}
    write_bundle(target, bundle)
    assert read_bundle(target).temperature == 1.7


def test_reading_while_it_is_replaced_gives_one_or_the_other(bundle, digits, tmp_path):
    x, _ = digits
    other = dataclasses.replace(bundle, temperature=2.0, seen=np.arange(5, dtype=np.uint64))
    write_bundle(tmp_path / "b", bundle)
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for version in (other, bundle):
                write_bundle(tmp_path / "b", version)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(20):
            read = read_bundle(tmp_path / "b")
            assert (read.temperature, len(read.seen)) in {(1.7, 3), (2.0, 5)}
    finally:
        stop.set()
        writer.join()
    np.testing.assert_array_equal(read.scores(x), bundle.scores(x))


def test_hidden_files_of_the_users_are_not_deleted_with_an_old_bundle(bundle, tmp_path):
    folder = write_bundle(tmp_path / "b", bundle)
    (folder / ".gitattributes").write_text("precious")
    with pytest.raises(BundleError, match=r"holds \.gitattributes beside the old bundle"):
        write_bundle(folder, bundle)
    assert (folder / ".gitattributes").read_text() == "precious"
