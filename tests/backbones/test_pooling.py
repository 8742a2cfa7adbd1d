"""Pooling against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featurepipe.backbones import Column, parse_column, pool
from featurepipe.backbones.pooling import pooled_shape
from featurepipe.errors import UsageError

# One image, two channels of 2 x 4.
MAP = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]], [[0.0, 0, 0, 0], [0, 0, 0, -16]]]])
TOKENS = torch.tensor([[[1.0, 10], [2, 20], [6, 0]]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("gap", [4.5, -2.0]),
        ("gmp", [8.0, 0.0]),
        # (1 + 8 + 27 + 64 + 125 + 216 + 343 + 512) / 8 = 162; clamping makes the second channel all 1e-6.
        ("gem", [162 ** (1 / 3), 1e-6]),
        ("avg1x2", [3.5, 5.5, 0.0, -4.0]),
        ("avg2x2", [1.5, 3.5, 5.5, 7.5, 0.0, 0.0, 0.0, -8.0]),
        ("max2x2", [2.0, 4.0, 6.0, 8.0, 0.0, 0.0, 0.0, 0.0]),
        ("max1x1", [8.0, 0.0]),
        ("flatten", [1.0, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, -16]),
    ],
)
def test_maps(pooling: str, expected: list[float]) -> None:
    channels_last = MAP.permute(0, 2, 3, 1).contiguous()
    for pooled in (
        pool(MAP, pooling),
        pool(MAP.contiguous(memory_format=torch.channels_last), pooling),
        pool(channels_last, pooling, channel_axis=3),
        pool(channels_last, pooling, channel_axis=-1),
    ):
        assert pooled.dtype == torch.float32
        np.testing.assert_allclose(pooled.numpy(), [expected], rtol=1e-6)
        assert pooled_shape((2, 2, 4), pooling) == tuple(pooled.shape[1:])
        assert pooled_shape((2, 4, 2), pooling, 3) == tuple(pooled.shape[1:])


def test_a_grid_that_does_not_divide_the_map_uses_overlapping_cells_as_torch_does() -> None:
    row = torch.tensor([[[[1.0, 2.0, 6.0]]]])
    assert pool(row, "avg1x2").tolist() == [[1.5, 4.0]]
    assert pool(row, "max1x2").tolist() == [[2.0, 6.0]]


def test_map_keeps_four_axes_channels_first() -> None:
    assert torch.equal(pool(MAP, "map"), MAP)
    assert torch.equal(pool(MAP.permute(0, 2, 3, 1), "map", channel_axis=3), MAP)
    assert pooled_shape((2, 4, 2), "map", 3) == (2, 2, 4)
    assert pool(TOKENS, "map").shape == (1, 3, 2)
    assert pooled_shape((3, 2), "map") == (3, 2)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("gap", [3.0, 10.0]),
        ("gmp", [6.0, 20.0]),
        ("gem", [75 ** (1 / 3), 3000 ** (1 / 3)]),
        ("flatten", [1.0, 10, 2, 20, 6, 0]),
    ],
)
def test_tokens(pooling: str, expected: list[float]) -> None:
    np.testing.assert_allclose(pool(TOKENS, pooling).numpy(), [expected], rtol=1e-6)
    assert pooled_shape((3, 2), pooling) == (len(expected),)


def test_tokens_with_channels_first() -> None:
    assert pool(TOKENS.permute(0, 2, 1), "gap", channel_axis=1).tolist() == [[3.0, 10.0]]


@pytest.mark.parametrize("pooling", ["gap", "gmp", "gem", "flatten", "map"])
def test_vectors_pass_through(pooling: str) -> None:
    vectors = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert torch.equal(pool(vectors, pooling), vectors)
    assert pooled_shape((2,), pooling) == (2,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_low_precision_maps_are_float32(dtype: torch.dtype) -> None:
    ones = torch.full((1, 1, 100, 100), 10.0, dtype=dtype)  # the sum, 100,000, overflows float16
    for pooling in ("gap", "gmp", "gem", "avg1x1"):
        pooled = pool(ones, pooling)
        assert pooled.dtype == torch.float32
        assert pooled.item() == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize(("tensor", "what"), [(torch.zeros(1, 3), "vectors"), (TOKENS, "tokens")])
def test_grids_need_a_map(tensor: torch.Tensor, what: str) -> None:
    with pytest.raises(UsageError, match=f"'avg2x2' needs a map .* this node gives {what} .*; use gap or flatten"):
        pool(tensor, "avg2x2")


def test_five_axes_are_refused() -> None:
    with pytest.raises(UsageError, match="5 axes cannot be pooled"):
        pool(torch.zeros(1, 2, 3, 4, 5), "gap")


@pytest.mark.parametrize("pooling", ["mean", "avg", "avg0x2", "avg2", "GAP", "max2x", ""])
def test_unknown_poolings_name_the_choices(pooling: str) -> None:
    with pytest.raises(UsageError, match="choices: gap, gmp, gem, avgKxK, maxKxK, flatten, map") as caught:
        pool(MAP, pooling)
    assert f"unknown pooling {pooling!r}" in str(caught.value)


def test_columns_are_read_and_written_as_node_and_pooling() -> None:
    assert parse_column("layer4") == Column("layer4", "gap")
    assert parse_column(" layer1.0.relu_2:max3x3 ") == Column("layer1.0.relu_2", "max3x3")
    assert str(parse_column("layer4")) == "layer4:gap"
    with pytest.raises(UsageError, match="names no node"):
        parse_column(":gap")
    with pytest.raises(UsageError, match="unknown pooling ''"):
        parse_column("layer4:")
