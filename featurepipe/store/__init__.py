"""What is kept: features in HDF5 parts, snapshots of datasets, records of runs. The only importer of h5py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurepipe.lazy_names import former_modules, lazy_names

if TYPE_CHECKING:
    from featurepipe.store.arrays import LazyArray as LazyArray
    from featurepipe.store.arrays import open_arrays as open_arrays
    from featurepipe.store.compact import CompactReport as CompactReport
    from featurepipe.store.compact import compact_store as compact_store
    from featurepipe.store.exports import export as export
    from featurepipe.store.exports import export_dataset as export_dataset
    from featurepipe.store.feature_store import FeatureStore as FeatureStore
    from featurepipe.store.feature_store import describe as describe
    from featurepipe.store.forget import ForgetReport as ForgetReport
    from featurepipe.store.forget import forget_images as forget_images
    from featurepipe.store.gc import GcReport as GcReport
    from featurepipe.store.gc import gc_store as gc_store
    from featurepipe.store.keys import KeyIndex as KeyIndex
    from featurepipe.store.roles import join_roles as join_roles
    from featurepipe.store.space import ColumnInfo as ColumnInfo
    from featurepipe.store.space import Space as Space
    from featurepipe.store.space import differences as differences
    from featurepipe.store.space import fingerprint as fingerprint
    from featurepipe.store.verify import Problem as Problem
    from featurepipe.store.verify import VerifyReport as VerifyReport
    from featurepipe.store.verify import verify_store as verify_store
    from featurepipe.store.views import FeatureSet as FeatureSet
    from featurepipe.store.writer import PartWriter as PartWriter

_HOMES = {
    "ColumnInfo": "space",
    "CompactReport": "compact",
    "FeatureSet": "views",
    "FeatureStore": "feature_store",
    "ForgetReport": "forget",
    "GcReport": "gc",
    "KeyIndex": "keys",
    "LazyArray": "arrays",
    "PartWriter": "writer",
    "Problem": "verify",
    "Space": "space",
    "VerifyReport": "verify",
    "compact_store": "compact",
    "describe": "feature_store",
    "differences": "space",
    "export": "exports",
    "export_dataset": "exports",
    "fingerprint": "space",
    "forget_images": "forget",
    "gc_store": "gc",
    "join_roles": "roles",
    "open_arrays": "arrays",
    "verify_store": "verify",
}
__all__ = list(_HOMES)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
former_modules(
    __name__,
    {
        "identity": "space",
        "labelled_images": "labels",
        "origin": "space",
        "part_files": "rows",
        "wide_rows": "rows",
    },
)
