"""Everything that is settled before the first image: the network, its feature space, the columns and the plan."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.backbones import Backbone, Column, load_backbone, parse_column
from featurepipe.backbones.engine import ENOUGH_IMAGES, NUMERICS, OPENVINO, PYTORCH
from featurepipe.display import counted
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.executor import Executor
from featurepipe.execution.local import LocalExecutor
from featurepipe.extraction.limits import ExtractionOptions, Losses
from featurepipe.extraction.plan import KeySet, MissingColumns, Plan, forgotten_of, make_plan
from featurepipe.features.loader import StageSeconds
from featurepipe.features.options import AUTO
from featurepipe.features.session import (
    LoadedNetwork,
    Sample,
    SampleContext,
    Session,
    measure_precision,
    settle_machine_for,
)
from featurepipe.features.settings import AS_IN_STORE, ASKED_FOR, SETTINGS, Held, MeasurePrecision, Settings, resolve
from featurepipe.images import Source
from featurepipe.images.budgets import check_budgets
from featurepipe.images.listing import SCHEMA, UNKNOWN, ListingSummary, is_image_name, is_told, unreadable_folders
from featurepipe.partitions import are_equal, filtered, gathered, index_in, part_of, partitions, stored, take
from featurepipe.store import FeatureStore, Space, differences
from featurepipe.store.choice import MIRRORED, is_mirrored
from featurepipe.store.documents import checked_dataset
from featurepipe.store.space import KNOWN_FILES

_logger = logging.getLogger(__name__)

LONGEST_NAME = 100

ROWS_PER_READ = 1000
"""Rows of parts that are looked through while one image is read: about a millisecond."""


@dataclass(frozen=True)
class History:
    """What the store remembers of a dataset; every run record is read once.

    Attributes:
        snapshot: the current snapshot without its reasons, or None.
        run_id: of that snapshot, or None.
        places: locations of the sources that the dataset was taken from since (and for) that snapshot, the latest first.
        fingerprints: of the feature spaces that its runs used, the latest first.
        max_rejects: what the run of that snapshot allowed; None if no record tells.
    """

    snapshot: pa.Table | None = None
    run_id: str | None = None
    places: Sequence[str] = ()
    fingerprints: Sequence[str] = ()
    max_rejects: float | str | None = None

    @classmethod
    def of(cls, store: FeatureStore | None, dataset: str) -> Self:
        """Reads it; a store that does not exist yet remembers nothing."""
        if store is None:
            return cls()
        last = max(store.snapshot_ids(dataset), default=None)
        snapshot = None if last is None else store.snapshot(dataset, last)
        runs = [run for run in reversed(store.runs()) if run.get("dataset") == dataset and "fingerprint" in run]
        return cls(
            snapshot=None if snapshot is None else snapshot.drop_columns(["reason"]),
            run_id=last,
            places=[run["source"] for run in runs if "source" in run and run["run_id"] >= (last or "")],
            fingerprints=list(dict.fromkeys(run["fingerprint"] for run in runs)),
            max_rejects=next(
                ((run.get("options") or {}).get("max_rejects") for run in runs if run["run_id"] == last), None
            ),
        )

    @property
    def images(self) -> int:
        """How many images the last snapshot lists."""
        return 0 if self.snapshot is None else self.snapshot.num_rows

    def with_unreadable(self, listing: pa.Table) -> pa.Table:
        """The listing, and for each folder that could not be read the images that the last snapshot has there.

        They are not gone: reading them gives the reason why the folder cannot be read, so that they are rejects.
        """
        folders = unreadable_folders(listing)
        if self.snapshot is None or not folders:
            return listing
        places = index_in(pa.chunked_array([pa.array(folders, pa.string())]), listing["id"])
        locators = dict(zip(folders, take(listing["locator"], places).to_pylist(), strict=True))

        def lie_there(rows: pa.Table) -> pa.Array:
            return pa.array([bool(locators.keys() & _folders_of(i)) for i in rows["id"].to_pylist()], pa.bool_())

        there = filtered(self.snapshot.select(["id", "label", "split"]), lie_there)
        lost = filtered(there, index_in(there["id"], listing["id"]) < 0)
        pieces = (_unread(part_of(lost, part), locators) for part in partitions(lost.num_rows))
        more = stored((batch for piece in pieces for batch in piece.to_batches()), SCHEMA)
        return gathered(pa.concat_tables([listing, more], promote_options="default"))

    def without_folders(self, listing: pa.Table) -> Self:
        """The same without the folders that could not be read then and now can be: their entries are no images that went."""
        if self.snapshot is None or not self.snapshot["key"].null_count:
            return self
        ids = self.snapshot["id"]
        unread = ids.filter(self.snapshot["key"].is_null())
        lost = unread.filter(pa.array(index_in(unread, listing["id"]) < 0)).to_pylist()
        doubtful = {id_ for id_ in lost if not is_image_name(id_)}
        if not doubtful:
            return self
        listed = (
            id_
            for column in (ids, listing["id"])
            for part in partitions(len(column))
            for id_ in part_of(column, part).to_pylist()
        )
        folders = {folder for id_ in listed for folder in _folders_of(id_) if folder in doubtful}
        values = pa.array(sorted(folders), pa.string())
        return replace(self, snapshot=filtered(self.snapshot, lambda rows: pc.invert(pc.is_in(rows["id"], values))))

    def gone(self, listing: pa.Table) -> int:
        """How many ids of the last snapshot a listing lacks."""
        if self.snapshot is None or are_equal(self.snapshot["id"], listing["id"]):
            return 0
        places = index_in(self.snapshot["id"], listing["id"])
        return sum(int(np.count_nonzero(places[part] < 0)) for part in partitions(len(places)))

    def losses(self, listing: pa.Table) -> Losses:
        """What a listing lacks of the last snapshot."""
        if self.snapshot is None:
            return Losses()
        there = set(pc.unique(listing["label"]).to_pylist())
        counts = pc.value_counts(self.snapshot["label"]).to_pylist()
        labels = {one["values"]: one["counts"] for one in counts if one["counts"] > 1 and one["values"] not in there}
        labels.pop(None, None)  # images without a label
        return Losses(self.images, self.gone(listing), labels)

    def elsewhere(self, location: str) -> str | None:
        """The other place that the snapshot (or without one, a run) is from, so that its sizes and times mean nothing here."""
        places = self.places if self.snapshot is None else self.places[-1:]
        return next((place for place in places if place != location), None)

    def is_only_of(self, location: str) -> bool:
        """Whether no run since the snapshot took the dataset from another place, not even one that failed."""
        return all(place == location for place in self.places)


@dataclass(frozen=True)
class ExtractionSpec:
    """An extraction with everything settled: a session, a source, and the plan of what to read of it.

    Attributes:
        session: the network, its settings and the machine.
        fields: what the feature space follows from.
        space: the feature space; None in a dry run that would start one.
        why_new: why the space is a new one, or None.
        missing: what is still to be computed, by key.
        history: what the store remembers of the dataset.
        losses: what the source no longer lists of the last snapshot.
        forgotten: images that the source lists and that were left out, since they were forgotten.
        listing: what the source lists, ignores and guesses.
        clock: where the stages' time is added up.
    """

    session: Session
    source: Source
    dataset: str
    options: ExtractionOptions
    fields: Mapping[str, Any]
    space: Space | None
    why_new: str | None
    missing: MissingColumns
    plan: Plan
    history: History
    losses: Losses
    forgotten: int
    listing: ListingSummary
    clock: StageSeconds

    @property
    def existing_space(self) -> Space:
        """The feature space, which only a dry run may lack."""
        if self.space is None:
            raise RuntimeError("a dry run has no feature space to write to")
        return self.space


def prepare(
    source: Source,
    store: FeatureStore | None,
    dataset: str | None,
    options: ExtractionOptions,
    say: Callable[[str], None],
    *,
    dry_run: bool,
    is_listing: bool = True,
    loaded: LoadedNetwork | None = None,
    executor: Executor | None = None,
) -> ExtractionSpec:
    """Settles everything before the first image.

    Args:
        source: the images.
        store: where features go; None in a dry run on a store that does not exist yet.
        dataset: name of the snapshots, the source's own name when None.
        options: what the user asked for.
        say: told what was decided, one line at a time.
        dry_run: leave the store as it is.
        is_listing: leave out images that were forgotten by id; else every row stays, and those forgotten are rejects.
        loaded: the network that ``options`` names, if it is loaded already.
        executor: who will compute images; by default this process.

    Raises:
        UsageError: an option is wrong; see the message.
        SourceError: the source holds no image, or lacks too many of the last snapshot.
        WeightsNotFound: the weights are not at hand.
    """
    asked = {name: getattr(options, name) for name in SETTINGS}
    check_budgets()
    executor = executor or LocalExecutor()
    machine = settle_machine_for(executor, options, options.decode)
    name = checked_dataset(dataset or dataset_name(source.name))
    backbone = loaded.backbone if loaded else load_backbone(options.backbone, options.weights, seed=options.seed)
    clock, forgotten = StageSeconds(), 0
    with clock.stage("scan"):
        listing = gathered(source.scan())  # taking rows from many chunks costs the more, the more there are
    past = None if store is None or not is_listing else forgotten_of(store.path)
    if past is not None:
        there = past.left_out(name, listing)
        forgotten = listing.num_rows - there.num_rows
        if forgotten:
            say(f"{counted(forgotten, 'image')} of the source left out: forgotten (featurepipe forget)")
            listing = gathered(there)
    summary = ListingSummary.of(listing)
    if not is_told(listing):
        for line in summary.lines(name):
            say(line)
    history = History.of(store, name)
    listing = history.with_unreadable(listing)
    losses = history.without_folders(listing).losses(listing)
    options.check_gone(source.name, listing.num_rows, losses)
    before = history.elsewhere(source.location)
    options.check_owner(name, before, source.location, losses, is_named=dataset is not None)

    spaces = held_spaces(store, backbone, history, mirrored=options.mirrored)
    columns = _columns(backbone, spaces, options.nodes)
    session = Session.of(backbone, columns, machine, options, loaded=loaded)
    followed = (*spaces, *(held_spaces(store, backbone, history) if options.mirrored else ()))
    settings = replace(
        resolve(asked, [_held(space, columns) for space in followed], precision_on(executor, session, source, listing)),
        mirrored=options.mirrored,
    )
    session = replace(session, settings=settings)
    if settings.decode == "gpu" and machine.device == "cpu":
        raise UsageError(
            Message(
                f"the store's features of {backbone.name} were decoded on a GPU, and here the device is cpu; ",
                Option("decode", "cpu"),
                " starts another feature space",
            )
        )
    fields = {**backbone.identity(), **settings.fields(), "numerics": NUMERICS}
    space = next((space for space in spaces if not differences(space.fields, fields)), None)
    why_new = None if space is not None else _why_new(spaces, fields, backbone)
    if store is not None and not dry_run:
        space = store.open_space(
            fields, backbone=backbone.name, notes=space_notes(backbone, settings) if why_new else {}
        )
        _note_map_shapes(space, backbone, columns)
    _tell_settings(backbone, settings, why_new, differences(spaces[0].fields, fields) if spaces else [], say)

    missing = MissingColumns(space, columns, options)
    plan = _plan(listing, name, space, missing, history, source.location, say)
    _explain(source, session, listing, plan, history)
    session = _with_engine(session, executor, len(plan.todo), space, say, keep=store is not None and not dry_run)
    if why_new:
        say(f"new feature space{f' {space.name}' if space else ''}: {_values(session)}")
    return ExtractionSpec(
        session=session,
        source=source,
        dataset=name,
        options=options,
        fields=fields,
        space=space,
        why_new=why_new,
        missing=missing,
        plan=plan,
        history=history,
        losses=losses,
        forgotten=forgotten,
        listing=summary,
        clock=clock,
    )


def _tell_settings(
    backbone: Backbone, settings: Settings, why_new: str | None, changed: Sequence[str], say: Callable[[str], None]
) -> None:
    """Says what is lost or guessed: stored features that cannot be reused, tensors; and logs why settings have their values."""
    if backbone.weights_note:
        say(f"weights {backbone.weights}: {backbone.weights_note}")
    for setting, value in settings.values().items():
        unasked = settings.why[setting] != ASKED_FOR and {setting, f"decoding.{setting}"} & set(changed)
        tell = say if (why_new and unasked) or setting in settings.costly else _logger.debug
        tell(f"{setting} {value}: {settings.why[setting]}")
    if why_new:
        (say if changed else _logger.debug)(why_new)


def _values(session: Session) -> str:
    """What was chosen, without reasons."""
    machine = {"engine": session.runtime()["engine"], "device": session.machine.device}
    return ", ".join(f"{name} {value}" for name, value in {**session.settled.values(), **machine}.items())


def _explain(source: Source, session: Session, listing: pa.Table, plan: Plan, history: History) -> None:
    """Logs what was found and settled, for those who ask why."""
    machine = session.machine
    before = f"the snapshot {history.run_id}" if history.run_id else "no earlier snapshot"
    _logger.debug("%s: %d images listed, compared with %s", source.location, listing.num_rows, before)
    _logger.debug(
        "%d images need nothing: same id, size and time, and every column there", listing.num_rows - len(plan.todo)
    )
    _logger.debug("%d images are to be read: new, changed, moved or without a column", len(plan.todo))
    _logger.debug("device %s, %d threads that read and decode", machine.device, machine.workers)
    _logger.debug(
        "%s with weights %s: %s", session.backbone.name, session.backbone.weights, ", ".join(map(str, session.columns))
    )


def _with_engine(
    session: Session, executor: Executor, images: int, space: Space | None, say: Callable[[str], None], *, keep: bool
) -> Session:
    """The session with what runs its network settled: as in the store, else by how many images there are to compute."""
    held = PYTORCH if space is None else space.notes.get("engine", PYTORCH)
    asked = session.machine.engine != AUTO
    session = session.for_images(images, OPENVINO if held == OPENVINO else None)
    if images and session.machine.engine == OPENVINO and executor.is_local:
        session.engine(session.columns)  # converted now, so that what comes of it can be said
        runtime = session.runtime()
        why = ASKED_FOR if asked else AS_IN_STORE if held == OPENVINO else f"{images:,} images are worth converting it"
        other = space is not None and space.columns() and held != session.machine.engine
        tell = say if other or "reason" in runtime else _logger.debug  # other than before, or than what was wanted
        tell(f"engine {runtime['engine']} {runtime['version']}: {runtime.get('reason') or why}")
    if keep and images and space is not None and session.machine.engine != held:
        space.update_notes({"engine": session.machine.engine})
    return session


def precision_on(executor: Executor, session: Session, source: Source, listing: pa.Table) -> MeasurePrecision:
    """Returns what compares precisions on images from all over a listing, where images will be computed."""
    sample = Sample(listing, spread(listing.num_rows, 4 * ENOUGH_IMAGES), ENOUGH_IMAGES)

    def measure(tried: str | None, intensity: str) -> tuple[str, str]:
        context = SampleContext.on(executor, session, source)
        return executor.once(measure_precision, (sample, tried, intensity), context=context)

    return measure


def spread(rows: int, most: int) -> np.ndarray:
    """At most so many of 0 ... rows - 1 at even distances, shuffled: any first ones are from all over; the same each time."""
    even = np.arange(min(rows, most)) * rows // max(min(rows, most), 1)
    return np.random.default_rng(0).permutation(even)


def dataset_name(source_name: str) -> str:
    """A source's name as a dataset name: letters, digits, ``.``, ``_`` and ``-``, not too long."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source_name)[:LONGEST_NAME].strip("-.") or "images"


