"""Everything that is settled before the first image: the network, its feature space, the columns and the plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from featurepipe.backbones import Backbone, Column, load_backbone, parse_column
from featurepipe.backbones.engine import NUMERICS, Engine
from featurepipe.errors import Reject, UsageError, unknown
from featurepipe.extraction import auto
from featurepipe.extraction.history import History
from featurepipe.extraction.limits import Limits
from featurepipe.extraction.machine import Machine
from featurepipe.extraction.options import DAMAGED, Options
from featurepipe.extraction.place import Here, Place
from featurepipe.extraction.plan import KeySet, Plan, make_plan
from featurepipe.extraction.stream import Loader, StageSeconds, loader_for
from featurepipe.extraction.wanted import Wanted
from featurepipe.images import Source
from featurepipe.images.budgets import check_budgets
from featurepipe.images.findings import ListingSummary, is_told
from featurepipe.store import FeatureStore, Space, differences
from featurepipe.store.runs import checked_dataset
from featurepipe.store.space import KNOWN_FILES

LONGEST_NAME = 100

ROWS_PER_READ = 1000
"""Rows of parts that are looked through while one image is read: about a millisecond."""


@dataclass(frozen=True)
class Job:
    """An extraction with everything settled.

    Attributes:
        space: the feature space; None in a dry run that would start one.
        why_new: why the space is a new one, or None.
        wanted: what is still to be computed, by key.
        history: what the store remembers of the dataset.
        gone: images of the last snapshot that the source no longer lists.
        listing: what the source lists, ignores and guesses.
        engines: the networks built so far, by their columns.
    """

    source: Source
    dataset: str
    options: Options
    machine: Machine
    backbone: Backbone
    columns: Sequence[Column]
    settings: auto.Settings
    fields: Mapping[str, Any]
    space: Space | None
    why_new: str | None
    wanted: Wanted
    plan: Plan
    history: History
    gone: int
    listing: ListingSummary
    clock: StageSeconds
    engines: dict[frozenset[Column], Engine] = field(default_factory=dict)

    @property
    def existing_space(self) -> Space:
        """The feature space, which only a dry run may lack."""
        if self.space is None:
            raise RuntimeError("a dry run has no feature space to write to")
        return self.space

    def loader(self, missing: Callable[[bytes], tuple[str, ...] | Reject]) -> Loader:
        """Threads that read, decode, resize and crop the images for which ``missing`` names columns."""
        route, intensity = self.settings.decode, self.settings.intensity
        keep = self.options.keep_damaged
        return loader_for(
            self.source, missing, self.backbone, self.machine, route, intensity, self.clock, keep_damaged=keep
        )

    def engine(self, columns: Sequence[Column]) -> Engine:
        """The network for some of the columns, in the job's precision; built once."""
        wanted = frozenset(columns)
        if wanted not in self.engines:
            self.engines[wanted] = Engine(
                self.backbone,
                columns,
                precision=self.settings.precision,
                device=self.machine.device,
                batch_size=self.machine.batch_size,
            )
        return self.engines[wanted]


def prepare(
    source: Source,
    store: FeatureStore | None,
    dataset: str | None,
    options: Options,
    say: Callable[[str], None],
    *,
    dry_run: bool,
    limits: Limits | None = None,
    network: Backbone | None = None,
    place: Place | None = None,
) -> Job:
    """Settles everything before the first image.

    Args:
        source: the images.
        store: where features go; None in a dry run on a store that does not exist yet.
        dataset: name of the snapshots, the source's own name when None.
        options: what the user asked for.
        say: told what was decided, one line at a time.
        dry_run: leave the store as it is.
        limits: what makes the extraction refuse a listing; without them only an empty one is refused.
        network: the backbone that ``options`` names, if it is loaded already.
        place: where images will be computed; by default here.

    Raises:
        UsageError: an option is wrong; see the message.
        SourceError: the source holds no image, or lacks too many of the last snapshot.
        WeightsNotFound: the weights are not at hand.
    """
    asked = {name: getattr(options, name) for name in auto.SETTINGS}
    auto.check(asked)
    if options.damaged not in DAMAGED:
        raise unknown("choice of damaged", options.damaged, DAMAGED)
    check_budgets()
    place = place or Here()
    machine = place.machine(options)
    name = checked_dataset(dataset or dataset_name(source.name))
    backbone = network or load_backbone(options.backbone, options.weights, seed=options.seed)
    clock = StageSeconds()
    with clock.stage("scan"):
        listing = source.scan().combine_chunks()  # taking rows from many chunks costs the more, the more there are
    summary = ListingSummary.of(listing)
    if not is_told(listing):
        for line in summary.lines(name):
            say(line)
    history = History.of(store, name)
    listing = history.with_unreadable(listing)
    gone = history.gone(listing)
    (limits or Limits()).check_gone(source.name, listing.num_rows, history.images, gone)

    spaces = held_spaces(store, backbone, history)
    columns = _columns(backbone, spaces, options.nodes)
    measure = place.precision(source, listing, backbone, columns, machine)
    settings = auto.resolve(asked, [_held(space, columns) for space in spaces], measure)
    if settings.decode == "gpu" and machine.device == "cpu":
        raise UsageError(
            f"the store's features of {backbone.name} were decoded on a GPU, and here the device is cpu; "
            "--decode cpu starts another feature space"
        )
    fields = {**backbone.identity(), **settings.fields(), "numerics": NUMERICS}
    space = next((space for space in spaces if not differences(space.fields, fields)), None)
    why_new = None if space is not None else _why_new(spaces, fields, backbone)
    if store is not None and not dry_run:
        space = store.open_space(fields, backbone=backbone.name, notes=_notes(backbone, settings) if why_new else {})
        _note_map_shapes(space, backbone, columns)
    if why_new:
        say(why_new)
    if backbone.weights_note:
        say(f"weights {backbone.weights}: {backbone.weights_note}")
    for setting, value in settings.values().items():
        say(f"{setting} {value}: {settings.why[setting]}")

    wanted = Wanted(space, columns, retry_rejects=options.retry_rejects, keep_damaged=options.keep_damaged)
    plan = _plan(listing, name, space, wanted, history, source.location, say)
    return Job(
        source=source,
        dataset=name,
        options=options,
        machine=machine,
        backbone=backbone,
        columns=columns,
        settings=settings,
        fields=fields,
        space=space,
        why_new=why_new,
        wanted=wanted,
        plan=plan,
        history=history,
        gone=gone,
        listing=summary,
        clock=clock,
        engines=place.engines(),
    )


