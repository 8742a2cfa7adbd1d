"""Checkpoints: finding a network's tensors in what ``weights.read_file`` has read of a training script's file.

A frozen network needs the tensors up to the deepest node whose features are asked for, so a file with another head, with
none, or with tensors of its own beside them is as good as the network's own state dict. Where in the file the tensors are,
and which prefix their names have (``model.``, ``module.encoder_q.``, ``_orig_mod.``), is found by matching names and shapes.
Names of torchvision's first DenseNets (``denselayer1.norm.1.weight``) become those of today (``denselayer1.norm1.weight``).
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featurepipe.backbones.weights import (
    NOT_A_VALUE,
    WRAPPERS,
    StateDict,
    differences,
    first_of,
    has_whole_numbers,
    load_into,
    shortened,
    unwrap,
)
from featurepipe.display import counted
from featurepipe.errors import UsageError

_DEEPEST = 4
_FORMER_NAME = re.compile(r"\b(denselayer\d+\.(?:norm|relu|conv))\.([12])(?=\.)")
"""As ``_load_state_dict`` of torchvision's ``densenet.py`` does; it left these names when torch forbade dots in module names."""
_RIVAL = 0.8  # a match with this share of the best one's tensors could be meant as well


@dataclass(frozen=True)
class Checkpoint:
    """What of a file goes into a network.

    Attributes:
        state: The tensors, by the network's names, with the file's dtypes.
        missing: Names of the network's tensors that the file lacks, or has in another shape, as whole numbers, or with values
            that are not finite.
        wrong: How the file differs from the network, for an error; empty where it does not.
        note: The same for people whom it does not matter to, and where the tensors were found; empty where there is nothing
            to say.
        renamed: Whether the file is no state dict of the network as it is.
    """

    state: StateDict
    missing: frozenset[str] = frozenset()
    wrong: str = ""
    note: str = ""
    renamed: bool = False


class _Match(NamedTuple):
    """Tensors of one mapping in the file, by the network's names."""

    where: tuple[str, ...]
    dropped: str
    added: str
    mapping: Mapping[str, Tensor]
    tensors: StateDict

    def __str__(self) -> str:
        place = "".join(f"[{key!r}]" for key in self.where) or "the file"
        return f"{place} with the prefix {self.dropped!r}" if self.dropped else place

    def given(self) -> StateDict:
        """All tensors of the mapping, by the names that they would have in the network."""
        if self.added:
            return {f"{self.added}{key}": tensor for key, tensor in self.mapping.items()}
        return {key.removeprefix(self.dropped): tensor for key, tensor in self.mapping.items()}


def present_name(key: str) -> str:
    """Returns a tensor's name in today's torchvision; only those of its first DenseNets differ."""
    return _FORMER_NAME.sub(r"\1\2", key)


def fit(content: Any, network: nn.Module, *, name: str, origin: str) -> Checkpoint:
    """Finds the tensors for ``network`` in what a weights file holds.

    A state dict that fits as it is (perhaps wrapped as ``{"state_dict": ...}``, with the prefix ``module.``) is taken as it is.

    Args:
        content: What the file holds.
        network: The network; its values may be overwritten, its parameters may be on the meta device.
        name: The network's name, for errors.
        origin: The file's name, for errors.

    Raises:
        UsageError: There is no tensor for it, or several sets of tensors fit equally well.
    """
    unusable: list[str] = []
    content, former = _with_present_names(_plain(content, unusable), network.state_dict())
    matches = _matches(content, network.state_dict())
    try:
        state = unwrap(content, origin)
        load_into(network, state, name=name, origin=origin)
    except UsageError as error:
        if not matches:
            raise UsageError(f"{error}{_left_out(unusable, before='; ')}") from error
        found = _checkpoint(_chosen(matches, name, origin), network.state_dict(), name)
    else:
        found = Checkpoint(state, note=_others(matches, state))
    found = _without_non_finite(found, network)
    notes, faults = (_renaming(former), found.note), (found.wrong, _left_out(unusable))
    return replace(
        found,
        note="; ".join(filter(None, (*notes, _left_out(unusable)))),
        wrong="; ".join(filter(None, faults)) if found.missing else "",
    )


