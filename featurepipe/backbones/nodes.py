"""Nodes: the outputs inside a network that can be kept, found by tracing it with ``torch.fx``.

Names are those of ``torchvision.models.feature_extraction``. Three building blocks that torchvision treats as leaves
(``Conv2dNormActivation``, ``SqueezeExcitation``, ``MLP``) are traced into, so that their insides can be kept and fused
too; their own names still work, as block names.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer
from torchvision.ops import MLP, Conv2dNormActivation, SqueezeExcitation

M = TypeVar("M", bound=nn.Module)
_TRACED_INTO = (Conv2dNormActivation, SqueezeExcitation, MLP)
_IN_PLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_IN_PLACE_METHODS = {
    name: name[:-1]
    for name in ("add_", "sub_", "mul_", "div_", "relu_", "clamp_", "sigmoid_", "tanh_", "neg_", "exp_", "masked_fill_")
}
_SUMS: tuple[Any, ...] = (operator.add, torch.add, "add")


@dataclass(frozen=True)
class Trace:
    """A traced network: its graph and the name of every node in it, in execution order."""

    module: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]

    def extractor(self, wanted: Mapping[str, str]) -> fx.GraphModule:
        """Returns a module that maps images to ``{key: output}`` and computes nothing beyond the deepest node.

        Args:
            wanted: For each key of the result, the name of the node.

        Raises:
            KeyError: A name is not in the network (``Backbone.graph`` says so in better words).
        """
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.graph_copy(self.graph, copies)
        by_name = {name: node for node, name in self.names.items()}
        graph.output({key: copies[by_name[name]] for key, name in wanted.items()})
        _without_inplace(graph)
        _remove_unused(graph)
        extractor = fx.GraphModule(self.module, graph, type(self.module).__name__)
        return freeze(extractor)

    def above(self, node: str, out: str) -> fx.GraphModule | None:
        """Returns a module that maps the output of ``node`` to that of ``out``; None if ``out`` needs more from below.

        Raises:
            KeyError: A name is not in the network.
        """
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.graph_copy(self.graph, copies)
        by_name = {name: copies[found] for found, name in self.names.items() if found in copies}
        cut = by_name[node]
        graph.output(by_name[out])
        _without_inplace(graph)
        with graph.inserting_before(cut):
            given = graph.placeholder("activations")
        cut.replace_all_uses_with(given)
        _remove_unused(graph)
        for image in [found for found in graph.nodes if found.op == "placeholder" and found is not given]:
            if image.users:
                return None
            graph.erase_node(image)
        return fx.GraphModule(self.module, graph, type(self.module).__name__)


def trace(module: nn.Module) -> Trace | None:
    """Traces a network in eval mode; None if ``torch.fx`` cannot (its control flow depends on values, for instance)."""
    tracer = NodePathTracer(
        autowrap_modules=(math, torchvision.ops),
        leaf_modules=[leaf for leaf in _operator_modules() if leaf not in _TRACED_INTO],
    )
    try:
        with attributes_kept(module):
            graph = tracer.trace(module)
    except (
        fx.proxy.TraceError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
        AssertionError,
    ):
        # A proxy stands for the image here, so whatever the network does with its values may fail in any of these ways.
        return None
    names = {node: tracer.node_to_qualname[node] for node in graph.nodes if node in tracer.node_to_qualname}
    return Trace(module, graph, {node: name for node, name in names.items() if node.op != "output"})


def is_faithful(found: Trace, images: Tensor, expected: Any) -> bool:
    """Whether the traced network computes for ``images`` (N, C, H, W) what the network itself does, ``expected``.

    Tracing follows one path only, and does not see that ``y += 1`` changes other names of ``y``, too. Networks that we
    have not tested ourselves are tried; the module must have values.
    """
    with torch.inference_mode():
        given = fx.GraphModule(found.module, found.graph)(images)
    if not isinstance(expected, Tensor) or not isinstance(given, Tensor):
        return False
    return expected.shape == given.shape and torch.allclose(expected, given, rtol=1e-4, atol=1e-5, equal_nan=True)


def _operator_modules() -> list[type[nn.Module]]:
    """The module classes of ``torchvision.ops``, which torchvision's own feature extraction does not look into."""
    classes = [value for _, value in inspect.getmembers(torchvision.ops, inspect.isclass)]
    return [value for value in classes if issubclass(value, nn.Module)]


