"""What a feature space is: its canonical JSON, the hash of that, and what differs between two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from featurepipe.errors import UsageError


def canonical_json(fields: Mapping[str, Any]) -> str:
    """Writes ``fields`` in the one form that is hashed: sorted keys, no spaces, shortest exact floats, no NaN.

    Raises:
        UsageError: A value is not a JSON value, or a float is NaN or infinite.

    Example:
        >>> canonical_json({"b": 0.1, "a": [1, None]})
        '{"a":[1,null],"b":0.1}'
    """
    try:
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the fields of a feature space must be finite JSON values with text keys: {error}") from error


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hashes a feature space: SHA-256 (hex) of its canonical JSON in UTF-8."""
    return hashlib.sha256(canonical_json(fields).encode("utf-8")).hexdigest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names the fields in which two feature spaces differ, dotted and sorted.

    Example:
        >>> differences({"net": {"name": "vgg16", "seed": 1}, "dtype": "float16"}, {"net": {"name": "vgg16"}})
        ['dtype', 'net.seed']
    """
    left, right = dict(_leaves(a, "")), dict(_leaves(b, ""))
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(inner, sort_keys=True)
