"""HEIC and AVIF: their pixels, their orientation, which is applied once, and what stands in for a missing decoder."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from pillow_heif import HeifFile, from_pillow, open_heif

from featurepipe import doctor
from featurepipe.errors import Reject, Unavailable
from featurepipe.images import heif
from featurepipe.images.decode import FIRST_IMAGE, decode, try_decode
from featurepipe.images.listing import ListingSummary
from featurepipe.images.open import open_source

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")

RGB = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), np.ones((16, 16, 1), np.uint8))


def heic(image=RGB, orientation=None, **options):
    """Lossless in YCbCr; the orientation is EXIF's, which pillow-heif writes as the container's turn."""
    return _saved(from_pillow(Image.fromarray(image)).save, orientation, quality=-1, chroma=444, **options)


def avif(image=RGB, orientation=None, **options):
    """Pillow writes EXIF's orientation as the container's turn, too."""
    return _saved(Image.fromarray(image).save, orientation, format="AVIF", quality=100, subsampling="4:4:4", **options)


def _saved(save, orientation, **options):
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    save(buffer, **options)
    return buffer.getvalue()


def distance(payload, expected):
    return np.abs(decode(payload).permute(1, 2, 0).numpy().astype(int) - expected).max()


@pytest.mark.parametrize("make", [heic, avif])
def test_pixels_and_greys(make):
    assert distance(make(), RGB) <= 4  # YCbCr in eight bits is not exact
    expected = np.asarray(Image.fromarray(RGB).convert("L")).astype(int)
    assert np.abs(decode(make(), colour="grey").numpy()[0] - expected).max() <= 4


@pytest.mark.parametrize("make", [heic, avif])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turn_is_applied_once(make, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = Image.fromarray(RGB)
    tagged.info["exif"] = exif.tobytes()
    assert distance(make(orientation=orientation), np.asarray(ImageOps.exif_transpose(tagged))) <= 4


@pytest.mark.parametrize("make", [heic, avif])
def test_transparency_is_composited_on_white(make):
    alpha = np.kron([[255, 0, 255], [0, 255, 0]], np.ones((32, 32))).astype(np.uint8)
    expected = np.where(alpha[..., None] == 255, RGB, 255)
    assert distance(make(np.dstack([RGB, alpha])), expected) <= 6


def several_heic(primary):
    images = [Image.fromarray(RGB // n) for n in (1, 2, 4)]
    found = from_pillow(images[0])
    for image in images[1:]:
        found.add_from_pillow(image)
    buffer = io.BytesIO()
    found.save(buffer, quality=-1, chroma=444, primary_index=primary)
    return buffer.getvalue()


@pytest.mark.parametrize("primary", [0, 2])
def test_of_several_images_the_primary_is_taken_and_that_is_told(primary):
    told = []
    assert distance(several_heic(primary), RGB // (1, 2, 4)[primary]) <= 4
    decode(several_heic(primary), on_remark=told.append)
    assert told == [FIRST_IMAGE]
    decode(heic(), on_remark=told.append)
    assert told == [FIRST_IMAGE]


@pytest.mark.parametrize("format_", ["AVIF", "GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_taken_and_that_is_told(format_):
    buffer = io.BytesIO()
    others = [Image.fromarray(RGB // 2), Image.fromarray(RGB // 3)]
    Image.fromarray(RGB).save(buffer, format_, save_all=True, append_images=others)
    one, told = io.BytesIO(), []
    Image.fromarray(RGB).save(one, format_)
    decode(one.getvalue(), on_remark=told.append)
    assert told == []
    decode(buffer.getvalue(), on_remark=told.append)
    assert told == [FIRST_IMAGE]
    found = try_decode(buffer.getvalue(), colour="rgb")
    assert (found.damage, found.remarks, found.pixels.shape) == ("", (FIRST_IMAGE,), (3, 64, 96))


def test_ten_bits_become_their_upper_eight():
    ramp = np.linspace(0, 1023, 64 * 64).astype(np.uint16).reshape(64, 64)
    values = np.stack([ramp] * 3, axis=-1) << 6  # of 16 bits, as the library takes them
    file, buffer = HeifFile(), io.BytesIO()
    file.add_frombytes("RGB;16", (64, 64), values.tobytes())
    file.save(buffer, quality=-1, chroma=444)
    assert open_heif(io.BytesIO(buffer.getvalue()), convert_hdr_to_8bit=False).info["bit_depth"] > 8
    assert distance(buffer.getvalue(), np.stack([ramp >> 2] * 3, axis=-1).astype(int)) <= 2


@pytest.mark.parametrize("make", [heic, avif])
def test_every_cut_is_a_reject(make):
    payload = make()
    for end in (*range(1, len(payload), max(1, len(payload) // 40)), len(payload) - 1):
        found = try_decode(payload[:end], colour="rgb")
        assert isinstance(found, Reject), end
        assert str(found).partition(":")[0] in {"truncated", "corrupt", "not-an-image", "unsupported"}, (
            end,
            str(found),
        )


@pytest.mark.parametrize("make", [heic, avif])
def test_changed_bytes_never_crash(make):
    payload, rng, codes = make(), np.random.default_rng(0), set()
    for _ in range(60):
        mutant = bytearray(payload)
        for at in rng.integers(0, len(payload), 3):
            mutant[at] = rng.integers(256)
        found = try_decode(bytes(mutant), colour="grey")
        codes.add(str(found).partition(":")[0] if isinstance(found, Reject) else "ok")
    assert codes <= {"ok", "truncated", "corrupt", "not-an-image", "unsupported", "bomb"}, codes


@pytest.mark.parametrize("make", [heic, avif])
def test_a_bomb_is_refused_by_its_header(make, monkeypatch):
    monkeypatch.setenv("FEATUREPIPE_MAX_PIXELS", "1000")
    with pytest.raises(Reject, match="bomb: 96x64 pixels"):
        decode(make())


def test_files_are_listed_by_their_suffixes_and_known_by_their_content(tmp_path):
    for name, payload in {"a.heic": heic(), "b.HEIF": heic(), "c.avif": avif(), "d.jpg": heic()}.items():
        (tmp_path / name).write_bytes(payload)
    source = open_source(str(tmp_path))
    listing = source.scan()
    assert listing["id"].to_pylist() == ["a.heic", "b.HEIF", "c.avif", "d.jpg"]
    for locator in listing["locator"].to_pylist():
        assert distance(source.read(locator), RGB) <= 4


def test_missing_decoders_are_said_once_and_wait_for_the_next_run(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(heic())
    (tmp_path / "b.avif").write_bytes(avif())
    listing, payloads = open_source(str(tmp_path)).scan(), (heic(), avif())
    assert "HEIC, AVIF, DICOM" in doctor.decoders().found
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    monkeypatch.setattr(features, "check", lambda name: False)
    assert heif.heic_reader() is heif.avif_reader() is None
    found = [try_decode(payload, colour="rgb") for payload in payloads]
    assert all(isinstance(reject, Unavailable) for reject in found)
    assert str(found[0]) == "unsupported: HEIC without pillow-heif; pip install featurepipe[heif]"
    assert str(found[1]).startswith("unsupported: AVIF, which this Pillow lacks; pip install --upgrade pillow")
    first, second = ListingSummary.of(listing).undecodable
    assert first == "1 HEIC file cannot be decoded here: pip install featurepipe[heif]"
    assert second.startswith("1 AVIF file cannot be decoded here: pip install --upgrade pillow")
    assert "(no HEIC: pip install featurepipe[heif]; no AVIF: " in doctor.decoders().found
