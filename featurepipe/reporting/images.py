"""Images on a page: where they lie in two dimensions by their features, and their thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from featurepipe.images.intensity import parse_intensity
from featurepipe.images.regions import Frame, Region

if TYPE_CHECKING:
    from featurepipe.store import FeatureSet
    from featurepipe.store.labelled_images import LabelledImages


POINTS = 2000
"""Images shown at most; t-SNE takes seconds for so many."""

_COMPONENTS = 50
_FEWEST_FOR_TSNE = 10

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Points in two dimensions.

    Attributes:
        ids: Of the n images shown, in random order.
        labels: Of each image.
        total: Images they were drawn from.
        places: (n, 2) by method: ``PCA``, and ``t-SNE`` where there are images enough.
        kept: Share of the variance in the two principal components.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    total: int
    places: dict[str, Array]
    kept: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        places = {method: np.round(place, 4).tolist() for method, place in self.places.items()}
        return {
            "ids": list(self.ids),
            "labels": list(self.labels),
            "total": self.total,
            "places": places,
            "kept": self.kept,
        }

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Projection:
        """What ``as_dict`` gave."""
        places = {method: np.asarray(place, np.float64) for method, place in found["places"].items()}
        return Projection(tuple(found["ids"]), tuple(found["labels"]), found["total"], places, found["kept"])


def project(
    ids: Sequence[str],
    features: npt.ArrayLike,
    labels: Sequence[Any] | None,
    *,
    total: int | None = None,
    seed: int = 0,
) -> Projection:
    """Places a random sample of images by their features: principal components, and t-SNE of the first 50 of them.

    Features are centred, not scaled. t-SNE (van der Maaten and Hinton, 2008; Barnes-Hut, 2014) starts from the principal
    components, with a perplexity of 30 or a third of the images.

    Args:
        ids: (n,).
        features: (n, D), finite.
        labels: (n,), or None.
        total: How many images these were drawn from, if they are a sample already.
        seed: Of the sample and of t-SNE.
    """
    values = np.asarray(features)
    chosen = np.random.default_rng(seed).permutation(len(values))[:POINTS]
    sample = values[chosen].astype(np.float64)
    components, kept = _principal(sample)
    places = {"PCA": components[:, :2]}
    if len(sample) >= _FEWEST_FOR_TSNE:
        places["t-SNE"] = _tsne(components, seed)
    return Projection(
        tuple(str(ids[k]) for k in chosen),
        tuple("" if labels is None or labels[k] is None else str(labels[k]) for k in chosen),
        len(values) if total is None else total,
        places,
        kept,
    )


_RANGES = 5  # of numbers, told apart by colour


def shown_names(images: LabelledImages) -> list[str | None]:
    """What tells images apart on a map: the class, the labels that an image has, or one of five ranges of its number."""
    targets = images.targets
    if targets is None:
        return list(images.labels)
    if images.target_names:
        names = np.array(images.target_names, object)
        return [" + ".join(names[row == 1]) or "none" for row in targets]
    known = targets[~np.isnan(targets)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, _RANGES + 1))) if len(known) else np.zeros(1)
    places = np.clip(np.searchsorted(edges, targets, side="right") - 1, 0, max(0, len(edges) - 2))
    texts = [f"{place + 1}: {one:.4g} to {other:.4g}" for place, (one, other) in enumerate(pairwise(edges))]
    texts = texts or [f"{edges[0]:.4g}"]
    return [None if np.isnan(value) else texts[place] for value, place in zip(targets, places, strict=True)]


def _principal(sample: Array) -> tuple[Array, float]:
    """The first principal components, at least two columns."""
    from sklearn.decomposition import PCA

    count = min(_COMPONENTS, *sample.shape)
    model = PCA(count, random_state=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # no variance at all leaves no ratios
        components = model.fit_transform(sample)
    kept = float(np.nan_to_num(model.explained_variance_ratio_)[:2].sum())
    missing = max(0, 2 - components.shape[1])
    return np.pad(components, ((0, 0), (0, missing))), kept


def _tsne(components: Array, seed: int) -> Array:
    from sklearn.manifold import TSNE

    start = components[:, :2] / (np.std(components[:, 0]) or 1.0) * 1e-4
    model = TSNE(perplexity=min(30.0, (len(components) - 1) / 3), init=start, random_state=seed, n_jobs=1)
    placed: Array = model.fit_transform(components.astype(np.float32)).astype(np.float64)
    return placed


def mapped(view: FeatureSet) -> FeatureSet:
    """Draws as many rows as a map shows, at random but always the same of as many rows, in their order."""
    return view.take(np.sort(np.random.default_rng(0).permutation(len(view))[:POINTS]))


ReadImage = Callable[[str], Any]
"""Gives the image of an id: encoded bytes, an array, a PIL image, or None where it is not at hand."""

BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
"""One transparent pixel."""

_SIDES = (80, 64, 48, 36, 28)
_TRIED = 40  # images by whose size that of all is judged
_QUALITY = 72


def thumbnails(ids: Iterable[str], read: ReadImage | None, *, side: int) -> dict[str, str]:
    """Makes data URIs of at most ``side`` x ``side`` pixels, for the ids whose images can be had."""
    made = {id_: thumbnail(read(id_), side) for id_ in ids} if read else {}
    return {id_: uri for id_, uri in made.items() if uri}


def bounded_thumbnails(ids: list[str], read: ReadImage | None, *, most: int) -> dict[str, str]:
    """As ``thumbnails``, as large as ``most`` characters in all allow, judged by some of the images.

    Images that no longer fit, if those were unusually small, are left out.
    """
    step = max(1, len(ids) // _TRIED)
    tried = ids[::step]
    for side in _SIDES:
        sample = thumbnails(tried, read, side=side)
        if sum(map(len, sample.values())) * len(ids) / max(len(tried), 1) <= most:
            break
    made, spent = {}, 0
    for id_, uri in thumbnails(ids, read, side=side).items():
        spent += len(uri)
        if spent > most:
            break
        made[id_] = uri
    return made


def thumbnail(image: Any, side: int) -> str | None:
    """One image as a data URI, JPEG or PNG, whichever is shorter; None if it cannot be read as an image."""
    try:
        small = upright(image, side)
    except Exception:  # noqa: BLE001  # a stranger's image may make a library raise anything; the page goes without it
        return None
    if small is None:
        return None
    candidates = [("jpeg", _encoded(small, "JPEG", quality=_QUALITY, optimize=True))]
    if small.width * small.height <= 32 * 32:
        candidates.append(("png", _encoded(small, "PNG", optimize=True)))
    kind, data = min(candidates, key=lambda candidate: len(candidate[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def upright(image: Any, side: int) -> Image.Image | None:
    """The image, turned as its EXIF says, on white, at most ``side`` wide and high, grey or RGB."""
    if image is None:
        return None
    if isinstance(image, bytes | bytearray | memoryview | Region | Frame):
        # In here, for it imports torch. Not Image.open: that tries formats of which some start other programs.
        from featurepipe.images.decode import decode

        # To be looked at, each image by its own least and greatest value, whatever the intensity of the features.
        shown = decode(
            image if isinstance(image, Region | Frame) else bytes(image),
            intensity=parse_intensity("minmax"),
            on_damage=lambda _: None,
        )
        pixels = shown.permute(1, 2, 0).numpy()
        is_grey = (pixels[..., :1] == pixels[..., 1:]).all()
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if is_grey else pixels))
    elif not isinstance(image, Image.Image):
        image = _from_array(np.asarray(image))
    turned = ImageOps.exif_transpose(image)
    flat = _flat(turned)
    flat.thumbnail((side, side), Image.Resampling.LANCZOS)
    return flat


def _from_array(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """An array (H, W), (H, W, C) or (C, H, W); values beyond bytes are brought into their range."""
    if pixels.ndim not in {2, 3} or not pixels.size:
        raise ValueError(f"an array of shape {pixels.shape} is no image")
    if pixels.ndim == 3 and pixels.shape[0] in {1, 3, 4} and pixels.shape[2] not in {1, 3, 4}:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8:
        values = np.nan_to_num(pixels.astype(np.float64))
        low, high = values.min(initial=0), values.max(initial=0)
        pixels = ((values - low) * (255 / (high - low if high > low else 1))).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _flat(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        image = _from_array(np.asarray(image))
    if image.mode in {"1", "L"}:
        return image.convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
