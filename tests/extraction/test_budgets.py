"""One image that takes too much memory, time or anything else is a reject; the others are computed, and a stop is a stop."""

from __future__ import annotations

import importlib
import io
import re
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featurepipe.backbones import Preprocessing
from featurepipe.errors import Reject, UsageError
from featurepipe.features import loader as stream
from featurepipe.features.loader import Loader, StageSeconds
from featurepipe.features.session import Decoding, decoder_for
from featurepipe.images import open_source
from featurepipe.images.budgets import ALL, DecodeMemory, check_budgets
from featurepipe.images.decode import decode


def encoded(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


PREPROCESSING = Preprocessing(resize=16, crop=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def noise(seed, side=16):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def loaded(payloads, decoder=None, prepare=lambda pixels, _row: pixels, stop=bool, workers=2):
    """Loads some encoded images; gives the images by their number."""
    source = open_source({f"{i:03d}": payload for i, payload in enumerate(payloads)})
    decoder = decoder or decoder_for(Decoding("cpu", "declared"), PREPROCESSING, "cpu")
    loader = Loader(source, lambda _: ("all",), decoder, prepare, clock=StageSeconds(), workers=workers, window=8)
    listing = source.scan().combine_chunks()
    return [image for images in loader.load(listing, np.arange(len(payloads)), stop) for image in images]


def test_a_file_beyond_its_budget_is_not_read(monkeypatch, tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(3 << 40)
    (tmp_path / "good.png").write_bytes(encoded(noise(0)))
    source = open_source(tmp_path)
    loader = Loader(
        source, lambda _: ("all",), decoder_for(Decoding("cpu", "declared"), PREPROCESSING, "cpu"), lambda pixels, _row: pixels,
        clock=StageSeconds(), workers=1, window=8,
    )  # fmt: skip
    listing = source.scan().combine_chunks()
    found = {image.row: image for images in loader.load(listing, np.arange(2)) for image in images}
    good, huge = found[0], found[1]
    assert good.pixels is not None
    assert huge.reason == "budget: 3,298,534,883,328 bytes, more than FEATUREPIPE_MAX_FILE_BYTES allows (1,000,000,000)"
    assert huge.key is None
    monkeypatch.setenv("FEATUREPIPE_MAX_FILE_BYTES", "100")
    with pytest.raises(Reject, match=r"^budget: "):
        decode(encoded(noise(0)))


def test_pixels_and_scans_have_budgets(monkeypatch):
    payload = encoded(noise(0, 64), "JPEG", progressive=True)
    decode(payload)
    monkeypatch.setenv("FEATUREPIPE_MAX_JPEG_SCANS", "4")
    with pytest.raises(Reject, match=r"^budget: a JPEG of more than 4 scans"):
        decode(payload)
    monkeypatch.setenv("FEATUREPIPE_MAX_PIXELS", "4095")
    with pytest.raises(Reject, match=r"^bomb: 64x64 pixels, more than 4095"):
        decode(payload)


def run_length_bmp(width, height, body):
    fields = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + fields + bytes(range(256)) * 4 + body


def test_run_lengths_must_be_there():
    rows = b"".join(bytes([100, 7]) + b"\0\0" for _ in range(50)) + b"\0\1"
    assert decode(run_length_bmp(100, 50, rows)).shape == (3, 50, 100)
    with pytest.raises(Reject, match=r"^bomb: "):
        decode(run_length_bmp(100_000, 1_000, rows))


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), OverflowError("too large"), RuntimeError("x")]
)
@pytest.mark.parametrize("place", ["read", "decode", "prepare"])
def test_every_exception_at_one_image_is_a_reject(monkeypatch, place, error):
    payloads = [encoded(noise(i)) for i in range(10)]

    def failing(real, seen):
        def call(value, *rest, **options):
            if seen(value):
                raise error
            return real(value, *rest, **options)

        return call

    prepare = lambda pixels, _row: pixels  # noqa: E731
    if place == "read":
        monkeypatch.setattr(stream, "key_of", failing(stream.key_of, lambda payload: payload == payloads[3]))
    elif place == "decode":
        module = importlib.import_module("featurepipe.images.decode")
        monkeypatch.setattr(module, "check_bytes", failing(module.check_bytes, lambda size: size == len(payloads[3])))
        payloads = [payload + bytes(i) for i, payload in enumerate(payloads)]
    else:
        third = torch.from_numpy(noise(3)).permute(2, 0, 1)
        prepare = failing(prepare, lambda pixels: torch.equal(pixels, third))
    found = loaded(payloads, prepare=prepare)
    assert [image.row for image in found if image.reason is not None] == [3]
    assert [image.row for image in found if image.pixels is not None] == [row for row in range(10) if row != 3]
    code, remembered = ("memory", False) if isinstance(error, MemoryError) else ("failed", place != "read")
    assert found[3].reason.startswith(f"{code}: ")
    assert (found[3].key is not None) == remembered


