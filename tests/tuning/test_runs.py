"""Several cuts and seeds: each run is that of a tuning of its own, the best is kept, and a kill or a divergence ends no other."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

import featurepipe as fp
from featurepipe.backbones.tail import Model
from featurepipe.errors import UsageError
from featurepipe.execution.dask import DaskExecutor
from featurepipe.heads.statistics.multilabel import average_precisions
from featurepipe.tuning import loop, runs, work
from featurepipe.tuning.finetune import finetune
from featurepipe.tuning.loop import LossNotFinite
from featurepipe.tuning.objective import TuningObjective
from featurepipe.tuning.options import TuneOptions
from featurepipe.tuning.runs import MIXES, adopt_best_mix, exact_head, with_loss_left

CUTS = ("s2", "s4")
FAST: dict[str, Any] = {"epochs": 2, "rate": 3e-3, "silent": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations at two nodes, and the bottleneck, of a LeNet-5 that was not trained."""
    folder, found = tmp_path_factory.mktemp("runs"), load_digits()
    for number, (pixels, digit) in enumerate(zip(found.images[:200], found.target[:200].tolist(), strict=True)):
        path = folder / "piles" / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((32, 32)).save(path)
    nodes = [*(f"{cut}:map" for cut in CUTS), "bottleneck"]
    fp.extract(
        folder / "piles", folder / "store", dataset="digits", backbone="lenet5", weights="none", nodes=nodes,
        silent=True,
    )  # fmt: skip
    return folder / "store"


