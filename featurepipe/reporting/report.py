"""From a document of numbers to the page: everything that is slow first, then the file, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from featurepipe.display import size
from featurepipe.errors import UsageError
from featurepipe.progress import announcer
from featurepipe.reporting.images import ReadImage, bounded_thumbnails, thumbnails
from featurepipe.store.atomic import atomic_file

KINDS = ("depth", "networks", "routes", "bundle", "nights", "images")
VERSION = 1

_MAP_CHARACTERS = (
    3_600_000  # of thumbnails on the map: with Bokeh's own 1.3 MB and the numbers the page stays under 6 MB
)
_MISTAKE_SIDE = 112


class Features(NamedTuple):
    """What a map is drawn from.

    Attributes:
        ids: (n,).
        values: (n, D) float32.
        labels: (n,), or None.
        total: How many images these were drawn from, if they are a sample already.
    """

    ids: Sequence[str]
    values: Any
    labels: Sequence[Any] | None
    total: int | None = None


def write_report(
    document: Mapping[str, Any],
    target: str | os.PathLike[str],
    *,
    images: ReadImage | None = None,
    elsewhere: ReadImage | None = None,
    features: Features | None = None,
    silent: bool = False,
) -> Path:
    """Writes one self-contained HTML page that shows a document; nothing on it is fetched from anywhere.

    Parts of the page are left out where the document lacks what they show.

    Args:
        document: What ``featurepipe depth --json`` or ``featurepipe routes --json`` gives, what ``nights_document`` does, or of a
            trained bundle ``kind`` "bundle", ``version`` 1, ``bundle`` (from ``describe_bundle``), ``evaluation`` (from
            ``evaluate``) and ``provenance``. Or about images: ``kind`` "images", ``title``, ``paragraphs``, ``provenance``, and
            ``groups``, each with ``title`` and ``images``: ``id``, ``lines`` of text, ``is_query`` where its picture comes from
            ``elsewhere``.
        target: The file; one that is there is replaced once the new one is complete.
        images: Gives the image of an id as encoded bytes, array (H, W), (H, W, C) or (C, H, W), or PIL image; None
            where it is not at hand. Without it the page has no pictures.
        elsewhere: The same for the images of the other source that a comparison was tested on.
        features: Of the recommended column, for the map, where the document has none (``map``). At most 2,000 images,
            drawn at random, are placed.
        silent: Say nothing on standard error.

    Returns:
        The file.

    Raises:
        UsageError: The document is of another kind or version, or the folder of ``target`` does not exist.
        DiskFull: No space is left; a file that was there is as before.
    """
    from featurepipe.reporting.blocks import metrics_elsewhere, metrics_of
    from featurepipe.reporting.images import POINTS, Projection, project
    from featurepipe.reporting.page import compose

    path = Path(target)
    _check(document)
    check_target(path)
    say = announcer(silent=silent)
    projection = Projection.from_dict(document["map"]) if document.get("map") else None
    if projection is None and features is not None and len(features.ids):
        total = features.total or len(features.ids)
        say(f"placing {min(len(features.ids), POINTS):,} of {total:,} images on a map")
        projection = project(features.ids, features.values, features.labels, total=total)
    metrics = metrics_of(document)
    refused = [str(one["id"]) for one in (document.get("rejects") or {}).get("images", ())]
    large = thumbnails(
        [*_mistaken(metrics), *refused, *_pictured(document, is_query=False)], images, side=_MISTAKE_SIDE
    )
    asked = [*_mistaken(metrics_elsewhere(document)), *_pictured(document, is_query=True)]
    there = thumbnails(asked, elsewhere, side=_MISTAKE_SIDE)
    small = bounded_thumbnails(list(projection.ids), images, most=_MAP_CHARACTERS) if projection else {}
    html = compose(document, metrics, projection, small, large, there).encode("utf-8", "replace")
    with atomic_file(path) as file:
        file.write(html)
    say(f"wrote {path} ({size(len(html))})")
    return path


def _mistaken(metrics: Mapping[str, Any]) -> list[str]:
    """Ids of the mistakes to show; of numbers the largest errors."""
    found = metrics.get("mistakes") or {}
    shown = found if isinstance(found, list) else found.get("most_confident") or []
    return list(dict.fromkeys(str(mistake.get("id")) for mistake in shown))


def _pictured(document: Mapping[str, Any], *, is_query: bool) -> list[str]:
    """Ids of the images of a page about images: of the answers, or of what was asked with images from elsewhere."""
    groups = document.get("groups", []) if document.get("kind") == "images" else []
    shown = [image for group in groups for image in group["images"]]
    return list(dict.fromkeys(str(image["id"]) for image in shown if image.get("is_query", False) == is_query))


def check_target(target: str | os.PathLike[str]) -> None:
    """Refuses a place that no page can be written to, before the work.

    Raises:
        UsageError: it is a folder, or in a folder that does not exist.
    """
    path = Path(target)
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it, such as {path / 'report.html'}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}; make it first")


def _check(document: Mapping[str, Any]) -> None:
    kind, version = document.get("kind"), document.get("version")
    if kind not in KINDS:
        raise UsageError(
            f"a document of kind {kind!r} has no page; kinds: {', '.join(KINDS)}. Make one with: featurepipe depth --json"
        )
    if version != VERSION:
        raise UsageError(f"this featurepipe shows documents of version {VERSION}, not {version!r}; measure again")
