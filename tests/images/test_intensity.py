"""Images of more than eight bits: what their files declare is used, what nothing declares is refused, and options decide."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featurepipe.errors import Reject, UsageError
from featurepipe.images import MemorySource
from featurepipe.images.decode import DECODING, decode, decoding_fields
from featurepipe.images.intensity import CHOICES, DECLARED, HIGH_BYTE, intensity_of, parse_intensity

BYTE, SHORT, LONG, FLOAT = 1, 3, 4, 11
_CODES = {BYTE: "B", SHORT: "H", LONG: "I", FLOAT: "f", 8: "h"}


def png(values, *, sbit=None, trns=None, interlaced=False):
    """A PNG of 16 bits; (H, W) grey, and (H, W, C) grey and alpha, RGB or RGBA."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]  # Adam7
    passes = [values[top::down, left::right] for top, left, down, right in steps] if interlaced else [values]
    rows = [row for part in passes if part.size for row in part]
    data = b"".join(b"\0" + np.ascontiguousarray(row).astype(">u2").tobytes() for row in rows)
    extra = chunk(b"sBIT", bytes(sbit)) if sbit else b""
    extra += chunk(b"tRNS", struct.pack(f">{len(trns)}H", *trns)) if trns else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def tiff(values, *, order="<", photometric=1, bits=None, packed=None, deflate=False, planar=False, tags=None):
    """A TIFF of one strip, of any NumPy numbers (H, W) or (H, W, C); ``packed`` are its bytes if bits are packed."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    stored = np.moveaxis(values, 2, 0) if planar else values
    data = stored.astype(values.dtype.newbyteorder(order)).tobytes() if packed is None else packed
    data = zlib.compress(data) if deflate else data
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {
        256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits or 8 * values.itemsize] * samples),
        259: (SHORT, [8 if deflate else 1]), 262: (SHORT, [photometric]), 273: (LONG, [8]), 277: (SHORT, [samples]),
        278: (LONG, [height]), 279: (LONG, [len(data)]), 284: (SHORT, [2 if planar else 1]), 339: (SHORT, [kind] * samples),
        **(tags or {}),
    }  # fmt: skip
    if planar:
        size = len(data) // samples
        entries[273] = (LONG, [8 + size * place for place in range(samples)])
        entries[279] = (LONG, [size] * samples)
    start = 8 + len(data) + 2 + 12 * len(entries) + 4
    directory, beyond = struct.pack(order + "H", len(entries)), b""
    for tag, (type_, numbers) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(numbers)}{_CODES[type_]}", *numbers)
        if len(value) > 4:
            value, beyond = struct.pack(order + "I", start + len(beyond)), beyond + value
        directory += struct.pack(order + "HHI", tag, type_, len(numbers)) + value.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(data)) + data + directory + bytes(4) + beyond


FULL = np.random.default_rng(0).integers(0, 1 << 16, (9, 11), dtype=np.uint16)  # of all values of 16 bits
TWELVE = FULL >> 4
S_MIN, S_MAX, MAX = 340, 341, 281


def grey(payload, intensity="declared"):
    return decode(payload, colour="grey", intensity=parse_intensity(intensity)).numpy()[0]


def rgb(payload, intensity="declared"):
    return decode(payload, intensity=parse_intensity(intensity)).permute(1, 2, 0).numpy()


def reason(payload, intensity="declared"):
    with pytest.raises(Reject) as caught:
        grey(payload, intensity)
    return str(caught.value)


def linear(values, low, high):
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def three(values):
    return np.stack([values, values[::-1], values[:, ::-1]], axis=2)


# What files declare


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_that_fill_their_range_keep_the_high_byte(order):
    for payload in (
        png(FULL),
        png(FULL, interlaced=True),
        tiff(FULL, order=order),
        tiff(FULL, order=order, deflate=True),
        FULL,
    ):
        np.testing.assert_array_equal(grey(payload), FULL >> 8)
        np.testing.assert_array_equal(grey(payload, "full"), FULL >> 8)
    np.testing.assert_array_equal(grey(FULL.astype(order + "u2")), FULL >> 8)


@pytest.mark.parametrize("deflate", [False, True])
def test_the_least_value_is_white_where_a_tiff_says_so(deflate):
    np.testing.assert_array_equal(grey(tiff(FULL, photometric=0, deflate=deflate)), 255 - (FULL >> 8))
    fractions = (FULL / 65535).astype(np.float32)
    range_ = {S_MIN: (FLOAT, [0]), S_MAX: (FLOAT, [1])}
    for order in "<>":
        payload = tiff(fractions, order=order, photometric=0, deflate=deflate, tags=range_)
        np.testing.assert_array_equal(grey(payload), 255 - linear(fractions, 0, 1))
    for values, option in ((TWELVE, "bits=12"), (FULL, "full")):
        seen = grey(tiff(values, photometric=0, deflate=deflate), option)
        np.testing.assert_array_equal(seen, 255 - (FULL >> 8))
    eight = (FULL >> 8).astype(np.uint8)
    np.testing.assert_array_equal(grey(tiff(eight, photometric=0, deflate=deflate)), 255 - eight)
    bits = np.array([[0, 3, 15, 8]], np.uint8)
    packed = tiff(bits, photometric=0, bits=4, packed=bytes([0x03, 0xF8]), deflate=deflate)
    np.testing.assert_array_equal(grey(packed), 255 - bits * 17)
    assert grey(tiff(bits, photometric=0, bits=1, packed=bytes([0b01000000]), deflate=deflate)).tolist() == [
        [255, 0, 255, 255]
    ]


def test_twelve_bits_of_a_tiff_are_its_range():
    values = np.array([[4095, 1, 0x123, 0x800]], np.uint16)
    packed = bytes.fromhex("fff001123800")
    assert grey(tiff(values, bits=12, packed=packed)).tolist() == [[255, 0, 0x12, 0x80]]


@pytest.mark.parametrize(
    ("tags", "low", "high"),
    [
        ({S_MAX: (SHORT, [4095])}, None, 12),
        ({S_MIN: (SHORT, [0]), S_MAX: (SHORT, [4095])}, None, 12),
        ({S_MIN: (SHORT, [100]), S_MAX: (SHORT, [5000])}, 100, 5000),
        ({S_MAX: (SHORT, [30000])}, 0, 30000),
        ({MAX: (SHORT, [4095])}, None, 12),
    ],
)
def test_a_tiff_declares_its_black_and_white(tags, low, high):
    values = np.clip(TWELVE, 100, None)
    expected = values >> 4 if low is None else linear(values, low, high)
    np.testing.assert_array_equal(grey(tiff(values, tags=tags)), expected)
    np.testing.assert_array_equal(
        grey(tiff(values, tags=tags), "bits=12"), values >> 4
    )  # a user's word is the last one
    tripled = {tag: (type_, numbers * 3) for tag, (type_, numbers) in tags.items()}
    colours = tiff(three(values), photometric=2, tags=tripled)
    np.testing.assert_array_equal(rgb(colours), three(expected))


@pytest.mark.parametrize(
    "tags",
    [
        {S_MAX: (SHORT, [65535])},  # what any 16 bits go to
        {MAX: (SHORT, [3977])},  # the greatest value of this image, a statistic
        {S_MIN: (SHORT, [7]), S_MAX: (SHORT, [7])},
        {S_MIN: (FLOAT, [0]), S_MAX: (FLOAT, [np.nan])},
        {S_MIN: (BYTE, [0])},
    ],
)
def test_tags_that_declare_nothing(tags):
    assert "fill less than a sixteenth of their range" in reason(tiff(TWELVE, tags=tags))
    np.testing.assert_array_equal(grey(tiff(FULL, tags={**tags, MAX: (SHORT, [65535])})), FULL >> 8)


def test_values_beyond_what_is_declared_are_refused():
    said = reason(tiff(TWELVE, tags={S_MAX: (SHORT, [1000])}))
    assert said.startswith(
        "intensity: the file declares black to be 0 and white 1000, and the 16-bit unsigned values go from"
    )
    assert "--intensity window=LO:HI" in said


def test_significant_bits_of_a_png_at_the_bottom_and_on_top():
    np.testing.assert_array_equal(grey(png(TWELVE, sbit=[12])), TWELVE >> 4)
    np.testing.assert_array_equal(grey(png(TWELVE << 4, sbit=[12])), TWELVE >> 4)
    repeated = np.rint(TWELVE * (65535 / 4095)).astype(np.uint16)
    np.testing.assert_array_equal(grey(png(repeated, sbit=[12])), repeated >> 8)
    np.testing.assert_array_equal(rgb(png(three(TWELVE), sbit=[12] * 3)), three(TWELVE >> 4))
    dark = TWELVE >> 4 << 4
    assert "12 significant bits (sBIT) may be the upper or the lower ones" in reason(png(dark, sbit=[12]))
    assert "fill less than a sixteenth" in reason(png(TWELVE, sbit=[16]))
    assert not grey(png(TWELVE * 0, sbit=[12])).any()


# What nothing declares


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_few_values_of_sixteen_bits_are_refused_and_the_option_is_named(bits):
    values = FULL >> (16 - bits)
    values[0, 0] = 2**bits - 1
    alpha = np.dstack([values, np.full_like(values, 65535)])
    colours = three(values)
    payloads = [
        png(values),
        tiff(values),
        tiff(values, order=">"),
        values,
        values[..., None],
        png(colours),
        colours,
        png(alpha),
    ]
    payloads += [tiff(colours, photometric=2, deflate=deflate) for deflate in (False, True)]
    for payload in payloads:
        said = reason(payload)
        assert said.startswith(
            f"intensity: 16-bit unsigned values from {values.min()} to {2**bits - 1} fill less than a sixteenth"
        )
        assert f"--intensity bits={bits}, or window=LO:HI, minmax, full (intensity= in Python)" in said
    for payload in (png(values), tiff(values, order=">"), values, png(alpha)):
        np.testing.assert_array_equal(grey(payload, f"bits={bits}"), values >> (bits - 8))
        np.testing.assert_array_equal(grey(payload, "full"), values >> 8)
        np.testing.assert_array_equal(grey(payload, "window=21:220"), linear(values, 21, 220))
        np.testing.assert_array_equal(grey(payload, "minmax"), linear(values, values.min(), values.max()))
    for payload in (
        png(colours),
        tiff(colours, photometric=2, deflate=True),
        tiff(colours, order=">", photometric=2),
        colours,
    ):
        np.testing.assert_array_equal(rgb(payload, f"bits={bits}"), colours >> (bits - 8))


def test_a_narrow_band_of_bright_values_is_refused_too():
    assert "16-bit unsigned values from 40000 to 44095 fill" in reason(png(np.array([[40000, 44095]], np.uint16)))
    assert grey(png(np.array([[40000, 44096]], np.uint16))).tolist() == [[156, 172]]


@pytest.mark.parametrize(("value", "seen"), [(0, 0), (4096, 16), (65535, 255)])
def test_an_image_of_one_value_that_is_the_same_in_any_range(value, seen):
    assert grey(png(np.full((3, 4), value, np.uint16))).tolist() == [[seen] * 4] * 3


def test_an_image_of_one_small_value_is_refused_and_minmax_makes_it_black():
    flat = np.full((3, 4), 300, np.uint16)
    assert "values from 300 to 300 fill less" in reason(flat)
    assert not grey(flat, "minmax").any()
    assert (grey(tiff(flat, photometric=0), "minmax") == 255).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_signed_and_floating_point_values_have_no_black_of_their_own(order, deflate):
    hounsfield = TWELVE.astype(np.int16) - 1024
    for values in (hounsfield, hounsfield.astype(np.int32), hounsfield.astype(np.float32)):
        payload = tiff(values, order=order, deflate=deflate)
        assert f"--intensity window={values.min():g}:{values.max():g}" in reason(payload)
        np.testing.assert_array_equal(grey(payload, "window=-160:240"), linear(hounsfield, -160, 240))
        np.testing.assert_array_equal(grey(payload, "minmax"), linear(values, values.min(), values.max()))
        declared = {S_MIN: (FLOAT, [-1024]), S_MAX: (FLOAT, [3071])}
        np.testing.assert_array_equal(
            grey(tiff(values, order=order, deflate=deflate, tags=declared)), linear(values, -1024, 3071)
        )
        assert "means 0 to 4095" in reason(payload, "bits=12")
    signed = (FULL.astype(np.int32) - 32768).astype(np.int16)
    np.testing.assert_array_equal(grey(tiff(signed, order=order, deflate=deflate), "full"), FULL >> 8)


def test_signed_bytes_are_not_taken_for_unsigned_ones():
    values = np.array([[-128, -1, 0, 127]], np.int8)
    assert "8-bit signed values from -128 to 127" in reason(tiff(values))
    assert grey(tiff(values), "full").tolist() == [[0, 127, 128, 255]]
    assert grey(values, "full").tolist() == [[0, 127, 128, 255]]


def test_thirty_two_bits():
    wide = FULL.astype(np.uint32) * 65537
    np.testing.assert_array_equal(grey(tiff(wide)), FULL >> 8)
    narrow = FULL.astype(np.uint32)
    for payload in (tiff(narrow), narrow, narrow.astype(np.uint64)):
        assert "fill less than a sixteenth" in reason(payload)
        np.testing.assert_array_equal(grey(payload, "bits=16"), FULL >> 8)
    np.testing.assert_array_equal(grey(narrow.astype(np.int64), "bits=16"), FULL >> 8)


# Arrays


def test_an_array_of_fractions_is_told_how_to_become_pixels():
    fractions = FULL / 65535
    for dtype in (np.float16, np.float32, np.float64):
        assert "(255 * image).astype('uint8')" in reason(fractions.astype(dtype))
        for option in ("full", "window=0:1"):
            np.testing.assert_array_equal(grey(fractions.astype(dtype), option), linear(fractions.astype(dtype), 0, 1))
    assert "full means 0 to 1" in reason(fractions * 2, "full")
    assert "no finite numbers" in reason(np.array([[0.5, np.nan]]), "minmax")


def test_bools_are_black_and_white():
    mask = FULL > 30000
    np.testing.assert_array_equal(grey(mask), mask * 255)


def test_bytes_keep_their_values_whatever_the_option():
    eight = (TWELVE >> 4).astype(np.uint8) // 32
    buffer = io.BytesIO()
    Image.fromarray(eight).save(buffer, "PNG")
    for option in ("declared", "full", "bits=12", "window=-5:4", "minmax", "high-byte"):
        np.testing.assert_array_equal(grey(eight, option), eight)
        np.testing.assert_array_equal(grey(buffer.getvalue(), option), eight)


# Transparency, colours, and what PIL misreads


def test_sixteen_bit_transparency_is_composited_on_white():
    alpha = np.full_like(FULL, 65535)
    alpha[0] = 0
    for values, option in ((FULL, "declared"), (TWELVE, "bits=12")):
        expected = three(FULL >> 8)
        expected[0] = 255
        np.testing.assert_array_equal(rgb(png(np.dstack([three(values), alpha])), option), expected)
        np.testing.assert_array_equal(rgb(np.dstack([three(values), alpha]), option), expected)
        grey_ = np.where(alpha == 0, 255, FULL >> 8)
        np.testing.assert_array_equal(grey(png(np.dstack([values, alpha])), option), grey_)
    assert "the opacity of a 16-bit unsigned image goes to 255 only" in reason(np.dstack([three(FULL), alpha >> 8]))


def test_a_value_that_stands_for_transparency_is_white():
    values = FULL.copy()
    values[2, 3] = 300
    assert grey(png(values, trns=[300]))[2, 3] == 255
    assert grey(png(values, trns=[300]), "full")[2, 3] == 255
    assert grey(png(values))[2, 3] == 1
    colours = three(values)
    colours[1, 1] = 300, 301, 302
    assert rgb(png(colours, trns=[300, 301, 302]))[1, 1].tolist() == [255] * 3


def test_cmyk_of_sixteen_bits():
    inks = np.dstack([three(FULL), FULL // 2])
    expected = np.asarray(Image.frombytes("CMYK", (11, 9), (inks >> 8).astype(np.uint8).tobytes()).convert("RGB"))
    for order in "<>":
        np.testing.assert_array_equal(rgb(tiff(inks, order=order, photometric=5)), expected)
    np.testing.assert_array_equal(rgb(tiff(inks >> 4, photometric=5), "bits=12"), expected)


def test_layouts_that_pil_misreads_or_does_not_read_are_named():
    assert "in planes of their own" in reason(tiff(three(FULL), photometric=2, planar=True))
    np.testing.assert_array_equal(
        rgb(tiff((three(FULL) >> 8).astype(np.uint8), photometric=2, planar=True)), three(FULL >> 8)
    )
    said = reason(tiff(FULL, order=">", photometric=0))
    assert said.startswith("unsupported: a big-endian TIFF with 1 sample of 16 bits for each pixel, MinIsWhite")
    assert "1 sample of 64 floating-point bits" in reason(tiff(FULL.astype(np.float64)))
    assert "3 samples of 32 floating-point bits for each pixel, RGB" in reason(
        tiff(three(FULL).astype(np.float32), photometric=2)
    )
    premultiplied = tiff(np.dstack([three(FULL), FULL]), photometric=2, tags={338: (SHORT, [1])})
    assert "multiplied by their opacity" in reason(premultiplied)


def test_orientation_is_applied_to_scaled_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(TWELVE).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(grey(buffer.getvalue(), "bits=12"), np.rot90(TWELVE >> 4, -1))
    turned = tiff(TWELVE, tags={274: (SHORT, [6]), S_MAX: (SHORT, [4095])})
    np.testing.assert_array_equal(grey(turned), np.rot90(TWELVE >> 4, -1))


# PIL images


def seen_of(image, intensity="declared"):
    source = MemorySource([image])
    return grey(source.read(source.scan()["locator"][0].as_py()), intensity)


def test_pil_images_obey_the_same_rule():
    np.testing.assert_array_equal(seen_of(Image.fromarray(FULL)), FULL >> 8)
    for image in (
        Image.fromarray(TWELVE),
        Image.fromarray(TWELVE.astype(np.int32)),
        Image.fromarray(TWELVE.astype(np.float32)),
    ):
        with pytest.raises(Reject, match=r"^intensity: .* --intensity (bits=12|window=\d+:\d+)"):
            seen_of(image)
        np.testing.assert_allclose(seen_of(image, "bits=12").astype(int), TWELVE >> 4, atol=1)
    np.testing.assert_array_equal(seen_of(Image.open(io.BytesIO(tiff(FULL, photometric=0)))), 255 - (FULL >> 8))
    np.testing.assert_array_equal(
        seen_of(Image.open(io.BytesIO(tiff(TWELVE, tags={S_MAX: (SHORT, [4095])})))), TWELVE >> 4
    )
    np.testing.assert_array_equal(seen_of(Image.open(io.BytesIO(png(np.dstack([FULL] * 3))))), FULL >> 8)
    with pytest.raises(Reject, match=r"^intensity: 16-bit colours .* give the file's path or bytes"):
        seen_of(Image.open(io.BytesIO(png(three(TWELVE)))))


# Version 1, and the option itself


def test_a_space_of_version_1_gives_what_it_gave_or_refuses():
    for payload in (png(FULL), tiff(FULL), png(three(FULL)), FULL, png(FULL, sbit=[16])):
        np.testing.assert_array_equal(rgb(payload, "high-byte"), rgb(payload))
    wrong = [
        tiff(FULL, photometric=0), png(TWELVE), png(three(TWELVE)), png(TWELVE, sbit=[12]),
        tiff(FULL, tags={S_MAX: (FLOAT, [70000])}),
        tiff(FULL.astype(np.float32), tags={S_MIN: (FLOAT, [0]), S_MAX: (FLOAT, [65535])}), tiff(FULL.astype(np.uint32)),
        tiff(FULL.astype(np.int16)), png(FULL, trns=[int(FULL[0, 0])]), png(three(FULL), trns=three(FULL)[0, 0].tolist()),
    ]  # fmt: skip
    for payload in wrong:
        assert "--intensity" in reason(payload, "high-byte")
        assert "another" in reason(payload, "high-byte")


def test_decoding_of_a_feature_space_holds_the_intensity():
    assert DECODING["icc"] == "ignored"
    for text in ("declared", "full", "bits=12", "window=-160:240", "minmax"):
        assert decoding_fields(text) == {**DECODING, "intensity": text}
        assert intensity_of(decoding_fields(text)) == text
    of_version_1 = decoding_fields("high-byte")
    assert of_version_1 == {
        "alpha": "white", "orientation": "exif", "frame": "first", "sixteen_bit": "high-byte", "cmyk": "naive",
        "grey": "luma-601", "jpeg": "libjpeg-islow",
    }  # fmt: skip
    assert intensity_of(of_version_1) == "high-byte"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("window=0.0:1.0", "window=0:1"), ("window=-1e3:.5", "window=-1000:0.5"), ("bits=08", "bits=8"), ("full", "full")],
)
def test_one_intensity_has_one_name(text, canonical):
    assert str(parse_intensity(text)) == canonical


@pytest.mark.parametrize(
    "text", ["", "Full", "bits", "bits=0", "bits=33", "bits=-1", "window=1", "window=2:1", "window=nan:1", "16"]
)
def test_unknown_intensities_are_refused_with_the_choices(text):
    with pytest.raises(UsageError) as caught:
        parse_intensity(text)
    assert str(caught.value).startswith(f"unknown intensity {text!r}; choices: {CHOICES}")


@settings(max_examples=40)
@given(st.binary(max_size=400), st.integers(0, 400), st.sampled_from([DECLARED, HIGH_BYTE]))
def test_damaged_deep_files_give_an_image_or_a_reject(noise, at, intensity):
    for whole in (
        png(three(FULL)),
        tiff(TWELVE, tags={S_MAX: (SHORT, [4095])}),
        tiff(three(FULL), photometric=2, deflate=True),
    ):
        damaged = whole[:at] + noise + whole[at + len(noise) :]
        try:
            assert decode(damaged, intensity=intensity).ndim == 3
        except Reject:
            continue
