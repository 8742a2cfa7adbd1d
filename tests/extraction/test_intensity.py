"""The option ``intensity`` through a run: rejects that name it, the space that it starts, and spaces of version 1."""

import io

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import TooManyRejects, UsageError
from featurepipe.images.decode import decoding_fields


def bits_of(seed, bits):
    """A grey PNG of 16 bits with values of so many."""
    values = np.random.default_rng(seed).integers(0, 1 << bits, (32, 32)).astype(np.uint16)
    values[0, :2] = 0, 2**bits - 1
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def radiographs(album):
    """Two of 12 bits, beside one that fills 16, and one of eight."""
    for number, bits in enumerate((12, 12, 16)):
        album.write(f"{number}.png", bits_of(number, bits))
    album.add("3.png", 3)
    return album


def test_few_values_are_rejects_and_an_option_starts_a_space_that_has_them(radiographs, run):
    record = run(radiographs.root, max_rejects=2)
    assert record["counts"]["computed"] == 2
    assert record["reject_reasons"] == {"intensity": 2}
    assert all("--intensity bits=12" in reject["reason"] for reject in record["rejects"])
    assert record["settings"]["intensity"]["value"] == "declared"
    eight_bits = run.features()["3.png"]

    record = run(radiographs.root, intensity="window=0:4095", max_rejects=2)
    assert "decoding.intensity differs" in record["new_space"]
    assert record["counts"]["computed"] == 4
    np.testing.assert_array_equal(run.features(backbone=record["space"])["3.png"], eight_bits)
    followed = run(radiographs.root)
    assert (followed["space"], followed["counts"]["known"]) == (record["space"], 4)
    assert followed["settings"]["intensity"] == {"value": "window=0:4095", "why": "as in the store"}
    assert run(radiographs.root, intensity="window=0.0:4095", dry_run=True)["new_space"] is None


def test_features_are_those_of_the_scaled_pixels(radiographs, run, tmp_path):
    run(radiographs.root, intensity="bits=16", max_rejects=0)
    stored = run.features()
    for name in ("0.png", "2.png"):
        high = (np.asarray(Image.open(radiographs.root / name)) >> 8).astype(np.uint8)
        (tmp_path / "eight").mkdir(exist_ok=True)
        Image.fromarray(high).save(tmp_path / "eight" / name)
    run(tmp_path / "eight", dataset="eight")
    for name, feature in run.features("eight").items():
        np.testing.assert_allclose(feature, stored[name], rtol=1e-3, atol=1e-5)


def test_a_store_of_version_1_goes_on_and_refuses_what_it_would_darken(album, run, capsys):
    album.fill(2)
    album.write("full.png", bits_of(5, 16))
    first = run(album.root, intensity="high-byte")
    (space,) = run.store.spaces()
    assert space.fields["decoding"] == decoding_fields("high-byte")
    assert space.fields["decoding"]["sixteen_bit"] == "high-byte"
    assert "intensity" not in space.fields["decoding"]

    album.write("dark.png", bits_of(6, 12))
    album.write("full2.png", bits_of(7, 16))
    record = run(album.root, max_rejects=1, silent=False)
    assert record["space"] == first["space"]
    assert (record["counts"]["known"], record["counts"]["computed"]) == (3, 1)
    said = capsys.readouterr().err
    assert "intensity high-byte: as in the store, which is of version 1" in said
    assert "--intensity declared starts a feature space without them" in said
    (reject,) = record["rejects"]
    assert reject["id"] == "dark.png"
    assert reject["reason"].startswith("intensity: 16-bit unsigned values from 0 to 4095 fill less than a sixteenth")
    assert reject["reason"].endswith("that starts another feature space")

    record = run(album.root, intensity="declared", max_rejects=1)
    assert "decoding.sixteen_bit" in record["new_space"]
    assert record["counts"]["computed"] == 4


def test_precisions_are_compared_on_images_decoded_as_asked(album, run):
    for number in range(3):
        album.write(f"{number}.png", bits_of(number, 12))
    record = run(album.root, precision="auto", intensity="bits=12", dry_run=True)
    assert record["space"]["decoding"]["intensity"] == "bits=12"
    assert record["sampled"] == 3
    with pytest.raises(UsageError, match="unknown intensity 'twelve'; choices: declared, full, bits=N"):
        run(album.root, intensity="twelve")


def test_arrays_of_other_numbers_obey_the_same_rule(run, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (3, 32, 32)).astype(np.uint16)
    np.savez(tmp_path / "scans.npz", x=values)
    np.savez(tmp_path / "masks.npz", x=values > 2000)
    np.savez(tmp_path / "fractions.npz", x=values / 4095)
    assert run(tmp_path / "masks.npz")["counts"]["computed"] == 3
    for name, option in (("scans.npz", "bits=12"), ("fractions.npz", "window=0:1")):
        with pytest.raises(TooManyRejects, match=rf"intensity: .*--intensity {option}"):
            run(tmp_path / name)  # by the default at first, and as in the store then
        record = run(tmp_path / name, intensity=option)
        assert record["counts"]["computed"] == 3
        assert len(run.features(name.partition(".")[0], backbone=record["space"])) == 3
