"""Makes the images that ``featurepipe demo`` runs on: a balanced sample of Fashion-MNIST, as four IDX.gz files.

    python tools/make_demo_data.py FOLDER [--to featurepipe/data]

FOLDER holds Fashion-MNIST's four original files. The same files give the same bytes: the sample is seeded, and gzip
writes no time stamp and no file name.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

PER_CLASS = {"train": 160, "t10k": 40}
CLASSES = 10
SEED = 0
_HEADERS = {"images-idx3-ubyte": 16, "labels-idx1-ubyte": 8}

Bytes = npt.NDArray[np.uint8]


def main() -> None:
    """Reads the whole data set, draws the sample, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "featurepipe" / "data")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        labels = _read(args.folder, split, "labels-idx1-ubyte")
        images = _read(args.folder, split, "images-idx3-ubyte").reshape(-1, 28, 28)
        chosen = balanced_sample(labels, per_class)
        _write(args.to, split, "labels-idx1-ubyte", labels[chosen])
        _write(args.to, split, "images-idx3-ubyte", images[chosen])


def balanced_sample(labels: Bytes, per_class: int) -> npt.NDArray[np.int64]:
    """Positions of ``per_class`` images of each class, drawn without replacement, in the data set's order."""
    generator = np.random.default_rng(SEED)
    drawn = [generator.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(CLASSES)]
    return np.sort(np.concatenate(drawn))


def _read(folder: Path, split: str, kind: str) -> Bytes:
    with gzip.open(folder / f"{split}-{kind}.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=_HEADERS[kind])


def _write(folder: Path, split: str, kind: str, values: Bytes) -> None:
    # IDX: two zero bytes, 0x08 for uint8, the number of dimensions, then each dimension as a big-endian uint32
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 0x08, values.ndim, *values.shape)
    packed = gzip.compress(header + values.tobytes(), compresslevel=9, mtime=0)
    (folder / f"{split}-{kind}.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
