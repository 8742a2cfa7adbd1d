"""Getting the columns into a store: extracted in one pass over the images, or found in a store that has them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from featurepipe.annotations import KEPT_COLUMN
from featurepipe.display import counted
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.local import executor_on
from featurepipe.features.options import KEEP, REJECT, MachineOptions, SourceOptions, places
from featurepipe.features.reading import opened
from featurepipe.features.session import settle_machine_for
from featurepipe.features.settings import Machine, Settled
from featurepipe.layer_depth.measure import FEW, Timing
from featurepipe.layer_depth.options import DepthOptions
from featurepipe.layer_depth.study import (
    AUTO,
    PRETRAINED,
    RANDOM,
    DepthColumn,
    Protocol,
    choose_columns,
    columns_of_space,
)
from featurepipe.option_groups import declared
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.choice import choose_space
from featurepipe.store.feature_store import is_store
from featurepipe.store.options import RoleOptions
from featurepipe.store.roles import with_roles
from featurepipe.store.rows import ArrayRows
from featurepipe.store.space import Origin

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone

DEFAULT_STORE = "features"


@dataclass(frozen=True)
class ComparisonRequest:
    """What is asked for; the fields are arguments of `featurepipe.depth`."""

    source: Any
    store: FeatureStore | str | PathLike[str] | None
    dataset: str | None
    backbone: str | None
    weights: str
    nodes: str | Sequence[str]
    test_source: Any
    silent: bool
    options: DepthOptions
    trust_code: bool | Collection[str] = False
    further: Sequence[str] = ()
    """Columns that are extracted in the same pass and not compared, such as maps."""


@dataclass(frozen=True)
class Extracted:
    """Where the columns are.

    Attributes:
        request: what was asked for.
        store: the store.
        dataset: the images' name in it.
        shifted_dataset: name of the other source's images, or None.
        backbone: the network, whose weights are not needed any more.
        columns: what is compared, in execution order.
        spaces: fingerprint of the feature space of each network.
        machine: where features are computed.
        records: run records, or in a dry run estimates, of each extraction.
        opening: how the source was opened.
    """

    request: ComparisonRequest
    store: FeatureStore
    dataset: str
    shifted_dataset: str | None
    backbone: Backbone
    columns: Sequence[DepthColumn]
    spaces: Mapping[str, str]
    machine: Machine
    records: Sequence[Mapping[str, Any]] = field(default_factory=list)
    opening: SourceOptions = field(default_factory=SourceOptions)

    @property
    def is_held(self) -> bool:
        """Whether the columns were found in a store, and nothing was extracted."""
        return is_store(self.request.source)

    @property
    def networks(self) -> Sequence[str]:
        """``pretrained``, and ``random`` where a control is asked for."""
        return [PRETRAINED, RANDOM] if self.request.options.control else [PRETRAINED]

    @property
    def runs(self) -> list[str]:
        """Ids of the extractions' runs."""
        return [str(record["run_id"]) for record in self.records]

    @property
    def weights_note(self) -> str:
        """What was ignored or guessed when the network's weights were loaded; empty if all is as usual."""
        if not self.is_held:
            return self.backbone.weights_note
        notes = self.store.space(self.spaces[PRETRAINED]).notes.get("backbone", {})
        return str(notes.get("weights_note", ""))

    @property
    def damaged(self) -> dict[str, Any] | None:
        """The images that were kept although they are damaged, as a run record has them, each with its dataset.

        None where nothing was extracted: what became of damaged images is in the records of the store's own runs.
        """
        if not self.records:
            return None
        told = {record["dataset"]: record["damaged"] for record in self.records}  # a control has the same images
        return {
            "asked": self.records[0]["damaged"]["asked"],
            "kept": sum(damaged["kept"] for damaged in told.values()),
            "images": [{"dataset": name, **image} for name, damaged in told.items() for image in damaged["images"]],
        }

    @property
    def space_name(self) -> str:
        """Name of the pretrained network's feature space."""
        return self.store.space(self.spaces[PRETRAINED]).name

    def control(self) -> dict[str, Any] | None:
        """The random network's feature space and seed, if there is one."""
        if RANDOM not in self.spaces:
            return None
        space = self.store.space(self.spaces[RANDOM])
        return {"space": space.fingerprint, "seed": space.notes.get("backbone", {}).get("seed")}

    @property
    def backbone_record(self) -> dict[str, Any]:
        """How to load the network again."""
        notes = self.store.space(self.spaces[PRETRAINED]).notes.get("backbone", {})
        return {
            "name": self.backbone.name,
            "weights": notes.get("weights"),
            "seed": notes.get("seed"),
            "description": notes,
        }

    def settings(self, protocol: Protocol) -> dict[str, Any]:
        """What was asked for, as JSON values."""
        options = self.request.options
        return {
            "heads": list(protocol.heads),
            "folds": protocol.folds,
            "split": protocol.folds is None,
            "seeds": list(range(protocol.seeds)),
            "nodes": self.request.nodes if isinstance(self.request.nodes, str) else list(self.request.nodes),
            "pooling": None if options.pooling is None else list(options.pooling),
            "max_width": options.max_width,
        }

    def joined(self, labels: Any, roles: RoleOptions, say: Callable[[str], None]) -> FeatureSet:
        """The images with what columns say of them; in a dry run those that are listed, of which there are no features.

        Raises:
            UsageError: there is no such column, or its values are none of the kind.
        """
        if self.is_held:
            view = self.store.features(self.dataset, self.columns[0].column, self.spaces[PRETRAINED])
            return with_roles(self.store, view, labels, roles, say)
        with closing(opened(self.request.source, self.opening)) as source:
            listed = _Listed(source.scan().combine_chunks())
        return with_roles(listed, listed.images(self.dataset), labels, roles, say)

    def plan(self) -> dict[str, Any]:
        """What a dry run says."""
        return {
            "dataset": self.dataset,
            "backbone": self.backbone.name,
            "columns": [column.as_dict() for column in self.columns],
            "extractions": [dict(record) for record in self.records],
        }

    def timing(self) -> Timing:
        """How long the forward takes up to each node is measured where features are computed, and as they are."""
        fields, device = self.store.space(self.spaces[PRETRAINED]).fields, self.machine.device
        return Timing(
            self.backbone.name,
            tuple(dict.fromkeys(column.node for column in self.columns)),
            str(fields.get("precision", "fp32")),
            device,
            FEW if device == "cpu" else self.machine.batch_size,
        )


