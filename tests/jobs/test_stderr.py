"""What libraries write past Python reaches the log line by line; with JSON lines, nothing else is on standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from featurepipe.images.damage import silence_libtiff
from featurepipe.jobs.log import captured_stderr

DAMAGED = """
import io, sys
import numpy as np
from PIL import Image
from featurepipe.errors import Reject
from featurepipe.images.decode import decode

rng = np.random.default_rng(0)
picture = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
said = []
for form in ("tiff_lzw", "tiff_adobe_deflate", "group3", "group4", "packbits", "jpeg"):
    file = io.BytesIO()
    picture.convert("1" if form.startswith("group") else "RGB").save(file, "TIFF", compression=form)
    for step in (3, 7, 30):
        data = bytearray(file.getvalue())
        data[12 : len(data) // 2 : step] = bytes(len(data[12 : len(data) // 2 : step]))
        try:
            decode(bytes(data))
        except Reject as reject:
            said.append(str(reject))
for mode in ("RGB", "CMYK", "L"):
    file = io.BytesIO()
    picture.convert(mode).save(file, "JPEG")
    data = file.getvalue()
    stray = data.replace(b"\\xff\\xda", b"ab\\xff\\xda")
    for damaged in (data[: len(data) // 2], data[: len(data) // 2] + bytes(len(data) // 2), stray):
        try:
            decode(damaged)
        except Reject as reject:
            said.append(str(reject))
print(len(said))
"""


@pytest.mark.slow
def test_no_decoder_writes_to_standard_error():
    ended = subprocess.run([sys.executable, "-c", DAMAGED], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert int(ended.stdout) >= 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell which libraries are loaded")
def test_libtiff_is_found():
    assert silence_libtiff()


NOISY = """
import os, sys, threading
from featurepipe.jobs.log import job_log

with job_log("nightly", log_format="json") as log:
    log.event("begin")
    os.write(2, b"a library\\nspeaks\\n\\n  \\n")
    os.system("echo a child >&2")
    print("Python", file=sys.stderr)
    os.write(2, b"x" * 200_000 + b"\\n")  # more than a pipe holds, with the interpreter's lock held
    os.write(2, b"no end of line \\xff")
os.write(2, b"afterwards\\n")
"""


def test_json_lines_alone_whoever_writes():
    ended = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, check=True, timeout=100)
    *lines, last = ended.stderr.splitlines()
    assert last == "afterwards"
    texts = [json.loads(line).get("text") for line in lines]
    assert sorted(text for text in texts if text and len(text) < 100) == [
        "Python", "a child", "a library", b"no end of line \\ufffd".decode("unicode_escape"), "speaks"
    ]  # fmt: skip
    assert "x" * 200_000 in texts


def test_a_stand_in_for_standard_error_is_left_alone(capsys):
    told = []
    with captured_stderr(told.append) as captured:
        assert captured.stream is sys.stderr
        print("seen", file=sys.stderr)
    assert capsys.readouterr().err == "seen\n"
    assert told == []


def test_a_closed_standard_error_is_left_alone(monkeypatch):
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(sys, "stderr", closed)
    with captured_stderr(lambda _: None) as captured:
        assert captured.stream is closed
    monkeypatch.setattr(sys, "stderr", None)
    with captured_stderr(lambda _: None) as captured:
        assert captured.stream is None
