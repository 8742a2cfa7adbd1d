"""The routing of the GPU decoder, with nvJPEG played by the CPU decoder; with CUDA, the real one too."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from featurepipe.errors import Reject
from featurepipe.images import decode_gpu
from featurepipe.images.decode import decode


def jpeg(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture
def photo():
    return load_sample_images().images[0][:200, :300]


@pytest.fixture
def played(monkeypatch):
    """nvJPEG's part is played by the CPU decoder; returns how many images each call got."""
    calls = []

    def play(payloads, device):
        calls.append(len(payloads))
        if device != "cpu":
            raise AssertionError(device)
        return [decode(payload) for payload in payloads]

    monkeypatch.setattr(decode_gpu, "decode_jpegs", play)
    return calls


@pytest.fixture
def library(monkeypatch):
    """Puts a stand-in for a library's module in place."""

    def put(name, **functions):
        monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**functions))

    decode_gpu._torchcodec.cache_clear()
    yield put
    decode_gpu._torchcodec.cache_clear()


def payloads(photo):
    turned = Image.Exif()
    turned[0x0112] = 6
    png = io.BytesIO()
    Image.fromarray(photo).save(png, "PNG")
    return {
        "plain": jpeg(photo),
        "turned": jpeg(photo, exif=turned),
        "png": png.getvalue(),
        "grey": jpeg(photo[:, :, 0]),
        "array": photo,
        "smaller": jpeg(photo[:64, :64]),
    }


def test_only_upright_colour_jpegs_take_the_fast_route_and_order_is_kept(photo, played):
    images = payloads(photo)
    found = list(decode_gpu.decode_batch(list(images.values()), colour="rgb", device="cpu"))
    assert played == [2]
    for payload, image in zip(images.values(), found, strict=True):
        assert torch.equal(image, decode(payload))


def test_a_damaged_jpeg_fails_alone_with_the_reason_of_the_cpu_route(photo, played):
    images = payloads(photo)
    broken = images["plain"][:2000]
    found = list(decode_gpu.decode_batch([images["smaller"], broken, b"", images["plain"]], colour="rgb", device="cpu"))
    with pytest.raises(Reject) as expected:
        decode(broken)
    assert torch.equal(found[0], decode(images["smaller"]))
    assert isinstance(found[1], Reject)
    assert str(found[1]) == str(expected.value)
    assert str(found[2]) == "empty: 0 bytes"
    assert torch.equal(found[3], decode(images["plain"]))


def test_what_looks_damaged_is_judged_by_the_cpu_route(photo, played):
    whole = jpeg(photo)
    zeroed = whole[: len(whole) // 3] + bytes(len(whole) - len(whole) // 3 - 2) + whole[-2:]
    found = list(decode_gpu.decode_batch([zeroed, whole[:-2], whole], colour="rgb", device="cpu"))
    assert played == [1]
    assert str(found[0]).startswith(("damaged", "truncated"))
    assert torch.equal(found[1], found[2])


def test_grey_networks_decode_on_the_cpu(photo, played):
    payload = jpeg(photo)
    assert torch.equal(
        next(decode_gpu.decode_batch([payload], colour="grey", device="cpu")), decode(payload, colour="grey")
    )
    assert played == []


def test_torchcodec_decodes_all_that_suit_in_one_call(photo, library):
    calls = []

    def decode_jpeg(source, *, mode, device):
        calls.append((len(source), mode, device))
        return [decode(payload) for payload in source]

    library("torchcodec.decoders", decode_jpeg=decode_jpeg)
    images = payloads(photo)
    found = list(decode_gpu.decode_batch(list(images.values()), colour="rgb", device="cpu"))
    assert calls == [(2, "RGB", "cpu")]
    for payload, image in zip(images.values(), found, strict=True):
        assert torch.equal(image, decode(payload))


@pytest.mark.parametrize("functions", [{}, {"VideoDecoder": object}])
def test_without_torchcodec_or_with_one_that_decodes_no_images_torchvision_does(photo, library, functions):
    calls = []

    def decode_jpeg(data, mode, *, device):
        calls.append((len(data), str(mode), device))
        return [decode(bytes(one.numpy())) for one in data]

    library("torchcodec.decoders", **functions)
    if not functions:
        sys.modules["torchcodec.decoders"] = None  # as if it were not installed; the fixture puts back what was
    library("torchvision.io", decode_jpeg=decode_jpeg, ImageReadMode=types.SimpleNamespace(RGB="RGB"))
    assert torch.equal(next(decode_gpu.decode_batch([jpeg(photo)], colour="rgb", device="cpu")), decode(jpeg(photo)))
    assert calls == [(1, "RGB", "cpu")]


def test_what_fails_on_the_device_is_decoded_on_the_cpu(photo, library):
    def decode_jpeg(source, **_):
        raise RuntimeError("nvJPEG: CUDA out of memory")

    library("torchcodec.decoders", decode_jpeg=decode_jpeg)
    assert torch.equal(next(decode_gpu.decode_batch([jpeg(photo)], colour="rgb", device="cpu")), decode(jpeg(photo)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nvjpeg_gives_nearly_the_pixels_of_the_cpu(photo):
    payload = jpeg(photo, quality=95)
    found = next(decode_gpu.decode_batch([payload], colour="rgb", device="cuda"))
    assert found.device.type == "cuda"
    difference = np.abs(found.cpu().numpy().astype(int) - decode(payload).numpy().astype(int))
    assert difference.mean() < 2