class _Listed:
    """A listing as the snapshot that it is to become: what roles are joined to before anything is extracted."""

    def __init__(self, listing: pa.Table) -> None:
        self._listing = listing.append_column("status", pa.array(["ok"] * len(listing)))

    def further_columns(self, dataset: str, run_id: str | None = None) -> list[str]:
        """The columns of a manifest."""
        del dataset, run_id
        names = self._listing.column_names
        return [name.removeprefix(KEPT_COLUMN) for name in names if name.startswith(KEPT_COLUMN)]

    def snapshot_ids(self, dataset: str) -> list[str]:
        """Of the only one."""
        del dataset
        return [""]

    def snapshot(
        self, dataset: str, run_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table | None:
        """Some columns of the listing."""
        del dataset, run_id
        return self._listing if columns is None else self._listing.select(list(columns))

    def runs(self) -> list[dict[str, Any]]:
        """None yet."""
        return []

    def images(self, dataset: str) -> FeatureSet:
        """The images, without features, keys and origin."""
        count = len(self._listing)
        nothing = ArrayRows((), np.zeros((count, 0), np.float32), np.arange(count))
        table, keys = self._listing.select(["id", "label", "split"]), np.zeros((count, 32), np.uint8)
        return FeatureSet(table, keys, rows=nothing, origin=Origin("", dataset, "", "", "", {}))


def counts_of(images: FeatureSet, *, tests: bool = True) -> tuple[int, int, int | None]:
    """How many images have a label, or what else is learned, of how many classes and groups, with joined columns.

    Args:
        images: with their roles.
        tests: whether those of the split ``test`` count.

    Returns:
        The images; classes, or labels, 1 of numbers; groups, one without a group counting as its own, None where there are none.
    """
    usable = images.mask(labelled=True) & (np.ones(len(images), np.bool_) if tests else images.splits != "test")
    some = images.take(np.flatnonzero(usable))
    classes = len(some.target_names) or (len(some.classes) if some.targets is None else 1)
    names = some.groups
    if names is None:
        return len(some), classes, None
    return len(some), classes, len(set(names) - {None}) + sum(name is None for name in names)


def source_options(extraction: Mapping[str, Any]) -> SourceOptions:
    """Of the arguments of ``extract``, those that say how a source is opened."""
    given = {name: extraction[name] for name in declared(SourceOptions) if name in extraction}
    return SourceOptions(**{**given, "only_under": places(given.get("only_under"))})


def extracted(
    request: ComparisonRequest, extraction: dict[str, Any], *, dry_run: bool, say: Callable[[str], None]
) -> Extracted:
    """Computes what the store lacks, or finds it there; see `featurepipe.depth`."""
    machine_asked = MachineOptions(
        **{name: extraction[name] for name in declared(MachineOptions) if name in extraction}
    )
    with executor_on(extraction.get("cluster"), say=say) as executor:
        executor.check()
        machine = settle_machine_for(executor, machine_asked, extraction.get("decode", AUTO))
    if is_store(request.source):
        if extraction.get("damaged", REJECT) != REJECT:
            raise UsageError(
                Message(
                    f"{request.source} is a feature store: no image is decoded, and what was damaged was rejected or kept when "
                    "it was extracted. Leave ",
                    Option("damaged", KEEP),
                    " out, or give it to featurepipe extract",
                )
            )
        return _held(request, machine)
    return _computed(request, extraction, machine, dry_run=dry_run, say=say)


def _computed(
    request: ComparisonRequest,
    extraction: dict[str, Any],
    machine: Machine,
    *,
    dry_run: bool,
    say: Callable[[str], None],
) -> Extracted:
    from featurepipe.backbones import load_backbone
    from featurepipe.extraction.extract import extract, network_for

    if request.options.control and request.weights == "none":
        none, random = Option("weights", "none"), Option("control", "random")
        raise UsageError(Message(none, " is a random network already: ", random, " would compare it with itself"))
    target = request.store if request.store is not None else DEFAULT_STORE
    name = network_for(target, request.backbone, request.weights, say)
    backbone = load_backbone(name, request.weights)
    columns = choose_columns(backbone, request.nodes, request.options.pooling, request.options.max_width)
    store = target if isinstance(target, FeatureStore) else FeatureStore(target)
    say(f"{name}: {', '.join(column.column for column in columns)}")

    names = list(dict.fromkeys([*(column.column for column in columns), *request.further]))

    def run(source: Any, dataset: str | None, weights: str, settled: Mapping[str, Settled]) -> dict[str, Any]:
        record = extract(
            source, store, dataset=dataset, backbone=name, weights=weights, nodes=names,
            dry_run=dry_run, silent=request.silent, **{**extraction, **settled},
        )  # fmt: skip
        if first := next(iter(record.get("rejects", ())), None):
            say(
                f"left out: {counted(record['counts']['rejected'], 'image')} that cannot be used, such as {first['id']} "
                f"({first['reason']}); all: featurepipe runs {shlex.quote(str(store.path))} --rejects"
            )
        return record

    dataset, shifted = _names(request, extraction.get("only_under"))
    records = [run(request.source, dataset, request.weights, {})]
    spaces = {PRETRAINED: records[0].get("fingerprint", "")}
    # All that is compared is computed alike, and precisions are compared once.
    as_images, as_network = (settled(records[0], f"as {one}") for one in ("the training images", "the trained network"))
    if shifted is not None:
        records.append(run(request.test_source, shifted, request.weights, as_images))
        _check_same_space(records[0], records[-1])
    if request.options.control:
        records.append(run(request.source, dataset, "none", as_network))
        spaces[RANDOM] = records[-1].get("fingerprint", "")
        if shifted is not None:
            records.append(run(request.test_source, shifted, "none", as_network))
    return Extracted(
        request, store, dataset, shifted, backbone, columns, spaces, machine, records, source_options(extraction)
    )


def settled(record: Mapping[str, Any], why: str = "") -> dict[str, Settled]:
    """What an extraction, or a dry run of one, made of what was ``auto``, as arguments of the next one; ``why``, or as it was."""
    found = {name: record["settings"][name] for name in ("precision", "intensity")}
    return {name: Settled(one["value"], why or one["why"]) for name, one in found.items()}


def _held(request: ComparisonRequest, machine: Machine) -> Extracted:
    """A comparison of what a store has."""
    from featurepipe.backbones import load_backbone
    from featurepipe.backbones.from_user import check_trusted

    if request.store is not None or request.options.control or request.test_source is not None:
        raise UsageError(
            Message(
                f"{request.source} is a feature store: its columns are compared as they are. For ",
                Option("store"),
                ", ",
                Option("control"),
                " or ",
                Option("test_source"),
                " give the images as the source, and the store with ",
                Option("store"),
            )
        )
    store = request.source if isinstance(request.source, FeatureStore) else FeatureStore(request.source, create=False)
    dataset = request.dataset or store.only_dataset()
    space = choose_space(store, request.backbone, dataset)
    if request.backbone != space.backbone:  # else the user has named that module
        check_trusted(space.backbone, request.trust_code, named_by="the store")
    backbone = load_backbone(space.backbone, "none")
    nodes = (
        columns_of_space(backbone, space, request.options.max_width)
        if request.nodes in (AUTO, [AUTO], (AUTO,))
        else request.nodes
    )
    columns = choose_columns(backbone, nodes, request.options.pooling, request.options.max_width)
    return Extracted(request, store, dataset, None, backbone, columns, {PRETRAINED: space.fingerprint}, machine)


def _names(request: ComparisonRequest, only_under: Any) -> tuple[str, str | None]:
    """Names of both datasets, which must differ: the second would replace the first.

    Raises:
        UsageError: they do not.
    """
    dataset = request.dataset or _own_name(request.source, only_under)
    if request.test_source is None:
        return dataset, None
    shifted = _own_name(request.test_source, only_under)
    if shifted == dataset:
        raise UsageError(
            Message(
                f"both sources would be dataset {shifted!r}; call the first otherwise, such as ",
                Option("dataset", f"{shifted}-source"),
            )
        )
    return dataset, shifted


def _own_name(source: Any, only_under: Any) -> str:
    from featurepipe.extraction.prepare import dataset_name

    with closing(opened(source, SourceOptions(only_under=places(only_under)))) as images:
        return dataset_name(images.name)


def _check_same_space(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if one.get("fingerprint") != other.get("fingerprint"):
        raise UsageError(
            Message(
                f"the two sources came out in two feature spaces, {one.get('space')} and {other.get('space')}; make them one: "
                "fix what `auto` decided differently, for instance with ",
                Option("precision", "fp32"),
            )
        )
