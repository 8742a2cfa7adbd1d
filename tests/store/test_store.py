"""Opening stores and finding feature spaces."""

import errno
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import warnings
from functools import partial

import pytest

from featurepipe.errors import StoreError, StoreLocked, UsageError
from featurepipe.store import FeatureStore, compact_store, describe, differences, fingerprint, gc_store

FIELDS = {"dtype": "float16", "net": {"name": "vgg16", "sha256": "ab" * 32}, "size": 224}


def test_makes_and_reopens(tmp_path):
    FeatureStore(tmp_path / "a" / "b").write_run({"run_id": "r"})
    record = json.loads((tmp_path / "a" / "b" / "store.json").read_text())
    assert (record["format"], record["version"]) == ("featurepipe-store", 1)
    assert FeatureStore(tmp_path / "a" / "b", create=False).spaces() == []


@pytest.mark.parametrize("made_before", [False, True])
def test_reading_makes_nothing_and_says_that_nothing_is_there(tmp_path, made_before):
    path = tmp_path / "typo"
    if made_before:
        path.mkdir()
    store = FeatureStore(path)
    assert (store.spaces(), store.datasets(), store.runs(), store.snapshot("d"), store.exists) == (
        [],
        [],
        [],
        None,
        False,
    )
    assert store.snapshot_ids("d") == []
    assert store.new_run_id() > "2026"
    readers = [
        lambda: store.features("d"),
        lambda: store.space("vgg16"),
        *(partial(act, store) for act in (describe, compact_store, gc_store)),
        lambda: FeatureStore(path, create=False),
    ]
    for read in readers:
        with pytest.raises(StoreError, match=f"there is no feature store at {path}; .*extract SOURCE --store {path}$"):
            read()
    assert path.exists() == made_before
    assert not made_before or list(path.iterdir()) == []


@pytest.mark.parametrize("first", ["open_space", "write_snapshot", "write_run", "lock"])
def test_the_first_write_makes_the_store(tmp_path, rows, first):
    store = FeatureStore(tmp_path / "deep" / "store")
    if first == "open_space":
        store.open_space(FIELDS, backbone="vgg16")
    elif first == "write_snapshot":
        rows.snapshot(store, "d", ["a"])
    elif first == "write_run":
        store.write_run({"run_id": store.new_run_id()})
    else:
        with store.lock(shared=True):
            pass
    assert store.exists
    assert FeatureStore(store.path, create=False).datasets() == (["d"] if first == "write_snapshot" else [])


def test_a_folder_that_was_filled_since_is_refused(tmp_path):
    store = FeatureStore(tmp_path / "s")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "holiday.jpg").touch()
    with pytest.raises(StoreError, match=r"neither empty nor a feature store.*holiday\.jpg"):
        store.lock(shared=True)
    assert [path.name for path in store.path.iterdir()] == ["holiday.jpg"]


