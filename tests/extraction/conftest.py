"""Small images, a small network, and a source that counts."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurepipe.extraction.extract import extract
from featurepipe.images import open_source
from featurepipe.store import FeatureStore

NETWORK = """
import torch
from torch import nn
from featurepipe.backbones import Preprocessing

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.flat(self.pool(self.act(self.norm(self.conv(x))))))

def make():
    torch.manual_seed(7)
    net = Tiny()
    net.norm.running_mean.uniform_(-0.5, 0.5)
    net.norm.running_var.uniform_(0.5, 2)
    net.preprocessing = Preprocessing(
        resize=20, crop=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
    )
    return net
"""


def encoded(seed: int, format_: str = "PNG", height: int = 36, width: int = 44) -> bytes:
    """A smooth coloured picture that no other seed gives."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    options = {"quality": 92} if format_ == "JPEG" else {}
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format_, **options)
    return buffer.getvalue()


class Album:
    """A folder of images that tests add to, move about in and damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, seed: int, **options: Any) -> Path:
        format_ = "JPEG" if name.lower().endswith((".jpg", ".jpeg")) else "PNG"
        return self.write(name, encoded(seed, format_, **options))

    def write(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def fill(self, count: int, first: int = 0, pattern: str = "{:03d}.png") -> None:
        for number in range(first, first + count):
            self.add(pattern.format(number), number)


class Counting:
    """A source that counts what is read from it."""

    def __init__(self, spec: Any) -> None:
        self._source = open_source(spec)
        self.location = self._source.location
        self.name = self._source.name
        self.reads = 0

    def scan(self) -> Any:
        return self._source.scan()

    def read(self, locator: bytes) -> Any:
        self.reads += 1
        return self._source.read(locator)

    def close(self) -> None:
        self._source.close()


class Run:
    """Extracts with lenet5 in fp32 unless told otherwise, and counts reads, decodes and forwards."""

    def __init__(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from featurepipe.backbones.engine import Engine
        from featurepipe.features import session

        self.path = store
        self.reads = self.decodes = self.forwards = 0
        decode, submit = session.try_decode, Engine.submit

        def counting_decode(payload: Any, **options: Any) -> Any:
            self.decodes += 1
            return decode(payload, **options)

        def counting_submit(engine: Engine, batch: Any) -> Any:
            self.forwards += len(batch)
            return submit(engine, batch)

        monkeypatch.setattr(session, "try_decode", counting_decode)
        monkeypatch.setattr(Engine, "submit", counting_submit)

    @property
    def store(self) -> FeatureStore:
        return FeatureStore(self.path, create=False)

    def __call__(self, source: Any, **options: Any) -> dict[str, Any]:
        self.reads = self.decodes = self.forwards = 0
        counted = Counting(source)
        defaults = {"backbone": "lenet5", "weights": "none", "precision": "fp32", "silent": True, "workers": 2}
        if ":" in options.get("backbone", ""):
            defaults["weights"] = "DEFAULT"
        try:
            return extract(counted, self.path, **{**defaults, **options})
        finally:
            self.reads = counted.reads

    def counts(self, source: Any, **options: Any) -> tuple[int, int, int, int, int]:
        """(computed, known, reads, decodes, forwards) of one run."""
        counts = self(source, **options)["counts"]
        return counts["computed"], counts["known"], self.reads, self.decodes, self.forwards

    def features(self, dataset: str = "album", node: str = "bottleneck", **options: Any) -> dict[str, np.ndarray]:
        """Feature by id."""
        found = self.store.features(dataset, node, **options)
        return dict(zip(found.ids, found.read(np.float32), strict=True))

    def parts(self) -> dict[str, str]:
        """SHA-256 of each part file, by name."""
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in self.path.glob("spaces/*/parts/*.h5")}


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return Album(tmp_path / "album")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path / "store", monkeypatch)


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a user's network, importable as the name it returns; ``edit`` maps its source to another."""
    count = 0

    def write(edit: Callable[[str], str] = lambda source: source, name: str | None = None) -> str:
        nonlocal count
        count += 1
        module = name or f"net_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{module}.py").write_text(edit(NETWORK))
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)
        __import__("importlib").invalidate_caches()
        return f"{module}:make"

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return write


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for seconds before it is tried again."""
    monkeypatch.setattr("featurepipe.features.reading.WAITS", (0.001, 0.001, 0.001))
