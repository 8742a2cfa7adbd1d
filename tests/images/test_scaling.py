"""JPEGs decoded at a part of their size: libjpeg's own pixels, the same rejects, and nothing else changes."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from featurepipe.backbones import Preprocessing
from featurepipe.errors import Reject, UsageError
from featurepipe.features.session import Decoding, decoder_for
from featurepipe.images.damage import read_jpeg_header
from featurepipe.images.decode import decode, jpeg_bytes, try_decode
from featurepipe.images.regions import Box, Region
from featurepipe.images.scaling import Scaling, parse_route

PHOTO = Image.fromarray(load_sample_image("china.jpg"))


def encoded(image, format_="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def by_pillow(payload, divisor, mode="RGB"):
    """What libjpeg makes of a JPEG at a part of its size, upright."""
    image = Image.open(io.BytesIO(payload))
    image.draft(mode, (image.width // divisor, image.height // divisor))
    return np.asarray(ImageOps.exif_transpose(image).convert(mode))


@settings(max_examples=40)
@given(
    st.tuples(st.integers(17, 130), st.integers(17, 130)),
    st.sampled_from(["RGB", "L"]),
    st.fixed_dictionaries(
        {"quality": st.integers(1, 100), "subsampling": st.integers(0, 2), "progressive": st.booleans()}
    ),
    st.integers(1, 8),
    st.sampled_from([2, 4, 8]),
)
def test_pixels_are_those_of_libjpeg_at_a_part_of_the_size(size, mode, options, orientation, divisor):
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(PHOTO.resize(size).convert(mode), exif=exif, **options)
    scaling = Scaling(1, max(1, min(size) // divisor))
    used = scaling.divisor(*size)
    found = decode(payload, scaling=scaling)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), by_pillow(payload, used))
    if mode == "L":
        np.testing.assert_array_equal(
            decode(payload, colour="grey", scaling=scaling)[0].numpy(), by_pillow(payload, used, "L")
        )


@pytest.mark.parametrize("target", [20, 41, (20, 90), (90, 20), 700])
@pytest.mark.parametrize("times", [1, 1.5, 2, 4])
@pytest.mark.parametrize("orientation", [1, 6])
def test_no_image_is_smaller_than_was_asked_for_and_none_could_be_halved(target, times, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(PHOTO.resize((333, 217)), exif=exif)
    sides = tuple(decode(payload, scaling=Scaling(times, target)).shape[1:])
    full = (333, 217) if orientation == 6 else (217, 333)
    (divisor,) = {round(all_of_it / part) for all_of_it, part in zip(full, sides, strict=True)}

    def is_enough(sides):
        least = (target, target) if isinstance(target, int) else target
        return all(side >= times * asked for side, asked in zip(sides, least, strict=True))

    assert divisor == 1 or is_enough(sides)
    assert divisor == 8 or not is_enough([side / (2 * divisor) for side in full])


def test_what_is_decoded_in_full_all_the_same():
    scaling = Scaling(1, 10)
    small = PHOTO.resize((96, 64))
    for payload in (encoded(small, "PNG"), encoded(small.convert("CMYK")), encoded(small, "WEBP")):
        assert torch.equal(decode(payload, scaling=scaling), decode(payload))
    preprocessing = Preprocessing(resize=10, crop=(10, 10), mean=(0.5,) * 3, std=(0.5,) * 3)
    decoder = decoder_for(Decoding("scaled=1", "declared"), preprocessing, "cpu")
    whole = encoded(small)
    found = list(decoder([whole, Region(whole, Box(0, 0, 12, 12))], lambda _: None))
    assert [tuple(image.shape) for image in found] == [(3, 16, 24), (3, 64, 96)]
    assert torch.equal(found[1], decode(whole))


@settings(max_examples=150)
@example(progressive=True, changes=[(0.25, 0), (0.3125, 0)], kept=1.0, divisor=2, keep_damaged=True)
@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0.3, 1),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
)
def test_damage_is_judged_and_told_as_in_full(progressive, changes, kept, divisor, keep_damaged):
    payload = bytearray(encoded(PHOTO.resize((96, 64)), progressive=progressive))
    for place, value in changes:
        payload[int(place * len(payload))] = value
    mutant = bytes(payload[: int(kept * len(payload))])
    full = try_decode(mutant, colour="rgb", keep_damaged=keep_damaged)
    scaled = try_decode(mutant, colour="rgb", keep_damaged=keep_damaged, scaling=Scaling(1, 64 // divisor))
    if isinstance(full, torch.Tensor):
        assert isinstance(scaled, torch.Tensor)
    elif isinstance(full, Reject):
        assert str(scaled) == str(full)
    else:
        assert torch.equal(scaled.pixels, full.pixels)
        assert scaled.damage == full.damage


def test_memory_that_is_claimed():
    claims = []
    decode(encoded(PHOTO.resize((400, 200))), scaling=Scaling(2, 25), claim=claims.append)
    assert claims == [3 * 100 * 50]
    progressive = encoded(PHOTO.resize((400, 200)), progressive=True)
    decode(progressive, scaling=Scaling(2, 25), claim=claims.append)
    assert claims[1] == 3 * 100 * 50 + 6 * 400 * 200
    assert jpeg_bytes(read_jpeg_header(progressive)) == 9 * 400 * 200


def test_routes_that_are_none():
    assert parse_route("scaled") == parse_route("scaled=2.0") == ("scaled=2", 2.0)
    for text in ("scaled=0.5", "scaled=17", "scaled=", "scaled=two", "half", "auto"):
        with pytest.raises(UsageError, match="choices: auto, cpu, gpu, scaled, scaled=N, with N from 1 to 16"):
            parse_route(text)