def held_spaces(
    store: FeatureStore | None, backbone: Backbone, history: History, *, mirrored: bool = False
) -> list[Space]:
    """The store's feature spaces of this backbone that hold features: those the dataset used last first, then the rest.

    Args:
        store: None for one that is not there yet.
        backbone: The network.
        history: Of the dataset.
        mirrored: Those of mirrored images, else those of images as they are.
    """
    if store is None:
        return []
    identity = backbone.identity()
    same = [space for space in store.spaces() if all(space.fields.get(k) == v for k, v in identity.items())]
    order = {fingerprint: place for place, fingerprint in enumerate(history.fingerprints)}
    filled = [space for space in same if space.columns() and is_mirrored(space.fields) == mirrored]
    return sorted(filled, key=lambda space: order.get(space.fingerprint, len(order)))


def _held(space: Space, columns: Sequence[Column]) -> Held:
    return Held(space.fields, complete={str(column) for column in columns} <= space.columns().keys())


def _columns(backbone: Backbone, spaces: Sequence[Space], nodes: Sequence[str]) -> Sequence[Column]:
    """The requested columns; from what the store holds where it has them all, which saves tracing the network."""
    for space in spaces:
        aliases = space.notes.get("aliases", {})
        columns = [parse_column(node) for node in nodes]
        columns = [Column(aliases.get(column.node, column.node), column.pooling) for column in columns]
        if {str(column) for column in columns} <= set(space.columns()):
            return list(dict.fromkeys(columns))
    return backbone.columns(nodes)


