"""What a listing takes, ignores and guesses: labels, splits, columns, suffixes, folders that cannot be read."""

import io
import json
import re
import struct
import tarfile
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from featurepipe.annotations import split_of
from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.images import MemorySource, open_source
from featurepipe.images.listing import ListingSummary, table_of


def told(source):
    """A listing as {id: (label, split)}, and its summary."""
    table = source.scan()
    rows = zip(*(table[name].to_pylist() for name in ("label", "split")), strict=True)
    return dict(zip(table["id"].to_pylist(), rows, strict=True)), ListingSummary.of(table)


def files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def tar(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return open_source(path)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Training TRAINING_SET train-set seg_train train2017 images_train trainset trn"),
        ("val", "val valid Validation dev development val_images Dev-Set val2014 validation-data"),
        ("test", "test Testing test_set seg_test TestSet test-images tst"),
        (None, "cat trainer trains contest latest testament value devil trainspotting training_day set images test1 t"),
    ],
)
def test_usual_names_of_splits(split, names):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_folders_by_other_names_are_splits_and_told(tmp_path):
    root = files(tmp_path, "Training/cat/1.jpg", "Training/dog/2.jpg", "VALID/cat/3.jpg", "seg_test/dog/4.jpg")
    rows, summary = told(open_source(root))
    assert rows["VALID/cat/3.jpg"] == ("cat", "val")
    assert summary.splits == {"train": 2, "val": 1, "test": 1}
    assert summary.notes == ["taken as splits: Training/ as train, VALID/ as val, seg_test/ as test"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["train/a/1.jpg", "test/a/2.jpg", "extra/3.jpg"],
            r"test/ \(1 image\), train/ \(1 image\).*others at the top: extra/",
        ),
        (["set/train/a/1.jpg", "set/test/a/2.jpg"], r"test/ \(1 image\), train/ \(1 image\).*others at the top: set/"),
        (["cat/train/1.jpg", "dog/Train/2.jpg"], r"Train/ \(1 image\), train/ \(1 image\)"),
        (["train/train/1.jpg", "test/a/2.jpg"], r"train/ \(1 image\)"),
    ],
)
def test_names_of_splits_that_are_not_taken_as_such_are_told(tmp_path, names, says):
    remote = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").pipe({f"/{tmp_path.name}/{name}": b"x" for name in names})
    for source in (
        open_source(files(tmp_path / "pile", *names)),
        tar(tmp_path / "pile.tar", *((name, b"x") for name in names)),
        open_source(remote),
    ):
        _, summary = told(source)
        assert [note for note in summary.notes if "named like splits" in note], summary
        assert any(re.search(says, note) for note in summary.notes), summary.notes


def test_a_class_that_only_the_test_split_has_is_told(tmp_path):
    _, summary = told(open_source(files(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "test/images/3.jpg")))
    assert summary.notes == ["labels that split train lacks: images (test, 1 image)"]


def test_splits_of_a_manifest(tmp_path):
    (tmp_path / "m.csv").write_text("path,Split\na,Train\nb,validation\nc,Test-Set\nd,holdout\ne,\n")
    rows, summary = told(open_source(tmp_path / "m.csv"))
    assert [split for _, split in rows.values()] == ["train", "val", "test", "holdout", None]
    assert summary.splits == {"train": 1, "val": 1, "test": 1, "holdout": 1}
    assert summary.notes == [
        "splits are taken: Train as train, validation as val, Test-Set as test",
        "splits that are neither train, val nor test are kept as they are: 'holdout'",
    ]
    assert summary.lines("m")[0] == "m: 5 images, no labels, splits train 1, val 1, test 1, holdout 1, none 1"


def test_splits_of_arrays(tmp_path):
    pixels, two = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    np.savez(
        tmp_path / "a.npz", train_set_x=pixels, train_set_y=two, Valid_Images=pixels, x_dev_mask=two, list_classes=two,
        testing_labels=two,
    )  # fmt: skip
    rows, summary = told(open_source(tmp_path / "a.npz"))
    assert rows == {
        "train/000000": ("0", "train"), "train/000001": ("1", "train"), "val/000000": (None, "val"), "val/000001": (None, "val"),
    }  # fmt: skip
    assert summary.ignored == ["list_classes", "testing_labels", "x_dev_mask"]
    assert "ignored arrays: list_classes, testing_labels, x_dev_mask" in summary.lines("a")[1]


