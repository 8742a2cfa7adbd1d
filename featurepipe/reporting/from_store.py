"""The page of a store: its last comparison of layers, or a bundle evaluated on it, with the images where they can be had."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featurepipe.display import counted
from featurepipe.errors import FeaturepipeError, Message, Option, Reject, StoreError, StoreMoved, UsageError
from featurepipe.features.options import Places, SourceOptions, places
from featurepipe.features.reading import opened
from featurepipe.images import key_of
from featurepipe.images.files import REFUSED, is_url
from featurepipe.images.source import OnlyUnder
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer
from featurepipe.records import host, now, versions
from featurepipe.reporting.blocks import metrics_elsewhere
from featurepipe.reporting.images import ReadImage, mapped, shown_names
from featurepipe.reporting.options import NIGHTS, FindingsOptions
from featurepipe.reporting.report import Features, check_target, write_report
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.choice import require_snapshot
from featurepipe.store.locks import starts_again
from featurepipe.store.options import NO_GROUP, RoleOptions, RowOptions, columns_of
from featurepipe.store.roles import with_roles
from featurepipe.store.snapshots import OK

_REJECTS = 24  # shown on a page


@starts_again
def report(
    store: FeatureStore | str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    bundle: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    source: Any = None,
    test_source: Any = None,
    only_under: Places = None,
    path_column: str | None = None,
    box: str | None = None,
    box_unit: str = "pixels",
    box_margin: float = 0.0,
    images: str | os.PathLike[str] | None = None,
    frames: str = "first",
    document: Mapping[str, Any] | None = None,
    labels: Any = None,
    label: str | None = None,
    group: str | None = None,
    split_column: str | None = None,
    command: str | None = None,
    nights: bool = False,
    last: int | None = None,
    job: str | None = None,
    silent: bool = False,
) -> Path:
    """Writes the page of the last comparison of layers (``featurepipe.depth``), of a trained bundle, or of the last runs.

    Args:
        store: the feature store or its path.
        target: the HTML file; one that is there is replaced once the new one is complete.
        bundle: show this bundle, evaluated on the dataset, instead of the comparison.
        dataset: a dataset in the store; may be left out if there is only one.
        split: what the bundle is evaluated on, as in ``evaluate``.
        source: the images, for pictures; by default where they were extracted from. Without them the page has none.
        test_source: the same for the other source that a comparison was tested on.
        only_under: a folder, the URL of one, or several: no picture is read elsewhere that a manifest or the store names, or a
            link leads to; by default any.
        path_column: of a manifest, as in ``extract``.
        box: as in ``extract``.
        box_unit: as in ``extract``.
        box_margin: as in ``extract``.
        images: as in ``extract``.
        frames: as in ``extract``.
        document: what a comparison returned, to show that one instead of the dataset's last.
        labels: a CSV or mapping with the labels that the comparison was made with, or the bundle is to be tested with, where they
            are not the dataset's.
        label: the column of the class that a bundle is tested with, as in ``evaluate``; a comparison knows its own.
        group: the column of groups that a bundle is tested with, as in ``evaluate``.
        split_column: the column of splits that a bundle is tested with, as in ``evaluate``.
        command: how it was called, for the record.
        nights: instead the trend of the last runs: images, time, drift, rejects; no other option goes with it than the next two.
        last: how many runs, by default 30.
        job: the job's name, or a dataset's that no job works on; by default that which ran last.
        silent: say nothing on the way.

    Returns:
        The file.

    Raises:
        UsageError: the dataset or job is unknown, no comparison was made of it, nothing has run, options do not go together, or
            the folder of ``target`` does not exist.
    """
    options = FindingsOptions(
        bundle=bundle,
        dataset=dataset,
        split=split,
        source=source,
        test_source=test_source,
        only_under=places(only_under),
        path_column=path_column,
        box=box,
        box_unit=box_unit,
        box_margin=box_margin,
        images=None if images is None else str(images),
        frames=frames,
        labels=labels,
        label=label,
        group=group,
        split_column=split_column,
    )
    if nights:
        return _nights(store, target, options, document, last=last, job=job, silent=silent)
    for one, value in {"last": last, "job": job}.items():
        if value is not None:
            raise UsageError(Message(Option(one, str(value)), " goes with ", Option("nights"), " only"))
    check_target(target)
    say = announcer(silent=silent)
    kept = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = str(document["dataset"]) if document else dataset or kept.only_dataset()
    if bundle is None:
        for one, value in {"split": split, **RowOptions.of(options).arguments()}.items():
            if value is not None:
                raise UsageError(
                    Message(
                        Option(one, value), " is for the page of a bundle; name one with ", Option("bundle"), ", or leave ",
                        Option(one), " out",
                    )
                )  # fmt: skip
        shown = document or _last_document(kept, name)
        features, snapshot = _mapped(kept, shown, labels, say), str(shown["provenance"]["snapshot"])
    else:
        shown, features = _bundle(kept, name, bundle, options, command, silent=silent)
        snapshot = str(shown["provenance"]["snapshot"])
    shown = {**shown, "rejects": _rejects(kept, name, snapshot)}
    look = _Look(kept, options, say)
    read = look.pictures(name, snapshot, source, Option("source"))
    there = _pictures_elsewhere(look, shown, test_source)
    try:
        page = write_report(shown, target, images=read, elsewhere=there, features=features, silent=silent)
    except FeaturepipeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if bundle is not None or document is not None:
            raise
        where = f"what the store holds of the last comparison of {name} is not as it should be"
        raise StoreError(f"{where} ({type(error).__name__}: {error}); compare again with featurepipe depth") from error
    look.tell_refused()
    return page


def _nights(
    store: FeatureStore | str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: FindingsOptions,
    document: Mapping[str, Any] | None,
    *,
    last: int | None,
    job: str | None,
    silent: bool,
) -> Path:
    from featurepipe.reporting.nights import nights_report

    if options != FindingsOptions() or document is not None:
        raise UsageError(
            Message(Option("nights"), ": leave all options out but ", Option("last"), " and ", Option("job"))
        )
    return nights_report(store, target, last=NIGHTS if last is None else last, job=job, silent=silent)


def image_page(
    store: FeatureStore,
    document: Mapping[str, Any],
    target: str | os.PathLike[str],
    options: SourceOptions,
    *,
    source: Any = None,
    dataset: str,
    snapshot: str,
    queries: ReadImage | str | None = None,
    silent: bool = False,
) -> Path:
    """Writes a page about images of a dataset, with thumbnails where the images are at hand.

    Args:
        store: the feature store.
        document: of kind "images", as ``write_report`` takes it; its provenance is added.
        target: the HTML file.
        options: how the source is opened.
        source: the images; by default where they were extracted from.
        dataset: the images' dataset.
        snapshot: run id of the images as they are on the page.
        queries: reads the images that were asked with by id, or names the dataset that they are of; None if they are among the
            dataset's own.
        silent: say nothing on the way.
    """
    look = _Look(store, options, announcer(silent=silent))
    read = look.pictures(dataset, snapshot, source, Option("source"))
    if isinstance(queries, str):
        queries = look.pictures(queries, store.snapshot_ids(queries)[-1], None, Option("source"))
    origin = {
        "when": now(), "software": versions(), "machine": host(), "store": str(store.path), "snapshot": snapshot,
        "options": as_asked(options),
    }  # fmt: skip
    shown = {**document, "provenance": origin}
    page = write_report(shown, target, images=read, elsewhere=queries, silent=silent)
    look.tell_refused()
    return page


def _last_document(store: FeatureStore, dataset: str) -> Mapping[str, Any]:
    documents = store.depth_documents(dataset)
    require_snapshot(store, dataset)
    if not documents:
        raise UsageError(
            Message(
                f"the layers of dataset {dataset} have not been compared yet; run: featurepipe depth SOURCE --store "
                f"{store.path}, or show a bundle with ",
                Option("bundle", "BUNDLE"),
            )
        )
    return documents[-1]


def _rejects(store: FeatureStore, dataset: str, snapshot: str) -> dict[str, Any]:
    """How many images of a snapshot could not be used, and the first of them with why."""
    if snapshot not in store.snapshot_ids(dataset):
        return {"count": 0, "images": []}
    table = store.snapshot(dataset, snapshot, columns=("id", "status", "reason"))
    found = [] if table is None else [row for row in table.to_pylist() if row["status"] != OK]
    return {"count": len(found), "images": [{"id": row["id"], "reason": row["reason"]} for row in found[:_REJECTS]]}


def _mapped(
    store: FeatureStore, document: Mapping[str, Any], labels: Any, say: Callable[[str], None]
) -> Features | None:
    """Features of the recommended column as they were when it was compared; None, and why, if they are gone.

    A document that has its map already needs none.
    """
    if document.get("map"):
        return None
    column = str(document["details"]["column"]).split("+")
    snapshot = document["provenance"]["snapshot"]
    try:
        view = store.features(
            document["dataset"], node=column, backbone=document["space"]["fingerprint"], snapshot=snapshot
        )
    except StoreMoved:
        raise
    except FeaturepipeError as error:
        say(f"the features that were compared are gone ({error}): the page has no map")
        return None
    asked = document["provenance"].get("options") or {}
    named = {name: asked.get(name) for name in ("label", "target", "multilabel")}
    if labels is not None or (any(named.values()) and not document.get("labels")):
        roles = RoleOptions(
            label=named["label"], target=named["target"], multilabel=columns_of(named["multilabel"]), group=NO_GROUP
        )
        return _features(with_roles(store, view, labels, roles, lambda _: None, snapshot=snapshot))
    if document.get("labels"):
        say(f"compared with the labels of {document['labels']}: the map shows no classes; give them with --labels")
        return _features(view)._replace(labels=None)
    return _features(view)


def _bundle(
    store: FeatureStore,
    dataset: str,
    path: str | os.PathLike[str],
    options: FindingsOptions,
    command: str | None,
    *,
    silent: bool,
) -> tuple[Mapping[str, Any], Features]:
    from featurepipe.evaluation.evaluate import evaluate
    from featurepipe.heads.bundle.bundle import read_bundle
    from featurepipe.heads.bundle.text import describe_bundle

    bundle = read_bundle(path)
    roles: RowOptions = RowOptions.of(options)
    asked = {"labels": options.labels, **roles.arguments()}
    found = evaluate(bundle, store, dataset=dataset, split=options.split, **asked, silent=silent)
    document = {
        "kind": "bundle",
        "version": 1,
        "bundle": {
            **describe_bundle(bundle), "path": os.fspath(path), "bottleneck": store.space(bundle.fingerprint).bottleneck,
        },
        "evaluation": found,
        "provenance": {
            "command": command, "when": now(), "software": versions(), "machine": host(), "store": str(store.path),
            "snapshot": store.snapshot_ids(dataset)[-1],
        },
    }  # fmt: skip
    view = store.features(dataset, node=list(bundle.columns), backbone=bundle.fingerprint)
    trained = bundle.training.get("roles")
    known = trained if isinstance(trained, dict) else None
    target = bundle.target or {}
    if bundle.target_name or target.get("columns"):
        multilabel = columns_of(target.get("columns")) or None
        roles = RoleOptions(**roles.arguments(), target=bundle.target_name or None, multilabel=multilabel)
    view = with_roles(store, view, options.labels, roles, lambda _: None, trained=known)  # evaluate has said it all
    return document, _features(view.select(split=found["split"]) if found["split"] else view)


def _features(view: FeatureSet) -> Features:
    """As many rows as the map shows."""
    some = mapped(view)
    return Features(list(some.ids), some.read(np.float32), shown_names(some), len(view))


def _pictures_elsewhere(look: _Look, document: Mapping[str, Any], source: Any) -> ReadImage | None:
    """Reads images of the other source that a comparison was tested on, where the page shows some."""
    name = document.get("test_dataset")
    if not name or not metrics_elsewhere(document) or not look.store.snapshot_ids(name):
        return None
    return look.pictures(str(name), look.store.snapshot_ids(name)[-1], source, Option("test_source"))


@dataclass
class _Look:
    """What is looked at for the pictures of a page.

    Attributes:
        store: the feature store.
        options: how sources are opened.
        say: told why pictures are left out.
        refused: ids of images that are not shown since they lie elsewhere than ``only_under`` allows, by dataset.
    """

    store: FeatureStore
    options: SourceOptions
    say: Callable[[str | Message], None]
    refused: set[tuple[str, str]] = field(default_factory=set)

    def pictures(self, dataset: str, snapshot: str, source: Any, option: Option) -> ReadImage | None:
        """Reads images by id from where they were extracted; None, and why, if they cannot be had.

        An image that has changed since is not shown: it is not what the features are of.

        Args:
            dataset: the images' dataset.
            snapshot: the images as they are on the page.
            source: the images; None for where the store says that they are.
            option: by which people name the source.
        """
        without = Message(": the page has no pictures; name them with ", option)
        location = source if source is not None else last_source(self.store, dataset)
        if location is None:
            self.say(Message("no run says where the images are", without))
            return None
        try:
            if source is None:
                self._check_named_by_the_store(location)
            images = opened(location, self.options)
            listing = images.scan()
        except FeaturepipeError as error:
            self.say(Message("the images cannot be listed (", error.message, ")", without))
            return None
        locators = dict(zip(listing["id"].to_pylist(), listing["locator"].to_pylist(), strict=True))
        known = self.store.snapshot_ids(dataset)
        table = self.store.snapshot(dataset, snapshot) if snapshot in known else self.store.snapshot(dataset)
        keys = {} if table is None else dict(zip(table["id"].to_pylist(), table["key"].to_pylist(), strict=True))

        def read(image: str) -> Any:
            if image not in locators:
                return None
            try:
                payload = images.read(locators[image])
            except Reject as reject:
                if str(reject).startswith(REFUSED):
                    self.refused.add((dataset, image))
                return None
            except Exception:  # noqa: BLE001  # at the border of one picture: the page goes without it
                return None
            return payload if key_of(payload) == keys.get(image) else None

        return read

    def _check_named_by_the_store(self, location: str) -> None:
        """Raises `UsageError` for a source that the store names, and that lies elsewhere than ``only_under`` allows."""
        if self.options.only_under is None:
            return
        bounds = OnlyUnder(self.options.only_under)
        files = glob.glob(location, recursive=True) if glob.has_magic(location) and not is_url(location) else []
        if not all(map(bounds.allows, [location, *files])):
            raise UsageError(
                Message(
                    f"the store names {location}, which is not below {' or '.join(bounds.places)}, as ",
                    Option("only_under"),
                    " asks for",
                )
            )

    def tell_refused(self) -> None:
        """Says how many pictures ``only_under`` has kept off the page."""
        if self.refused:
            self.say(
                Message(f"{counted(len(self.refused), 'picture')} not shown, as ", Option("only_under"), " asks for")
            )


def last_source(store: FeatureStore, dataset: str) -> str | None:
    """Where a dataset was last extracted from, as its run says; None if none does."""
    known = [run["source"] for run in store.runs() if run.get("dataset") == dataset and run.get("source")]
    return str(known[-1]) if known else None
