"""How far images are from what a network was trained on, as its own BatchNorm statistics tell; no image of those is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featurepipe.errors import DiskFull, FeaturepipeError, Interrupted
from featurepipe.execution.executor import Executor, Report, Stop, Worker
from featurepipe.features.options import Options
from featurepipe.features.reading import opened
from featurepipe.features.session import Sample, SampleContext, Session
from featurepipe.images.intensity import intensity_of
from featurepipe.layer_depth.journal import Journal, key_of
from featurepipe.layer_depth.sources import source_options

if TYPE_CHECKING:
    from featurepipe.backbones import Backbone
    from featurepipe.features.settings import Machine

SAMPLED = 128
"""Images that are looked at, drawn at random."""
NOISE = 64
"""Images of noise that a network's scale is made of."""
BATCH = 16
DIFFERENT = 0.5
"""Share of the way to noise from which on images are called different from what the network was trained on."""
METHOD = (
    "the distance of each BatchNorm layer's inputs from the statistics that it learned: the Wasserstein distance of two normal "
    "distributions for each channel, in units of the learned deviation; the root of the mean square over channels, and the mean "
    'over layers (after Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", '
    "where it tells how much accuracy a network loses); 0 is the training images themselves, 1 uniform noise"
)


def layer_distances(network: nn.Module, batches: Sequence[Tensor]) -> tuple[dict[str, float], Tensor]:
    """Compares what goes into each BatchNorm layer with the statistics that it learned.

    Args:
        network: in eval mode.
        batches: float inputs, (N, C, H, W) each.

    Returns:
        For each layer, by name in the order of the network, the root of the mean over channels of
        ``((m - M)^2 + (s - S)^2) / (S^2 + eps)``, with the mean m and deviation s of the inputs over images and places, and the
        learned M and S; nothing for a network without BatchNorm. And what the network gives for all images.
    """
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    with _moments(layers) as sums, torch.inference_mode():
        given = [network(batch) for batch in batches]
    found = {}
    for name, (count, total, squares) in sums.items():
        layer, mean = layers[name], total / count
        deviation = (squares / count - mean**2).clamp_min(0).sqrt()
        learned, variance = layer.running_mean.double(), layer.running_var.double()  # type: ignore[union-attr]
        apart = ((mean - learned) ** 2 + (deviation - variance.sqrt()) ** 2) / (variance + layer.eps)
        found[name] = float(apart.mean().sqrt())
    outputs = torch.cat(given) if given and all(isinstance(one, Tensor) for one in given) else torch.zeros(0, 0)
    return {name: found[name] for name in layers if name in found}, outputs


@contextmanager
def _moments(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[int, Tensor, Tensor]]]:
    """While the block runs, adds up inputs and their squares over images and places: the count and two (C,) sums by layer."""
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def adder(name: str) -> Callable[[nn.Module, Any], None]:
        def add(_: nn.Module, inputs: Any) -> None:
            values = inputs[0].detach().double()
            over = [axis for axis in range(values.ndim) if axis != 1]
            count = values.numel() // values.shape[1]
            before = sums.get(name, (0, torch.zeros(values.shape[1]), torch.zeros(values.shape[1])))
            sums[name] = (before[0] + count, before[1] + values.sum(over), before[2] + (values**2).sum(over))

        return add

    hooks = [layer.register_forward_pre_hook(adder(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def distance_of(backbone: Backbone, images: Tensor) -> dict[str, Any]:
    """How far images are from what a network was trained on.

    Args:
        backbone: with its weights.
        images: uint8 (n, C, h, w), as the network takes them.

    Returns:
        ``distance`` (the mean over layers), ``noise`` (the same of uniform noise), ``relative`` (their ratio), ``layers`` (the
        distance of each, by name), ``noise_layers``, ``images``, and ``confidence``: the mean of the largest probability that
        the network gives to one of its own classes (Hendrycks and Gimpel 2017); None without classes.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (NOISE, *images.shape[1:]), generator=generator).to(torch.uint8)
    normalise = backbone.preprocessing.normalise
    layers, outputs = layer_distances(backbone.module, [normalise(part) for part in _batches(images)])
    scale, _ = layer_distances(backbone.module, [normalise(part) for part in _batches(noise)])
    distance, most = (float(np.mean(list(of.values()))) for of in (layers, scale)) if layers else (None, None)
    sure = outputs.shape[1:] == (len(backbone.classes),) and len(backbone.classes) > 1
    return {
        "distance": distance,
        "noise": most,
        "relative": distance / most if distance is not None and most else None,
        "layers": layers,
        "noise_layers": scale,
        "images": len(images),
        "confidence": float(outputs.softmax(1).amax(1).mean()) if sure else None,
    }


def _batches(images: Tensor) -> list[Tensor]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def measure_distance(
    context: SampleContext, asked: tuple[Sample, str], worker: Worker, _stop: Stop, _report: Report
) -> dict[str, Any] | None:
    """Loads a sample and compares it, where images are computed; None where no image of it can be read."""
    sample, intensity = asked
    with context.session.at(worker) as session:
        images = context.load(session, sample, intensity)
        return distance_of(session.backbone, images) if len(images) else None


def similarity(
    source: Any,
    backbone: Backbone,
    machine: Machine,
    fields: Mapping[str, Any],
    extraction: Mapping[str, Any],
    *,
    weights: str,
    seed: int,
    images: str,
    journal: Journal,
    executor: Executor,
) -> dict[str, Any]:
    """How far a source's images are from what a network was trained on; what the journal knows is not measured again.

    Args:
        source: the images.
        backbone: the network, with its weights.
        machine: where images are computed.
        fields: of the feature space.
        extraction: further arguments of ``extract``, of which those count that say how the source is opened.
        weights: as any process can load them.
        seed: of random weights.
        images: names the images as they are, so that the same images are not looked at again in another snapshot.
        journal: keeps what is found.
        executor: who computes.

    Returns:
        As `distance_of`, with ``method`` and ``different``: the value of ``relative`` from which on images are called different;
        or ``why``, where it cannot be measured.
    """
    if backbone.is_random:
        return {"relative": None, "why": "the weights are random: the network was trained on nothing"}
    key = key_of(what="similarity of training", version=2, network=backbone.identity(), images=images, sampled=SAMPLED)

    def find() -> dict[str, Any] | None:
        with closing(opened(source, source_options(extraction))) as listed:
            listing = listed.scan().combine_chunks()
            rows = np.random.default_rng(0).permutation(listing.num_rows)
            asked = Options(backbone=backbone.name, weights=weights, seed=seed)
            session = Session.of(backbone, tuple(backbone.columns(["bottleneck"])), machine, asked)
            context = SampleContext.on(executor, session, listed)
            sample = Sample(listing, rows, SAMPLED)
            return executor.once(measure_distance, (sample, intensity_of(fields["decoding"])), context=context)

    try:
        found = journal.known(key)
        if found is None:  # not asked yet, or no image could be read when it was
            found = find()
            if found is not None:
                journal.keep(key, found)
    except (Interrupted, DiskFull):
        raise
    except FeaturepipeError as error:  # the page goes without it
        return {"relative": None, "why": f"the images cannot be read ({error.message})"}
    if found is None:
        return {"relative": None, "why": "none of the images could be read"}
    if found["relative"] is None:
        return {**found, "why": f"{backbone.name} has no BatchNorm layers, whose statistics would tell"}
    return {**found, "method": METHOD, "different": DIFFERENT}
