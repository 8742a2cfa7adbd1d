"""Heads that sum on a device: PyTorch's tensors on the CPU stand for a GPU's; with CUDA, a GPU's own."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.heads.devices import HOST, Device, OnDevice, device_of, namespace_of
from featurepipe.heads.linear import classifiers, losses, multilabel, optimisers, passes, row_sums
from featurepipe.heads.linear.classifiers import BlockLinearSVC, BlockLogisticRegression, fit_path
from featurepipe.heads.linear.multilabel import MultilabelLogisticRegression
from featurepipe.heads.linear.ordinal import OrdinalLogisticRegression
from featurepipe.heads.preprocessing import BlockScaler

WHOLE = 1 << 40


def torch_device(memory=0, name="cpu"):
    return Device(torch.empty(0, device=name), memory)


def made_up(rows, width, classes, dtype=np.float32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    centres = rng.normal(size=(classes, width))
    return (0.4 * centres[labels] + rng.normal(size=(rows, width)) + 3).astype(dtype), labels


def objective(head, features, labels):
    """C * sum(loss) + |W|^2 / 2 of a logistic head, in float64."""
    scores = features.astype(np.float64) @ head.coef_.T + head.intercept_
    if scores.shape[1] == 1:
        scores = np.column_stack([np.zeros(len(scores)), scores[:, 0]])
    top = scores.max(axis=1)
    losses = top + np.log(np.exp(scores - top[:, None]).sum(axis=1)) - scores[np.arange(len(scores)), labels]
    return head.C * losses.sum() + np.square(head.coef_).sum() / 2


class Counting(ArrayBlocks):
    """Blocks that remember how many rows were read, and how many at once at most."""

    def __init__(self, array):
        super().__init__(array)
        self.rows, self.most = 0, 0

    def read(self, dtype=None, *, rows=None):
        found = super().read(dtype, rows=rows)
        self.rows, self.most = self.rows + len(found), max(self.most, len(found))
        return found.copy()


def counting(called, name, function):
    def count(*args):
        called[name] += 1
        return function(*args)

    return count


class Elsewhere(torch.Tensor):
    """Tensors that mix with none of this process's memory, as a GPU's do not: neither NumPy's arrays nor ordinary tensors."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        values = chain.from_iterable(value if isinstance(value, tuple | list) else [value] for value in args)
        for value in [*values, *(kwargs or {}).values()]:
            is_index = isinstance(value, np.ndarray) and "getitem" in function.__name__  # which a GPU's take
            foreign = (isinstance(value, np.ndarray) and not is_index) or type(value) is torch.Tensor
            assert not (foreign and value.ndim), (
                f"{function.__name__} of {type(value).__name__} with a tensor on the device"
            )
        return super().__torch_function__(function, types, args, kwargs)

    def __array__(self, *_, **__):
        raise AssertionError("a tensor on the device is taken for NumPy's")

    def cpu(self):
        return torch.Tensor.cpu(self).as_subclass(torch.Tensor)

    def __array_namespace__(self):
        return Namespace


class Namespace:
    """PyTorch's functions, which make tensors elsewhere."""

    def __getattr__(self, name):
        found = getattr(torch, name)
        if name not in ("asarray", "zeros", "empty", "ones", "arange"):
            return found
        return lambda *args, **kwargs: found(*args, **kwargs).as_subclass(Elsewhere)


Namespace = Namespace()


@pytest.fixture
def float32_from_the_start(monkeypatch):
    """As for features too large to be computed in float64."""
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)


@pytest.mark.usefixtures("float32_from_the_start")
@pytest.mark.parametrize("memory", [0, WHOLE], ids=["streamed", "kept"])
@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_logistic_head_reaches_the_same_optimum(dtype, classes, memory):
    features, labels = made_up(3_000, 24, classes, dtype)
    here = BlockLogisticRegression(tol=1e-7).fit(Counting(features), labels)
    there = BlockLogisticRegression(tol=1e-7).fit(OnDevice(Counting(features), torch_device(memory)), labels)
    least, found = objective(here, features, labels), objective(there, features, labels)
    assert found == pytest.approx(least, rel=1e-6)
    assert np.abs(there.coef_ - here.coef_).max() < 1e-3 * np.abs(here.coef_).max()
    assert (there.predict(features) == here.predict(features)).mean() > 0.999


