"""Documents of comparisons: the newest is last, whatever the clock says, and they are no one else's."""

import json
from datetime import UTC, datetime

import pytest

from featurepipe.errors import StoreError, UsageError
from featurepipe.store import FeatureStore, documents


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store")


def document(dataset="album", number=0):
    return {"kind": "depth", "version": 1, "dataset": dataset, "number": number}


def numbers(store, dataset="album"):
    return [found["number"] for found in store.depth_documents(dataset)]


def test_nothing_was_compared_yet(store):
    assert store.depth_documents("album") == []
    assert not store.path.exists()  # looking makes no store
    assert store.depth_journal("album") == store.path / "depth" / "album" / "journal.jsonl"


def test_documents_come_oldest_first_and_by_dataset(store):
    for number in range(20):
        store.write_depth(document(number=number))
    store.write_depth(document("other", 99))
    assert numbers(store) == list(range(20))
    assert numbers(store, "other") == [99]


def test_a_document_is_kept_as_it_was_with_its_run_id(store):
    path = store.write_depth({**document(), "accuracy": 0.1 + 0.2, "text": "é"})
    (found,) = store.depth_documents("album")
    assert found == {**document(), "accuracy": 0.1 + 0.2, "text": "é", "run_id": path.stem}


def test_the_newest_is_last_though_the_clock_was_set_back(store, monkeypatch):
    store.write_depth(document(number=0))

    class Earlier(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2020, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(documents, "datetime", Earlier)
    store.write_depth(document(number=1))
    assert numbers(store) == [0, 1]


def test_journal_and_unfinished_files_are_no_documents(store):
    folder = store.write_depth(document()).parent
    store.depth_journal("album").write_text(json.dumps(document(number=1)) + "\n")
    (folder / ".99990101T000000000000Z-00000000.json").write_text("{")
    assert numbers(store) == [0]


def test_what_is_no_number_is_refused_and_leaves_nothing(store):
    with pytest.raises(ValueError, match="JSON"):
        store.write_depth({**document(), "accuracy": float("nan")})
    assert store.depth_documents("album") == []
    assert list((store.path / "depth" / "album").iterdir()) == []


def test_a_damaged_document_is_named(store):
    path = store.write_depth(document())
    path.write_text("{")
    with pytest.raises(StoreError, match=path.name):
        store.depth_documents("album")


@pytest.mark.parametrize("name", ["../elsewhere", "", ".hidden", "a/b"])
def test_a_dataset_name_leads_nowhere_else(store, name):
    with pytest.raises(UsageError, match="not a dataset name"):
        store.depth_documents(name)
    with pytest.raises(UsageError, match="not a dataset name"):
        store.write_depth(document(name))
