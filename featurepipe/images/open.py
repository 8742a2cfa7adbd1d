"""From what a user names to the source that reads it."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH111, PTH112, PTH119, PTH120, PTH122

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa

from featurepipe.annotations import KEPT_COLUMN
from featurepipe.display import counted
from featurepipe.errors import FeaturepipeError, Message, Option, SourceError, UsageError, missing, unsearchable
from featurepipe.images.annotated import CLASS_FILES, AnnotatedSource, YoloSource, is_yolo
from featurepipe.images.archives import ArchiveSource
from featurepipe.images.arrays import IDX_IMAGES, ArrayReader, ArraySource, read_idx, read_npz
from featurepipe.images.coco import CocoSource
from featurepipe.images.dicom import DICOM_SUFFIXES, frames_in
from featurepipe.images.files import is_chain, is_url, location_of, open_anew, url_in
from featurepipe.images.folder import FolderSource, RemoteFolderSource
from featurepipe.images.listing import SCHEMA, UNKNOWN, check_unique, is_image_name, with_note
from featurepipe.images.manifest import MANIFEST_SUFFIXES, ManifestSource
from featurepipe.images.memory import Item, MemorySource
from featurepipe.images.regions import Boxes, Frame, FramesFile, Payload, file_of, frame_locator, split_frame
from featurepipe.images.source import OnlyUnder, Source

ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".zip")
COCO_SUFFIX: Final = ".json"
FIRST, ALL = FRAMES = ("first", "all")
_HEADER_BYTES: Final = (1 << 16, 1 << 22, sys.maxsize)
"""What is read of a file, step by step, until its frames are known."""
_HEADERS_AT_ONCE: Final = 8  # a share answers each only after a while
HDF5_SUFFIXES: Final = (".h5", ".hdf5")
_CHOICES: Final = (
    "a folder of images, a manifest (.csv .parquet .jsonl), boxes in COCO's .json or a YOLO folder, "
    "archives (.tar .tar.gz .tgz .zip, or a glob of them), "
    "image arrays (.npz .h5 .hdf5, *idx3-ubyte[.gz]), or any of them under a URL (s3://, http://, memory://)"
)

Spec = str | os.PathLike[str] | Source | Sequence[Item] | Mapping[str, Item] | np.ndarray[Any, Any]


def open_source(
    spec: Spec,
    *,
    array_readers: Mapping[str, ArrayReader] | None = None,
    only_under: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    path_column: str | None = None,
    boxes: Boxes | None = None,
    images: str | os.PathLike[str] | None = None,
    frames: str = FIRST,
) -> Source:
    """Makes the source for whatever names images.

    Args:
        spec: A path, glob or URL; a source, which is returned as it is; a sequence of paths; a mapping id -> bytes,
            array or path; or one array of pixels, (N,H,W) or (N,H,W,C).
        array_readers: For suffixes of array files that this package cannot open itself (``.h5``), functions from a
            path to a mapping name -> array that is read by slicing; picklable, so that the source is.
        only_under: A folder, the URL of one, or several: of what a manifest names, or a link in a folder leads to, only files
            below them are read, all others are rejects; see `OnlyUnder`. By default any.
        path_column: The column of a manifest that holds the paths; see `ManifestSource`.
        boxes: Where boxes are, their unit and margin; by default as `Boxes` says.
        images: A folder, its URL, or archives with the images that a manifest or COCO file names; by default beside it.
        frames: ``first`` of a DICOM file of several frames, or ``all``, each an image of its own; see `EachFrame`.

    Raises:
        UsageError: Nothing can be read from such a thing; names the value and the choices. Or it is a URL that is not below
            ``only_under``; or it is no manifest, and a ``path_column``, ``boxes`` or ``images`` are given.
        SourceError: The path does not exist.
    """
    if frames not in FRAMES:
        raise UsageError(Message("unknown ", Option("frames", frames), f"; choices: {', '.join(FRAMES)}"))
    source = _bounded(spec, array_readers or {}, only_under)
    if path_column is not None:
        if not isinstance(source, ManifestSource) or isinstance(source, AnnotatedSource):
            raise UsageError(
                f"{source.name} has no columns: a path column is for a manifest ({', '.join(MANIFEST_SUFFIXES)})"
            )
        source.path_column = path_column
    if boxes is not None and boxes != Boxes():
        if not isinstance(source, ManifestSource):
            raise UsageError(
                Message(
                    Option("box"), ", ", Option("box_unit"), " and ", Option("box_margin"),
                    f" are for manifests ({', '.join(MANIFEST_SUFFIXES)}), and {source.name} is none; list its images in one",
                )
            )  # fmt: skip
        source.boxes = boxes
    if images is not None:
        _look_in(source, os.fspath(images))
    return EachFrame(source) if frames == ALL else source


class EachFrame(Source):
    """The images of a source, each frame of a DICOM file of several as an image of its own.

    Frame n of a file is called ``path#n``, from 1; the frames of one file are a group. A file of one frame stays as it is. To
    know how many there are, a listing reads the header of each file that may be DICOM by its name; where the source has no
    part of a file to give, all of it. Regions stay those of the first frame.

    Args:
        source: The images.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name, self.location, self.only_under = source.name, source.location, source.only_under

    def scan(self) -> pa.Table:
        """Lists the frames, file by file; reads headers."""
        table = self._source.scan().combine_chunks()
        ids, locators, sizes = (table[name].to_pylist() for name in ("id", "locator", "size"))
        asked = [row for row, id_ in enumerate(ids) if _may_be_dicom(id_) and file_of(locators[row]) == locators[row]]
        counts = np.ones(len(ids), np.int64)
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            counts[asked] = list(pool.map(self._count, [locators[row] for row in asked], [sizes[row] for row in asked]))
        several = np.flatnonzero(counts > 1)
        if not len(several):
            return table
        rows = np.repeat(np.arange(len(ids)), counts)
        frames = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
        taken = table.take(pa.array(rows))
        is_frame = (counts > 1)[rows]
        names, places = taken["id"].to_pylist(), taken["locator"].to_pylist()
        for place in np.flatnonzero(is_frame).tolist():
            names[place] = f"{names[place]}#{frames[place]}"
            places[place] = frame_locator(places[place], int(frames[place]))
        for name, values in (("id", names), ("locator", places)):
            at, field = table.column_names.index(name), SCHEMA.field(name)
            taken = taken.set_column(at, field, pa.array(values, field.type))
        group = f"{KEPT_COLUMN}group"
        if group not in taken.column_names:
            taken = taken.append_column(group, pa.array([ids[row] for row in rows.tolist()], pa.string()))
        said = f"{counted(int(counts[several].sum()), 'frame')} of {counted(len(several), 'DICOM file')} of several"
        return with_note(check_unique(taken, self.location), said)

    def read(self, locator: bytes) -> Payload:
        """Reads one image or frame; see :meth:`Source.read`."""
        file, number = split_frame(locator)
        payload = self._source.read(file)
        return payload if number is None or not isinstance(payload, bytes) else Frame(FramesFile(payload), number)

    def close(self) -> None:
        """Releases what is held open."""
        self._source.close()

    def _count(self, locator: bytes, size: int) -> int:
        """How many frames a file has; 1 if it cannot be read, which is told when it is to be."""
        for part in _HEADER_BYTES:
            try:
                head = getattr(self._source, "head", partial(Source.head, self._source))(
                    locator, part
                )  # or a user's own
            except FeaturepipeError:
                return 1
            whole = len(head) if len(head) < part or size == UNKNOWN else size
            if (found := frames_in(head, whole)) is not None:
                return found
        return 1


