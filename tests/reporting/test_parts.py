"""Thumbnails, projections, numbers and colours, each alone."""

import base64
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from featurepipe.reporting.blocks import ACCENT, INK, OTHERS, QUIET, SERIES, contrast, on_shade, series, shade
from featurepipe.reporting.images import bounded_thumbnails, project, thumbnail, thumbnails

PAGES = {"light": ("#ffffff", "#f4f6f8", "#e7f2fb"), "dark": ("#15181d", "#20252c", "#18324a")}


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",", 1)
    assert head in {"data:image/jpeg;base64", "data:image/png;base64"}
    return Image.open(io.BytesIO(base64.b64decode(data)))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_an_image_of_few_of_sixteen_bits_is_shown_all_the_same():
    values = np.repeat(np.linspace(0, 4095, 20).astype(np.uint16)[None], 20, axis=0)
    small = np.asarray(decoded(thumbnail(encoded(Image.fromarray(values), "PNG"), 30)).convert("L"))
    assert small.min() < 20
    assert small.max() > 235


@pytest.mark.parametrize(
    "image",
    [
        np.full((40, 60), 200, np.uint8),
        np.full((40, 60, 3), 200, np.uint8),
        np.full((3, 40, 60), 200, np.uint8),
        np.full((1, 40, 60), 200, np.uint8),
        np.full((40, 60, 1), 200, np.uint8),
        Image.new("RGB", (60, 40), (200, 200, 200)),
        Image.new("CMYK", (60, 40), (0, 0, 0, 55)),
        encoded(Image.new("L", (60, 40), 200), "PNG"),
        encoded(Image.new("RGB", (600, 400), (200, 200, 200)), "JPEG"),
        encoded(Image.new("RGB", (60, 40), (200, 200, 200)), "WEBP", lossless=True),
    ],
)
def test_every_form_of_image_becomes_the_same_thumbnail(image):
    small = decoded(thumbnail(image, 30)).convert("RGB")
    assert small.size == (30, 20)
    assert abs(np.asarray(small).astype(int) - 200).max() <= 3


def test_thumbnails_are_upright_on_white_and_never_larger_than_the_image():
    tall = Image.new("RGB", (60, 40), "white")
    tall.paste("black", (0, 0, 20, 40))  # a dark left edge, which EXIF turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(thumbnail(encoded(tall, "JPEG", exif=exif), 30)).convert("L")
    assert turned.size == (20, 30)
    pixels = np.asarray(turned).astype(int)
    assert pixels[2].mean() < 60
    assert pixels[-3].mean() > 200
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert np.asarray(decoded(thumbnail(clear, 30)).convert("L")).min() > 250
    assert decoded(thumbnail(clear, 30)).size == (20, 20)


def test_values_beyond_bytes_are_brought_into_their_range():
    ramp = np.linspace(0, 4095, 32 * 32).reshape(32, 32)
    for image in (ramp.astype(np.uint16), ramp / 4095, Image.fromarray(ramp.astype(np.uint16))):
        small = np.asarray(decoded(thumbnail(image, 32)).convert("L")).astype(int)
        assert small[0, 0] < 15
        assert small[-1, -1] > 240


@pytest.mark.parametrize(
    "image", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n broken", np.zeros((0, 3)), np.zeros(5)]
)
def test_what_is_no_image_has_no_thumbnail(image):
    assert thumbnail(image, 30) is None
    assert thumbnails(["a"], lambda _: image, side=30) == {}


def test_thumbnails_shrink_until_they_fit():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (100, 100, 3), np.uint8)
    ids = [str(k) for k in range(100)]
    roomy = bounded_thumbnails(ids, lambda _: noise, most=10_000_000)
    tight = bounded_thumbnails(ids, lambda _: noise, most=250_000)
    assert {decoded(uri).size for uri in roomy.values()} == {(80, 80)}
    assert set(tight) == set(ids)
    assert sum(map(len, tight.values())) <= 250_000
    assert {decoded(uri).size for uri in tight.values()} < {(k, k) for k in (64, 48, 36, 28)}
    fewer = bounded_thumbnails(ids, lambda _: noise, most=20_000)
    assert 0 < len(fewer) < 100
    assert sum(map(len, fewer.values())) <= 20_000


