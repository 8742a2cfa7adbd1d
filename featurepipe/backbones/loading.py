"""Backbones: frozen networks by name, with their weights, preprocessing and nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from featurepipe.backbones import checkpoints, nodes, weights
from featurepipe.backbones import nodes as measure
from featurepipe.backbones.checkpoints import Checkpoint
from featurepipe.backbones.families import SEE, Family, Torchvision, classification_names
from featurepipe.backbones.nodes import NodeInfo, Trace
from featurepipe.backbones.packaged import LITE, EfficientNetLite, LeNet
from featurepipe.backbones.pooling import Column, parse_column, pooled_shape
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.side_by_side import BESIDE, SideBySide
from featurepipe.backbones.stages import blocks, bounded_pooling, stages
from featurepipe.backbones.weights import StateDict, is_file_name
from featurepipe.errors import UsageError, about, unknown

BOTTLENECK = "bottleneck"
ALL = "all"
"""Stands for the outputs of all blocks, each pooled to `ALL_GRID` x `ALL_GRID` cells, or fewer within `ALL_WIDTH` values."""
ALL_GRID, ALL_WIDTH = 4, 9000
DEFAULT, SMALL = "resnet50", "efficientnet_lite0"
"""The network that is used where none is named, and the one where only that is at hand."""
_SEEDS = (-(2**63), 2**64 - 1)  # what torch.manual_seed takes


def load_backbone(name: str, weights: str = "DEFAULT", *, seed: int = 0, like: str | None = None) -> Backbone:
    """Finds a backbone by name; its weights are read when they are first needed.

    Args:
        name: A torchvision classification model, ``timm/NAME``, ``package.module:factory``, ``efficientnet_lite0`` (also
            1 and 2, and several with ``+`` between them, side by side) or ``lenet5``.
        weights: The name of pretrained weights, ``DEFAULT`` for the best of them, ``none`` for a random control, or the
            path of a checkpoint (``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.safetensors``) that holds the network's tensors up
            to the nodes that are asked for; see ``Backbone.weights_note``.
        seed: Seed of the random control.
        like: The name of the pretrained weights from which those of the checkpoint were tuned: images are preprocessed as
            these expect them. By default those that a file which ``featurepipe finetune`` wrote names, else the best of them.

    Raises:
        UsageError: The name or the weights are unknown, the file does not fit the network, the seed is out of range, or
            the user's own code fails.
        WeightsNotFound: (When the weights are needed) they are not at hand and cannot be downloaded.
    """
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        text = f"seed {seed} is out of range; give a number from {_SEEDS[0]} to {_SEEDS[1]}, such as 0"
        raise UsageError(text, option="seed")
    with about("backbone"):
        family = _family(name)
    with about("weights"):
        return Backbone(name, family, weights, seed=seed, like=like)


def default_backbone(weights: str, kept: Collection[str], say: Callable[[str], None]) -> str:
    """The network that is used where none is named.

    It is `DEFAULT`; but `SMALL` where the store has that one alone, or where the weights of that one alone are on this machine.

    Args:
        weights: What is asked for; anything but ``DEFAULT`` is of the usual network.
        kept: Networks whose features the store has.
        say: Told which network it is, and why, unless it is the usual one.
    """
    if weights != "DEFAULT" or DEFAULT in kept or not weights_at_hand(SMALL):
        return DEFAULT
    if SMALL in kept:
        say(f"no network is named: {SMALL}, as in the store")
        return SMALL
    if weights_at_hand(DEFAULT):
        return DEFAULT
    say(f"no network is named: {SMALL}, whose weights are at hand; those of {DEFAULT} would have to be downloaded")
    return SMALL


def weights_at_hand(name: str, weights: str = "DEFAULT") -> bool:
    """Whether a backbone's weights are on this machine; touches no network.

    Raises:
        UsageError: The name or the weights are unknown.
    """
    if weights == "none":
        return True
    if is_file_name(weights):
        return Path(weights).is_file()
    family = _family(name)
    return bool(family.choices()) and family.at_hand(family.resolve(weights))


def _family(name: str) -> Family:
    if name in LITE:
        return EfficientNetLite(name)
    if name == "lenet5":
        return LeNet()
    if name.startswith("timm/"):
        from featurepipe.backbones.from_timm import Timm

        return Timm(name.removeprefix("timm/"))
    if ":" in name:
        from featurepipe.backbones.from_user import User

        return User(name)
    if BESIDE in name:
        return SideBySide(name)
    known = classification_names()
    if name in known:
        return Torchvision(name)
    raise unknown("backbone", name, [*known, *LITE, "lenet5"], see=SEE, is_better=weights_at_hand)


class Backbone:
    """A frozen network: eval mode, no gradients, nothing overwritten in place. Made by ``load_backbone``.

    Attributes:
        name: As the user wrote it.
        architecture: Origin and name, such as ``torchvision/resnet50`` or ``user/package.module:factory``.
        weights: The weights for people to read: ``IMAGENET1K_V2``, ``random (seed 0)`` or ``file:NAME.pth``.
        is_random: Whether this is a random control.
        seed: The random control's seed, else None.
    """

    def __init__(self, name: str, family: Family, weights_name: str, *, seed: int = 0, like: str | None = None) -> None:
        self.name = name
        self.architecture = family.architecture
        self.is_random = weights_name == "none"
        self.seed = seed if self.is_random else None
        self._seed = seed  # a user's factory may draw random numbers, too, and must draw the same ones every night
        self._family = family
        self._resolved: str | None = None
        self._file: Path | None = None
        if self.is_random:
            self.weights = f"random (seed {seed})"
        elif is_file_name(weights_name):
            self._file = Path(weights_name)
            self.weights = f"file:{self._file.name}"
            tuned_from = weights.tuned_from(self._file)
            like = like or (tuned_from if tuned_from in family.choices() else None)  # else it is of another network
        else:
            self._resolved = family.resolve(weights_name)
            self.weights = self._resolved
        self._like = None if like is None else family.resolve(like)
        if self._file is not None:
            _ = self._checkpoint  # read now, so that a wrong file is told at once

    def __repr__(self) -> str:
        return f"Backbone({self.architecture}, weights={self.weights})"

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What the weights expect images to look like."""
        with _seeded(self._seed):
            return self._family.preprocessing(self._resolved or self._like)

    @cached_property
    def module(self) -> nn.Module:
        """The network, built on first use, on the CPU.

        Raises:
            WeightsNotFound: The weights are not at hand and cannot be downloaded.
        """
        if self.is_random:
            return self._random_module
        module = self._new_skeleton()
        state = self._state if self._checkpoint is None else checkpoints.filled(self._checkpoint, module)
        weights.load_into(module, state, name=self.name, origin=self.weights)
        return nodes.freeze(module)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights' names, dtypes, shapes and values, as hexadecimal digits.

        Pretrained and file weights are hashed as they are read, without building the network. Of a file that holds more,
        less or the same under other names, the tensors that go into the network are hashed under its names: what is
        ignored (another head) changes no feature and no hash.
        """
        return weights.sha256_of(self.state())

    def state(self) -> StateDict:
        """Returns the tensors that the weights hold for the network, by its names; what ``weights_sha256`` is the hash of."""
        return dict(self._random_module.state_dict() if self.is_random else self._state)

    @property
    def like(self) -> str | None:
        """The name of the pretrained weights as which images are preprocessed; None for the architecture's own way."""
        return self._resolved or self._like

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that stand side by side in it; empty for one network."""
        return self._family.parts

    @property
    def weights_note(self) -> str:
        """Where in the weights file the tensors were found, and what is ignored or missing; empty if all is as usual."""
        return "" if self._checkpoint is None else self._checkpoint.note

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that pretrained weights tell apart, in the order of the outputs; empty if none are known."""
        return () if self._resolved is None else tuple(self._family.classes(self._resolved))

    @cached_property
    def bottleneck(self) -> str:
        """Name of the node whose output feeds the final classifier."""
        found = self._trace_of_skeleton
        if found is not None:
            return nodes.bottleneck(found)
        return self._hooked.bottleneck

    @property
    def traceable(self) -> bool:
        """Whether ``torch.fx`` can trace the network; where not, its nodes are its modules."""
        return self._trace_of_skeleton is not None

    def nodes(self) -> list[NodeInfo]:
        """Returns the nodes whose output can be kept, in execution order; needs no weights."""
        return list(self._node_infos)

    def stages(self) -> tuple[str, ...]:
        """Names the outputs of the network's blocks in execution order, the bottleneck last; needs no weights."""
        return self._divided(stages)

    def graph(self, names: Sequence[str]) -> fx.GraphModule | None:
        """Returns a module that maps images (N, C, H, W) to ``{node: output}``, pruned above the deepest node.

        None where the network cannot be traced: all its nodes are modules then, and a hook on
        ``module.get_submodule(node)`` sees their output.

        Raises:
            UsageError: A node is unknown.
        """
        self._check_nodes(names)
        self._check_present(names)
        if not self.traceable:
            return None
        found = nodes.trace(self.module)
        return None if found is None else found.extractor({name: self._by_name[name].name for name in names})

    def columns(self, requested: Sequence[str]) -> list[Column]:
        """Reads the columns that a user asks for; needs no weights.

        Args:
            requested: ``node`` or ``node:pooling``; ``bottleneck`` stands for the node that feeds the classifier, ``all`` for
                the outputs of all blocks, each pooled to a width. Names of modules (``layer4``) are kept as written and mean
                the module's last node.

        Returns:
            The columns in the order given, without duplicates; the bottleneck alone if nothing is requested.

        Raises:
            UsageError: A node or a pooling is unknown, or they do not suit each other.
        """
        columns = []
        with about("nodes"):
            for text in requested or [BOTTLENECK]:
                if text == ALL and ALL not in self._by_name:
                    columns += self._every_block()
                    continue
                column = parse_column(text)
                if column.node == BOTTLENECK:
                    column = column._replace(node=self.bottleneck)
                self.feature_shape(column)
                self._check_present([column.node])
                columns.append(column)
        return list(dict.fromkeys(columns))

    def _every_block(self) -> list[Column]:
        """The output of every block and the bottleneck, pooled to a grid of `ALL_GRID` or what `ALL_WIDTH` values allow."""
        found = []
        for name in self._divided(blocks):
            info = self.node(name)
            found.append(Column(name, bounded_pooling(info, min(ALL_WIDTH, ALL_GRID**2 * info.width))))
        return found

    def _divided(self, divide: Callable[..., tuple[str, ...]]) -> tuple[str, ...]:
        """What `stages` or `blocks` gives; of networks side by side that of each, and the bottleneck of all."""
        if not self.parts:
            return divide(self._skeleton, self._node_infos, self.node(self.bottleneck))
        found: list[str] = []
        for part in self.parts:
            begin = f"{part}."
            inner = [
                replace(
                    info,
                    name=info.name.removeprefix(begin),
                    blocks=tuple(name.removeprefix(begin) for name in info.blocks if name.startswith(begin)),
                )
                for info in self._node_infos
                if info.name.startswith(begin)
            ]
            names = divide(self._skeleton.get_submodule(part), inner, inner[-1])
            found += [f"{begin}{name}" for name in names[:-1]]
        return (*found, self.bottleneck)

    def feature_shape(self, column: Column) -> tuple[int, ...]:
        """Returns the shape of one image's feature: (D,), or (C, H, W) for the pooling ``map``.

        Raises:
            UsageError: The node is unknown, or the pooling does not suit it.
        """
        info = self.node(column.node)
        return pooled_shape(info.shape, column.pooling, info.channel_axis)

    def node(self, name: str) -> NodeInfo:
        """Returns the node called ``name``, or the last node of the module called so.

        Raises:
            UsageError: There is none.
        """
        self._check_nodes([name])
        return self._by_name[name]

    def channel_axis(self, node: str) -> int:
        """Axis of a node's output that holds the channels, counted with the batch as axis 0."""
        return self.node(node).channel_axis

    def identity(self) -> dict[str, Any]:
        """Returns what decides the network's features, as JSON values: part of the feature space."""
        return {
            "architecture": self.architecture,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing.as_dict(),
            **self._family.identity(),
        }

    def description(self) -> dict[str, Any]:
        """Returns what people want to know about the backbone, as JSON values; needs no weights."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "weights": self.weights,
            "random": self.is_random,
            "seed": self.seed,
            "bottleneck": self.bottleneck,
            "parameters": sum(parameter.numel() for parameter in self._skeleton.parameters()),
            **({"weights_note": self.weights_note} if self.weights_note else {}),
        }

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        """What the weights file holds for this network; None without a file."""
        if self._file is None:
            return None
        content = weights.read_checkpoint(self._file)
        return checkpoints.fit(content, self._new_skeleton(), name=self.name, origin=self.weights)

    @cached_property
    def _state(self) -> StateDict:
        if self._checkpoint is not None:
            return self._checkpoint.state
        with _seeded(self._seed):
            return self._family.state(self._resolved or "")

    @cached_property
    def _random_module(self) -> nn.Module:
        with _seeded(self._seed):
            return nodes.freeze(self._family.random())

    @cached_property
    def _skeleton(self) -> nn.Module:
        """The network for looking at, without values (so without memory or work) where the family can do without."""
        skeleton = nodes.freeze(self._new_skeleton())
        return skeleton.to("meta") if self._family.is_tested else skeleton

    def _new_skeleton(self) -> nn.Module:
        with _seeded(self._seed):
            return self._family.skeleton(self._resolved or self._like)

    @cached_property
    def _hooked(self) -> measure.HookedRun:
        """One forward of a network that cannot be traced, without values if that works."""
        try:
            return measure.run_hooked(self._skeleton, self.preprocessing.input_shape)
        except (NotImplementedError, RuntimeError):
            return measure.run_hooked(self.module, self.preprocessing.input_shape)

    @cached_property
    def _trace_of_skeleton(self) -> Trace | None:
        if self._family.is_tested:
            return nodes.trace(self._skeleton)
        images = torch.randn(2, *self.preprocessing.input_shape, generator=torch.Generator().manual_seed(0))
        expected = self._family.try_forward(self._skeleton, images)
        found = nodes.trace(self._skeleton)
        return found if found is not None and nodes.is_faithful(found, images, expected) else None

    @cached_property
    def _node_infos(self) -> tuple[NodeInfo, ...]:
        found = self._trace_of_skeleton
        if found is None:
            return tuple(self._hooked.nodes)
        try:
            return tuple(measure.measure_trace(found, self.preprocessing.input_shape))
        except (NotImplementedError, RuntimeError):
            found = nodes.trace(self.module) or found  # some operation needs values
            return tuple(measure.measure_trace(found, self.preprocessing.input_shape))

    @cached_property
    def _by_name(self) -> dict[str, NodeInfo]:
        by_name = {info.name: info for info in self._node_infos}
        for info in self._node_infos:
            by_name.update({block: info for block in info.blocks if block not in by_name})
        return by_name

    @property
    def _see(self) -> str:
        return f"featurepipe nodes {self.name}"

    def _check_present(self, names: Sequence[str]) -> None:
        """Refuses nodes that need tensors which the weights file lacks."""
        if self._checkpoint is None or not self._checkpoint.missing:
            return
        for name in names:
            missing = sorted(self._checkpoint.missing.intersection(self.needed(self.node(name).name)))
            if missing:
                raise UsageError(
                    f"weights {self.weights!r} do not fit {self.name}: {self._checkpoint.wrong}; node {name} needs "
                    f"{len(missing)} of these, such as {missing[0]}. A network of another shape can be given as "
                    "package.module:factory"
                )

    def needed(self, node: str) -> set[str]:
        """Returns the names of the tensors from which a node's output is computed."""
        found, names = self._trace_of_skeleton, list(self._skeleton.state_dict())
        if found is not None:
            return nodes.tensors_below(found, node, names)
        at = [info.name for info in self._node_infos].index(node)
        later = [f"{info.name}." for info in self._node_infos[at + 1 :] if not node.startswith(f"{info.name}.")]
        return {name for name in names if not name.startswith(tuple(later))}

    def _check_nodes(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._by_name:
                raise unknown("node", name, [*self._by_name, BOTTLENECK], where=self.name, see=self._see)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch inside, and leaves its global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class BackboneInfo:
    """One line of the catalogue.

    Attributes:
        name: What ``load_backbone`` takes.
        input_size: (channels, height, width) of the images that the network sees with its default weights.
        parameters: Number of parameters, those of auxiliary training heads left out.
        bottleneck_width: Width of the features that feed the final classifier.
        weights: Names of the pretrained weights.
        at_hand: Whether the default weights are on this machine.
    """

    name: str
    input_size: tuple[int, int, int]
    parameters: int
    bottleneck_width: int
    weights: tuple[str, ...]
    at_hand: bool


def list_backbones() -> list[BackboneInfo]:
    """Lists featurepipe's own backbones and all classification models of torchvision; downloads nothing.

    timm's models (``timm/NAME``) are too many to build one by one: ``timm.list_models()`` names them.
    """
    own: dict[str, Family] = {**{name: EfficientNetLite(name) for name in LITE}, "lenet5": LeNet()}
    families: dict[str, Family] = {**own, **{name: Torchvision(name) for name in classification_names()}}
    return [_describe(name, family) for name, family in families.items()]


def timm_models() -> int:
    """Returns how many models the installed timm offers, 0 if it is not installed."""
    try:
        import timm
    except ImportError:
        return 0
    return len(timm.list_models())


def _describe(name: str, family: Family) -> BackboneInfo:
    choices = family.choices()
    default = family.resolve("DEFAULT") if choices else None
    network = family.skeleton(default)
    return BackboneInfo(
        name=name,
        input_size=family.preprocessing(default).input_shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bottleneck_width=_classifier_inputs(network),
        weights=tuple(choices),
        at_hand=default is not None and family.at_hand(default),
    )


def _classifier_inputs(network: nn.Module) -> int:
    """Width of what feeds the classifier: in all these networks the last Linear or, in SqueezeNet, convolution."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    last = layers[-1]
    return last.in_features if isinstance(last, nn.Linear) else last.in_channels
