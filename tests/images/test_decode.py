"""Every kind of image that section 2 of the issue names: its exact pixels, or its reason."""

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.io import ImageReadMode, decode_jpeg

from featurepipe.errors import Reject
from featurepipe.images.budgets import PIXELS
from featurepipe.images.damage import QUIET
from featurepipe.images.decode import ALPHA, DECODING, decode

CODES = {"empty", "truncated", "damaged", "budget", "intensity", "not-an-image", "bomb", "unsupported", "corrupt"}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format_, **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format_, **options)
    return buffer.getvalue()


def hwc(tensor):
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


def on_white(rgb, alpha):
    """The composite, rounded to nearest."""
    alpha = alpha[..., None].astype(int)
    return ((rgb.astype(int) * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)


RGB = noise(13, 19, 3)
GREY = noise(13, 19)


def reason(payload):
    with pytest.raises(Reject) as caught:
        decode(payload)
    return str(caught.value)


def outcome(payload):
    try:
        tensor = decode(payload)
    except Reject as reject:
        return str(reject).partition(":")[0]
    return tensor.dtype, tensor.shape[0]


@pytest.mark.parametrize(
    ("format_", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_lossless_formats_give_the_exact_pixels(format_, options):
    np.testing.assert_array_equal(hwc(decode(encoded(RGB, format_, **options))), RGB)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 98}])
def test_jpeg_equals_pillow_to_the_bit(options):
    photo = load_sample_image("china.jpg")[:101, :203]
    payload = encoded(photo, "JPEG", **options)
    np.testing.assert_array_equal(hwc(decode(payload)), np.asarray(Image.open(io.BytesIO(payload))))


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.fixed_dictionaries(
        {"quality": st.integers(1, 100), "subsampling": st.integers(0, 2), "progressive": st.booleans()},
        optional={
            "restart_marker_blocks": st.integers(1, 9),
            "icc_profile": st.just(b"a profile" * 9),
            "optimize": st.sampled_from([True]),
        },
    ),
    st.integers(0, 8),
    st.integers(0, 99),
)
def test_a_jpeg_has_the_pixels_that_other_decoders_give(size, mode, options, orientation, seed):
    rough = Image.fromarray(noise(9, 9, 3, seed=seed)).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(rough.convert(mode), "JPEG", exif=exif, **options)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(payload)))
    found = decode(payload)
    np.testing.assert_array_equal(hwc(found), np.asarray(image.convert("RGB")))
    if mode != "CMYK":
        with QUIET:
            of_torchvision = decode_jpeg(
                torch.frombuffer(bytearray(payload), dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True
            )
        assert torch.equal(found, of_torchvision)
        payload = encoded(rough.convert(mode), "JPEG", **options)
        with Image.open(io.BytesIO(payload)) as grey:
            grey.draft("L", grey.size)  # the luma channel alone
            np.testing.assert_array_equal(decode(payload, colour="grey")[0].numpy(), np.asarray(grey))


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF"])
def test_grey(format_):
    payload = encoded(GREY, format_)
    np.testing.assert_array_equal(hwc(decode(payload)), np.stack([GREY] * 3, axis=2))
    np.testing.assert_array_equal(decode(payload, colour="grey").numpy(), GREY[None])


def test_grey_jpeg():
    payload = encoded(GREY, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(payload)))
    np.testing.assert_array_equal(decode(payload, colour="grey").numpy(), expected[None])
    np.testing.assert_array_equal(hwc(decode(payload)), np.stack([expected] * 3, axis=2))


def test_colour_to_grey_is_the_601_luma():
    expected = (RGB.astype(int) @ [19595, 38470, 7471] + 0x8000) >> 16
    np.testing.assert_array_equal(decode(encoded(RGB, "PNG"), colour="grey").numpy()[0], expected)
    payload = encoded(load_sample_image("flower.jpg")[:64, :64], "JPEG", quality=95)
    luma = np.asarray(Image.open(io.BytesIO(payload)).convert("YCbCr"))[..., 0].astype(int)
    assert np.abs(decode(payload, colour="grey").numpy()[0] - luma).max() <= 2


def test_palette():
    image = Image.fromarray(noise(13, 19) % 5).convert("P")
    image.putpalette([9, 8, 7, 20, 30, 40, 1, 2, 3, 250, 251, 252, 0, 255, 0])
    expected = np.asarray(image.convert("RGB"))
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) == 5
    for format_ in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(hwc(decode(encoded(image, format_))), expected)


@pytest.mark.parametrize("transparency", [1, b"\x00\x40\xff"])
def test_palette_with_transparency_is_composited_on_white(transparency):
    indices = noise(13, 19) % 3
    image = Image.fromarray(indices).convert("P")
    image = Image.frombytes("P", (19, 13), indices.tobytes())
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    image.putpalette(palette.ravel().tolist())
    alphas = np.array([255, 0, 255]) if transparency == 1 else np.frombuffer(transparency, np.uint8)
    expected = on_white(palette[indices], alphas[indices])
    np.testing.assert_array_equal(hwc(decode(encoded(image, "PNG", transparency=transparency))), expected)


