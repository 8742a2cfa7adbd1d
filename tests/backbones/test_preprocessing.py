"""Our uint8 route against ``weights.transforms()``, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights, Swin_V2_T_Weights, ViT_B_16_Weights, get_model_weights
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification

from featurepipe.backbones import Preprocessing, load_backbone
from featurepipe.backbones.families import classification_names
from featurepipe.backbones.preprocessing import from_timm, from_value, from_weights
from featurepipe.errors import UsageError

PLAIN = Preprocessing(resize=256, crop=(224, 224), mean=(0.5,) * 3, std=(0.25,) * 3)


def as_pil(photo: torch.Tensor) -> Image.Image:
    return Image.fromarray(photo.permute(1, 2, 0).numpy())


def ours(preprocessing: Preprocessing, photos: list[torch.Tensor]) -> torch.Tensor:
    return preprocessing.normalise(torch.stack([preprocessing.resize_crop(photo) for photo in photos]))


@pytest.mark.parametrize(
    "weights", [ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2, Swin_V2_T_Weights.DEFAULT]
)
def test_pixels_agree_with_the_weights_transforms(weights, photos) -> None:
    transforms = weights.transforms()
    expected = torch.stack([transforms(as_pil(photo)) for photo in photos])
    found = ours(from_weights(transforms), photos)
    assert found.shape == expected.shape
    one_step = 1 / 255 / min(transforms.std)
    assert (found - expected).abs().max() <= 2.01 * one_step  # PIL and torch round intermediate rows differently
    # PIL rounds the rows between its two passes. PyTorch does so where the CPU has AVX2, else it rounds only the result: rounding
    # errs by 1/4 on average, and the second pass averages that. Other interpolation or antialiasing is off by whole steps.
    assert (found - expected).abs().mean() <= 0.25 * one_step


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double())


@pytest.mark.slow
def test_features_of_a_random_resnet_agree(photos) -> None:
    """Features are taken relative to their mean: those of a random network all point the same way otherwise."""
    backbone = load_backbone("resnet50", "none", seed=0)
    transforms = ResNet50_Weights.DEFAULT.transforms()
    graph = backbone.graph(["layer1", "flatten"])
    assert graph is not None
    with torch.inference_mode():
        found = graph(ours(backbone.preprocessing, photos))
        expected = graph(torch.stack([transforms(as_pil(photo)) for photo in photos]))
    for node in ("layer1", "flatten"):
        a, b = found[node].flatten(1), expected[node].flatten(1)
        a, b = a - b.mean(0), b - b.mean(0)
        assert cosines(b[:-1], b[1:]).max() < 0.9
        assert cosines(a, b).min() >= 0.9999


def test_features_of_efficientnet_lite0_agree(lite0, photos) -> None:
    p = lite0.preprocessing
    reference = ImageClassification(
        crop_size=224, resize_size=256, mean=p.mean, std=p.std, interpolation=InterpolationMode.BICUBIC
    )
    graph = lite0.graph(["blocks.5", "flatten"])
    with torch.inference_mode():
        found = graph(ours(p, photos))
        expected = graph(torch.stack([reference(as_pil(photo)) for photo in photos]))
    for node in ("blocks.5", "flatten"):
        a, b = found[node].flatten(1), expected[node].flatten(1)
        assert cosines(b[:-1], b[1:]).max() < 0.95
        assert cosines(a, b).min() >= 0.9999


def test_every_torchvision_preset_can_be_read() -> None:
    for name in classification_names():
        for weights in get_model_weights(name):
            transforms = weights.transforms()
            read = from_weights(transforms)
            assert read.crop == (transforms.crop_size[0], transforms.crop_size[0])
            assert read.resize == transforms.resize_size[0]
            assert read.interpolation == transforms.interpolation.value
            assert list(read.mean) == transforms.mean


def test_normalise_by_hand() -> None:
    batch = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    p = Preprocessing(resize=1, crop=(1, 1), mean=(0.5, 0.2, 0.0), std=(0.25, 0.5, 2.0))
    assert p.normalise(batch).flatten().tolist() == pytest.approx([-2.0, 0.0, 0.5], abs=1e-6)
    assert p.normalise(batch, torch.bfloat16).dtype == torch.bfloat16
    last = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert p.normalise(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 4000), (3, 20000, 1), (3, 10, 17), (3, 600, 601)])
def test_any_size_gives_the_crop(shape: tuple[int, int, int]) -> None:
    cropped = PLAIN.resize_crop(torch.full(shape, 7, dtype=torch.uint8))
    assert cropped.shape == (3, 224, 224)
    assert cropped.dtype == torch.uint8
    assert cropped.unique().tolist() == [7]


STRIPS = [(1, 33), (10, 321), (3, 100), (7, 300), (40, 1501), (150, 4901)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest-exact"])
@pytest.mark.parametrize(("resize", "crop"), [(64, (56, 56)), (20, (24, 30))])
def test_strips_are_resized_and_cropped_as_torchvision_does(interpolation, resize, crop, monkeypatch) -> None:
    channels = (0.0,) * 3, (1.0,) * 3
    preprocessing = Preprocessing(resize, crop, *channels, interpolation)
    theirs = v2.Compose([v2.Resize(resize, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(crop)])
    for height, width in [*STRIPS, *(shape[::-1] for shape in STRIPS)]:
        generator = torch.Generator().manual_seed(height)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        expected = theirs(image)
        found = preprocessing.resize_crop(image)  # equal where torchvision resizes bytes, as on x86-64 with AVX2
        assert (found.int() - expected.int()).abs().max() <= 1, (height, width)
        with monkeypatch.context() as patch:  # as little as makes every one of them too long
            patch.setattr("featurepipe.backbones.preprocessing.STRIP_BYTES", 1)
            found = preprocessing.resize_crop(image)
        assert (found.int() - expected.int()).abs().max() <= 2, (height, width)


def test_a_strip_one_pixel_high_takes_little_memory() -> None:
    grey = Preprocessing(resize=256, crop=(224, 224), mean=(0.5,), std=(0.5,), colour="grey")
    for shape in ((1, 1, 3_000_000), (1, 3_000_000, 1)):
        assert grey.resize_crop(torch.full(shape, 9, dtype=torch.uint8)).unique().tolist() == [9]


def test_grey_images_of_lenet() -> None:
    p = load_backbone("lenet5", "none").preprocessing
    assert p.colour == "grey"
    assert p.input_shape == (1, 32, 32)
    batch = p.resize_crop(torch.full((1, 28, 28), 255, dtype=torch.uint8))[None]
    assert p.normalise(batch).unique().tolist() == pytest.approx([1.0])


def test_equal_preprocessings_have_equal_json_however_they_were_written() -> None:
    listed = Preprocessing(resize=[256, 256], crop=[224, 224], mean=[0, 0, 0], std=[1, 1, 1])  # type: ignore[arg-type]
    tupled = Preprocessing(resize=(256, 256), crop=(224, 224), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert listed == tupled
    assert json.dumps(listed.as_dict()) == json.dumps(tupled.as_dict())
    assert from_value(json.loads(json.dumps(listed.as_dict()))) == listed


def test_timm_configurations() -> None:
    config = {
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    assert from_timm(config).resize == 248
    assert from_timm(config).interpolation == "bicubic"
    assert from_timm({**config, "crop_mode": "squash", "crop_pct": 1.0}).resize == (224, 224)
    assert from_timm({**config, "input_size": (1, 28, 28)}).input_shape == (1, 28, 28)
    with pytest.raises(UsageError, match="crop mode 'border' is not supported; choices: center, squash"):
        from_timm({**config, "crop_mode": "border"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "cmyk"}, "colour 'cmyk' is unknown; choices: rgb, grey"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is unknown; choices: nearest"),
        ({"mean": (0.5,)}, "rgb needs 3 values each of mean and std, got 1 and 3"),
        ({"std": (1.0, 0.0, 1.0)}, "must be positive"),
        ({"crop": (224,)}, r"crop .* must be \(height, width\), both positive"),
        ({"resize": (0, 3)}, r"resize .* must be \(height, width\), both positive"),
        ({"resize": 0}, "resize 0 must be positive"),
    ],
)
def test_wrong_fields_are_named(change: dict, message: str) -> None:
    fields = {"resize": 256, "crop": (224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, **change}
    with pytest.raises(UsageError, match=message):
        Preprocessing(**fields)


def test_values_that_are_no_preprocessing() -> None:
    with pytest.raises(UsageError, match=r"not complete: .*crop"):
        from_value({"resize": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(UsageError, match="cannot read preprocessing from int: it has no resize_size"):
        from_value(3)
    assert from_value(ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms()).crop == (384, 384)