def dataset_name(source_name: str) -> str:
    """A source's name as a dataset name: letters, digits, ``.``, ``_`` and ``-``, not too long."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source_name)[:LONGEST_NAME].strip("-.") or "images"


def held_spaces(store: FeatureStore | None, backbone: Backbone, history: History) -> list[Space]:
    """The store's feature spaces of this backbone that hold features: those the dataset used last first, then the rest."""
    if store is None:
        return []
    identity = backbone.identity()
    same = [space for space in store.spaces() if all(space.fields.get(k) == v for k, v in identity.items())]
    order = {fingerprint: place for place, fingerprint in enumerate(history.fingerprints)}
    filled = [space for space in same if space.columns()]
    return sorted(filled, key=lambda space: order.get(space.fingerprint, len(order)))


def _held(space: Space, columns: Sequence[Column]) -> auto.Held:
    return auto.Held(space.fields, complete={str(column) for column in columns} <= space.columns().keys())


def _columns(backbone: Backbone, spaces: Sequence[Space], nodes: Sequence[str]) -> Sequence[Column]:
    """The wanted columns; from what the store holds where it has them all, which saves tracing the network."""
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
    wanted: Wanted,
    history: History,
    location: str,
    say: Callable[[str], None],
) -> Plan:
    """Joins the listing with the last snapshot, and with the parts too where that leaves files unexplained."""
    known = KNOWN_FILES.empty_table()
    rejected = KeySet(wanted.reasons)
    elsewhere = history.elsewhere(location)
    if elsewhere is not None:
        say(
            f"dataset {dataset} was last taken from {elsewhere}, now from {location}: every file is read again, and "
            "the dataset becomes what is listed now. To keep the two apart give one another name: --dataset NAME"
        )
    elif history.snapshot is not None:
        known = _with_key(history.snapshot)
    plan = make_plan(listing, known, wanted, rejected)
    if space is None or plan.has_key.all() or not history.is_only_of(location):
        return plan
    ids = listing["id"].filter(pa.array(~plan.has_key))
    files = space.known_files(dataset=dataset, ids=ids, since=_since(space, dataset, len(ids), history))
    return make_plan(listing, pa.concat_tables([_with_key(files), known]), wanted, rejected)


def _since(space: Space, dataset: str, unexplained: int, history: History) -> str | None:
    """The run after which to look for files that the last snapshot does not explain; None to look into every part.

    What a run left that never came to its snapshot is in later parts. Earlier ones only tell of files that were gone and are
    back: a few of these are read sooner than ten million rows are looked through, a whole share that was away is not.
    """
    rows = sum(part.rows for part in space.parts() if part.dataset == dataset)
    return history.run_id if unexplained * ROWS_PER_READ < rows else None


def _with_key(files: pa.Table) -> pa.Table:
    files = files.select(KNOWN_FILES.names)
    return files.filter(files["key"].is_valid()).cast(KNOWN_FILES)


def _why_new(spaces: Sequence[Space], fields: Mapping[str, Any], backbone: Backbone) -> str:
    if not spaces:
        return f"starting a new feature space: the store holds none for {backbone.name} with these weights and preprocessing"
    changed = ", ".join(differences(spaces[0].fields, fields))
    return f"starting a new feature space: {changed} differs from {spaces[0].name}, so no feature there can be reused"


def _note_map_shapes(space: Space, backbone: Backbone, columns: Sequence[Column]) -> None:
    """Writes down what to reshape the rows of ``map`` columns to, since the store keeps vectors."""
    known = space.notes.get("map_shapes", {})
    new = {str(c): backbone.feature_shape(c) for c in columns if c.pooling == "map" and str(c) not in known}
    if new:
        space.update_notes({"map_shapes": {**known, **new}})


def _notes(backbone: Backbone, settings: auto.Settings) -> dict[str, Any]:
    return {
        "backbone": backbone.description(),
        "aliases": {"bottleneck": backbone.bottleneck},
        "resolved": dict(settings.why),
    }