@pytest.mark.parametrize("head", [BlockLogisticRegression(tol=1e-9), BlockLinearSVC(tol=1e-9)])
@pytest.mark.parametrize("classes", [2, 5])
def test_in_float64_coefficients_agree_to_a_millionth(head, classes):
    features, labels = made_up(1_000, 12, classes, np.float64)
    weights = np.random.default_rng(1).uniform(0.1, 2, len(labels))
    here, there = (
        fit_path(head, X, labels, Cs=[0.01, 1.0], folds=[slice(0, 900), slice(100, 1000)], sample_weight=weights)
        for X in (features, torch.from_numpy(features))
    )
    for expected, found in zip(chain.from_iterable(here), chain.from_iterable(there), strict=True):
        np.testing.assert_allclose(found.coef_, expected.coef_, atol=1e-6 * np.abs(expected.coef_).max())
        np.testing.assert_allclose(found.intercept_, expected.intercept_, atol=1e-6)


def test_several_labels_and_ordered_classes_agree_as_well():
    features, labels = made_up(2_000, 16, 4, np.float64)
    several = np.column_stack([labels == 1, labels >= 2, labels == 3]).astype(float)
    tensor = torch.from_numpy(features)
    here, there = (
        MultilabelLogisticRegression(tol=1e-9).fit(X, several) for X in (ArrayBlocks(features), OnDevice(tensor))
    )
    np.testing.assert_allclose(there.decision_function(features), here.decision_function(features), atol=1e-4)
    order = {"order": [0, 1, 2, 3]}
    here, there = (OrdinalLogisticRegression(tol=1e-9, **order).fit(X, labels) for X in (features, tensor))
    np.testing.assert_allclose(there.predict_proba(features), here.predict_proba(features), atol=1e-5)


@pytest.mark.parametrize("memory", [0, WHOLE], ids=["streamed", "kept"])
@pytest.mark.parametrize("start", ["float32", "float64"])
def test_sums_on_a_device_mix_with_nothing_of_this_process(memory, start, monkeypatch):
    """What a GPU's tensors would refuse; all ways of measuring curvature, and Newton's steps, which take products."""
    if start == "float32":
        monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    monkeypatch.setattr(losses, "_LEAST_ROWS", 64)  # so that rows are chosen
    monkeypatch.setattr(losses, "_ROWS_PER_VALUE", 1)
    monkeypatch.setattr(multilabel, "_OWN_FROM", 0)  # so that labels share a basis
    called = Counter()
    for owner, name in (
        (row_sums, "pair_curvature"),
        (row_sums.Products, "__call__"),
        (losses.RotatedDiagonals, "add"),
    ):
        monkeypatch.setattr(owner, name, counting(called, name, getattr(owner, name)))
    device = Device(torch.empty(0).as_subclass(Elsewhere), memory)
    features, labels = made_up(1_500, 12, 4)
    several = np.column_stack([labels == 1, labels >= 2, labels == 3]).astype(float)
    order = [0, 1, 2, 3]
    fits = [
        lambda X: BlockLogisticRegression().fit(X, labels),
        lambda X: BlockLogisticRegression().fit(X, labels > 1),
        lambda X: BlockLogisticRegression(class_weight="balanced").fit(X, labels * 10 + np.arange(1_500) % 10),
        lambda X: BlockLinearSVC(C=0.1).fit(X, labels),
        lambda X: MultilabelLogisticRegression().fit(X, several),
        lambda X: OrdinalLogisticRegression(order=order).fit(X, labels),
    ]
    for fit in fits:
        there, here = fit(OnDevice(ArrayBlocks(features), device)), fit(ArrayBlocks(features))
        scores = "decision_function" if hasattr(here, "decision_function") else "predict_proba"
        expected = getattr(here, scores)(features)
        np.testing.assert_allclose(getattr(there, scores)(features), expected, atol=2e-2 * np.abs(expected).max())
    monkeypatch.setattr(classifiers, "patience_of", lambda *_: 1)  # then the curvature of all classes together
    for method in (None, "newton"):
        if method:
            monkeypatch.setattr(classifiers, "joint_lbfgs", optimisers.newton)
        there, here = (
            BlockLogisticRegression(C=10).fit(X, labels) for X in (OnDevice(ArrayBlocks(features), device), features)
        )
        np.testing.assert_allclose(there.predict_proba(features), here.predict_proba(features), atol=2e-2)
    assert set(called) == {"pair_curvature", "__call__", "add"}


