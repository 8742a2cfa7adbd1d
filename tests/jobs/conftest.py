"""Small piles of images, and jobs that run over them with the tiny lenet5."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurepipe.jobs.run import run_job
from featurepipe.store import FeatureStore

JOB = """
store = "features"
{top}
[source]
path = "pile"
retries = 0
{source}
[[features]]
backbone = "lenet5"
weights = "none"
nodes = ["c3", "bottleneck"]
precision = "fp32"
dtype = "float32"
[machine]
device = "cpu"
workers = 2
{rest}
"""


def picture(seed: int) -> bytes:
    """A smooth coloured PNG that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((44, 36), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


class Pile:
    """A folder of images that tests add to, move about in and damage; and a job over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.file = folder, folder / "pile", folder / "nightly.toml"
        self.root.mkdir()
        self.job()

    def add(self, name: str, seed: int) -> Path:
        return self.write(name, picture(seed))

    def write(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def fill(self, count: int, first: int = 0, folder: str = "") -> None:
        for number in range(first, first + count):
            self.add(f"{folder}{number:03d}.png", number)

    def job(self, rest: str = "", *, top: str = "", source: str = "") -> Path:
        """Writes the job file, with these lines added."""
        self.file.write_text(JOB.format(top=top, source=source, rest=rest))
        return self.file

    def run(self, **options: Any) -> dict[str, Any]:
        return run_job(self.file, **{"silent": True, **options})

    @property
    def store(self) -> FeatureStore:
        return FeatureStore(self.folder / "features", create=False)

    def records(self) -> list[dict[str, Any]]:
        """The records of the job's runs, oldest first."""
        return [record for record in self.store.runs() if record["command"] == "run"]


@pytest.fixture
def pile(tmp_path: Path) -> Pile:
    return Pile(tmp_path)
