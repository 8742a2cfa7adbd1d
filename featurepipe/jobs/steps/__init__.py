"""What a night does before its extractions and after them: one function a step, `(night, table) -> dict` of plain JSON values.

Each result has a ``text``, the line that the summary shows; ``skipped`` says why there was nothing to do, ``warnings`` what
people should look at. A step that fails raises.
"""

from featurepipe.jobs.steps.heads import finetune, predict, train
from featurepipe.jobs.steps.housekeeping import compact, export, forget, keep, metrics, report
from featurepipe.jobs.steps.measuring import depth, drift, labels, outliers, routes, select, similar

__all__ = [
    "compact",
    "depth",
    "drift",
    "export",
    "finetune",
    "forget",
    "keep",
    "labels",
    "metrics",
    "outliers",
    "predict",
    "report",
    "routes",
    "select",
    "similar",
    "train",
]
