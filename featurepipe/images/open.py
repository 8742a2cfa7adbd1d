"""From what a user names to the source that reads it."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH111, PTH112, PTH119, PTH120, PTH122

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import numpy as np

from featurepipe.errors import FeaturepipeError, Message, Option, SourceError, UsageError, unsearchable
from featurepipe.images.annotated import CLASS_FILES, AnnotatedSource, CocoSource, YoloSource, is_yolo
from featurepipe.images.archives import ArchiveSource
from featurepipe.images.arrays import IDX_IMAGES, ArrayReader, ArraySource, read_idx, read_npz
from featurepipe.images.files import is_chain, is_url, location_of, open_anew, url_in
from featurepipe.images.folder import FolderSource, RemoteFolderSource
from featurepipe.images.listing import is_image_name
from featurepipe.images.manifest import MANIFEST_SUFFIXES, ManifestSource
from featurepipe.images.memory import Item, MemorySource
from featurepipe.images.regions import Boxes
from featurepipe.images.source import OnlyUnder, Source

ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".zip")
COCO_SUFFIX: Final = ".json"
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

    Raises:
        UsageError: Nothing can be read from such a thing; names the value and the choices. Or it is a URL that is not below
            ``only_under``; or it is no manifest, and a ``path_column``, ``boxes`` or ``images`` are given.
        SourceError: The path does not exist.
    """
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
    return source


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
    missing = f"no such file or folder (looked in {os.path.abspath(os.path.dirname(path) or '.')})"
    raise SourceError(f"{path}: {unsearchable(path) or missing}")


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