def test_refuses_what_is_not_a_store(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(StoreError, match=r"neither empty nor a feature store.*holiday\.jpg"):
        FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        FeatureStore(tmp_path / "holiday.jpg")
    with pytest.raises(StoreError, match="no feature store at"):
        FeatureStore(tmp_path / "absent", create=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.jpg"]


def test_a_folder_with_only_a_dead_makers_file_counts_as_empty(tmp_path):
    (tmp_path / ".store.json.1-ab.tmp").touch()
    FeatureStore(tmp_path)


def test_a_newer_store_is_refused_with_both_versions(store, space):
    record = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(StoreError, match=r"version 2.*up to 1"):
        FeatureStore(store.path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": "1"}', '{"version": 0}'])
def test_a_broken_store_file_is_an_error(store, space, content):
    (store.path / "store.json").write_text(content)
    with pytest.raises(StoreError, match=r"store\.json"):
        FeatureStore(store.path)


def test_importing_the_package_loads_no_h5py():
    code = "import sys, featurepipe.store; print('h5py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_exported_name_can_be_loaded():
    import featurepipe.store as room

    assert {getattr(room, name).__name__ for name in room.__all__} == set(room.__all__)
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = room.Nonsense


def test_fingerprints_are_stable_and_exact():
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # SHA-256 of "{}"
    assert fingerprint({"b": 0.1, "a": "ü"}) == fingerprint({"a": "ü", "b": 0.1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    assert fingerprint({"a": 0.1}) != fingerprint({"a": 0.1 + 1e-17 * 2})
    for bad in (float("nan"), float("inf"), object(), {1: 2, "a": 3}):
        with pytest.raises(UsageError, match="JSON"):
            fingerprint({"a": bad})


def test_differences_are_dotted():
    other = {"dtype": "float32", "net": {"name": "vgg16", "sha256": "cd" * 32}, "extra": {}}
    assert differences(FIELDS, other) == ["dtype", "extra", "net.sha256", "size"]
    assert differences(FIELDS, dict(reversed(FIELDS.items()))) == []


def test_a_space_is_opened_by_its_fields(store):
    space = store.open_space(FIELDS, backbone="timm/vgg 16.x", notes={"worst_cosine": 0.9999})
    assert space.name == f"timm-vgg-16.x-{fingerprint(FIELDS)[:12]}"
    again = store.open_space(FIELDS, backbone="timm/vgg 16.x", notes={"ignored": True})
    assert again.path == space.path
    assert again.notes == {"worst_cosine": 0.9999}
    assert again.fields == FIELDS
    assert json.loads((space.path / "space.json").read_text())["fingerprint"] == fingerprint(FIELDS)
    assert len(store.spaces()) == 1


def test_notes_of_two_openers_are_both_kept(store):
    one = store.open_space(FIELDS, backbone="vgg16")
    two = store.open_space(FIELDS, backbone="vgg16")
    one.update_notes({"a": 1})
    two.update_notes({"b": 2})
    assert store.spaces()[0].notes == two.notes == {"a": 1, "b": 2}


def open_the_same_space(path, barrier, names):
    barrier.wait()
    names.put(FeatureStore(path).open_space(FIELDS, backbone="vgg16", notes={"pid": os.getpid()}).notes["pid"])


def test_racing_processes_make_one_store_and_one_space(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, notes = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_the_same_space, args=(tmp_path / "s", barrier, notes)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({notes.get(timeout=120) for _ in processes}) == 1  # the first one's notes stay
    for process in processes:
        process.join()
        assert process.exitcode == 0
    notes.close()
    notes.join_thread()
    assert not list((tmp_path / "s").rglob("*.tmp"))


def test_a_space_is_found_by_name_backbone_and_fingerprint(store):
    vgg = store.open_space(FIELDS, backbone="vgg16")
    store.open_space({**FIELDS, "size": 99}, backbone="resnet50")
    for wanted in (vgg.name, "vgg16", vgg.fingerprint, vgg.fingerprint[:8], vgg.fingerprint[:4].upper()):
        assert store.space(wanted).path == vgg.path
    with pytest.raises(UsageError, match=r"unknown feature space"):
        store.space(vgg.fingerprint[:3])
    with pytest.raises(UsageError, match=r"unknown feature space 'vgg61'.*nearest: vgg16"):
        store.space("vgg61")


def test_an_ambiguous_space_lists_the_candidates_and_what_differs(store, rows):
    half = store.open_space(FIELDS, backbone="vgg16")
    full = store.open_space({**FIELDS, "dtype": "float32"}, backbone="vgg16")
    with pytest.raises(UsageError) as caught:
        store.space("vgg16")
    lines = str(caught.value).splitlines()
    assert "'vgg16' fits 2 feature spaces" in lines[0]
    assert sorted(lines[1:]) == sorted([f"  {half.name}  (dtype=float16)", f"  {full.name}  (dtype=float32)"])
    rows.write(store, full, ["x"])
    rows.snapshot(store, "d", ["x"])
    assert store.space("vgg16", dataset="d").path == full.path


def weighted(store, weights, *, random, seed=None):
    notes = {"backbone": {"weights": weights, "random": random, "seed": seed}}
    return store.open_space({**FIELDS, "weights": weights}, backbone="vgg16", notes=notes)


def test_a_random_control_does_not_disturb(store, rows):
    trained = weighted(store, "IMAGENET1K_V1", random=False)
    control = weighted(store, "random (seed 0)", random=True, seed=0)
    assert store.space("vgg16").path == trained.path
    assert store.space(control.name).path == control.path
    for space in (trained, control):
        rows.write(store, space, ["x"])
    rows.snapshot(store, "d", ["x"])
    assert store.features("d", "a").space_fingerprint == trained.fingerprint
    assert store.features("d", "a", backbone=control.fingerprint[:4]).space_fingerprint == control.fingerprint


@pytest.mark.parametrize("third", [("IMAGENET1K_V2", False), ("random (seed 1)", True), ("unheard of", None)])
def test_only_what_is_known_to_be_trained_is_preferred(store, third):
    weights, random = third
    if not random:
        weighted(store, "IMAGENET1K_V1", random=False)
    weighted(store, "random (seed 0)", random=True, seed=0)
    weighted(store, weights, random=random)
    with pytest.raises(UsageError, match=r"fits \d feature spaces") as caught:
        store.space("vgg16")
    assert f"(weights={weights}, " in str(caught.value)
    assert "(weights=random (seed 0), " in str(caught.value)


def test_an_empty_store_says_what_to_run(store, rows):
    store.write_run({"run_id": store.new_run_id()})
    with pytest.raises(StoreError, match=f"no features yet; run: featurepipe extract SOURCE --store {store.path}"):
        store.space("vgg16")
    with pytest.raises(UsageError, match=r"unknown dataset 'd': .*no dataset yet.*--dataset d$"):
        store.features("d")
    notes = {"backbone": {"random": True, "seed": 7}}
    space = store.open_space(FIELDS, backbone="vgg16", notes=notes)
    with pytest.raises(UsageError, match=r"no features yet.*--backbone vgg16 --weights none --seed 7 --node NODE$"):
        space.resolve_column("fc7")


@pytest.mark.parametrize("program", ["/usr/bin/featurepipe", "/site-packages/featurepipe/__main__.py"])
def test_the_lock_is_shared_by_writers_and_excludes_rewriters(store, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "extract", "photos"])
    with store.lock(shared=True), store.lock(shared=True):
        who = rf"holds its lock \(pid {os.getpid()} on {re.escape(socket.gethostname())}, featurepipe extract, since \d{{4}}-"
        with pytest.raises(StoreLocked, match=who) as caught, store.lock(shared=False):
            pass
        assert caught.value.exit_code == 75
    with store.lock(shared=False):
        for shared in (True, False):
            with pytest.raises(StoreLocked, match="wait until it has finished"), store.lock(shared=shared):
                pass
    with store.lock(shared=False):
        pass


def test_the_lock_names_who_holds_it_and_not_who_came_last(store, monkeypatch):
    """One that is over, or was killed, is not the one to wait for or to stop."""
    killed = subprocess.Popen(["true"])
    killed.wait()

    def refused() -> list[str]:
        with pytest.raises(StoreLocked) as caught, store.lock(shared=False):
            pass
        return re.findall(r"pid \d+ on [^,]*, featurepipe (\w+)", str(caught.value))

    def signed_by(command: str) -> None:
        monkeypatch.setattr(sys, "argv", ["featurepipe", command])

    signed_by("run")
    with store.lock(shared=True):
        signed_by("extract")
        with store.lock(shared=True):
            assert refused() == ["run", "extract"]
        assert refused() == ["run"]
        dead = {"pid": killed.pid, "host": socket.gethostname(), "command": "featurepipe train", "since": "2026-11-30"}
        with (store.path / ".lock").open("r+b") as file:
            file.seek(512)
            file.write(json.dumps(dead).encode())
        assert refused() == ["run"]
        with store.lock(shared=True):  # takes the place of the dead one
            assert refused() == ["run", "extract"]
    with store.lock(shared=False):
        pass
    assert not (store.path / ".lock").read_bytes().strip()


@pytest.mark.parametrize("content", ["", "[1]", "{}", "123", "not JSON"])
def test_a_lock_of_another_program_is_of_someone_unknown(store, content):
    with store.lock(shared=True):
        (store.path / ".lock").write_text(content)
        with pytest.raises(StoreLocked, match=r"holds its lock \(an unknown process\)"), store.lock(shared=False):
            pass


@pytest.mark.parametrize("kind", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_where_there_are_no_locks_writers_go_on_and_nothing_is_rewritten(store, space, rows, monkeypatch, kind):
    rows.write(store, space, ["1", "2"])

    def none(descriptor, operation):
        raise OSError(getattr(errno, kind), "no locks here")

    monkeypatch.setattr("fcntl.flock", none)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            with store.lock(shared=True):
                rows.write(store, space, ["3"])
    assert [str(one.message) for one in caught] == [
        f"the file system of {store.path} has no locks (flock): adding features works, compact and gc do not"
    ]
    space.update_notes({"aliases": {"bottleneck": "a"}})
    assert store.spaces()[0].notes["aliases"] == {"bottleneck": "a"}
    before = sorted(path.name for path in space.part_paths())
    for act in (compact_store, gc_store):
        with pytest.raises(StoreLocked, match=r"has no locks \(flock\), so nobody can tell"):
            act(store)
    assert sorted(path.name for path in space.part_paths()) == before


def test_other_errors_are_not_taken_for_a_lack_of_locks(store, monkeypatch):
    def broken(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(OSError, match="Input/output"), store.lock(shared=True):
        pass


def test_columns_are_summed_over_parts(store, space, rows):
    rows.write(store, space, ["1", "2"], columns=("a:gap", "b:gap"))
    rows.write(store, space, ["3"], columns=("b:gap",))
    columns = space.columns()
    assert list(columns) == ["a:gap", "b:gap"]
    assert (columns["a:gap"].dtype, columns["a:gap"].width, columns["a:gap"].rows) == ("float16", 4, 2)
    assert (columns["b:gap"].rows, columns["b:gap"].bytes) == (3, 3 * 4 * 2)


def test_a_bundle_is_told_from_a_store(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(
        StoreError, match=f"{tmp_path} is a bundle, what featurepipe train writes, and no feature store"
    ):
        FeatureStore(tmp_path, create=False)
