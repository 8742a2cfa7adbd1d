"""The stored features that a bundle can be asked about: those of its own feature space, and no others."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featurepipe.errors import BundleError
from featurepipe.execution.dask import executor_on
from featurepipe.heads.blocks import Blocks
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.images.intensity import intensity_of
from featurepipe.store import FeatureStore, Space, differences

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


def features_for(bundle: Bundle, store: FeatureStore, dataset: str, snapshot: str | None = None) -> FeatureSet:
    """Opens the bundle's columns of a dataset, in the bundle's feature space and no other.

    Raises:
        BundleError: the store has no features of that space; says which it has and how to compute them.
        StoreError: features of some images are missing.
        UsageError: the dataset or snapshot is unknown.
    """
    spaces = store.spaces()
    if dataset in store.datasets() and bundle.fingerprint not in {space.fingerprint for space in spaces}:
        raise BundleError(*_no_such_space(bundle, store, spaces, dataset))
    features = store.features(dataset, node=list(bundle.columns), backbone=bundle.fingerprint, snapshot=snapshot)
    bundle.check(features)
    return features


@contextmanager
def features_at(
    cluster: Any, features: FeatureSet, store: FeatureStore, say: Callable[[str], None]
) -> Iterator[Blocks]:
    """Features where heads work on them: as they are, or spread over a cluster's workers for as long as the block runs.

    Args:
        cluster: what `featurepipe.execution.connect` takes; None for here.
        features: some of the store's.
        store: which workers must see under the same path.
        say: where messages go.

    Raises:
        ClusterError: there is no such cluster, or none of its workers can be used.
    """
    with executor_on(cluster, say=say) as executor:
        executor.check(store.path)
        yield executor.rows(features)


def _no_such_space(bundle: Bundle, store: FeatureStore, spaces: list[Space], dataset: str) -> list[str]:
    name = bundle.backbone["name"]
    lines = [
        f"the bundle is for features of the space {name}-{bundle.fingerprint[:12]}, and {store.path} has none of that space; "
        "scores on others would mean nothing. It has:"
    ]
    lines += [f"  {space.name}, which differs in {_differing(bundle, space)}" for space in spaces] or [
        "  no space at all"
    ]
    return [*lines, f"compute them with: {_command(bundle, store, dataset)}"]


def _differing(bundle: Bundle, space: Space) -> str:
    names = differences(bundle.space, space.fields)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more fields" if len(names) > 4 else "")


def _command(bundle: Bundle, store: FeatureStore, dataset: str) -> str:
    """The ``featurepipe extract`` that computes what the bundle needs; only SOURCE is left to the user."""
    about = bundle.backbone
    words = ["featurepipe", "extract", "SOURCE", "--store", str(store.path), "--dataset", dataset]
    words += ["--backbone", about["name"]]
    words += ["--weights", "FILE" if about["weights"] == "file" else about["weights"]]
    words += ["--seed", str(about["seed"])] if about["weights"] == "none" else []
    for option in ("precision", "dtype", "decode"):
        words += [f"--{option}", str(bundle.space[option])] if option in bundle.space else []
    words += ["--intensity", intensity_of(bundle.space["decoding"])] if "decoding" in bundle.space else []
    for column in bundle.columns:
        words += ["--node", column]
    return shlex.join(words)