def _plain(content: Any, unusable: list[str]) -> Any:
    """The content with tensors that have their values themselves; what no network can take is left out and named."""

    def plain(key: Any, value: Tensor, _: Mapping[Any, Any]) -> tuple[Any, Tensor] | None:
        if kind := _unusable_kind(value):
            unusable.append(f"{shortened(str(key))}: {kind}")
            return None
        return key, _own_values(value)

    return _with_tensors(content, plain)


def _with_tensors(
    content: Any, change: Callable[[Any, Tensor, Mapping[Any, Any]], tuple[Any, Tensor] | None], depth: int = 0
) -> Any:
    """The content, nested mappings included, with ``change(key, tensor, mapping)`` in a tensor's place; None leaves it out."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return content
    changed: OrderedDict[Any, Any] = OrderedDict()
    for key, value in content.items():
        if not isinstance(value, Tensor):
            changed[key] = _with_tensors(value, change, depth + 1)
        elif (item := change(key, value, content)) is not None:
            changed[item[0]] = item[1]
    if len(changed) == len(content) and all(key in content and content[key] is changed[key] for key in changed):
        return content  # torch hangs version notes on the mapping itself
    changed.__dict__.update(getattr(content, "__dict__", {}))
    return changed


def _unusable_kind(value: Tensor) -> str:
    """What a tensor is that holds no plain numbers; empty for one that does."""
    kinds = (
        (value.is_nested, "nested"),
        (value.layout != torch.strided, "sparse"),
        (value.is_meta, "without values (on the meta device)"),
        (value.is_quantized, "quantised"),
        (value.is_complex(), "complex"),
        (value.is_floating_point() and "float4" in str(value.dtype), "of four bits"),
    )
    return next((kind for applies, kind in kinds if applies), "")


def _own_values(value: Tensor) -> Tensor:
    """Float8 as float32, which is exact and can be compared; a view that is negated in passing as what it means."""
    if value.is_floating_point() and value.dtype.itemsize == 1:
        return value.float()
    return value.resolve_neg() if value.is_neg() else value


def _left_out(unusable: Sequence[str], before: str = "") -> str:
    if not unusable:
        return ""
    count = f"{counted(len(unusable), 'tensor')} of the file {'is' if len(unusable) == 1 else 'are'} left out"
    return f"{before}{count}, which no network takes ({first_of(unusable)})"


def _without_non_finite(found: Checkpoint, network: nn.Module) -> Checkpoint:
    """Counts weights that are NaN or infinite as missing: a ReLU behind them may make zeros of them, in silence."""
    expected = network.state_dict()
    values = [name for name, _ in network.named_parameters()]
    values += [name for name in expected if name.endswith(("running_mean", "running_var"))]
    given = ((name, found.state[name]) for name in values if name in found.state and name in expected)
    bad = [name for name, value in given if not bool(torch.isfinite(value.to(expected[name].dtype)).all())]
    if not bad:
        return found
    said = f"{counted(len(bad), 'tensor')} of the file {'holds' if len(bad) == 1 else 'hold'} NaN or infinity ({first_of(bad)})"
    return replace(
        found,
        missing=found.missing | frozenset(bad),
        wrong="; ".join(filter(None, (found.wrong, said))),
        note="; ".join(filter(None, (found.note, said))),
    )


def _with_present_names(content: Any, expected: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """The content with today's names of tensors, and the names that were changed."""
    former: list[str] = []
    if any(present_name(key) != key for key in expected):
        return content, former  # a network of somebody's own that has such names today

    def renamed(key: Any, value: Tensor, mapping: Mapping[Any, Any]) -> tuple[Any, Tensor]:
        name = present_name(key) if isinstance(key, str) else key
        if name == key or name in mapping:  # where the file has both, today's is the one that is meant
            return key, value
        former.append(key)
        return name, value

    return _with_tensors(content, renamed), former


def _renaming(former: Sequence[str]) -> str:
    if not former:
        return ""
    return (
        f"{counted(len(former), 'tensor')} renamed as torchvision does ({former[0]} to {present_name(former[0])}, ...)"
    )


def filled(checkpoint: Checkpoint, network: nn.Module) -> StateDict:
    """The checkpoint's tensors, and for the missing ones the network's own values, or NaN where it has none."""
    if not checkpoint.renamed:
        return checkpoint.state
    own = network.state_dict()
    lacking = {key: own[key] for key in checkpoint.missing | (own.keys() - checkpoint.state.keys())}
    return {**checkpoint.state, **{key: _empty(value) if value.is_meta else value for key, value in lacking.items()}}