def test_rgba_is_composited_on_white():
    rgba = noise(64, 64, 4)
    expected = on_white(rgba[..., :3], rgba[..., 3])
    np.testing.assert_array_equal(hwc(decode(encoded(rgba, "PNG"))), expected)
    np.testing.assert_array_equal(hwc(decode(encoded(rgba, "TIFF"))), expected)
    np.testing.assert_array_equal(hwc(decode(rgba)), expected)
    np.testing.assert_array_equal(hwc(decode(encoded(rgba, "WEBP", lossless=True, exact=True))), expected)
    assert DECODING["alpha"] == ALPHA == "white"


def test_grey_with_alpha_is_composited_on_white():
    values, alpha = noise(13, 19, seed=1), noise(13, 19, seed=2)
    image = Image.merge("LA", [Image.fromarray(values), Image.fromarray(alpha)])
    expected = on_white(values[..., None], alpha)
    np.testing.assert_array_equal(hwc(decode(encoded(image, "PNG"))), np.repeat(expected, 3, axis=2))
    np.testing.assert_array_equal(decode(encoded(image, "PNG"), colour="grey").numpy()[0], expected[..., 0])


def test_a_transparent_colour_is_white():
    rgb = np.full((2, 2, 3), 100, np.uint8)
    rgb[0, 0] = (1, 2, 3)
    expected = rgb.copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(hwc(decode(encoded(rgb, "PNG", transparency=(1, 2, 3)))), expected)


def test_one_bit():
    image = Image.fromarray(GREY > 127)
    expected = np.where(GREY > 127, 255, 0)
    for format_ in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(encoded(image, format_), colour="grey").numpy()[0], expected)


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_the_high_byte(format_):
    values = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    expected = [[0, 0, 1], [0x12, 0xFF, 0xFF]]
    np.testing.assert_array_equal(decode(encoded(values, format_), colour="grey").numpy()[0], expected)


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_lab_is_unsupported(colour):
    with pytest.raises(Reject, match=r"^unsupported: LAB colours$"):
        decode(encoded(Image.new("LAB", (40, 40)), "TIFF"), colour=colour)


def test_a_failing_conversion_is_a_reject(monkeypatch):
    monkeypatch.setattr("featurepipe.images.decode.flattened", lambda image: image.convert("no such mode"))
    with pytest.raises(Reject, match=r"^corrupt: "):
        decode(encoded(RGB, "PNG"))


def test_sixteen_bit_colour_png_keeps_the_high_byte():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0x1234, 0x00FF, 0xFFFF, 0xABCD, 0x8000, 1)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert hwc(decode(png)).tolist() == [[[0x12, 0, 0xFF], [0xAB, 0x80, 0]]]


def test_cmyk_jpeg_goes_through_pillow():
    image = Image.fromarray(load_sample_image("china.jpg")[:40, :56]).convert("CMYK")
    payload = encoded(image, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    np.testing.assert_array_equal(hwc(decode(payload)), expected)
    assert np.abs(expected.astype(int) - np.asarray(image.convert("RGB"))).mean() < 6  # not inverted


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format_, orientation):
    image = Image.fromarray(load_sample_image("china.jpg")[:24, :40])
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(image, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {}))
    flat = Image.open(io.BytesIO(payload))
    stored = Image.open(io.BytesIO(encoded(image, format_, **({"lossless": True} if format_ == "WEBP" else {}))))
    turned = ImageOps.exif_transpose(flat)
    expected = np.asarray(turned)
    assert (stored.size == turned.size) == (orientation < 5)
    np.testing.assert_array_equal(hwc(decode(payload)), expected)


def test_animations_give_their_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for format_, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        payload = encoded(frames[0], format_, save_all=True, append_images=frames[1:], **options)
        assert decode(payload).unique().tolist() == [10], format_


def test_the_name_and_the_content_need_not_agree():
    # decode never sees a name: a PNG called x.jpg is a PNG
    np.testing.assert_array_equal(hwc(decode(encoded(RGB, "PNG"))), RGB)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_arrays_are_their_own_pixels(shape):
    array = noise(*shape)
    expected = array if array.ndim == 3 and shape[2] == 3 else np.stack([array.reshape(5, 7)] * 3, axis=2)
    tensor = decode(array)
    np.testing.assert_array_equal(hwc(tensor), expected)
    tensor += 1  # the caller owns it
    np.testing.assert_array_equal(array, noise(*shape))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (
            np.zeros((4, 4), np.float32),
            "intensity: 32-bit floating-point values from 0 to 0 have no range of their own",
        ),
        (np.zeros((4, 4), np.complex64), "unsupported: an array of complex64"),
        (np.zeros((3, 4, 4), np.uint8)[:, :, :2], "unsupported: an array of shape (3, 4, 2)"),
        (np.zeros(4, np.uint8), "unsupported: an array of shape (4,)"),
        (np.zeros((0, 4), np.uint8), "empty: 4x0 pixels"),
    ],
)
def test_other_arrays_are_rejected(array, says):
    assert reason(array).startswith(says)