@pytest.fixture(scope="module")
def both(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two cuts with two seeds each."""
    return finetune(store, from_node=list(CUTS), seeds=2, out=tmp_path_factory.mktemp("both") / "b", **FAST)


def scores(found: dict[str, Any]) -> list[list[float]]:
    return [[entry["loss"] for entry in run["history"]] for run in found["tuning"]["runs"]]


def goodness(run: dict[str, Any]) -> tuple[float, float]:
    return run["score"], -next(entry["loss"] for entry in run["history"] if entry["epoch"] == run["best_epoch"])


def test_of_runs_with_equal_scores_the_one_of_the_smaller_loss_is_kept(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop.TuningObjective, "score", lambda *_: 0.5)
    found = {
        cuts: finetune(store, from_node=cuts, out=tmp_path / cuts[0], **FAST)["tuning"] for cuts in (CUTS, CUTS[::-1])
    }
    losses = {run["from"]: -goodness(run)[1] for run in found[CUTS]["runs"]}
    assert len(set(losses.values())) == 2
    assert {tuning["from"] for tuning in found.values()} == {min(losses, key=lambda cut: losses[cut])}


def test_features_are_stored_from_the_cut_of_the_bundle_where_nothing_is_tuned_anew(
    store, both, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(work, "MIXES", (1.0,))  # else the frozen network may be kept, whose features are there
    kept = both["tuning"]["from"]
    cuts = [*({*CUTS} - {kept}), kept]  # the first is another one
    copied = tmp_path / "store"
    shutil.copytree(store, copied)
    asked: dict[str, Any] = {"from_node": cuts, "seeds": 2, "out": tmp_path / "b", **FAST}
    found = finetune(copied, **asked)
    assert found["tuning"]["from"] == kept
    again = finetune(copied, **asked, if_changed=True, store_features=True)
    assert "skipped" in again
    assert again["stored_features"]["images"] == 200
    measured = fp.evaluate(tmp_path / "b", copied, silent=True)["metrics"]["log_loss"]["value"]
    # Stored features are float16 (relative error below 5e-4); from the other cut's activations the loss is another altogether.
    assert measured == pytest.approx(found["test"]["log_loss"]["value"], rel=5e-4)


def test_runs_of_several_cuts_are_those_of_each_alone_and_the_best_is_kept(store, both, tmp_path) -> None:
    tuning = both["tuning"]
    assert [run["from"] for run in tuning["runs"]] == ["s2", "s2", "s4", "s4"]
    alone = {cut: finetune(store, from_node=cut, seeds=2, out=tmp_path / cut, **FAST) for cut in CUTS}
    assert scores(both) == scores(alone["s2"]) + scores(alone["s4"])
    best = max(range(4), key=lambda number: goodness(tuning["runs"][number]))
    assert (tuning["kept_run"], tuning["from"]) == (best, CUTS[best // 2])
    kept = (Path(both["bundle"]) / "weights.safetensors").read_bytes()
    assert kept == (tmp_path / tuning["from"] / "weights.safetensors").read_bytes()
    assert both["options"]["from_node"] == list(CUTS)
    assert alone["s2"]["options"]["from_node"] == "s2"  # as before there were several: old checkpoints go on
    assert not Path(f"{both['bundle']}.tuning").exists()
    again = finetune(store, from_node=CUTS, seeds=2, out=both["bundle"], if_changed=True, **FAST)
    assert "skipped" in again


def test_after_a_kill_runs_that_have_ended_are_not_made_again(store, both, tmp_path, monkeypatch) -> None:
    whole, made = loop.TuningRun.learn, list[str]()

    def learn(run: Any, *given: Any) -> float:
        made.append(run.model.body.node)
        if made.count("s4") > 3:
            raise KeyboardInterrupt  # as a kill does, it leaves the last checkpoint alone
        return whole(run, *given)

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    asked: dict[str, Any] = {"from_node": CUTS, "seeds": 2, "out": tmp_path / "b", **FAST}
    with monkeypatch.context() as patched:
        patched.setattr(loop.TuningRun, "learn", learn)
        with pytest.raises(KeyboardInterrupt):
            finetune(store, **asked)
    files = {path.name for path in (tmp_path / "b.tuning").iterdir()}
    assert files == {"head.pt", "s2-run-0.pt", "s2-run-1.pt", "s4-run-0.pt"}
    steps = made.count("s2") // 4  # of an epoch; two seeds of two epochs
    made.clear()
    monkeypatch.setattr(loop.TuningRun, "learn", lambda run, *given: made.append("more") or whole(run, *given))
    again = finetune(store, **asked)
    assert len(made) == 4 * steps - 3
    assert scores(again) == scores(both)
    assert not (tmp_path / "b.tuning").exists()


def test_where_scoring_takes_long_a_kill_within_it_costs_no_step(store, tmp_path, monkeypatch) -> None:
    checkpoint = loop.TuningCheckpoint(tmp_path / "none.pt", "")
    assert [checkpoint.is_due_before(seconds) for seconds in (1.0, 60.0, math.inf)] == [False, True, True]
    asked: dict[str, Any] = {"from_node": "s2", "out": tmp_path / "b", **FAST}
    whole, made = loop.TuningRun.learn, list[int]()

    def killed(run: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.TuningRun, "learn", lambda run, *given: made.append(run.epoch) or whole(run, *given))
    with monkeypatch.context() as patched:
        patched.setattr(loop, "MOST_SECONDS", 0.0)  # as where the validation images take a minute
        patched.setattr(loop.TuningCheckpoint, "is_due", False)
        patched.setattr(loop.TuningRun, "end_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(store, **asked)
    steps = len(made)
    found = finetune(store, **asked)
    assert made == [0] * steps + [1] * steps
    assert [entry["epoch"] for entry in found["tuning"]["runs"][0]["history"]] == [0, 1, 2]


def test_a_run_that_diverges_is_said_and_the_others_go_on(store, tmp_path, monkeypatch, capsys) -> None:
    whole = loop.TuningObjective.loss

    def infinite_above_s2(self: Any, *values: Any, **options: Any) -> Any:
        return whole(self, *values, **options) * (math.nan if diverging(values) else 1)

    names: list[str] = []
    monkeypatch.setattr(loop.TuningObjective, "loss", infinite_above_s2)
    monkeypatch.setattr(loop.TuningRun, "steps", property(lambda run: names.append(run.model.body.node) or _steps(run)))

    def diverging(_: Any) -> bool:
        return names[-1] == "s2" or everywhere

    everywhere = False
    found = finetune(store, from_node=CUTS, out=tmp_path / "b", **{**FAST, "silent": False})
    assert found["tuning"]["diverged"] == 1
    assert [run["from"] for run in found["tuning"]["runs"]] == ["s4"]
    assert (
        "tuning above s2 ended: the loss became infinite or not a number in epoch 1, step 1, before the first one ended; "
        "try --rate 0.0003" in capsys.readouterr().err
    )
    everywhere = True
    with pytest.raises(LossNotFinite, match=r"before the first one ended; try rate='0\.0003'"):
        finetune(store, from_node=CUTS, out=tmp_path / "c", **FAST)


def _steps(run: Any) -> int:
    return -(-len(run.train) // run.options.batch_size)


def test_workers_elsewhere_make_the_same_runs(store, both, tmp_path, thread_executor: DaskExecutor) -> None:
    found = finetune(store, from_node=CUTS, seeds=2, out=tmp_path / "b", cluster=thread_executor, **FAST)
    assert np.allclose(np.concatenate(scores(found)), np.concatenate(scores(both)), rtol=1e-3)
    assert found["tuning"]["from"] == both["tuning"]["from"]
    assert not (tmp_path / "b.tuning").exists()


def test_a_dry_run_tells_of_each_cut_and_wrong_cuts_are_refused(store, tmp_path, cli) -> None:
    planned = cli("finetune", store, "--from", "s2", "--from", "s4", "--out", tmp_path / "b", "--dry-run")
    assert "lenet5 above s2: 60,700 weights" in planned.out
    assert "lenet5 above s4: 58,284 weights" in planned.out
    assert list(tmp_path.iterdir()) == []
    for wrong, said in (
        (("s2", "s2"), "names a node twice"),
        (("s2", "images"), "cannot be images beside nodes"),
        ((), "must not be empty"),
        (3, "must be a node"),
    ):
        with pytest.raises(UsageError, match=said):
            TuneOptions(from_node=wrong)
    with pytest.raises(UsageError, match="unknown node 's9'"):
        finetune(store, from_node=["s2", "s9"], out=tmp_path / "b", silent=True)


def test_of_mixes_that_few_rows_cannot_tell_apart_the_nearest_to_the_frozen_network_is_kept() -> None:
    """The model has one weight, 2 frozen and 6 tuned, and scores of the second class are the weight times the input."""
    body = nn.Identity()
    model = Model(body, np.array([[0.0], [2.0]]), np.zeros(2))  # type: ignore[arg-type]
    frozen = {"head.weight": torch.tensor([[0.0], [2.0]])}
    tuned = {"head.weight": torch.tensor([[0.0], [6.0]])}
    inputs = np.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 1.0], np.float32)
    answers = np.array([1, 1, 1, 0, 0, 0, 0, 0])  # the last is wrong for every share, the more so the larger
    objective = TuningObjective("multiclass", answers)

    class Inputs:
        scored = 8

        def batches(self, parts: Any, draw: Any = None) -> Any:
            return ((torch.from_numpy(inputs[part])[:, None], part) for part in parts)

    rows = np.arange(8)

    kept, mixes = adopt_best_mix(model, frozen, tuned, MIXES, Inputs(), objective, rows)  # type: ignore[arg-type]
    assert [mix.share for mix in mixes] == list(MIXES)
    entropy = -(math.log(7 / 8) * 7 + math.log(1 / 8)) / 8  # at the temperature that suits all of them
    assert [mix.loss for mix in mixes] == pytest.approx([entropy] * 5, abs=1e-5)
    assert {mix.score for mix in mixes} == {7 / 8}
    assert kept.share == 0
    answers[-1], frozen["head.weight"] = (
        1,
        torch.tensor([[0.0], [0.01]]),
    )  # now all are right, and no multiple of 0.01 is sure
    kept, _ = adopt_best_mix(model, frozen, tuned, MIXES, Inputs(), objective, rows)  # type: ignore[arg-type]
    assert (kept.share, model.head.weight[1].item()) == (
        0.25,
        pytest.approx(1.5075),
    )  # of equally sure ones the nearest
    # a score that is lower by more than a standard error is not made up for by its loss
    tuned["head.weight"] = torch.tensor([[0.0], [-0.1]])
    kept, mixes = adopt_best_mix(model, frozen, tuned, (0.0, 1.0), Inputs(), objective, rows)  # type: ignore[arg-type]
    assert ([mix.score for mix in mixes], kept.share) == ([1.0, 0.0], 0)


def test_a_gain_in_loss_within_its_paired_standard_error_goes_to_the_smaller_share() -> None:
    """28 images, all scores alike: a lower mean loss counts only where it is lower for most images."""
    from featurepipe.tuning.runs import _within_an_error

    noise = np.tile([0.5, -0.5], 14)
    assert _within_an_error(0.09 + noise)  # the error is 0.5 * sqrt(28 / 27) / sqrt(28) = 0.0962
    assert not _within_an_error(0.10 + noise)
    assert not _within_an_error(np.full(28, 0.01))
    assert _within_an_error(np.full(28, 0.00005))
    assert _within_an_error(np.array([3.0]))

    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, 28)
    signs = 2.0 * answers - 1
    inputs = np.stack([signs + rng.normal(0, 1, 28), signs], axis=1).astype(np.float32)
    model = Model(nn.Identity(), np.array([[0.0, 0.0], [2.0, 0.0]]), np.zeros(2))  # type: ignore[arg-type]
    frozen = {"head.weight": torch.tensor([[0.0, 0.0], [2.0, 0.0]])}

    class Inputs:
        scored = 28

        def batches(self, parts: Any, draw: Any = None) -> Any:
            return ((torch.from_numpy(inputs[part]), part) for part in parts)

    def kept(tuned: list[float]) -> tuple[float, list[float]]:
        weights = {"head.weight": torch.tensor([[0.0, 0.0], tuned])}
        objective, rows = TuningObjective("multiclass", answers), np.arange(28)
        mix, mixes = adopt_best_mix(model, frozen, weights, (0.0, 1.0), Inputs(), objective, rows)  # type: ignore[arg-type]
        return mix.share, [mix.loss for mix in mixes]

    inputs[:, 1] = inputs[:, 0]
    inputs[0, 1] += 0.2 * signs[0]  # a little better for one image alone
    share, losses = kept([0.0, 2.0])
    assert share == 0
    assert losses[1] < losses[0]
    inputs[:, 1] = 2 * signs  # far better for all
    assert kept([0.0, 2.0])[0] == 1


def test_the_standard_error_of_a_mix_is_that_of_the_rows_that_could_be_read() -> None:
    """Two of four right are no better than one of four, and the frozen network is kept; of a hundred they would be."""
    model = Model(nn.Identity(), np.zeros((2, 1)), np.zeros(2))  # type: ignore[arg-type]
    tuned = {"head.weight": torch.tensor([[0.0], [10.0]]), "head.bias": torch.zeros(2)}
    frozen = {
        "head.weight": torch.zeros(2, 1),
        "head.bias": torch.tensor([0.0, 1e-3]),
    }  # sure of nothing: the lower loss
    inputs, answers = np.array([1.0, 1.0, -1.0, 1.0], np.float32), np.zeros(100, np.int64)
    answers[0] = 1

    class FourOfThem:
        scored = 100

        def batches(self, parts: Any, draw: Any = None) -> Any:
            return ((torch.from_numpy(inputs)[:, None], part[:4]) for part in parts)

    objective, rows = TuningObjective("multiclass", answers), np.arange(100)
    kept, mixes = adopt_best_mix(model, frozen, tuned, (0.0, 1.0), FourOfThem(), objective, rows)  # type: ignore[arg-type]
    assert ([mix.score for mix in mixes], kept.share) == ([0.25, 0.5], 0)


@pytest.mark.parametrize("target_type", ["multiclass", "multilabel", "continuous"])
def test_a_head_to_tune_from_has_half_of_the_loss_left_and_the_same_answers(target_type: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 5)).astype(np.float32)
    weight, bias = 40 * rng.normal(size=(3, 5)), 5 * rng.normal(size=3)
    scores = (values @ weight.T + bias).astype(np.float32)
    answers = {"multiclass": scores.argmax(1), "multilabel": (scores > 0).astype(float), "continuous": scores[:, 0]}
    objective, rows = TuningObjective(target_type, answers[target_type]), np.arange(60)
    assert objective.mean_loss(scores, rows) < 0.05  # all is known by heart
    found, offset = with_loss_left((weight, bias), values, objective, rows)
    after = (values @ found.T + offset).astype(np.float32)
    if target_type == "continuous":  # whose loss leaves gradients
        assert found is weight
        return
    nothing = math.log(3 if target_type == "multiclass" else 2)
    assert objective.mean_loss(after, rows) == pytest.approx(nothing / 2, rel=1e-4)
    assert scores == pytest.approx(after * (weight[0, 0] / found[0, 0]), rel=1e-4, abs=1e-3)
    again, _ = with_loss_left((found / 2, offset / 2), values, objective, rows)
    assert again == pytest.approx(found / 2)  # more than half is left: it stays


STRENGTHS = [10.0**power for power in range(-4, 3)]


def noisy(answers: Any, *, width: int = 60) -> np.ndarray:
    """Features of which twenty tell a little of the first answer, and the last hardly varies."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(len(answers), width)).astype(np.float32)
    values[:, :20] += 0.5 * np.asarray(answers, np.float32)[:, None]
    values[:, -1] *= 1e-4
    return 30 * values


FIT, CHOOSE, TEST = np.arange(0, 200, 2), np.arange(1, 200, 2), slice(200, 400)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_the_exact_head_is_fitted_on_values_in_one_unit(in_blocks: bool, monkeypatch) -> None:
    """Not standardised: one value hardly varies and tells nothing, so its weight is small."""
    monkeypatch.setattr(runs, "SMALL_VALUES", 0 if in_blocks else 10**9)
    codes = np.arange(400) // 2 % 2
    values = noisy(codes)
    objective, pool = TuningObjective("multiclass", codes), np.arange(200)
    (weight, bias), params = exact_head(values[pool], pool, objective, FIT, CHOOSE, outputs=3, seed=0)
    unit = np.sqrt(values[FIT].var(axis=0).mean())

    def fitted(C: float) -> Any:
        return LogisticRegression(C=C, max_iter=1000, tol=1e-6).fit(values[FIT] / unit, codes[FIT])

    accuracies = {C: fitted(C).score(values[CHOOSE] / unit, codes[CHOOSE]) for C in STRENGTHS[:5]}
    best = max(accuracies, key=lambda C: accuracies[C])
    assert params == {"C": best}
    scores = values[TEST].astype(np.float64) @ weight.T + bias
    expected = fitted(best).decision_function(values[TEST] / unit)
    found = scores[:, 1] - scores[:, 0]
    factor = float(found @ expected / (expected @ expected))  # of `with_loss_left`
    assert 0 < factor <= 1
    assert found == pytest.approx(factor * expected, rel=0.02, abs=0.02 * factor)
    assert np.abs(weight[:, 59]).max() < 0.01 * np.abs(weight[:, :20]).max()
    assert (scores[:, 2] < scores[:, :2].min(1)).all()  # a class that no row has


def test_of_several_labels_each_has_a_penalty_and_one_that_no_row_has_scores_lowest() -> None:
    codes = np.arange(400) // 2 % 2
    labels = np.stack([codes, np.random.default_rng(1).integers(0, 2, 400), np.zeros(400)], axis=1).astype(np.float32)
    labels[5, 0] = np.nan
    values = noisy(codes)
    objective, pool = TuningObjective("multilabel", labels), np.arange(200)
    (weight, bias), params = exact_head(values[pool], pool, objective, FIT, CHOOSE, outputs=3, seed=0)
    assert len(params["C"]) == 3
    unit = np.sqrt(values[FIT].var(axis=0).mean())
    known = FIT[~np.isnan(labels[FIT, 0])]

    def precision(C: float) -> float:
        head = LogisticRegression(C=C, max_iter=5000, tol=1e-6).fit(values[known] / unit, labels[known, 0])
        chosen = CHOOSE[~np.isnan(labels[CHOOSE, 0])]
        return float(average_precisions(head.decision_function(values[chosen] / unit)[:, None], labels[chosen, :1])[0])

    precisions = {C: precision(C) for C in STRENGTHS}
    assert precisions[params["C"][0]] == pytest.approx(max(precisions.values()), abs=0.005)
    scores = values[TEST].astype(np.float64) @ weight.T + bias
    assert average_precisions(scores[:, :1], labels[TEST, :1])[0] > 0.8
    assert not weight[2].any()
    assert bias[2] < bias[:2].min()


def test_of_numbers_the_penalty_with_the_least_error_is_taken() -> None:
    rng = np.random.default_rng(2)
    numbers = rng.normal(size=400)
    values = noisy(numbers)
    objective, pool = TuningObjective.of("continuous", numbers, None, FIT), np.arange(200)
    head, params = exact_head(values[pool], pool, objective, FIT, CHOOSE, outputs=1, seed=0)
    unit = np.sqrt(values[FIT].var(axis=0).mean())
    fitted = {
        alpha: Ridge(alpha=alpha).fit(values[FIT].astype(np.float64) / unit, numbers[FIT])
        for alpha in (10.0**power for power in range(-2, 6))
    }
    errors = {
        alpha: np.mean((one.predict(values[CHOOSE] / unit) - numbers[CHOOSE]) ** 2) for alpha, one in fitted.items()
    }
    best = min(errors, key=lambda alpha: errors[alpha])
    assert params == {"alpha": best}
    weight, bias = objective.to_target(*head)
    expected = fitted[best].predict(values[TEST].astype(np.float64) / unit)
    assert (values[TEST] @ weight.T + bias)[:, 0] == pytest.approx(expected, abs=1e-4)


def test_each_run_from_random_weights_begins_with_others_which_follow_from_its_seed(
    store, tmp_path, monkeypatch
) -> None:
    begun: dict[tuple[str, int], runs.TuningContext] = {}

    class Enough(Exception):
        pass

    def caught(context: runs.TuningContext, *_: Any, **__: Any) -> None:
        begun[name, seed] = context
        raise Enough

    monkeypatch.setattr(work, "tuned_runs", caught)
    for name, asked in (("images", {"weights": "none", "backbone": "lenet5"}), ("s2", {"head_start": "random"})):
        for seed in (0, 1):
            with pytest.raises(Enough):
                finetune(store, from_node=name, seeds=2, seed=seed, out=tmp_path / "b", silent=True, **asked)

    def weights(name: str, seed: int, number: int) -> dict[str, torch.Tensor]:
        return begun[name, seed].run(runs.CutRun(name, number)).model.weights()

    for name, layers in (("images", {"c1", "c3", "c5", "f6"}), ("s2", set[str]())):
        first, second, again, next_seed = (weights(name, *of) for of in ((0, 0), (0, 1), (0, 0), (1, 0)))
        other = {key for key, value in first.items() if key.endswith(".weight") and not torch.equal(value, second[key])}
        assert {key.split(".")[2] for key in other if key.startswith("body.")} == layers
        assert "head.weight" in other
        for same, wanted in ((again, first), (next_seed, second)):
            assert all(torch.equal(value, wanted[key]) for key, value in same.items())