def _empty(like: Tensor) -> Tensor:
    value = float("nan") if like.is_floating_point() else 0
    return torch.full(tuple(like.shape), value, dtype=like.dtype)


def _checkpoint(best: _Match, expected: Mapping[str, Tensor], name: str) -> Checkpoint:
    needed = {key for key, value in expected.items() if _counts(key, value)}
    missing = frozenset(needed - best.tensors.keys())
    used = {f"{best.dropped}{key.removeprefix(best.added)}" for key in best.tensors}
    ignored = sorted(key for key in best.mapping if key not in used and _counts(key, best.mapping[key]))
    parts = [f"{len(needed) - len(missing)} of the {len(needed)} tensors of {name} are in {best}"]
    if missing:
        parts.append(f"{len(missing)} are not ({first_of(sorted(missing))})")
    if ignored:
        parts.append(f"{len(ignored)} of the file are ignored ({first_of(ignored)})")
    wrong = differences(expected, best.given()) if missing else ""
    return Checkpoint(best.tensors, missing, wrong, "; ".join(parts), renamed=True)


def _counts(key: str, value: Tensor) -> bool:
    """Whether a tensor changes features: counters do not, and tables of indices a network makes for itself."""
    return value.is_floating_point() and key.rpartition(".")[2] != NOT_A_VALUE


def _matches(content: Any, expected: Mapping[str, Tensor]) -> list[_Match]:
    """Every way to take tensors from the file, those with most first."""
    found = []
    for where, mapping in _mappings(content):
        for dropped, added in _prefixes(mapping, expected):
            names = {key: f"{dropped}{key.removeprefix(added)}" for key in expected if key.startswith(added)}
            tensors = {
                key: mapping[other]
                for key, other in names.items()
                if other in mapping and mapping[other].shape == expected[key].shape
                if not has_whole_numbers(mapping[other], expected[key])
            }
            if any(_counts(key, value) for key, value in tensors.items()):
                found.append(_Match(where, dropped, added, mapping, tensors))
    return sorted(found, key=lambda match: -len(match.tensors))


def _mappings(content: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    if not isinstance(content, Mapping) or len(where) > _DEEPEST:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield where, tensors
    for key, value in content.items():
        yield from _mappings(value, (*where, str(key)))


def _prefixes(mapping: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The likeliest prefixes: what to drop from the file's names, or from the network's (a backbone inside a wrapper)."""
    counts: Counter[tuple[str, str]] = Counter()
    for names, others, is_file in ((mapping, expected, True), (expected, mapping, False)):
        for name, value in names.items():
            for prefix, tail in _tails(name):
                if tail in others and others[tail].shape == value.shape and (prefix or is_file):
                    counts[(prefix, "") if is_file else ("", prefix)] += 1
    most = max(counts.values(), default=0)
    return [pair for pair, count in counts.items() if count >= _RIVAL * most]


def _tails(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for i in range(len(parts)):
        tail = ".".join(parts[i:])
        yield name[: len(name) - len(tail)], tail


def _chosen(matches: Sequence[_Match], name: str, origin: str) -> _Match:
    """The best match; of equally good ones that under the usual key, else their values have to be the same."""
    rivals = [match for match in matches if len(match.tensors) >= _RIVAL * len(matches[0].tensors)]
    for wrapper in WRAPPERS:
        under = [match for match in rivals if match.where[:1] == (wrapper,)]
        rivals = under or rivals
    other = next((match for match in rivals[1:] if not _same(rivals[0].tensors, match.tensors)), None)
    if other is not None:
        raise UsageError(
            f"weights {origin!r} hold several sets of tensors for {name}: {'; '.join(map(str, rivals))}; save the one that you "
            "want alone: torch.save(tensors, path)"
        )
    return rivals[0]


def _same(one: StateDict, other: StateDict) -> bool:
    return all(one[key] is other[key] or _equal(one[key], other[key]) for key in one.keys() & other.keys())


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN equals NaN."""
    return torch.equal(one, other) or (one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num()))


def _others(matches: Sequence[_Match], state: StateDict) -> str:
    """Says that the file holds another set of tensors with other values, such as averaged ones."""
    full = [match for match in matches if len(match.tensors) >= _RIVAL * len(state)]
    others = [match for match in full if not _same(match.tensors, state)]
    return (
        f"the file holds other tensors as well, which are ignored: {first_of(list(map(str, others)))}" if others else ""
    )
