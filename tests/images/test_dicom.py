"""DICOM files made here: their exact pixels by hand computation, or the reason of their reject."""

import hashlib
import io
import pickle
import struct
import sys
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from featurepipe.errors import Reject, Unavailable, UsageError
from featurepipe.extraction.extract import extract
from featurepipe.extraction.text import text
from featurepipe.images import dicom, key_of
from featurepipe.images.decode import decode, is_outdated, try_decode
from featurepipe.images.intensity import parse_intensity
from featurepipe.images.listing import ListingSummary
from featurepipe.images.open import open_source
from featurepipe.images.regions import Frame, FramesFile

NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
RAMP = np.linspace(0, 4095, 24).astype(np.uint16).reshape(4, 6)
RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def dataset(pixels, *, syntax=ExplicitVRLittleEndian, photometric="MONOCHROME2", bits=None, frames=None, **elements):
    """A data set of pixels (H, W), (H, W, 3), or with frames in front."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    colours = photometric in {"RGB", "YBR_FULL", "YBR_FULL_422"}
    shape = pixels.shape[1:] if frames else pixels.shape
    made.Rows, made.Columns = shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 3 if colours else 1, photometric
    if colours:
        made.PlanarConfiguration = 0
    made.BitsAllocated = 8 * pixels.dtype.itemsize
    made.BitsStored = bits or made.BitsAllocated
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    if frames:
        made.NumberOfFrames = frames
    made.PixelData = pixels.astype(pixels.dtype.newbyteorder("<>"[syntax == ExplicitVRBigEndian])).tobytes()
    made["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def file_of(made):
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom_of(pixels, **options):
    return file_of(dataset(pixels, **options))


def grey(payload, intensity="declared"):
    return decode(payload, colour="grey", intensity=parse_intensity(intensity)).numpy()[0]


def reason(payload, intensity="declared"):
    with pytest.raises(Reject) as caught:
        decode(payload, intensity=parse_intensity(intensity))
    return str(caught.value)


def item(**elements):
    made = Dataset()
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def by_window(values, centre, width):
    """PS3.3, C.11.2.1.2.1, word for word."""
    scaled = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    scaled = np.where(values <= centre - 0.5 - (width - 1) / 2, 0, scaled)
    return np.rint(np.where(values > centre - 0.5 + (width - 1) / 2, 255, scaled)).astype(np.uint8)


@pytest.mark.parametrize("syntax", NATIVE)
def test_rescale_and_window_in_every_uncompressed_transfer_syntax(syntax):
    payload = dicom_of(
        RAMP, syntax=syntax, bits=12, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=40, WindowWidth=400
    )
    expected = by_window(2.0 * RAMP - 1000, 40, 400)
    np.testing.assert_array_equal(grey(payload), expected)
    np.testing.assert_array_equal(decode(payload).numpy(), np.stack([expected] * 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize(
    "rescale", [{}, {"RescaleSlope": 1, "RescaleIntercept": -24}, {"RescaleSlope": -0.5, "RescaleIntercept": 3}]
)
def test_a_window_of_every_type_of_number(dtype, rescale):
    info = np.iinfo(dtype)
    values = np.linspace(info.min, info.max, 24).astype(dtype).reshape(4, 6)
    units = values * float(rescale.get("RescaleSlope", 1)) + rescale.get("RescaleIntercept", 0)
    payload = dicom_of(values, WindowCenter=10, WindowWidth=62, **rescale)
    np.testing.assert_array_equal(grey(payload), by_window(units, 10, 62))


def test_monochrome_1_is_inverted_once():
    for options in ({}, {"WindowCenter": 2000, "WindowWidth": 1000}, {"PresentationLUTShape": "INVERSE"}):
        plain, inverted = (dicom_of(RAMP, bits=12, photometric=f"MONOCHROME{i}", **options) for i in (2, 1))
        np.testing.assert_array_equal(grey(inverted), 255 - grey(plain))
    eight = RGB[..., 0]
    np.testing.assert_array_equal(grey(dicom_of(eight, photometric="MONOCHROME1")), 255 - eight)


def test_without_a_window_the_range_of_the_stored_bits_counts():
    np.testing.assert_array_equal(grey(dicom_of(RAMP, bits=12)), RAMP >> 4)
    signed = RAMP.astype(np.int16) - 2048
    np.testing.assert_array_equal(grey(dicom_of(signed, bits=12)), np.rint((signed + 2048.0) * 255 / 4095))
    rescaled = dicom_of(RAMP, bits=12, RescaleSlope=1, RescaleIntercept=-1024)
    np.testing.assert_array_equal(grey(rescaled), np.rint(RAMP * 255.0 / 4095))
    np.testing.assert_array_equal(grey(dicom_of(RGB[..., 0])), RGB[..., 0])
    four = RGB[..., 0] % 16
    np.testing.assert_array_equal(grey(dicom_of(four, bits=4)), four * 17)


def test_numbers_that_fill_little_of_their_range_are_refused_and_other_intensities_read_them():
    payload = dicom_of(RAMP // 4)
    said = reason(payload)
    assert said.startswith(
        "intensity: 16-bit unsigned values from 0 to 1023 fill less than a sixteenth of what the file can hold"
    )
    assert "--intensity bits=10" in said
    np.testing.assert_array_equal(grey(payload, "bits=10"), RAMP // 4 >> 2)
    np.testing.assert_array_equal(grey(payload, "full"), RAMP // 4 >> 8)
    np.testing.assert_array_equal(grey(payload, "minmax"), np.rint((RAMP // 4) * 255.0 / 1023))


def test_another_intensity_is_asked_of_hounsfield_units_whatever_the_window():
    payload = dicom_of(RAMP, bits=12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=7, WindowWidth=0)
    expected = np.clip(np.rint((RAMP - 1024.0 + 1000) * 255 / 1400), 0, 255)
    np.testing.assert_array_equal(grey(payload, "window=-1000:400"), expected)
    assert reason(payload, "high-byte").startswith("intensity: ")


@pytest.mark.parametrize(
    ("elements", "low", "high"),
    [
        ({"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}, 1500, 2500),
        ({"WindowCenter": [2000, 50], "WindowWidth": [1001, 2]}, 1499.5, 2499.5),
    ],
)
def test_exact_windows_and_the_first_of_several(elements, low, high):
    expected = np.clip(np.rint((RAMP.astype(float) - low) * 255 / (high - low)), 0, 255)
    np.testing.assert_array_equal(grey(dicom_of(RAMP, bits=12, **elements)), expected)


def test_a_window_of_width_1_is_a_threshold():
    np.testing.assert_array_equal(
        grey(dicom_of(RAMP, bits=12, WindowCenter=2000, WindowWidth=1)), (RAMP > 1999.5) * 255
    )


@pytest.mark.parametrize(
    ("elements", "says"),
    [
        ({"WindowWidth": 0}, "intensity: the file's window has width 0, where LINEAR needs 1 at least"),
        ({"WindowWidth": -5}, "intensity: the file's window has width -5"),
        (
            {"WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"},
            "intensity: the file's window has width 0, where LINEAR_EXACT",
        ),
        (
            {"WindowWidth": 100, "VOILUTFunction": "GAMMA"},
            "intensity: the file's window is of function 'GAMMA'; known are",
        ),
        ({"WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, "intensity: the file's window has width 0, where SIGMOID"),
        ({"WindowWidth": 100, "RescaleSlope": 0}, "corrupt: a rescale slope of 0"),
    ],
)
def test_windows_that_mean_nothing(elements, says):
    said = reason(dicom_of(RAMP, bits=12, WindowCenter=40, **elements))
    assert said.startswith(says)
    assert "--intensity window=LO:HI" in said or "slope" in said


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 2, "RescaleIntercept": -1000}])
@pytest.mark.parametrize("width", [1.5, 400, 100_000])
def test_windows_are_those_of_pydicom(function, rescale, width):
    made = dataset(RAMP, bits=12, WindowCenter=300, WindowWidth=width, VOILUTFunction=function, **rescale)
    with np.errstate(over="ignore"):
        theirs = apply_windowing(apply_modality_lut(RAMP, made), made)
    low, high = (np.array([0, 4095]) * rescale.get("RescaleSlope", 1) + rescale.get("RescaleIntercept", 0)).tolist()
    np.testing.assert_allclose(grey(file_of(made)), (theirs - low) * 255 / (high - low), atol=0.5001)


def test_lookup_tables_are_those_of_pydicom():
    """Of 16 bits: of eight pydicom wraps 12-bit indices, and knows none of 12; see `test_lookup_tables`."""
    entries = np.linspace(0, 65535, 300).astype(np.uint16)[::-1]
    table = item(LUTDescriptor=[300, 1000, 16], LUTData=entries.tolist())
    table["LUTData"].VR = table["LUTDescriptor"].VR = "US"
    made = dataset(RAMP, bits=12, VOILUTSequence=[table])
    np.testing.assert_array_equal(grey(file_of(made)), apply_voi_lut(RAMP, made) >> 8)
    made = dataset(RAMP, bits=12, ModalityLUTSequence=[table], WindowCenter=32768, WindowWidth=20000)
    theirs = apply_windowing(apply_modality_lut(RAMP, made), made).astype(np.float64)
    np.testing.assert_allclose(grey(file_of(made)), theirs * 255 / 65535, atol=0.5001)


def remarks_of(payload, intensity="declared"):
    told = []
    decode(payload, intensity=parse_intensity(intensity), on_remark=told.append)
    return told


def test_what_is_left_out_of_a_file_is_told():
    frames = np.stack([RAMP, RAMP[::-1]])
    several = dicom_of(frames, frames=2, bits=12, WindowCenter=[2000, 50], WindowWidth=[1001, 2])
    assert remarks_of(several) == [dicom.FIRST_FRAME, dicom.FIRST_WINDOW]
    found = try_decode(several, colour="grey")
    assert (found.damage, found.remarks) == ("", (dicom.FIRST_FRAME, dicom.FIRST_WINDOW))
    assert remarks_of(dicom_of(RAMP, bits=12, WindowCenter=[2000], WindowWidth=[1001])) == []
    assert isinstance(try_decode(dicom_of(RAMP, bits=12), colour="grey"), torch.Tensor)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_stretches_no_range(photometric):
    values = RAMP.astype(np.int16) // 16  # a sixteenth of 12 bits, and so refused
    values[0, :3] = -2000
    elements = {"photometric": photometric, "PixelPaddingValue": -2000}
    assert reason(dicom_of(values, **elements)).startswith("intensity: ")
    least, most = values[values > -2000].min(), values.max()
    scaled = np.rint((values.astype(float) - least) * 255 / (most - least)).clip(0, 255)
    expected = np.where(values == -2000, 0, scaled if photometric == "MONOCHROME2" else 255 - scaled)
    np.testing.assert_array_equal(grey(dicom_of(values, **elements), "minmax"), expected)
    windowed = grey(dicom_of(values, WindowCenter=100, WindowWidth=50, **elements))
    assert (windowed[0, :3] == 0).all()
    assert (windowed[0, 3] == 255) == (photometric == "MONOCHROME1")
    made = dataset(values.view(np.uint16), **elements | {"PixelPaddingValue": 63536})  # the same bits
    assert (grey(file_of(made), "minmax") == 0).sum() == 3 + 1
    eight = np.array([[5, 200, 7], [255, 9, 254]], np.uint8)
    ranged = dicom_of(eight, photometric=photometric, PixelPaddingValue=255, PixelPaddingRangeLimit=254)
    kept = eight if photometric == "MONOCHROME2" else 255 - eight
    np.testing.assert_array_equal(grey(ranged), np.where(eight >= 254, 0, kept))
    nothing = dicom_of(np.full((4, 6), 7, np.uint16), PixelPaddingValue=7)
    assert reason(nothing) == "empty: every pixel has the padding value"


@pytest.mark.parametrize("explicit", [False, True])
def test_files_without_preamble(explicit):
    made = dataset(RAMP, bits=12, syntax=ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian)
    made.ImageType = ["ORIGINAL", "PRIMARY"]
    buffer = io.BytesIO()
    dcmwrite(buffer, made, implicit_vr=not explicit, little_endian=True, enforce_file_format=False)
    bare = buffer.getvalue()[len(buffer.getvalue()) - len(buffer.getvalue().partition(b"\x08\0\x08\0")[2]) - 4 :]
    assert bare[:4] == b"\x08\0\x08\0"
    np.testing.assert_array_equal(grey(bare), RAMP >> 4)
    for end in range(20, len(bare) - 2, 11):
        assert isinstance(try_decode(bare[:end], colour="grey"), Reject)
    whole = file_of(made)
    np.testing.assert_array_equal(grey(whole[128 + 4 :]), RAMP >> 4)  # with the group of the file's own facts


def test_a_preamble_may_be_that_of_a_tiff():
    payload = dicom_of(RAMP, bits=12)
    for magic in (b"II*\0", b"MM\0*"):
        np.testing.assert_array_equal(grey(magic + b"\x54\0\0\0" + payload[8:]), RAMP >> 4)


@pytest.mark.parametrize(
    ("name", "remarks"),
    [
        ("CT_small.dcm", []),
        ("MR_small_bigendian.dcm", []),
        ("MR_small_RLE.dcm", []),
        ("rtdose.dcm", [dicom.FIRST_FRAME]),
    ],
)
def test_files_of_scanners(name, remarks):
    """Those that pydicom ships for its own tests, against its own pipeline."""
    path = Path(pydicom.__file__).parent / "data" / "test_files" / name
    made = pydicom.dcmread(path)
    values = made.pixel_array[0] if remarks else made.pixel_array
    theirs = apply_modality_lut(values, made).astype(np.float64)
    if "WindowCenter" in made:
        theirs = apply_windowing(theirs, made)
    low, high = (theirs.min(), theirs.max()) if "WindowCenter" not in made else _range_of(made)
    intensity = "declared" if "WindowCenter" in made else "minmax"
    np.testing.assert_allclose(grey(path.read_bytes(), intensity), (theirs - low) * 255 / (high - low), atol=0.51)
    assert remarks_of(path.read_bytes(), intensity) == remarks


def _range_of(made):
    bits = int(made.BitsStored)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if made.PixelRepresentation else (0, 2**bits - 1)
    return sorted(float(made.get("RescaleSlope", 1)) * end + float(made.get("RescaleIntercept", 0)) for end in ends)


def test_compression_is_decoded_by_a_plug_in_that_is_installed(monkeypatch):
    """As pylibjpeg or gdcm would, a function gives the bytes of the frame."""
    plug_in = types.ModuleType("featurepipe_plug_in")
    plug_in.is_available = lambda uid: True
    plug_in.frame = lambda source, runner: bytearray((RAMP >> 4).astype(np.uint8).tobytes())
    monkeypatch.setitem(sys.modules, "featurepipe_plug_in", plug_in)
    payload = compressed((RAMP >> 4).astype(np.uint8), b"\xff\xd8\xff\xc3", JPEGLosslessSV1)
    assert "python-gdcm" in str(try_decode(payload, colour="rgb"))
    decoder = get_decoder(JPEGLosslessSV1)
    decoder.add_plugin("fake", ("featurepipe_plug_in", "frame"))
    try:
        np.testing.assert_array_equal(grey(payload), RAMP >> 4)
    finally:
        decoder.remove_plugin("fake")


FRAMES = np.stack([RAMP, RAMP[::-1], 4095 - RAMP])


def frames_source(folder, **options):
    folder.mkdir(exist_ok=True)
    groups = [item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=400)]) for c in (1000, 2000, 3000)]
    (folder / "cine.dcm").write_bytes(dicom_of(FRAMES, frames=3, bits=12, PerFrameFunctionalGroupsSequence=groups))
    (folder / "one.dcm").write_bytes(dicom_of(RAMP, bits=12))
    (folder / "plain.png").write_bytes(encoded(RGB, "PNG"))
    return open_source(folder, **options)


def test_each_frame_is_an_image_of_its_own(tmp_path):
    source = pickle.loads(pickle.dumps(frames_source(tmp_path / "pile", frames="all")))
    table = source.scan()
    assert table["id"].to_pylist() == ["cine.dcm#1", "cine.dcm#2", "cine.dcm#3", "one.dcm", "plain.png"]
    assert table["column:group"].to_pylist() == ["cine.dcm"] * 3 + ["one.dcm", "plain.png"]
    assert "3 frames of 1 DICOM file of several" in ListingSummary.of(table).notes
    content = (tmp_path / "pile" / "cine.dcm").read_bytes()
    for place, centre in enumerate((1000, 2000, 3000)):
        payload = source.read(table["locator"][place].as_py())
        np.testing.assert_array_equal(grey(payload), by_window(FRAMES[place], centre, 400))
        told = []
        decode(payload, on_remark=told.append)
        assert told == []
        digest = hashlib.sha256(content).digest() + str(place + 1).encode()
        assert key_of(payload) == hashlib.sha256(b"featurepipe frame 1\n" + digest).digest()
    assert source.read(table["locator"][3].as_py()) == (tmp_path / "pile" / "one.dcm").read_bytes()
    assert open_source(tmp_path / "pile", frames="first").scan()["id"].to_pylist()[0] == "cine.dcm"
    with pytest.raises(UsageError, match="unknown frames='last'; choices: first, all"):
        open_source(tmp_path / "pile", frames="last")
    with pytest.raises(Reject, match="missing: frame 4 of 3"):
        decode(Frame(FramesFile(content), 4))
    with zipfile.ZipFile(tmp_path / "pile.zip", "w") as archive:
        archive.write(tmp_path / "pile" / "cine.dcm", "a/cine.dcm")
    zipped = open_source(tmp_path / "pile.zip", frames="all")
    assert zipped.scan()["id"].to_pylist() == [f"pile.zip/a/cine.dcm#{n}" for n in (1, 2, 3)]
    assert key_of(zipped.read(zipped.scan()["locator"][1].as_py())) == key_of(source.read(table["locator"][1].as_py()))


def test_frames_are_read_and_parsed_once_and_extracted(tmp_path, monkeypatch):
    frames_source(tmp_path / "pile")
    parsed, parse = [], dicom._parsed
    monkeypatch.setattr(dicom, "_parsed", lambda payload, claim: parsed.append(payload) or parse(payload, claim))
    options = {"backbone": "lenet5", "weights": "none", "nodes": ["c3"], "silent": True, "precision": "fp32"}
    record = extract(tmp_path / "pile", tmp_path / "store", frames="all", **options)
    assert (record["counts"]["computed"], record["options"]["frames"], record["remarks"]) == (5, "all", {})
    assert len(parsed) == 2
    parsed.clear()
    record = extract(tmp_path / "pile", tmp_path / "first", **options)
    assert (record["counts"]["computed"], record["remarks"]) == (3, {dicom.FIRST_FRAME: 1})
    assert f"{dicom.FIRST_FRAME}: 1 image" in text(record)
    assert len(parsed) == 2
    again = extract(tmp_path / "pile", tmp_path / "store", frames="all", **options)
    assert again["counts"]["read"] == 0


@pytest.mark.parametrize(("frames", "listed"), [(3, 3), (4, 1), (2**31 - 1, 1), (0, 1), (-5, 1)])
def test_frames_that_cannot_be_there_are_not_listed(tmp_path, frames, listed):
    (tmp_path / "a.dcm").write_bytes(
        changed(dataset(FRAMES.repeat(20, 1).repeat(20, 2), frames=3, bits=12), NumberOfFrames=frames)
    )
    source = open_source(tmp_path, frames="all")
    table = source.scan()
    assert table.num_rows == listed
    assert isinstance(try_decode(source.read(table["locator"][0].as_py()), colour="rgb"), Reject) == (listed == 1)


def test_frames_beyond_the_budget_are_bombs(monkeypatch):
    monkeypatch.setenv("FEATUREPIPE_MAX_PIXELS", "23")
    payload = dicom_of(FRAMES, frames=3, bits=12)
    for image in (payload, Frame(FramesFile(payload), 2)):
        assert reason(image) == "bomb: 6x4 pixels, more than 23, the limit of FEATUREPIPE_MAX_PIXELS"
    monkeypatch.setenv("FEATUREPIPE_MAX_FILE_BYTES", "100")
    assert reason(Frame(FramesFile(payload), 2)).startswith("budget: ")


def test_frames_of_compressed_files_and_headers_beyond_the_first_bytes(tmp_path):
    made = dataset(np.stack([SMOOTH, SMOOTH[::-1]]), syntax=JPEGBaseline8Bit, frames=2)
    jpegs = [encoded(pixels, "JPEG", quality=95) for pixels in (SMOOTH, SMOOTH[::-1])]
    made.PixelData = encapsulate(jpegs)
    made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    made.add_new((0x0009, 0x0010), "LO", "MINE")
    made.add_new((0x0009, 0x1001), "OB", bytes(70_000))  # before the number of frames
    (tmp_path / "a.dcm").write_bytes(file_of(made))
    deflated = dataset(FRAMES, syntax=DeflatedExplicitVRLittleEndian, frames=3, bits=12)
    (tmp_path / "b.dcm").write_bytes(file_of(deflated))
    source = open_source(tmp_path, frames="all")
    table = source.scan()
    assert table["id"].to_pylist() == ["a.dcm#1", "a.dcm#2", "b.dcm#1", "b.dcm#2", "b.dcm#3"]
    for place, jpeg in enumerate(jpegs):
        payload = source.read(table["locator"][place].as_py())
        np.testing.assert_array_equal(grey(payload), decode(jpeg, colour="grey").numpy()[0])
    np.testing.assert_array_equal(grey(source.read(table["locator"][4].as_py())), FRAMES[2] >> 4)


def test_lookup_tables():
    table = item(
        LUTDescriptor=[4, 1000, 8], LUTData=[0, 50, 100, 255]
    )  # values below 1000 are its first, above 1003 its last
    expected = np.array([0, 50, 100, 255], np.uint8)[np.clip(RAMP.astype(int) - 1000, 0, 3)]
    table["LUTData"].VR = table["LUTDescriptor"].VR = "US"
    np.testing.assert_array_equal(grey(dicom_of(RAMP, bits=12, VOILUTSequence=[table])), expected)
    np.testing.assert_array_equal(grey(dicom_of(RAMP, bits=12, ModalityLUTSequence=[table])), expected)
    table.LUTData = [0, 50, 100]
    assert reason(dicom_of(RAMP, bits=12, VOILUTSequence=[table])).startswith("truncated: a lookup table of 3 entries")


def test_functional_groups_of_an_enhanced_image():
    shared = item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-1000, RescaleType="HU")])
    first, second = (item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=400)]) for c in (40, 900))
    payload = dicom_of(
        np.stack([RAMP, RAMP[::-1]]),
        frames=2,
        bits=12,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[first, second],
    )
    np.testing.assert_array_equal(grey(payload), by_window(2.0 * RAMP - 1000, 40, 400))


def test_the_first_of_several_frames_is_taken():
    frames = np.stack([RAMP, RAMP[::-1], RAMP * 0])
    np.testing.assert_array_equal(grey(dicom_of(frames, frames=3, bits=12)), RAMP >> 4)


def test_bits_above_those_stored_are_not_part_of_the_value():
    np.testing.assert_array_equal(grey(dicom_of(RAMP | 0xA000, bits=12)), RAMP >> 4)
    signed = (RAMP.astype(np.int16) - 2048) & 0x0FFF  # not extended by the sign
    np.testing.assert_array_equal(
        grey(dicom_of(signed, bits=12)), grey(dicom_of(RAMP.astype(np.int16) - 2048, bits=12))
    )


def test_colours():
    np.testing.assert_array_equal(decode(dicom_of(RGB, photometric="RGB")).permute(1, 2, 0).numpy(), RGB)
    planes = dataset(RGB, photometric="RGB")
    planes.PlanarConfiguration, planes.PixelData = 1, RGB.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(decode(file_of(planes)).permute(1, 2, 0).numpy(), RGB)
    deep = RGB.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(dicom_of(deep, photometric="RGB")).permute(1, 2, 0).numpy(), RGB)
    ybr = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
    expected = np.asarray(Image.fromarray(ybr, "YCbCr").convert("RGB")).astype(int)
    found = decode(dicom_of(ybr, photometric="YBR_FULL")).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_palette(bits):
    table = np.random.default_rng(1).integers(0, 256, (3, 300)).astype(f"u{bits // 8}")
    if bits == 16:
        table *= 257
    indices = np.linspace(10, 309, 24).astype(np.uint16).reshape(4, 6)
    elements = {}
    for name, plane in zip(("Red", "Green", "Blue"), table, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [300, 10, bits]
        elements[f"{name}PaletteColorLookupTableData"] = plane.astype(f"<u{bits // 8}").tobytes()
    payload = dicom_of(indices, photometric="PALETTE COLOR", **elements)
    expected = (table[:, indices - 10] >> (bits - 8)).astype(np.uint8)
    np.testing.assert_array_equal(decode(payload).numpy(), expected)
    assert reason(dicom_of(indices, photometric="PALETTE COLOR")).startswith(
        "unsupported: a DICOM palette that is missing"
    )


def test_one_bit_and_floating_point():
    mask = RGB[..., 0] > 127
    one = dataset(mask.astype(np.uint8))
    one.BitsAllocated = one.BitsStored = 1
    one.HighBit, one.PixelData = 0, np.packbits(mask.ravel(), bitorder="little").tobytes() + b"\0"
    np.testing.assert_array_equal(grey(file_of(one)), mask * 255)
    real = dataset(RAMP.astype(np.float32))
    del real.PixelData
    real.FloatPixelData = RAMP.astype(np.float32).tobytes()
    assert reason(file_of(real)).startswith("intensity: 32-bit floating-point values from 0 to 4095 have no range")
    np.testing.assert_array_equal(grey(file_of(real), "window=0:4095"), np.rint(RAMP * (255 / 4095)))


def compressed(pixels, frame, syntax, **options):
    made = dataset(pixels, syntax=syntax, **options)
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    return file_of(made)


def encoded(image, format_, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format_, **options)
    return buffer.getvalue()


def test_rle():
    made = dataset(RAMP, bits=12, WindowCenter=2000, WindowWidth=1000)
    made.compress(RLELossless)
    np.testing.assert_array_equal(grey(file_of(made)), by_window(RAMP, 2000, 1000))
    made.PixelData = encapsulate([bytes(64) + bytes(4096)])
    assert reason(file_of(made)).startswith("corrupt: 4,160 bytes of run lengths")


SMOOTH = np.add.outer(np.arange(0, 128, 2), np.arange(0, 96, 2)).astype(np.uint8)


def test_jpeg_within_dicom_has_the_pixels_of_the_jpeg_and_its_damage_is_found():
    jpeg = encoded(SMOOTH, "JPEG", quality=95)
    np.testing.assert_array_equal(
        grey(compressed(SMOOTH, jpeg, JPEGBaseline8Bit)), decode(jpeg, colour="grey").numpy()[0]
    )
    colours = np.stack([SMOOTH, SMOOTH[::-1], SMOOTH[:, ::-1]], axis=-1)
    jpeg = encoded(colours, "JPEG", quality=95, subsampling=0)
    payload = compressed(colours, jpeg, JPEGBaseline8Bit, photometric="YBR_FULL_422")
    assert np.abs(decode(payload).numpy().astype(int) - decode(jpeg).numpy()).max() <= 1
    damaged = bytearray(jpeg)
    damaged[-200:-100] = bytes(100)
    assert reason(compressed(colours, bytes(damaged), JPEGBaseline8Bit, photometric="YBR_FULL_422")).startswith(
        ("damaged: ", "truncated: ", "corrupt: ")
    )
    other = encoded(SMOOTH[:-1], "JPEG")
    assert (
        reason(compressed(SMOOTH, other, JPEGBaseline8Bit))
        == "corrupt: a frame of 48x63 pixels, and the file says 48x64"
    )
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n"
    assert reason(compressed(SMOOTH, eps, JPEGBaseline8Bit)) == "corrupt: a frame that is no JPEG"


def test_jpeg_2000_within_dicom():
    payload = compressed(SMOOTH, encoded(SMOOTH, "JPEG2000", no_jp2=True), JPEG2000Lossless)
    np.testing.assert_array_equal(grey(payload), SMOOTH)
    deep = np.add.outer(np.arange(0, 4096, 64), np.arange(0, 4096, 64)).astype(np.uint16) * 8
    frame = encoded(deep, "JPEG2000", no_jp2=True)
    np.testing.assert_array_equal(grey(compressed(deep, frame, JPEG2000Lossless)), deep >> 8)
    assert reason(compressed(deep[:-1], frame, JPEG2000Lossless)).startswith("corrupt: a frame of 64x64 pixels")
    assert reason(compressed(deep, frame[: len(frame) // 2], JPEG2000Lossless)).startswith(("corrupt", "truncated"))


def test_compression_without_a_plug_in_waits_for_one():
    found = try_decode(compressed(SMOOTH, b"\xff\xd8\xff\xc3", JPEGLosslessSV1), colour="rgb")
    assert isinstance(found, Unavailable)
    assert "JPEG Lossless" in str(found)
    assert "pip install pylibjpeg" in str(found)


def changed(made, **elements):
    for name, value in elements.items():
        setattr(made, name, value)
    return file_of(made)


@pytest.mark.parametrize(
    ("elements", "says"),
    [
        ({"PixelData": bytes(46)}, "truncated: 46 bytes of pixels, and 48 follow from rows, columns, frames and bits"),
        ({"PixelData": bytes(60)}, "corrupt: 60 bytes of pixels, and 48 follow"),
        ({"Rows": 65535, "Columns": 65535}, "bomb: 65535x65535 pixels"),
        ({"Rows": 0}, "empty: 6x0 pixels"),
        ({"NumberOfFrames": 0}, "empty: 0 frames"),
        ({"NumberOfFrames": -1}, "empty: -1 frames"),
        ({"NumberOfFrames": 2}, "truncated: 48 bytes of pixels, and 96 follow"),
        ({"BitsStored": 20}, "unsupported: a DICOM of 20 bits stored in 16"),
        ({"HighBit": 15}, "unsupported: a DICOM whose 12 bits end at bit 15"),
        ({"SamplesPerPixel": 3}, "corrupt: 3 samples a pixel"),
        ({"PhotometricInterpretation": "CMYK"}, "unsupported: a DICOM of photometric interpretation 'CMYK'"),
    ],
)
def test_headers_that_do_not_fit_the_pixels(elements, says):
    assert reason(changed(dataset(RAMP, bits=12), **elements)).startswith(says)


@pytest.mark.parametrize("name", ["Rows", "BitsStored", "PixelRepresentation", "PhotometricInterpretation"])
def test_what_is_missing_is_named(name):
    made = dataset(RAMP, bits=12)
    delattr(made, name)
    assert name in reason(file_of(made))


def test_files_without_pixels_are_no_images():
    made = dataset(RAMP)
    for name in ("PixelData", "Rows"):
        delattr(made, name)
    assert reason(file_of(made)) == "not-an-image: a DICOM file without pixels (Secondary Capture Image Storage)"


@pytest.mark.parametrize("syntax", NATIVE)
def test_every_cut_is_a_reject_with_a_known_code(syntax):
    payload = dicom_of(RAMP, syntax=syntax, bits=12, WindowCenter=40, WindowWidth=400)
    for end in range(133, len(payload) - 2, 7):
        found = try_decode(payload[:end], colour="grey")
        assert isinstance(found, Reject), end
        assert str(found).partition(":")[0] in {"truncated", "corrupt", "not-an-image"}, (end, str(found))


def test_changed_bytes_never_crash():
    payload, rng = dicom_of(RAMP, bits=12, WindowCenter=40, WindowWidth=400), np.random.default_rng(0)
    codes = set()
    for _ in range(300):
        mutant = bytearray(payload)
        for at in rng.integers(132, len(payload) - RAMP.nbytes, 3):
            mutant[at] = rng.integers(256)
        found = try_decode(bytes(mutant), colour="grey")
        codes.add(str(found).partition(":")[0] if isinstance(found, Reject) else "ok")
    assert codes <= {"ok", "truncated", "corrupt", "not-an-image", "unsupported", "bomb", "empty", "intensity"}, codes


def test_a_deflated_bomb_is_not_inflated(monkeypatch):
    payload = dicom_of(np.zeros((600, 600), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.setenv("FEATUREPIPE_MAX_FILE_BYTES", "500kB")
    assert len(payload) < 10_000
    assert reason(payload).startswith("bomb: inflates to more than FEATUREPIPE_MAX_FILE_BYTES allows")
    assert zlib.MAX_WBITS == 15


def test_dicom_is_known_by_content_and_a_manifest_can_name_files_without_a_suffix(tmp_path):
    (tmp_path / "scan").mkdir()
    for name in ("IM0001", "a.dcm", "b.DICOM"):
        (tmp_path / "scan" / name).write_bytes(dicom_of(RAMP, bits=12))
    listing = open_source(str(tmp_path)).scan()
    assert listing["id"].to_pylist() == ["scan/a.dcm", "scan/b.DICOM"]
    lines = ListingSummary.of(listing).lines("pile")
    assert "passed over 1 file: no suffix 1 (a manifest can name images without a suffix, as of DICOM)" in lines[1]
    (tmp_path / "list.csv").write_text("path\nscan/IM0001\n")
    source = open_source(str(tmp_path / "list.csv"))
    (locator,) = source.scan()["locator"].to_pylist()
    np.testing.assert_array_equal(grey(source.read(locator)), RAMP >> 4)


def test_without_pydicom_it_is_said_once_and_left_for_the_next_run(tmp_path, monkeypatch):
    payload = dicom_of(RAMP, bits=12)
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(payload)
    assert not ListingSummary.of(open_source(str(tmp_path)).scan()).undecodable
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert not dicom.has_pydicom()
    found = try_decode(payload, colour="rgb")
    assert isinstance(found, Unavailable)
    assert str(found) == "unsupported: DICOM without pydicom; pip install featurepipe[dicom]"
    summary = ListingSummary.of(open_source(str(tmp_path)).scan())
    assert summary.undecodable == ["2 DICOM files cannot be decoded here: pip install featurepipe[dicom]"]
    assert summary.lines("pile", labels=False)[1] == f"pile: {summary.undecodable[0]}"


def test_rejects_of_releases_before_are_tried_again():
    assert is_outdated("not-an-image: starts with b'\\x00'; known are JPEG, PNG, WebP, GIF, BMP, TIFF")
    assert is_outdated("unsupported: HEIC")
    assert not is_outdated(reason(struct.pack("16x")))