def test_two_arrays_of_one_role_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 4, 4), np.uint8), y=[1], labels=[2])
    with pytest.raises(SourceError, match="both 'labels' and 'y' are named like the labels"):
        open_source(tmp_path / "a.npz").scan()


def test_idx_files_with_a_name_before_the_split(tmp_path):
    for name in ("emnist-digits-test", "emnist-letters-test", "emnist-letters-Train"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 1, 2, 2) + bytes(4))
    rows, _ = told(open_source(tmp_path))
    assert {id_: split for id_, (_, split) in rows.items()} == {
        "emnist-digits-test-images-idx3-ubyte/000000": "test", "emnist-letters-test-images-idx3-ubyte/000000": "test",
        "train/000000": "train",
    }  # fmt: skip


# --- labels in archives -----------------------------------------------------------------------------------------------


def test_a_label_belongs_to_its_own_stem(tmp_path):
    source = tar(
        tmp_path / "a.tar",
        ("v1.0/x 2.5.cls", b"late"), ("v1.0/x 2.0.jpg", b""), ("v1.0/x 2.5.jpg", b""), ("v1.0/y.left.png", b""),
        ("v1.0/y.right.png", b""), ("v1.0/y.right.cls", b"own"), ("v1.0/y.json", b'{"label": "both"}'),
        ("v1.0/z.jpg", b""), ("v1.0/z.jpg.json", b'{"cls": 7.0}'), ("v1.0/.hidden.jpg", b""), ("v1.0/._z.cls", b"\0\xff"),
    )  # fmt: skip
    rows, summary = told(source)
    assert {id_.rpartition("/")[2]: label for id_, (label, _) in rows.items()} == {
        "x 2.0.jpg": "v1.0", "x 2.5.jpg": "late", "y.left.png": "both", "y.right.png": "own", "z.jpg": "7",
    }  # fmt: skip
    assert summary.notes == ["4 images labelled by a .cls or .json, 1 without one by the name of a folder"]
    assert summary.passed_over == {"hidden": 2}


def test_labels_before_and_after_all_images_and_without_one(tmp_path):
    source = tar(
        tmp_path / "a.tar",
        ("0.cls", b"cat\n"), ("0.png", b""), ("1.png", b""), ("0.txt", b"a cat"), ("0.json", b'{"caption": "x"}'),
        ("1.json", b'{"label": "dog"}'), ("9.cls", b"owl"),
    )  # fmt: skip
    rows, summary = told(source)
    assert rows == {"a.tar/0.png": ("cat", None), "a.tar/1.png": ("dog", None)}
    assert summary.passed_over == {".txt": 1, ".json": 1}
    assert summary.notes == [f"1 label in {tmp_path}/a.tar without an image of the same stem, such as '9.cls'"]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ((("0.cls", b"cat"), ("0.json", b'{"label": "dog"}')), "'0.cls' and '0.json' say 'cat' and 'dog'"),
        ((("0.cls", b"cat"), ("0.cls", b"dog")), "'0.cls' is there twice, and says 'cat' and 'dog'"),
    ],
)
def test_two_labels_for_one_image_are_an_error(tmp_path, members, says):
    with pytest.raises(SourceError, match=says):
        tar(tmp_path / "a.tar", ("0.png", b""), *members).scan()
    same = tar(tmp_path / "b.tar", ("0.png", b""), ("0.cls", b"3"), ("0.json", b'{"label": 3.0}'))
    assert told(same)[0] == {"b.tar/0.png": ("3", None)}


def test_labels_of_a_tar_that_are_none(tmp_path):
    source = tar(
        tmp_path / "a.tar",
        *((f"{i}.png", b"") for i in range(5)),
        ("0.json", b'{"label": ["a", "b"]}'), ("1.json", b'{"label": NaN}'), ("2.cls", b"nan"), ("3.cls", b"  \n"),
        ("4.json", b'{"label": null}'),
    )  # fmt: skip
    rows, summary = told(source)
    assert set(rows.values()) == {(None, None)}
    assert [note.partition(" (first")[0] for note in summary.notes] == [
        "1 label is a list", "1 label is NaN", "1 label is 'nan'",
    ]  # fmt: skip