def _may_be_dicom(id_: str) -> bool:
    return id_.lower().endswith(DICOM_SUFFIXES) or not is_image_name(id_)


def _look_in(source: Source, images: str) -> None:
    """Has a manifest's images looked for in a folder or archive."""
    if not isinstance(source, ManifestSource) or isinstance(source, YoloSource):
        raise UsageError(
            Message(
                Option("images"), f" is for manifests and COCO files, and {source.name} is neither: it has its images"
            )
        )
    if is_url(images) and not images.lower().endswith(ARCHIVE_SUFFIXES):
        source.images = images.rstrip("/")
        return
    path = images if is_url(images) else os.path.abspath(os.path.expanduser(images))
    if os.path.isdir(path):
        source.images = path
        return
    archive = _open(path, {})
    if not isinstance(archive, ArchiveSource):
        raise UsageError(Message(Option("images", images), " is neither a folder nor an archive"))
    source.archive = archive


def _bounded(
    spec: Spec,
    readers: Mapping[str, ArrayReader],
    only_under: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
) -> Source:
    if only_under is None:
        return _open(spec, readers)
    bounds = OnlyUnder([only_under] if isinstance(only_under, str | os.PathLike) else only_under)
    if hasattr(spec, "scan") and hasattr(spec, "read"):
        raise UsageError("only_under is for sources by path or URL; this one is open already")
    if (
        isinstance(spec, str | os.PathLike)
        and is_url(url := os.fspath(spec))
        and not bounds.allows(url.rstrip("/") + "/")
    ):
        raise UsageError(
            Message(
                f"{location_of(url)} is not below {' or '.join(bounds.places)}, which ",
                Option("only_under"),
                " asks for; to read it all the same, add ",
                Option("only_under", location_of(url)),
            )
        )
    source = _open(spec, readers)
    source.only_under = bounds
    return source


