"""JPEGs that libjpeg warns about: those that lost pixels are rejects or kept on request, all others are what they always were."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from featurepipe.errors import Reject
from featurepipe.images.damage import STRAY_BYTES, STRAY_PROGRESSIVE, count_scans, read_jpeg_header, segments
from featurepipe.images.decode import REPAIRED, decode, try_decode

PHOTOS = [photo[:240, :320] for photo in load_sample_images().images]
KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "444": {"subsampling": 0, "quality": 95},
    "restarts": {"restart_marker_blocks": 16},
}
SOS, EOI = 0xDA, 0xD9


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def before(payload, marker, stray, which=0):
    """The JPEG with bytes put in before a marker."""
    at = [segment.start for segment in segments(payload) if segment.marker == marker][which]
    return payload[:at] + stray + payload[at:]


def damaged(payload, kind, rng):
    start = next(segment.start for segment in segments(payload) if segment.marker == SOS) + 20
    at = int(rng.integers(start, len(payload) - 200))
    tail = payload[at:-2]
    return {
        "zeroed tail": payload[:at] + bytes(len(tail)) + payload[-2:],
        "tail of noise": payload[:at] + rng.integers(0, 255, len(tail), np.uint8).tobytes() + payload[-2:],
        "cut": payload[:at],
        "cut and ended": payload[:at] + b"\xff\xd9",
    }[kind]


@pytest.mark.parametrize("colour", ["rgb", "grey"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (101, 203)])
def test_the_pixels_are_those_of_libjpegs_slow_integer_transform(kind, colour, size):
    """As PIL decodes: 4:2:0, 4:4:4, progressive, of grey and of colour."""
    for pixels in (PHOTOS[0][: size[0], : size[1]], PHOTOS[1][: size[0], : size[1], 0]):
        payload = jpeg(pixels, **KINDS[kind])
        image = Image.open(io.BytesIO(payload))
        if colour == "grey" and image.mode == "RGB":
            image.draft("L", None)  # the luma channel as it is stored
        expected = np.asarray(image.convert("RGB" if colour == "rgb" else "L"))
        found = decode(payload, colour=colour).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_we_turn_as_exif_says(order, orientation):
    sign, mark = {"little": ("<", b"II"), "big": (">", b"MM")}[order]
    tiff = mark + struct.pack(f"{sign}HI", 42, 8)
    tiff += struct.pack(f"{sign}HHHIHHHHIHHI", 2, 0x010F, 2, 2, 65, 0, 0x0112, 3, 1, orientation, 0, 0)
    payload = jpeg(PHOTOS[0][:30, :50], exif=b"Exif\0\0" + tiff)
    assert read_jpeg_header(payload).orientation == orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))))
    np.testing.assert_array_equal(decode(payload).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("damage", ["zeroed tail", "tail of noise", "cut", "cut and ended"])
@pytest.mark.parametrize("kind", ["baseline", "444", "restarts"])
def test_lost_pixels_are_a_reject_and_kept_on_request(kind, damage):
    rng = np.random.default_rng(3)
    for trial in range(8):
        payload = damaged(jpeg(PHOTOS[trial % 2], **KINDS[kind]), damage, rng)
        with pytest.raises(Reject, match=rf"^(truncated|damaged): {REPAIRED}: ") as caught:
            decode(payload)
        told = []
        assert decode(payload, on_damage=told.append).shape == (3, 240, 320)
        assert told == [str(caught.value)]


@pytest.mark.parametrize("damage", ["zeroed tail", "tail of noise", "cut"])
def test_most_damage_of_progressive_files_is_found(damage):
    """A few bytes lost in a late scan may decode without any warning; or the scans after it may be unreadable altogether."""
    rng, found = np.random.default_rng(4), 0
    for trial in range(12):
        try:
            decode(damaged(jpeg(PHOTOS[trial % 2], progressive=True), damage, rng), on_damage=None)
        except Reject:
            found += 1
    assert found == 12


@pytest.mark.parametrize(
    "stray", [b"\0", b"\0\0\0\0", b"\x12\x34", bytes(2000), b"\xaa" * 512, bytes(range(1, STRAY_PROGRESSIVE + 1))]
)
@pytest.mark.parametrize("kind", ["baseline", "progressive", "444", "restarts"])
def test_padding_before_the_end_costs_no_pixels(kind, stray):
    payload = jpeg(PHOTOS[0], **KINDS[kind])
    told = []
    assert torch.equal(decode(before(payload, EOI, stray)), decode(payload))
    assert torch.equal(decode(before(payload, EOI, stray), on_damage=told.append), decode(payload))
    assert told == []


def test_how_many_bytes_are_few():
    payload = jpeg(PHOTOS[0])
    assert torch.equal(decode(before(payload, EOI, bytes(range(1, STRAY_BYTES + 1)))), decode(payload))
    with pytest.raises(Reject, match=r"^damaged: .* extraneous bytes before marker"):
        decode(before(payload, EOI, bytes(range(1, 40))))


@pytest.mark.parametrize("marker", [0xDB, 0xC0, 0xC4, SOS])
def test_stray_bytes_in_the_header_cost_no_pixels(marker):
    payload = jpeg(PHOTOS[1])
    assert torch.equal(decode(before(payload, marker, b"\0\x01\x02junk" * 9)), decode(payload))


def test_several_harmless_causes_in_one_file():
    payload = jpeg(PHOTOS[1], progressive=True)
    odd = payload
    for which in range(1, 4):
        odd = before(odd, SOS, bytes(which), which)
    odd = before(before(odd, 0xDB, b"ab"), EOI, b"\0\0")
    assert torch.equal(decode(odd), decode(payload))


def test_a_harmless_cause_does_not_hide_a_damage():
    """libjpeg tells its first warning only."""
    payload = jpeg(PHOTOS[0])
    half = payload[: len(payload) // 2] + bytes(len(payload) // 2) + payload[-2:]
    with pytest.raises(Reject, match=r"^(truncated|damaged): "):
        decode(before(half, 0xDB, b"stray"))


def test_versions_of_metadata_that_libjpeg_does_not_know_cost_no_pixels():
    payload = jpeg(PHOTOS[0])
    at = payload.index(b"JFIF\0") + 5
    assert torch.equal(decode(payload[:at] + b"\x07\x09" + payload[at + 2 :]), decode(payload))
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 77)
    assert torch.equal(decode(before(payload, 0xDB, adobe)), decode(payload))


def test_only_the_end_marker_is_lacking():
    payload = jpeg(PHOTOS[0])
    assert torch.equal(decode(payload[:-2]), decode(payload))
    with pytest.raises(Reject, match=r"^truncated: "):
        decode(payload[:-3])
    with pytest.raises(Reject, match=r"^truncated: "):  # of several scans, some may be lacking
        decode(jpeg(PHOTOS[0], progressive=True)[:-2])


def test_bytes_after_the_end_are_none_of_ours():
    payload = jpeg(PHOTOS[0])
    assert torch.equal(decode(payload + b"\0" * 100), decode(payload))
    assert torch.equal(decode(payload + jpeg(PHOTOS[1])[:1000]), decode(payload))  # as phones append a film


def test_a_damaged_cmyk_jpeg_is_found_too():
    payload = jpeg(Image.fromarray(PHOTOS[0]).convert("CMYK"))
    assert decode(payload).shape == (3, 240, 320)
    third = len(payload) // 3
    with pytest.raises(Reject, match=f"{REPAIRED}: "):
        decode(payload[:third] + bytes(len(payload) - third - 2) + payload[-2:])


def test_samplings_that_turbojpeg_does_not_name_are_decoded():
    payload = bytearray(jpeg(PHOTOS[0][:64, :64], subsampling=0))
    payload[payload.index(b"\xff\xc0") + 11] = 0x42  # 4 x 2
    expected = np.asarray(Image.open(io.BytesIO(bytes(payload))).convert("RGB"))
    np.testing.assert_array_equal(decode(bytes(payload), on_damage=lambda _: None).permute(1, 2, 0).numpy(), expected)


def test_scans_are_counted_where_they_are():
    payload = jpeg(PHOTOS[0], progressive=True)
    true = payload.count(b"\xff\xda")
    assert count_scans(payload, true) <= true
    assert count_scans(payload, 3) == 4
    metadata = b"\xff\xe1" + struct.pack(">H", 2 + 2 * 500) + b"\xff\xda" * 500
    assert read_jpeg_header(payload).several_scans
    assert not read_jpeg_header(jpeg(PHOTOS[0])).several_scans
    assert count_scans(before(payload, 0xDB, metadata), 20) <= 20


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_to_standard_error(kind, capfd):
    payload = jpeg(PHOTOS[0], **KINDS[kind])
    rng = np.random.default_rng(5)
    for damage in ("zeroed tail", "tail of noise", "cut"):
        decode(before(payload, EOI, b"ab"))
        try:
            decode(damaged(payload, damage, rng), on_damage=lambda _: None)
        except Reject:
            continue
    assert capfd.readouterr() == ("", "")


def test_what_pil_logs_is_not_written_to_standard_error(monkeypatch, capfd):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as where nobody has set up logging
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "TIFF")
    samples = struct.pack("<HHI", 277, 3, 1)
    assert samples in picture.getvalue()
    found = try_decode(picture.getvalue().replace(samples + b"\3\0", samples + b"\3\x82"), colour="rgb")
    assert isinstance(found, Reject)
    assert capfd.readouterr() == ("", "")


def test_every_changed_byte_of_a_png_is_found():
    buffer = io.BytesIO()
    Image.fromarray(PHOTOS[0][:40, :40]).save(buffer, "PNG")
    payload = buffer.getvalue()
    start = payload.index(b"IDAT") + 4
    end = payload.index(b"IEND") - 8
    for at in [*np.linspace(start, end - 1, 60).astype(int).tolist(), end - 1, end - 2, end - 5]:
        with pytest.raises(Reject, match=r"^(corrupt|truncated): "):
            decode(payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :])


def test_pixels_that_libjpeg_never_wrote_are_not_kept():
    """It counts an error after a warning as a warning, and leaves the memory as it found it."""
    payload = bytearray(jpeg(PHOTOS[0], progressive=True))
    first, second = [segment for segment in segments(bytes(payload)) if segment.marker == SOS][:2]
    payload[first.start + 100 : first.end - 40] = bytes(first.end - first.start - 140)
    payload[second.start + 2 : second.start + 4] = bytes(2)  # its length
    with pytest.raises(Reject, match=r"^corrupt: libjpeg cannot decode it: Bogus marker length$"):
        decode(bytes(payload), on_damage=lambda _: None)