def png_of_size(width, height):
    payload = bytearray(encoded(RGB, "PNG"))
    payload[16:24] = struct.pack(">II", width, height)
    payload[29:33] = struct.pack(">I", zlib.crc32(payload[12:29]))
    return bytes(payload)


def jpeg_of_size(width, height):
    payload = bytearray(encoded(RGB, "JPEG"))
    at = payload.index(b"\xff\xc0")
    payload[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(payload)


def test_decompression_bombs():
    assert PIXELS() == 178_956_970
    assert reason(png_of_size(60_000, 60_000)).startswith("bomb: 60000x60000 pixels")
    assert reason(jpeg_of_size(60_000, 60_000)).startswith("bomb: 60000x60000 pixels")
    # under our limit but over the size at which PIL warns: the missing data is what counts
    assert reason(png_of_size(10_000, 10_000)).startswith(("truncated", "corrupt"))


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "empty: 0 bytes"),
        (b"hello, I am text", "not-an-image: starts with b'hello, I'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not-an-image"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0vvc1", "unsupported: HEIF of a codec that is neither"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "unsupported: JPEG XL"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\xff\xd8\xff\xd9" + bytes(20), "corrupt: a JPEG without a frame header"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "not-an-image"),
    ],
)
def test_what_is_no_image(payload, says):
    assert reason(payload).startswith(says)


def test_twelve_bit_and_lossless_jpegs_are_unsupported():
    payload = bytearray(encoded(RGB, "JPEG"))
    at = payload.index(b"\xff\xc0")
    payload[at + 4] = 12
    assert reason(bytes(payload)).startswith("unsupported: a 12-bit JPEG of type SOF0")
    payload[at + 1], payload[at + 4] = 0xC3, 8
    assert reason(bytes(payload)).startswith("unsupported: a 8-bit JPEG of type SOF3")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_truncated_files_are_rejected_not_half_filled(format_, options, share):
    whole = encoded(noise(64, 64, 3), format_, **options)
    says = reason(whole[: int(len(whole) * share)])
    codes = ("truncated", "corrupt") if format_ == "TIFF" or share < 0.1 else ("truncated",)
    assert says.startswith(codes), says


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_one_missing_byte_is_truncation(format_):
    whole = encoded(noise(20, 20, 3), format_)
    assert reason(whole[:-5]).startswith("truncated")


def test_reasons_are_the_words_of_libjpeg_without_those_of_its_wrapper():
    photo = encoded(noise(64, 64), "JPEG")
    says = reason(photo[: len(photo) // 2])
    assert says == "truncated: libjpeg could only repair it: Corrupt JPEG data: premature end of data segment"


def test_a_truncated_cmyk_jpeg_is_rejected():
    whole = encoded(Image.fromarray(noise(40, 40, 3)).convert("CMYK"), "JPEG")
    assert reason(whole[: len(whole) // 2]).startswith("truncated")


def test_a_flipped_bit_in_a_png_is_corrupt():
    payload = bytearray(encoded(RGB, "PNG"))
    payload[payload.index(b"IDAT") + 40] ^= 1
    assert reason(bytes(payload)).startswith("corrupt")


SEEDS = [
    encoded(RGB, "JPEG"),
    encoded(RGB, "PNG"),
    encoded(RGB, "WEBP", lossless=True),
    encoded(RGB, "GIF"),
    encoded(RGB, "BMP"),
    encoded(RGB, "TIFF"),
    encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    encoded(Image.fromarray(RGB).convert("PA").convert("LA"), "PNG"),
]


@settings(max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0.1, 1),
)
def test_damage_gives_pixels_or_a_reject_and_nothing_else(seed, changes, kept):
    payload = bytearray(seed)
    for place, value in changes:
        payload[int(place * len(payload))] = value
    # Any other error, a warning included, comes through outcome and fails the test.
    assert outcome(bytes(payload[: int(kept * len(payload))])) in {*CODES, (torch.uint8, 3)}


ODD_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x09\0" + b"\x12\x01\x03\0\x63\0\0\0\xff\xff\0\0" * 2


def test_odd_metadata_neither_warns_nor_rejects():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for format_ in ("JPEG", "PNG", "WEBP"):
            assert decode(encoded(RGB, format_, exif=ODD_EXIF)).shape[0] == 3
        with pytest.raises(Reject):
            decode(encoded(RGB, "TIFF")[:60])
    assert not caught


def test_warnings_of_others_are_heard_again_afterwards():
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(SEEDS[1]) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_threads_decode_the_same_pixels():
    expected = [decode(seed) for seed in SEEDS]
    wrong = []

    def work():
        wrong.extend(i for _ in range(20) for i, seed in enumerate(SEEDS) if not torch.equal(decode(seed), expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_listing_does_not_load_torch():
    code = "import featurepipe.images, sys; sys.exit('torch' in sys.modules or 'h5py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_decoding_releases_the_interpreter_lock():
    photo = encoded(np.tile(load_sample_image("china.jpg"), (6, 6, 1)), "JPEG")
    counted = 0
    done = threading.Event()

    def work():
        decode(photo)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():  # holds the lock whenever the decoder does not
        counted += 1
    thread.join()
    assert counted > 1_000