def _open(spec: Spec, readers: Mapping[str, ArrayReader]) -> Source:
    if hasattr(spec, "scan") and hasattr(spec, "read"):
        return cast("Source", spec)
    if isinstance(spec, bytes):
        raise UsageError(f"cannot read images from bytes; give a mapping id -> bytes, or {_CHOICES}")
    if isinstance(spec, str | os.PathLike):
        path = os.fspath(spec)
        return _open_url(path.rstrip("/"), readers) if is_url(path) else _open_path(os.path.expanduser(path), readers)
    if isinstance(spec, Mapping | Sequence | np.ndarray):
        return MemorySource(spec)
    raise UsageError(f"cannot read images from a {type(spec).__name__}; give {_CHOICES}")


def _open_path(path: str, readers: Mapping[str, ArrayReader]) -> Source:
    if os.path.isdir(path):
        idx = _idx_files(path, os.listdir(path))
        if idx:
            return _idx_source(idx, path)
        names_classes = any(os.path.exists(f"{path}/{name}") for name in CLASS_FILES)
        return YoloSource(path) if names_classes and is_yolo(path) else FolderSource(path)
    if os.path.exists(path):
        return _open_file(os.path.abspath(path), readers)
    if glob.has_magic(path):
        return _open_many(sorted(map(os.path.abspath, glob.glob(path, recursive=True))), path)
    raise SourceError(f"{path}: {unsearchable(path) or missing(path)}")


def _open_url(url: str, readers: Mapping[str, ArrayReader]) -> Source:
    try:
        file_system, path = open_anew(url)
        if glob.has_magic(path):
            return _open_many(sorted(url_in(file_system, url, found) for found in file_system.glob(path)), url)
        if _has_known_suffix(path if is_chain(url) else url):
            return _open_file(url, readers)
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in file_system.ls(path, detail=True)]
    except FeaturepipeError:
        raise
    except Exception as error:  # the border of the source: file systems raise what their libraries do
        raise SourceError(f"{url}: cannot be opened: {type(error).__name__}: {error}") from error
    idx = _idx_files(url, names)
    return _idx_source(idx, url) if idx else RemoteFolderSource(url)


