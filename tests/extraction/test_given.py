"""Images as Python objects: every container that scikit-learn passes on, PIL images as their pixels, and plain errors."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import Reject, UsageError
from featurepipe.extraction.given import images_given
from featurepipe.images import MemorySource, key_of, open_source
from featurepipe.images.decode import decode

PATHS = ["/a/1.png", "/a/2.png", "/a/1.png"]
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 9, 8, 3), dtype=np.uint8)


def read(source):
    return [source.read(locator) for locator in source.scan()["locator"].to_pylist()]


@pytest.mark.parametrize(
    "images",
    [
        PATHS,
        tuple(PATHS),
        np.array(PATHS),
        np.array(PATHS, dtype=object),
        np.array(PATHS)[:, None],
        list(map(Path, PATHS)),
        iter(PATHS),
    ],
    ids=["list", "tuple", "array", "objects", "column", "Path", "iterator"],
)
def test_paths_come_in_any_container_and_each_is_listed_once(images):
    given = images_given(images, name="x")
    assert given.ids == ["/a/1.png", "/a/2.png"]
    assert given.place.tolist() == [0, 1, 0]
    assert given.source.scan()["id"].to_pylist() == given.ids


def test_pandas_columns_give_their_values_in_their_order():
    pd = pytest.importorskip("pandas")
    for images in (
        pd.Series(PATHS, index=[5, 3, 5]),
        pd.DataFrame({"path": PATHS}),
        pd.Series(PATHS, dtype="category"),
    ):
        given = images_given(images, name="x")
        assert given.ids == ["/a/1.png", "/a/2.png"]
        assert given.place.tolist() == [0, 1, 0]
    with pytest.raises(UsageError, match="image 1 is a float, nan, and no image"):
        images_given(pd.Series(["a.png", None], dtype=object).fillna(np.nan), name="x")
    with pytest.raises(UsageError, match=r"an array of shape \(1, 2\)"):
        images_given(pd.DataFrame({"a": ["x"], "b": ["y"]}), name="x")


def test_a_relative_path_is_named_by_its_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert images_given(["x.png", str(tmp_path / "x.png"), "memory://x.png"], name="x").ids == [
        str(tmp_path / "x.png"), "memory://x.png",
    ]  # fmt: skip


@pytest.mark.parametrize("images", [PIXELS, list(PIXELS), PIXELS[..., 0], list(PIXELS[..., 0]), PIXELS[..., :1]])
def test_arrays_are_read_as_they_are(images):
    given = images_given(images, name="x")
    assert given.place.tolist() == [0, 1, 2, 3]
    for found, expected in zip(read(given.source), images, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", "one str is no list of images; put it into a list"),
        (Image.new("L", (3, 3)), "one Image is no list of images"),
        (5, "a int holds no images; give a list"),
        ({"a": "b"}, "a dict holds no images"),
        (PIXELS[0], r"an array of shape \(9, 8, 3\) looks like one image \(H, W, C\); put it into a list"),
        (PIXELS[0, :, :, 0], r"an array of shape \(9, 8\) and dtype uint8 holds no images"),
        (PIXELS.astype(np.complex64), r"the array holds complex64, and pixels are numbers, best uint8 from 0 to 255"),
        ([PIXELS[0], PIXELS[1].astype("m8[s]")], r"image 1 holds timedelta64\[s\], and pixels are numbers"),
        ([PIXELS[0], PIXELS[0, 0, 0]], r"image 1 is an array of shape \(3,\); pixels are \(H, W\) or \(H, W, 3\)"),
        (["a.png", None], "image 1 is a NoneType, None, and no image"),
        (["a.png", np.nan], "image 1 is a float, nan, and no image"),
        (np.array([["x", "y"]]), r"an array of shape \(1, 2\) and dtype .* holds no images"),
        ([["a.png"]], r"image 0 is a list, \['a.png'\], and no image"),
    ],
)
def test_what_holds_no_images_is_refused_by_name_and_position(images, message):
    with pytest.raises(UsageError, match=message):
        images_given(images, name="x")


def test_a_folder_is_refused_with_how_to_list_it(tmp_path):
    for folder in (str(tmp_path), tmp_path):
        with pytest.raises(UsageError) as refused:
            images_given(folder, name="x")
        assert str(refused.value) == (
            f"{str(tmp_path)!r} is a folder; give a list of its files: sorted(Path({str(tmp_path)!r}).rglob('*.jpg'))"
        )


def test_an_unusable_image_is_named_with_its_first_position():
    given = images_given(["/a/x.png", PIXELS[0], "/a/y.png", "/a/y.png"], name="x")
    assert (
        str(given.refuse(2, "why"))
        == "image 2 (/a/y.png) cannot be used: why. Leave it out, and its label, or have nan for such images with on_reject='nan'"
    )
    assert (
        str(given.refuse(1, "why"))
        == "image 1 cannot be used: why. Leave it out, and its label, or have nan for such images with on_reject='nan'"
    )


def picture(mode):
    rng = np.random.default_rng(3)
    channels = {"L": 0, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "1": 0, "P": 3, "I;16": 0}[mode]
    shape = (11, 13, channels) if channels else (11, 13)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, shape).astype(np.uint16))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    if mode == "P":
        return Image.fromarray(pixels).quantize(16)
    if mode == "1":
        return Image.fromarray(pixels).convert("1")
    return Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "1", "P", "I;16"])
@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_a_pil_image_gives_the_pixels_of_its_file(mode, colour):
    image = picture(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    (found,) = read(MemorySource([image]))
    assert found.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    assert found.ndim == (2 if mode in ("L", "1", "I;16") else 3)
    np.testing.assert_array_equal(decode(found, colour=colour), decode(buffer.getvalue(), colour=colour))


def test_a_pil_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(buffer, "PNG", exif=exif)
    (found,) = read(MemorySource([Image.open(buffer)]))
    np.testing.assert_array_equal(found, np.rot90(PIXELS[0], -1))


def test_a_pil_image_has_the_key_of_its_pixels():
    images = [Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0, :, :, 0])]
    assert [key_of(found) for found in read(MemorySource(images))] == [key_of(PIXELS[0]), key_of(PIXELS[0, :, :, 0])]


def test_pil_images_are_numbered_measured_and_travel():
    source = open_source([Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[1])])
    listing = pickle.loads(pickle.dumps(source)).scan()
    assert listing["id"].to_pylist() == ["000000", "000001"]
    assert listing["size"].to_pylist() == [PIXELS[0].nbytes] * 2
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source)))[1], PIXELS[1])


def test_a_truncated_pil_image_is_a_reject_every_time(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    (tmp_path / "x.png").write_bytes(buffer.getvalue()[:4000])
    with Image.open(tmp_path / "x.png") as image:
        source = MemorySource([image])
        for _ in range(2):
            with pytest.raises(Reject, match=r"^(truncated|corrupt): "):
                source.read(source.scan()["locator"][0].as_py())


def test_one_open_pil_image_may_be_read_by_many_threads(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for _ in range(5):
        with Image.open(tmp_path / "x.png") as image:
            source = MemorySource([image] * 16)
            locators = source.scan()["locator"].to_pylist()
            with ThreadPoolExecutor(8) as pool:
                for found in pool.map(source.read, locators):
                    np.testing.assert_array_equal(found, pixels)


def test_listing_pil_images_loads_no_torch():
    code = (
        "import sys; from PIL import Image; from featurepipe.extraction.given import images_given; "
        "images_given([Image.new('L', (3, 3)), 'x.png'], name='x').source.scan(); "
        "print([name for name in ('torch', 'h5py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