def _plan(
    listing: pa.Table,
    dataset: str,
    space: Space | None,
    missing: MissingColumns,
    history: History,
    location: str,
    say: Callable[[str], None],
) -> Plan:
    """Joins the listing with the last snapshot, and with the parts too where that leaves files unexplained."""
    known = KNOWN_FILES.empty_table()
    rejected = KeySet(missing.reasons)
    elsewhere = history.elsewhere(location)
    if elsewhere is not None:
        say(
            f"dataset {dataset} was last taken from {elsewhere}, now from {location}: every file is read again, and "
            "the dataset becomes what is listed now. To keep the two apart give one another name: --dataset NAME"
        )
    elif history.snapshot is not None:
        known = _with_key(history.snapshot)
    plan = make_plan(listing, known, missing, rejected)
    if space is None or plan.has_key.all() or not history.is_only_of(location):
        return plan
    ids = filtered(listing.select(["id"]), ~plan.has_key)["id"]
    files = space.known_files(dataset=dataset, ids=ids, since=_since(space, dataset, len(ids), history))
    return make_plan(listing, pa.concat_tables([_with_key(files), known]), missing, rejected)


def _since(space: Space, dataset: str, unexplained: int, history: History) -> str | None:
    """The run after which to look for files that the last snapshot does not explain; None to look into every part.

    What a run left that never came to its snapshot is in later parts. Earlier ones only tell of files that were gone and are
    back: a few of these are read sooner than ten million rows are looked through, a whole share that was away is not.
    """
    rows = sum(part.rows for part in space.parts() if part.dataset == dataset)
    return history.run_id if unexplained * ROWS_PER_READ < rows else None