def _open_file(path: str, readers: Mapping[str, ArrayReader]) -> Source:
    lower = path.lower()
    name, location = _name_of(path), location_of(path)
    if lower.endswith(ARCHIVE_SUFFIXES):
        return ArchiveSource([path], name, location)
    if lower.endswith((*MANIFEST_SUFFIXES, COCO_SUFFIX)):
        return CocoSource([path]) if lower.endswith(COCO_SUFFIX) else ManifestSource(path)
    if IDX_IMAGES.search(path):
        return ArraySource([(path, read_idx)], name, location)
    if lower.endswith(".npz"):
        return ArraySource([(path, read_npz)], name, location)
    if lower.endswith(HDF5_SUFFIXES):
        return ArraySource([(path, _reader_of(path, readers))], name, location)
    if is_image_name(path):
        return MemorySource([path], name=name, location=location)
    raise UsageError(f"cannot read images from {path!r}; give {_CHOICES}")


def _open_many(paths: Sequence[str], pattern: str) -> Source:
    if not paths:
        blocked = "" if is_url(pattern) else _blocked(pattern)
        raise SourceError(f"{pattern}: {blocked or 'no file matches'}")
    # The pattern, not the paths: it stays the same when archives are added.
    name, location = _name_of(os.path.dirname(paths[0])), location_of(pattern)
    if all(path.lower().endswith(ARCHIVE_SUFFIXES) for path in paths):
        return ArchiveSource(paths, name, location)
    if all(path.lower().endswith(COCO_SUFFIX) for path in paths):
        return CocoSource(paths, pattern)
    if all(map(is_image_name, paths)):
        return MemorySource(list(paths), name=name, location=location)
    odd = next(path for path in paths if not path.lower().endswith(ARCHIVE_SUFFIXES))
    raise UsageError(
        f"{pattern}: {odd!r} is no archive; a glob names archives ({' '.join(ARCHIVE_SUFFIXES)}), COCO files "
        f"({COCO_SUFFIX}) or images only"
    )


def _blocked(pattern: str) -> str:
    """Why nobody can tell whether a file matches, if the folder of the first wildcard may not be listed, or not be searched."""
    steps = pattern.split("/")
    first = next(place for place, step in enumerate(steps) if glob.has_magic(step))
    folder = "/".join(steps[:first]) + "/" if first else "."
    if why := unsearchable(folder if first == len(steps) - 1 else folder + "/_"):
        return why
    try:
        os.scandir(folder).close()
    except PermissionError:
        return f"the folder {os.path.abspath(folder)} cannot be listed: its permission r is missing for this user"
    except OSError:
        pass
    return ""


def _reader_of(path: str, readers: Mapping[str, ArrayReader]) -> ArrayReader:
    suffix = os.path.splitext(path)[1].lower()
    # Both suffixes name one format, so either reader will do.
    found = readers.get(suffix) or next((readers[other] for other in HDF5_SUFFIXES if other in readers), None)
    if found is None:
        raise UsageError(f"{path}: no reader for {suffix}; pass array_readers={{{suffix!r}: function(path) -> arrays}}")
    return found


def _has_known_suffix(path: str) -> bool:
    lower = path.lower()
    arrays = (".npz", *HDF5_SUFFIXES)
    return (
        is_image_name(path)
        or bool(IDX_IMAGES.search(path))
        or lower.endswith((*ARCHIVE_SUFFIXES, *MANIFEST_SUFFIXES, COCO_SUFFIX, *arrays))
    )


def _idx_source(files: Sequence[str], folder: str) -> Source:
    return ArraySource([(file, read_idx) for file in files], _name_of(folder), location_of(folder))


def _idx_files(folder: str, names: Sequence[str]) -> list[str]:
    """The IDX image files of a folder; the plain one where torchvision has left it beside the compressed one."""
    found = {name for name in names if IDX_IMAGES.search(name)}
    return [
        f"{folder.rstrip('/')}/{name}"
        for name in sorted(found)
        if name.removesuffix(".gz") == name or name[:-3] not in found
    ]


def _name_of(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2] or os.path.basename(os.path.abspath(path))
    return name.partition(".")[0] or name