def test_the_projection_keeps_groups_apart_and_is_the_same_again():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 40)
    values = (rng.normal(0, 20, (3, 30))[group] + rng.normal(0, 1, (120, 30))).astype(np.float32)
    ids = [f"i{k}" for k in range(120)]
    found = project(ids, values, [str(g) for g in group])
    again = project(ids, values, [str(g) for g in group])
    assert set(found.places) == {"PCA", "t-SNE"}
    assert sorted(found.ids) == sorted(ids)
    assert all(found.labels[k] == str(group[int(id_[1:])]) for k, id_ in enumerate(found.ids))
    assert 0.9 < found.kept <= 1
    for method, places in found.places.items():
        assert np.array_equal(places, again.places[method])
        centres = np.stack([places[np.array(found.labels) == g].mean(0) for g in "012"])
        nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(1)
        assert [str(g) for g in nearest] == list(found.labels)


@pytest.mark.parametrize(("n", "width"), [(1, 5), (2, 1), (9, 3), (12, 1), (40, 2)])
def test_few_images_and_narrow_features_can_be_placed(n, width):
    values = np.arange(n * width, dtype=np.float32).reshape(n, width) % 7
    found = project([str(k) for k in range(n)], values, None)
    assert ("t-SNE" in found.places) == (n >= 10)
    for places in found.places.values():
        assert places.shape == (n, 2)
        assert np.isfinite(places).all()


def test_features_without_any_variance_can_be_placed():
    found = project([str(k) for k in range(20)], np.ones((20, 4), np.float32), None)
    assert found.kept == 0
    assert all(np.isfinite(places).all() for places in found.places.values())


def test_text_and_series_stand_out_in_both_schemes():
    for scheme, pages in PAGES.items():
        for page in pages:
            assert all(contrast(getattr(pair, scheme), page) >= 4.5 for pair in (INK, QUIET, ACCENT)), (scheme, page)
        assert all(contrast(getattr(pair, scheme), pages[0]) >= 3 for pair in (*SERIES, OTHERS)), scheme
    for value in np.linspace(0, 1, 41):
        for cell, ink in zip(shade(float(value)), on_shade(float(value)), strict=True):
            assert contrast(cell, ink) >= 4.5


def test_the_stylesheet_uses_the_colours_that_are_checked():
    from importlib import resources

    style = (resources.files("featurepipe.reporting") / "style.css").read_text()
    for name, pair in {"ink": INK, "quiet": QUIET, "accent": ACCENT}.items():
        assert f"--{name}: {pair.light};" in style
        assert f"--{name}: {pair.dark};" in style
    for name, place in {"page": 0, "card": 1, "marked": 2}.items():
        assert f"--{name}: {PAGES['light'][place]};" in style
        assert f"--{name}: {PAGES['dark'][place]};" in style


def test_fifty_six_series_differ_in_colour_or_marker():
    styles = [series(k) for k in range(56)]
    assert len({(style.colour, style.marker) for style in styles}) == 56
    assert all(a.colour != b.colour and a.marker != b.marker for a, b in itertools.pairwise(styles))


def test_an_image_that_starts_programs_in_other_readers_has_no_thumbnail(monkeypatch):
    def called(*_args, **_options):
        raise AssertionError("Image.open tries every format that it knows, of which some start programs")

    monkeypatch.setattr(Image, "open", called)
    assert thumbnail(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", 32) is None
    picture = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), 77, np.uint8)).save(picture, "JPEG")
    assert thumbnail(picture.getvalue(), 32)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), OverflowError()])
def test_whatever_an_image_raises_the_page_goes_without_it(monkeypatch, error):
    def failing(*_args, **_options):
        raise error

    monkeypatch.setattr("featurepipe.images.decode.decode", failing)
    assert thumbnail(b"\xff\xd8\xff", 32) is None