def test_names_that_are_not_utf8_have_their_labels_and_paths_that_lead_out_are_told(tmp_path):
    source = tar(
        tmp_path / "a.tar",
        ("caf\udce9.png", b""), ("caf\udce9.cls", b"cat"), ("b\\xe9.png", b""), ("b\\xe9.cls", b"dog"),
        ("../../c.png", b""), ("/../c.png", b""), ("d/../d/d.png", b""),
    )  # fmt: skip
    rows, summary = told(source)
    assert rows == {
        "a.tar/caf\\xe9.png": ("cat", None), "a.tar/b\\\\xe9.png": ("dog", None),
        "a.tar/d/d.png": ("d", None),
    }  # fmt: skip
    assert "passed over 2 files: names that lead out of the archive (..) 2" in summary.lines("a")[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b" + bytes(600), "compressed with gzip: name it .tar.gz"),
        (b"BZh91AY", "compressed with bzip2, which is not read"),
        (b"<html>404</html>", "16 bytes, which start with b'<html>'"),
        (b"", "0 bytes"),
    ],
)
def test_files_that_are_no_tar_say_what_they_are(tmp_path, content, says):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SourceError, match=says):
        open_source(tmp_path / "a.tar").scan()


def test_classes_that_may_not_be_meant_are_told(tmp_path):
    labels = ("None", "Cat", "cat", "caf\u00e9", "cafe\u0301", "a", "A", "01", "1", "dog")
    (tmp_path / "m.csv").write_text(
        "".join(["path,label,\n", *(f"{i}.png,{label},\n" for i, label in enumerate(labels))])
    )
    rows, summary = told(open_source(tmp_path / "m.csv"))
    assert [label for label, _ in rows.values()] == list(labels)
    assert summary.notes == [
        "taken as a class: 'None'; leave the label empty where there is none",
        "taken as classes of their own, though they look alike: '01' and '1', 'Cat' and 'cat', 'cafe\u0301' and 'caf\u00e9'",
    ]
    assert "ignored columns: one without a name" in summary.lines("m")[1]


def test_what_a_zip_holds_besides_images(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/1.jpg", "cat/1.cls", "dog/2.NEF", "__MACOSX/cat/._1.jpg"):
            archive.writestr(name, b"x")
    rows, summary = told(open_source(tmp_path / "a.zip"))
    assert rows == {"a.zip/cat/1.jpg": ("cat", None)}
    assert summary.passed_over == {".cls": 1, ".nef": 1, "hidden": 1}


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"path;label\na b.png;cat\n",
        b"path\tlabel\r\na b.png\tcat\r\n",
        b"\xef\xbb\xbfpath,label\na b.png,cat\n",
        "path\tlabel\na b.png\tcat\n".encode("utf-16"),
        b"sep=;\npath;label\na b.png;cat\n",
        b"Path , LABEL\na b.png , cat \n",
        b'"File_Name";"Label"\n"a b.png";"cat"\n',
        b"label|image path\ncat|a b.png\n",
        b"img_path,label,\na b.png,cat,\n,,\n",
        b"\n\npath,label\n\na b.png,cat\n\n",
        b'label,patient id,filename\ncat,"1,\n2",a b.png\n',
    ],
)  # fmt: skip
def test_csv_files_as_people_have_them(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    rows, _ = told(open_source(tmp_path / "m.csv"))
    assert {id_.strip(): label for id_, (label, _) in rows.items()} == {"a b.png": "cat"}


def test_columns_that_are_not_used_are_told(tmp_path):
    (tmp_path / "m.csv").write_text("image,file,class,Subset,size,ID\na.png,b.png,cat,train,L,7\n")
    rows, summary = told(open_source(tmp_path / "m.csv"))
    assert rows == {"b.png": (None, None)}
    assert summary.further == ["image", "class", "Subset", "size", "ID"]
    assert summary.notes == [
        "paths are in column 'file'",
        "there is no column 'label': if it is 'class', call it 'label', or name it later with --label class",
        "there is no column 'split': if it is 'Subset', call it 'split', or name it later with --split-column Subset",
    ]


def test_columns_that_are_not_kept_are_told_with_the_reason(tmp_path):
    (tmp_path / "m.csv").write_text(f"path,age,report,age,label\na.png,1,{'word ' * 300},2,cat\nb.png,1,short,2,dog\n")
    _, summary = told(open_source(tmp_path / "m.csv"))
    assert summary.reasons == {"age": "there 2 times", "report": "values of over 1,000 characters"}
    assert "ignored columns: age (there 2 times), report (values of over 1,000 characters)" in summary.lines("m")[1]
    features = pa.array([[0.5] * 2000] * 3)
    pyarrow.parquet.write_table(pa.table({"path": ["a", "b", "c"], "features": features}), tmp_path / "m.parquet")
    _, summary = told(open_source(tmp_path / "m.parquet"))
    assert (summary.ignored, summary.reasons) == (["features"], {"features": "values of over 1,000 characters"})


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("path,group,group", "column 'group' is there 2 times; leave one"),
        ("path,Group,GROUP", "several columns may be 'group': 'Group', 'GROUP'"),
        ("path,Label,LABEL", "several columns may be 'label': 'Label', 'LABEL'"),
        ("path,split,split", "column 'split' is there 2 times; leave one"),
    ],
)
def test_two_columns_that_may_be_one_role_are_refused(tmp_path, header, said):
    (tmp_path / "m.csv").write_text(f"{header}\na.png,1,2\n")
    with pytest.raises(UsageError, match=said):
        open_source(tmp_path / "m.csv").scan()


