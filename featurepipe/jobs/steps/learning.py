"""Training heads."""

from __future__ import annotations

from typing import Any

from featurepipe.jobs.job import TrainTable
from featurepipe.jobs.step import Night, within_time
from featurepipe.jobs.steps.heads import snapshot_of
from featurepipe.tables import counted


def train(night: Night, table: TrainTable) -> dict[str, Any]:
    """Trains a head, if what it learns from is not what its bundle was trained on, or always.

    The older bundle stays until the new one is complete. Labels are those of the table's file, else of the source's, else
    the images' own.
    """
    from featurepipe.training.train import train as run

    def work() -> dict[str, Any]:
        return run(
            night.store,
            dataset=night.dataset,
            snapshot=snapshot_of(night, table.backbone),
            nodes=list(table.nodes),
            head=table.head,
            out=table.out,
            backbone=table.backbone,
            labels=table.labels or night.job.source.labels,
            split=table.split,
            params=table.params,
            pca=_components(table.pca),
            class_weight=table.class_weight,
            tune=table.tune,
            calibration=table.calibration,
            min_class_size=table.min_class_size,
            memory=table.memory,
            jobs=table.jobs,
            seed=table.seed,
            weights=_own_weights(night),
            trust_code=night.job.networks,
            if_changed=table.when == "labels changed",
            silent=night.silent,
            cluster=night.team(),
        )

    found = within_time(night.stop.deadline, work, "the older bundle stays, and the next night trains")
    return found if "skipped" in found else _told(found)


def _own_weights(night: Night) -> dict[str, str]:
    """The weights files of the user's own, by feature space: bundles take them along, as they must predict elsewhere."""
    return {
        run["fingerprint"]: features.weights
        for run, features in zip(night.extracted, night.job.features, strict=False)
        if str(run["backbone"].get("weights", "")).startswith("file:")
    }


def _components(pca: float | None) -> float | None:
    """A share of the variance, or a whole number of components, which TOML and its model may have as a float."""
    return pca if pca is None or pca < 1 else int(pca)


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """What the run record keeps of a training; the bundle keeps all of it."""
    names = ("bundle", "backbone", "columns", "head", "params", "counts", "why", "seconds")
    images = f"{counted(found['counts']['train'], 'image')} of {len(found['classes']):,} classes"
    told = {name: found[name] for name in names if name in found}
    if not found["test"]:
        return {**told, "text": f"trained on {images}; no test images"}
    accuracy = found["test"]["accuracy"]
    text = f"trained on {images}; {accuracy['value']:.4f} right of {counted(found['test']['images'], 'test image')}"
    return {**told, "accuracy": accuracy, "text": text}