def _without_inplace(graph: fx.Graph) -> None:
    """Makes in-place calls ordinary ones, so that a kept output is not overwritten by what follows it.

    Whoever reads the overwritten value later gets the new one, as in the original network.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
            node.target = _IN_PLACE_OPERATORS[node.target]
        elif node.op == "call_method" and node.target in _IN_PLACE_METHODS:
            node.target = _IN_PLACE_METHODS[node.target]
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        else:
            continue
        overwritten = node.args[0]
        if isinstance(overwritten, fx.Node):
            later = _after(node)
            overwritten.replace_all_uses_with(node, later.__contains__)


def _after(node: fx.Node) -> set[fx.Node]:
    """The nodes that run after ``node``; not the output, which keeps values as they were when they were made."""
    nodes = list(node.graph.nodes)
    return {later for later in nodes[nodes.index(node) + 1 :] if later.op != "output"}


def _remove_unused(graph: fx.Graph) -> None:
    """Removes what no kept output needs, checks on sizes included; ``eliminate_dead_code`` alone keeps assertions."""
    for node in reversed(graph.nodes):
        if node.op not in ("output", "placeholder") and not node.users and node.target is not operator.setitem:
            graph.erase_node(node)


def bottleneck(found: Trace) -> str:
    """Names the node whose output feeds the final classifier.

    The classifier is the last Linear layer (or 1 x 1 convolution, as in SqueezeNet) between which and the network's
    output only layers without parameters lie. Of several whose outputs are added (distilled networks such as LeViT have two)
    it is the first. A network without one gives its own output's node.
    """
    output = _last_value(found)
    if output is None:
        return ""
    classifier = _classifier(found, output)
    if classifier is None:
        return found.names[output]
    source = classifier.args[0]
    return found.names[source] if isinstance(source, fx.Node) and source in found.names else found.names[classifier]


def _classifier(found: Trace, output: fx.Node, *, may_be_sum: bool = True) -> fx.Node | None:
    """The layer that an output comes from through layers without parameters alone, or None."""
    modules = dict(found.module.named_modules())
    node = output
    while node in found.names:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if _classifies(node, layer):
            return node
        inputs = node.all_input_nodes
        if may_be_sum and len(inputs) == 2 and node.target in _SUMS:
            both = [_classifier(found, one, may_be_sum=False) for one in inputs]
            return both[0] if None not in both else None
        if len(inputs) != 1 or (layer is not None and any(True for _ in layer.parameters())):
            return None
        node = inputs[0]
    return None


def _classifies(node: fx.Node, layer: nn.Module | None) -> bool:
    if node.op == "call_function":  # a subclass of Linear, which the tracer looks into
        return node.target is nn.functional.linear
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _last_value(found: Trace) -> fx.Node | None:
    """The node that makes the network's (first) output."""
    outputs = [node for node in found.graph.nodes if node.op == "output"]
    candidates = [node for node in outputs[0].all_input_nodes if node in found.names] if outputs else []
    return candidates[0] if candidates else None


def tensors_below(found: Trace, node: str, names: Iterable[str]) -> set[str]:
    """Those of the ``names`` of a network's tensors from which the output of ``node`` is computed."""
    waiting = [value for value, name in found.names.items() if name == node]
    waiting += [value for value in found.graph.nodes if value.target is operator.setitem]
    seen: set[fx.Node] = set()
    while waiting:
        value = waiting.pop()
        seen.add(value)
        waiting += [given for given in value.all_input_nodes if given not in seen]
    used = {str(value.target) for value in seen if value.op in ("call_module", "get_attr")}
    return {name for name in names if name in used or any(name.startswith(f"{target}.") for target in used)}


def freeze(module: M) -> M:
    """Freezes a network: eval mode, no gradients, and no layer overwrites its input.

    Every layer is put into eval mode, also those that a ``train()`` of the network's own leaves out.
    """
    module.eval()
    for layer in module.modules():
        layer.training = False
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False  # type: ignore[assignment]
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:  # weight_norm's product, which could not be copied
                vars(layer)[name] = value.detach()
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    return module


def frozen_copy(module: M) -> M:
    """Copies a network and freezes the copy: ``copy.deepcopy`` puts torchvision's ``DualGraphModule`` into training mode."""
    return freeze(copy.deepcopy(module))


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns a network without ``torch.compile`` and without the several GPUs of DataParallel, also inside of it.

    A compiled network computes the same, but its insides cannot be seen; DataParallel wants GPUs, where we are on the CPU.
    """
    while _is_compiled(module):
        module = module.get_submodule("_orig_mod")
    for layer in module.modules():
        if layer._compiled_call_impl is not None:  # noqa: SLF001
            layer._compiled_call_impl = None  # noqa: SLF001
        if isinstance(layer, nn.DataParallel):
            layer.device_ids = []
        for name, child in layer.named_children():
            if _is_compiled(child):
                setattr(layer, name, uncompiled(child))
    return module


def _is_compiled(module: nn.Module) -> bool:
    # By name: importing the class takes as long as importing torch.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules  # noqa: SLF001


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Takes back what a forward inside writes on the network's layers, such as a cache of attention biases.

    While ``torch.fx`` traces, such a cache (LeViT, EfficientFormer) fills with values that stand for nothing outside of
    that trace; after a real forward it holds values of one dtype and device, which a copy in another could not use.
    Constants that the tracer hangs on the network stay.
    """
    layers = [layer for layer in module.modules() if not isinstance(layer, torch.jit.ScriptModule)]
    before = [(layer, dict(vars(layer))) for layer in layers]
    containers = [
        (value, copy.copy(value)) for _, kept in before for value in kept.values() if type(value) in (dict, list, set)
    ]
    try:
        yield
    finally:
        for layer, kept in before:
            constants = {name: value for name, value in vars(layer).items() if name.startswith("_tensor_constant")}
            vars(layer).clear()
            vars(layer).update({**kept, **constants})
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