def test_a_path_column_of_ones_own(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"photo": "a.png", "path": "x", "label": 1}\n')
    assert list(told(open_source(tmp_path / "m.jsonl", path_column="photo"))[0]) == ["a.png"]
    with pytest.raises(UsageError, match=r"unknown column 'foto' in .*m\.jsonl; nearest: photo"):
        open_source(tmp_path / "m.jsonl", path_column="foto").scan()
    with pytest.raises(UsageError, match="a path column is for a manifest"):
        open_source(files(tmp_path / "pile", "a.png"), path_column="photo")


def test_a_column_size_of_a_users_own(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1234567")
    for columns in ("size,mtime_ns\na.png,12.5,8", "size,mtime_ns\na.png,7,yesterday", "size\na.png,3"):
        (tmp_path / "m.csv").write_text(f"path,{columns}\n")
        assert open_source(tmp_path / "m.csv").scan()["size"].to_pylist() == [7]


def test_lines_that_cannot_be_read_are_named(tmp_path):
    for content, says in (
        ("path;label\na;b\nc;d;e\n", "line 3: 3 fields separated by semicolons, and the header has 2"),
        ('path,label\n"a,b\n', "line 2: unexpected end of data"),
        ("path,label\na,b\n,c\n", "line 3 has no path"),
        ("path,label,label\na,b,c\n", "column 'label' is there 2 times"),
    ):
        (tmp_path / "m.csv").write_text(content)
        with pytest.raises((SourceError, UsageError), match=says):
            open_source(tmp_path / "m.csv").scan()


LABELS = [3, 3.0, " cat ", "", None, float("nan"), ["a", "b"], {"a": 1}, "nan", True, 1.5]
TEXTS = ["3", "3", "cat", None, None, None, None, None, None, "True", "1.5"]


def test_labels_mean_the_same_everywhere(tmp_path):
    rows = [{"path": f"{i}.png", "label": label} for i, label in enumerate(LABELS)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (
        open_source(tmp_path / "m.jsonl"),
        MemorySource([b"x"] * len(LABELS), labels=LABELS),
        MemorySource({row["path"]: b"x" for row in rows}, labels={row["path"]: row["label"] for row in rows}),
    ):
        found, summary = told(source)
        assert [label for label, _ in found.values()] == TEXTS
        assert [note.partition(" (first")[0] for note in summary.notes] == [
            "1 label is NaN", "1 label is a list", "1 label is a dict", "1 label is 'nan'",
        ]  # fmt: skip
    assert "(first: line 7)" in told(open_source(tmp_path / "m.jsonl"))[1].notes[1]


def test_labels_of_a_parquet_file(tmp_path):
    table = {"path": ["a", "b", "c"], "label": pa.array([["x"], None, ["y", "z"]]), "age": [1, 2, 3]}
    pa.parquet.write_table(pa.table(table), tmp_path / "m.parquet")
    found, summary = told(open_source(tmp_path / "m.parquet"))
    assert set(found.values()) == {(None, None)}
    assert summary.notes == ["2 labels are a list (first: line 1), taken as missing"]
    pa.parquet.write_table(pa.table({**table, "label": [1.0, float("nan"), None]}), tmp_path / "m.parquet")
    assert [label for label, _ in told(open_source(tmp_path / "m.parquet"))[0].values()] == ["1", None, None]


def test_labels_of_arrays(tmp_path):
    pixels = np.zeros((3, 4, 4), np.uint8)
    for labels, texts in (
        (np.array([b"caf\xe9", b"bar", b""]), ["caf\\xe9", "bar", None]),
        (np.array([1.0, np.nan, 2.0]), ["1", None, "2"]),
        (np.array([[4], [5], [6]]), ["4", "5", "6"]),
        (np.array(["2020-01-01", "NaT", "2021-01-01"], "datetime64[D]"), [None] * 3),
    ):
        np.savez(tmp_path / "a.npz", x=pixels, y=labels)
        assert [label for label, _ in told(open_source(tmp_path / "a.npz"))[0].values()] == texts


def test_labels_of_ids_that_are_no_images():
    _, summary = told(MemorySource({"a": b"x"}, labels={"a": "cat", "b": "dog"}))
    assert summary.notes == ["1 label of ids that are no images, ignored"]


# --- files and folders ------------------------------------------------------------------------------------------------


def test_files_that_are_passed_over_are_counted(tmp_path):
    names = (
        "a/1.jpg a/2.NEF a/3.nef a/README a/notes.txt a/scan.001 a/scan.002 .DS_Store a/.cache/4.jpg a/x.verylongsuffix"
    )
    root = files(tmp_path, *names.split())
    (root / "gone").symlink_to(root / "nowhere")
    (root / "a/back").symlink_to(root)
    _, summary = told(open_source(root))
    assert summary.passed_over == {
        ".nef": 2, "numbered": 2, "no suffix": 2, ".txt": 1, "hidden": 2, "links to nothing": 1,
        "links to a folder around them": 1,
    }  # fmt: skip
    first, second = summary.lines("pile")
    assert first == "pile: 1 image, 1 label, no splits"
    assert second.startswith("pile: passed over 9 files: .nef 2, links to ")
    assert (
        "(convert images in formats that are not read; a manifest can name images without a suffix, as of DICOM)"
        in second
    )


def test_suffixes_do_not_grow_without_bound(tmp_path):
    _, summary = told(open_source(files(tmp_path, "0.png", *(f"f.s{i}" for i in range(150)))))
    assert len(summary.passed_over) <= 101
    assert sum(summary.passed_over.values()) == 150


def test_a_store_inside_the_folder_is_told(tmp_path):
    root = files(tmp_path, "a/1.jpg", "kept/2.jpg")
    (root / "kept/store.json").write_text('{"format": "featurepipe-store"}')
    assert told(open_source(root))[1].notes == ["passed over kept/, a feature store"]


@pytest.mark.parametrize("mode", [0o644, 0o311, 0o000])
def test_folders_that_cannot_be_searched_or_listed_are_rejects(tmp_path, mode, without_privileges):
    root = files(tmp_path / "pile", "a/1.jpg", "shut/b/2.jpg", "shut/c/3.jpg", "shut/4.jpg")
    (root / "shut").chmod(mode)
    try:
        with without_privileges():
            source = open_source(root)
            table = source.scan()
            ids = table["id"].to_pylist()
            assert ids == (["a/1.jpg", "shut/4.jpg", "shut/b", "shut/c"] if mode == 0o644 else ["a/1.jpg", "shut"])
            for locator in table["locator"].to_pylist()[1:]:
                with pytest.raises(Reject, match="unreadable: Permission denied"):
                    source.read(locator)
    finally:
        (root / "shut").chmod(0o755)
    summary = ListingSummary.of(table)
    assert list(summary.unreadable) == [id_ for id_ in ids[1:] if not id_.endswith(".jpg")]
    first, second = summary.lines("pile")
    assert "cannot be read: shut/" in second
    told_of = {
        0o644: "pile: 2 images and 2 folders that cannot be read, 2 labels, no splits",
        0o311: "pile: 1 image and 1 folder that cannot be read, 1 label, no splits",
    }
    assert first == told_of[mode or 0o311]
    labels = dict(zip(ids, table["label"].to_pylist(), strict=True))
    assert [labels[folder] for folder in summary.unreadable] == [None] * len(summary.unreadable)


def test_a_source_of_a_users_own_need_not_leave_anything():
    table = table_of([("a", "cat", "train", 1, 1, b""), ("b", None, None, 1, 1, b"")])
    summary = ListingSummary.of(table)
    assert summary.lines("mine") == ["mine: 2 images, 1 label on 1 of them, split train 1, none 1"]
    assert json.loads(json.dumps(summary.as_dict()))["splits"] == {"train": 1}


def test_what_was_found_stays_with_the_table():
    table = MemorySource({"a": b"x"}, labels={"a": [1]}).scan()
    assert ListingSummary.of(table.combine_chunks()).notes == ListingSummary.of(table).notes != []


@pytest.mark.parametrize(
    ("written", "taken", "note"),
    [
        (
            ["1.0", "", "2.0", "10.0"],
            ["1", None, "2", "10"],
            "'1.0' as '1'",
        ),  # as pandas writes whole numbers with gaps
        (["1.0", "0.0", "-3.0"], ["1", "0", "-3"], "'-3.0' as '-3'"),  # and what is left when the gaps are dropped
        (["1", "1.0", " 2.0 "], ["1", "1", "2"], "'1.0' as '1'"),  # two files put together
        (["1.0", "nan", "2.0"], ["1", None, "2"], "'1.0' as '1'"),
        (["1.0", "1.5", "2.0"], None, "such as '1.0' are kept as they are written, .*such as '1.5'.* has '1' for it"),
        (["1.0", "none"], None, "kept as they are written, .*such as 'none'"),
        (["01.0", "1.0"], None, "kept as they are written, .*such as '01.0'"),
        (["1", "2", ""], ["1", "2", None], None),
        (["01", "1.10", "1.00", "v1.0", "-0.0", "1e3"], None, None),
        (["9007199254740993.0", "1"], None, None),  # more than a float holds
    ],
)
def test_whole_numbers_written_as_floats_are_whole_numbers_if_the_whole_column_is(tmp_path, written, taken, note):
    rows = [f"{number}.png,{label}\n" for number, label in enumerate(written)]
    (tmp_path / "m.csv").write_text("".join(["path,label\n", *rows]))
    found, summary = told(open_source(tmp_path / "m.csv"))
    assert [label for label, _ in found.values()] == (taken or written)
    about = [text for text in summary.notes if "kept as they are written" in text or "written as floats" in text]
    assert len(about) == bool(note)
    assert not note or re.search(note, about[0])
    assert all(text in summary.lines("m")[1] for text in about)


def test_the_same_table_has_the_same_classes_in_each_kind_of_manifest(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"path": [f"{number}.png" for number in range(4)], "label": [3, None, 1, 3]})
    assert table["label"].dtype == np.float64
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "b.parquet")
    table.astype({"label": "Int64"}).to_parquet(tmp_path / "c.parquet")
    table.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    assert "3.0" in (tmp_path / "a.csv").read_text()
    listed = [told(open_source(tmp_path / name))[0] for name in ("a.csv", "b.parquet", "c.parquet", "d.jsonl")]
    assert [label for label, _ in listed[0].values()] == ["3", None, "1", "3"]
    assert listed[0] == listed[1] == listed[2] == listed[3]


def test_hidden_files_are_told_beside_others(tmp_path):
    root = files(tmp_path, "a.png", "b.txt", ".c", ".d")
    assert told(open_source(root))[1].lines("pile")[1] == "pile: passed over 1 file: .txt 1, besides 2 hidden"