def test_the_stand_in_for_a_gpu_refuses_what_a_gpu_would():
    elsewhere = Device(torch.empty(0).as_subclass(Elsewhere)).put(np.ones(3))
    for other in (np.ones(3), torch.ones(3)):
        with pytest.raises(AssertionError, match="a tensor on the device"):
            elsewhere + other
    with pytest.raises(AssertionError, match="taken for NumPy's"):
        np.asarray(elsewhere)
    np.testing.assert_array_equal(elsewhere.cpu(), np.ones(3))


@pytest.mark.usefixtures("float32_from_the_start")
def test_what_fits_on_the_device_is_read_once_what_does_not_in_every_pass_and_a_block_at_a_time():
    features, labels = made_up(4_000, 64, 3, np.float16)
    bytes_of_all = features.nbytes
    kept, streamed = Counting(features), Counting(features)
    heads = [
        BlockLogisticRegression(memory="200KB").fit(OnDevice(blocks, torch_device(memory)), labels)
        for blocks, memory in ((kept, bytes_of_all), (streamed, bytes_of_all - 1))
    ]
    assert kept.rows == len(features)
    assert streamed.rows > 5 * len(features)
    assert max(kept.most, streamed.most) * 64 * 4 <= 200_000 // 3
    np.testing.assert_allclose(heads[0].coef_, heads[1].coef_, rtol=1e-6)


def test_a_device_is_found_below_what_maps_and_checks_features():
    features, labels = made_up(500, 8, 3)
    device = torch_device(WHOLE)
    scaled = BlockScaler().fit(OnDevice(ArrayBlocks(features), device))
    mapped = scaled.transform(OnDevice(ArrayBlocks(features), device))
    assert device_of(mapped) is device
    assert device_of(ArrayBlocks(features)) is HOST
    here = BlockLogisticRegression(tol=1e-8).fit(scaled.transform(ArrayBlocks(features)), labels)
    np.testing.assert_allclose(BlockLogisticRegression(tol=1e-8).fit(mapped, labels).coef_, here.coef_, atol=1e-5)


def test_blocks_on_a_device_are_read_as_any_others():
    features, _ = made_up(40, 5, 2, np.float16)
    blocks = OnDevice(torch.from_numpy(features))
    assert (blocks.shape, blocks.dtype) == ((40, 5), np.float16)
    for rows in (None, slice(3, 9), np.array([7, 1]), np.arange(40) % 2 == 0):
        found = blocks.read(np.float32, rows=rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, features[slice(None) if rows is None else rows].astype(np.float32))
    assert namespace_of(features) is np
    assert namespace_of(torch.empty(0)) is torch


@pytest.mark.usefixtures("float32_from_the_start")
def test_columns_far_from_zero_are_centred_on_their_way():
    features, labels = made_up(2_000, 8, 3)
    far = features + np.float32(2_000)
    there = BlockLogisticRegression(tol=1e-8).fit(OnDevice(ArrayBlocks(far), torch_device(WHOLE)), labels)
    here = BlockLogisticRegression(tol=1e-8).fit(ArrayBlocks(far), labels)
    np.testing.assert_allclose(there.coef_, here.coef_, atol=1e-4)
    np.testing.assert_allclose(there.coef_, BlockLogisticRegression(tol=1e-8).fit(features, labels).coef_, atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    features, labels = made_up(300, 4, 2)
    features[7, 2] = value
    kind = "NaN" if np.isnan(value) else "infinity"
    for blocks in (torch.from_numpy(features), OnDevice(ArrayBlocks(features), torch_device())):
        with pytest.raises(UsageError, match=f"Input X contains {kind}"):
            BlockLogisticRegression().fit(blocks, labels)


def test_features_that_may_not_be_written_to_are_copied_without_a_warning():
    features, labels = made_up(200, 4, 2, np.float64)
    features.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlockLogisticRegression().fit(OnDevice(ArrayBlocks(features), torch_device(WHOLE)), labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("memory", [0, WHOLE], ids=["streamed", "kept"])
def test_on_cuda_a_head_reaches_the_optimum_of_this_process(memory):
    features, labels = made_up(200_000, 64, 20, np.float16)
    here = BlockLogisticRegression().fit(ArrayBlocks(features), labels)
    there = BlockLogisticRegression().fit(OnDevice(ArrayBlocks(features), torch_device(memory, "cuda")), labels)
    assert objective(there, features, labels) == pytest.approx(objective(here, features, labels), rel=1e-5)
    resident = torch.from_numpy(features).to("cuda")
    again = BlockLogisticRegression().fit(resident, labels)
    np.testing.assert_allclose(again.coef_, there.coef_, rtol=1e-4, atol=1e-6)
