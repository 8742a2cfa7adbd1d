"""JPEGs that libjpeg could only repair: rejects by default, kept and listed on request, whatever an earlier run did."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from featurepipe.cli import main
from featurepipe.cnn_features import CNNFeatures
from featurepipe.errors import UsageError

DAMAGED = ("004.jpg", "007.jpg")


@pytest.fixture
def pile(tmp_path, noisy_jpeg):
    """Ten JPEGs, of which two are copies that stopped after a third."""
    folder = tmp_path / "pile"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i:03d}.jpg").write_bytes(noisy_jpeg(i, damaged=f"{i:03d}.jpg" in DAMAGED))
    return folder


def named(images):
    return tuple(image["id"] for image in images)


def told(record):
    counts = record["counts"]
    return counts["computed"], counts["known"], counts["rejected"], counts["read"], named(record["damaged"]["images"])


@pytest.mark.parametrize("cluster", [False, True])
def test_what_is_damaged_is_rejected_or_kept_and_listed(pile, run, cluster, request):
    there = {"cluster": request.getfixturevalue("thread_executor")} if cluster else {}
    record = run(pile, max_rejects=2, **there)
    assert told(record) == (8, 0, 2, 10, ())
    assert named(record["rejects"]) == DAMAGED
    assert all("libjpeg could only repair it" in reject["reason"] for reject in record["rejects"])
    record = run(pile, damaged="keep", **there)
    assert told(record) == (2, 8, 0, 2, DAMAGED)
    assert record["damaged"]["asked"] == "keep"
    assert record["damaged"]["kept"] == 2
    assert set(DAMAGED) <= set(run.features("pile"))


def test_what_was_kept_stays_listed_and_is_rejected_again_without_being_read(pile, run):
    assert told(run(pile, damaged="keep")) == (10, 0, 0, 10, DAMAGED)
    assert told(run(pile, damaged="keep")) == (0, 10, 0, 0, DAMAGED)
    (pile / "004.jpg").rename(pile / "moved.jpg")  # the same bytes under another name
    assert told(run(pile, damaged="keep")) == (0, 10, 0, 1, ("007.jpg", "moved.jpg"))
    record = run(pile, max_rejects=2)
    assert told(record) == (0, 8, 2, 0, ())
    assert named(record["rejects"]) == ("007.jpg", "moved.jpg")
    assert "moved.jpg" not in run.features("pile")
    assert told(run(pile, max_rejects=2, retry_rejects=True)) == (0, 8, 2, 0, ())
    assert told(run(pile, damaged="keep")) == (0, 10, 0, 0, ("007.jpg", "moved.jpg"))


def test_copies_of_a_kept_image_are_listed_each(pile, run):
    (pile / "copy.jpg").write_bytes((pile / "004.jpg").read_bytes())
    assert told(run(pile, damaged="keep")) == (10, 1, 0, 11, (*DAMAGED, "copy.jpg"))


def test_other_rejects_stay_rejects(pile, run):
    (pile / "none.jpg").write_bytes(b"no picture")
    (pile / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert told(run(pile, damaged="keep", max_rejects=2)) == (10, 0, 2, 12, DAMAGED)
    assert told(run(pile, damaged="keep", max_rejects=2)) == (0, 10, 2, 0, DAMAGED)


def test_features_of_sound_images_do_not_depend_on_it(pile, run, tmp_path):
    run(pile, damaged="keep")
    kept = run.features("pile")
    run(pile, max_rejects=2)
    for name, feature in run.features("pile").items():
        np.testing.assert_array_equal(feature, kept[name])


def test_another_word_is_refused(pile, run):
    with pytest.raises(UsageError, match=r"unknown damaged 'repair'; nearest: .*|choices: reject, keep"):
        run(pile, damaged="repair")


def test_the_command_and_a_job_take_it(pile, tmp_path, capsys):
    store = str(tmp_path / "other")
    shape = ["--backbone", "lenet5", "--weights", "none", "--precision", "fp32", "--quiet"]
    assert main(["extract", str(pile), "--store", store, *shape, "--damaged", "keep"]) == 0
    printed = capsys.readouterr().out
    assert "kept although damaged: 2" in printed
    assert "004.jpg: damaged: libjpeg could only repair it" in printed or "004.jpg: truncated: libjpeg" in printed
    job = tmp_path / "night.toml"
    job.write_text(
        f'store = "{tmp_path / "third"}"\n[source]\npath = "{pile}"\n[limits]\ndamaged = "keep"\n'
        '[[features]]\nbackbone = "lenet5"\nweights = "none"\nprecision = "fp32"\n'
    )
    assert main(["run", str(job), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["limits"]["damaged"] == "keep"


# CNNFeatures


@pytest.mark.parametrize("store", [False, True])
def test_a_transformer_refuses_what_is_damaged_or_keeps_it_and_warns(pile, run, tmp_path, store):
    lenet = {"backbone": "lenet5", "weights": "none", "dtype": "float32", "workers": 2}
    options = {**lenet, "precision": "fp32", "store": tmp_path / "cache" if store else None}
    paths = [str(path) for path in sorted(pile.iterdir())]
    sound = [path for path in paths if not path.endswith(DAMAGED)]
    with pytest.raises(UsageError, match=r"image 4 \(.*004\.jpg\) cannot be used: .* or keep it with damaged='keep'"):
        CNNFeatures(**options).fit_transform(paths)
    found = CNNFeatures(**options, on_reject="nan").fit_transform(paths)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [4, 7]
    keeping = CNNFeatures(**options, damaged="keep").fit(paths)
    for _ in range(2):  # computed, then perhaps looked up
        with pytest.warns(
            UserWarning, match=r"2 of 10 images are kept although they are damaged: image 4 \(.*; image 7 "
        ):
            kept = keeping.transform(paths)
    run(pile, damaged="keep", dtype="float32")
    stored = run.features("pile")
    expected = np.stack([stored[f"{number:03d}.jpg"] for number in range(10)])
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-6)  # the batches' company was another
    np.testing.assert_allclose(keeping.transform(sound), kept[[0, 1, 2, 3, 5, 6, 8, 9]], rtol=1e-4, atol=1e-6)
    with pytest.raises(
        UsageError, match="cannot be used"
    ):  # a store that has kept it keeps nobody else from rejecting it
        CNNFeatures(**options).fit_transform(paths)
    with pytest.raises(UsageError, match="unknown damaged 'repair'"):
        CNNFeatures(**options, damaged="repair").fit(paths)


def test_many_kept_images_are_a_warning_of_one_line(tmp_path, noisy_jpeg):
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(noisy_jpeg(number, damaged=True))
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    keeping = CNNFeatures("lenet5", weights="none", damaged="keep").fit(paths)
    with pytest.warns(UserWarning, match=r"7 of 7 images .*; and 2 more$") as caught:
        keeping.transform([*paths, paths[0]])
    assert len(caught) == 1
    assert re.findall(r"image (\d)", str(caught[0].message)) == list("01234")