def slow_at(places, payloads, wait):
    """A decoder that ``wait`` holds up at some of the images."""

    def decoder(batch, claim):
        for payload in batch:
            claim(1_000)
            if payloads.index(payload) in places:
                wait()
            yield decode(payload)

    return decoder


@pytest.mark.slow
@pytest.mark.parametrize("in_python", [True, False])
def test_an_image_that_takes_too_long_is_given_up(monkeypatch, in_python):
    monkeypatch.setenv("FEATUREPIPE_DECODE_SECONDS", "1")
    payloads = [encoded(noise(i)) for i in range(40)]
    over = threading.Event()

    def wait():
        while in_python:  # ended by an exception from outside
            time.sleep(0.01)
        over.wait(60)  # as in a library, where none arrives

    before = threading.active_count()
    try:
        found = loaded(payloads, slow_at({2, 3, 17}, payloads, wait))
    finally:
        over.set()
    late = [image for image in found if image.reason is not None]
    assert [image.row for image in found] == list(range(40))
    assert [image.row for image in late] == [2, 3, 17]
    assert {image.reason for image in late} == {
        "time: takes more than 1 seconds to decode, the limit of FEATUREPIPE_DECODE_SECONDS"
    }
    assert all(image.key is None for image in late), "the next run tries again"
    assert all(torch.equal(image.pixels, decode(payloads[image.row])) for image in found if image.reason is None)
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.1)
    assert threading.active_count() <= before


def test_a_stop_does_not_wait_for_a_decoder(monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE", 0.2)
    payloads, over = [encoded(noise(i)) for i in range(8)], threading.Event()
    start = time.monotonic()
    try:
        assert (
            loaded(payloads, slow_at({0}, payloads, lambda: over.wait(60)), stop=lambda: time.monotonic() > start + 0.5)
            == []
        )
    finally:
        over.set()
    assert time.monotonic() - start < 30


def test_memory_for_decoding_is_shared_in_the_order_of_asking():
    memory, events = DecodeMemory(lambda: 100), []

    def use(name, amount):
        with memory.lease() as lease:
            lease(amount)
            events.append(name)

    with memory.lease() as first:
        first(60)
        threads = []
        for name, amount in (("large", 1_000), ("small", 10)):
            threads.append(threading.Thread(target=use, args=(name, amount)))
            threads[-1].start()
            while len(memory._queue) < len(threads):
                time.sleep(0.001)
        assert events == []  # the small one would fit, but comes later
        first.end()
        first.end()
        for thread in threads:
            thread.join(30)
    assert events == ["large", "small"]
    assert memory._held == 0


def test_a_lease_that_asks_anew_gives_back_first():
    memory = DecodeMemory(lambda: 100)
    with memory.lease() as lease:
        for _ in range(3):
            lease(80)
        assert memory._held == 80
    assert memory._held == 0


@pytest.mark.parametrize("budget", ALL, ids=lambda budget: budget.variable)
def test_budgets_are_read_from_the_environment_and_documented(monkeypatch, budget):
    assert budget() >= 1
    monkeypatch.setenv(budget.variable, "7")
    assert budget() == 7
    monkeypatch.setenv(budget.variable, "many")
    with pytest.raises(UsageError, match=f"^{budget.variable}='many'"):
        check_budgets()


def test_the_table_of_budgets_is_complete():
    text = (Path(__file__).parents[2] / "docs/limits.md").read_text()
    for budget in ALL:
        assert f"| `{budget.variable}` | `{budget.default}` |" in text


STUCK = """
import sys, time
from pathlib import Path
from featurepipe.cli import main
from featurepipe.features import session

real = session.try_decode

def stuck(payload, **options):
    if payload.endswith(b"stuck"):
        Path("READY").write_text("")
        time.sleep(1_000)  # in C, where no exception arrives
    return real(payload, **options)

session.try_decode = stuck
sys.exit(main(["extract", "pile", "--store", "store", "--backbone", "lenet5", "--weights", "none", "--precision", "fp32",
               "--workers", "2"]))
"""


def test_sigterm_ends_a_run_whose_decoder_is_stuck(tmp_path, launcher):
    (tmp_path / "pile").mkdir()
    for i in range(40):
        (tmp_path / "pile" / f"{i:02d}.png").write_bytes(encoded(noise(i)) + b"stuck" * (i == 30))
    process = launcher.start(STUCK, cwd=tmp_path)
    while not (tmp_path / "READY").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    done = process.wait()
    assert done.code == 128 + signal.SIGTERM, done.err
    assert re.search(r"stopped by SIGTERM: \d+ images computed and committed", done.err)
    assert "Traceback" not in done.err
