"""Whether a job names networks, nodes and heads that there are, before hours are spent on those that come first."""

from __future__ import annotations

from featurepipe.backbones import load_backbone
from featurepipe.errors import UsageError
from featurepipe.heads.families import make_head
from featurepipe.jobs.job import Job


def check_networks(job: Job) -> None:
    """Loads every network but the first, which is loaded soon enough, and makes every head.

    Raises:
        UsageError: there is no such network, node, or parameter of a head; the message names the key.
        WeightsNotFound: weights are not at hand.
    """
    for place, table in enumerate(job.features[1:], start=1):
        try:
            load_backbone(table.backbone, table.weights, seed=table.seed).columns(table.nodes)
        except UsageError as error:
            raise UsageError(f"features[{place}]: {error}") from error
    for place, head in enumerate(job.train):
        try:
            make_head(head.head, pca=head.pca, class_weight=head.class_weight, **head.params)
        except UsageError as error:
            raise UsageError(f"train[{place}]: {error}") from error
