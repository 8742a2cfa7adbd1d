"""What ``bundle.json`` says of a bundle, checked for what would not be true on another machine."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurepipe.errors import BundleError
from featurepipe.heads.bundle.files import plain, sha256_of
from featurepipe.heads.bundle.head import check_head

if TYPE_CHECKING:
    from featurepipe.heads.bundle.bundle import Bundle

_PACKAGES = ("featurepipe", "numpy", "safetensors", "scikit-learn", "scipy", "skops", "xgboost")
_JSON = ("backbone", "space", "params", "metrics", "training", "temperature", "columns", "classes")
_WITHOUT_PATHS = ("backbone", "space", "params", "training")


def plain_record(bundle: Bundle) -> dict[str, Any]:
    """Turns a bundle into JSON values, all but its files.

    Raises:
        BundleError: A value is no JSON value, a path of this machine, or does not fit the others.
    """
    check_head(bundle.head, bundle.classes, "the head")
    record = {name: plain(getattr(bundle, name), name) for name in _JSON}
    for name in _WITHOUT_PATHS:
        for where, text in _texts(record[name], name):
            if Path(text).is_absolute() and os.path.lexists(text):
                raise BundleError(
                    f"{where} is {text!r}, a path of this machine, on which no bundle may depend; leave it out"
                )
    if sha256_of(record["space"]) != bundle.fingerprint:
        raise BundleError(
            f"{bundle.fingerprint!r} is not the fingerprint of the bundle's space; take both from the same space"
        )
    if bundle.temperature is not None and not bundle.temperature > 0:
        raise BundleError(
            f"the temperature is {bundle.temperature}, give one above 0, or None for a head that is not calibrated"
        )
    software = _software()
    return {
        **record,
        "family": bundle.family,
        "fingerprint": bundle.fingerprint,
        "width": bundle.width,
        "software": software,
    }


def warn_of_versions(folder: Path, software: Mapping[str, Any]) -> None:
    """Warns in one line if scikit-learn is of another minor version than the one that wrote the head."""
    then, now = str(software.get("scikit-learn", "")), version("scikit-learn")
    if then and _minor(then) != _minor(now):
        warnings.warn(
            f"{folder.name} was written with scikit-learn {then}, this is {now}: compare a few predictions, "
            "or train again to be sure",
            stacklevel=3,
        )


def _minor(release: str) -> list[str]:
    return release.split(".")[:2]


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{number}]")