def _with_key(files: pa.Table) -> pa.Table:
    files = files.select(KNOWN_FILES.names)
    known = filtered(files, lambda rows: rows["key"].is_valid()) if files["key"].null_count else files
    return known.cast(KNOWN_FILES)


def _why_new(spaces: Sequence[Space], fields: Mapping[str, Any], backbone: Backbone) -> str:
    if not spaces:
        of = " of mirrored images" if fields.get(MIRRORED) else ""
        return f"starting a new feature space{of}: the store holds none for {backbone.name} with these weights and preprocessing"
    changed = ", ".join(differences(spaces[0].fields, fields))
    return f"starting a new feature space: {changed} differs from {spaces[0].name}, so no feature there can be reused"


def _note_map_shapes(space: Space, backbone: Backbone, columns: Sequence[Column]) -> None:
    """Writes down what to reshape the rows of ``map`` columns to, since the store keeps vectors."""
    known = space.notes.get("map_shapes", {})
    new = {str(c): backbone.feature_shape(c) for c in columns if c.pooling == "map" and str(c) not in known}
    if new:
        space.update_notes({"map_shapes": {**known, **new}})


def space_notes(backbone: Backbone, settings: Settings) -> dict[str, Any]:
    """What a new feature space says of itself beside its fields."""
    return {
        "backbone": backbone.description(),
        "aliases": {"bottleneck": backbone.bottleneck},
        "resolved": dict(settings.why),
    }


def _unread(rows: pa.Table, locators: Mapping[str, bytes]) -> pa.Table:
    """Images of a snapshot as a listing has them if a folder, whose locator is given, cannot be read."""
    ids = rows["id"].to_pylist()
    more = pa.array([next(locators[each] for each in _folders_of(i) if each in locators) for i in ids], pa.binary())
    unknown = pa.array(np.full(len(ids), UNKNOWN, np.int64))
    return pa.table([rows["id"], rows["label"], rows["split"], unknown, unknown, more], schema=SCHEMA)


def _folders_of(id_: str) -> Iterator[str]:
    """The folders that an image lies in, the outermost first."""
    end = id_.find("/")
    while end >= 0:
        yield id_[:end]
        end = id_.find("/", end + 1)
