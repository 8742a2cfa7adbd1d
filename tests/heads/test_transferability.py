"""LogME and H-score are those of their formulas, written out densely, and rank features as accuracy does."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import load_digits

from featurepipe.errors import UsageError
from featurepipe.heads.sampling import sampled_positions
from featurepipe.heads.statistics.transferability import TransferScores, h_score, log_me, transfer_scores


def dense_log_me(x, codes, classes):
    """The largest density of the labels under N(0, x x' / alpha + I / beta), found by a simplex search."""
    evidences = []
    for number in range(classes):
        y = (codes == number).astype(np.float64)

        def cost(logs, y=y):
            alpha, beta = np.exp(logs)
            return -multivariate_normal.logpdf(y, cov=x @ x.T / alpha + np.eye(len(x)) / beta)

        found = minimize(cost, [0, 0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 2000})
        evidences.append(-found.fun / len(x))
    return np.mean(evidences)


def dense_h_score(x, codes, share):
    """Ibrahim et al. (2021), equation 4; Bao et al. (2019) without a share."""
    total = np.cov(x.T, bias=True)
    means = np.zeros_like(x)
    for number in np.unique(codes):
        means[codes == number] = x[codes == number].mean(axis=0)
    shrunk = (1 - share) * total + share * np.trace(total) / len(total) * np.eye(len(total))
    return np.trace(np.linalg.pinv(shrunk, rcond=1e-12, hermitian=True) @ ((1 - share) * np.cov(means.T, bias=True)))


def problem(n, width, classes=3, *, noise=1.0, seed=0):
    """Features that tell classes apart the better, the less noise."""
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    centres = rng.standard_normal((classes, width))
    return centres[codes] + noise * rng.standard_normal((n, width)) + 0.5, codes


SHAPES = pytest.mark.parametrize(("n", "width"), [(60, 7), (30, 30), (25, 70)], ids=["tall", "square", "wide"])


@SHAPES
def test_log_me_is_the_largest_evidence(n, width, wrap):
    x, codes = problem(n, width, noise=2.0)
    assert log_me(wrap(x), codes, 3) == pytest.approx(dense_log_me(x, codes, 3), abs=1e-6)


def test_the_scale_does_not_decide_which_maximum_is_found():
    """The evidence of these has two maxima; from alpha = beta = 1 the iteration finds the lower one of small features."""
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 2
    strong = rng.standard_normal(60)
    weak = 1e-2 * (2.0 * codes - 1 + 0.3 * rng.standard_normal(60))
    x = np.column_stack([strong, weak])
    found = [log_me(x * scale, codes, 2) for scale in (1e-6, 1, 1e6)]
    assert found == pytest.approx([best_on_a_grid(x, codes)] * 3, abs=1e-3)


def best_on_a_grid(x, codes):
    """Mean over two classes of the highest log evidence at any alpha / beta, each with its best beta."""
    found = []
    for y in (codes == 0, codes == 1):
        values = []
        for ratio in np.logspace(-7, 4, 200):
            covariance = np.eye(len(x)) + x @ x.T / ratio
            beta = len(x) / (y @ np.linalg.solve(covariance, y.astype(float)))
            values.append(multivariate_normal.logpdf(y, cov=covariance / beta) / len(x))
        found.append(max(values))
    return np.mean(found)


@SHAPES
@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", 0.3, 0.0, 1.0])
def test_h_score_is_that_of_the_formula(n, width, shrinkage, wrap):
    x, codes = problem(n, width)
    share = ledoit_wolf(x)[1] if shrinkage == "ledoit-wolf" else shrinkage
    found = h_score(wrap(x), codes, 3, shrinkage=shrinkage)
    assert found == pytest.approx(dense_h_score(x, codes, share), rel=1e-8, abs=1e-12)
    assert 0 <= found <= 2 + 1e-9


@SHAPES
def test_both_at_once_are_each_alone(n, width, wrap):
    x, codes = problem(n, width)
    found = transfer_scores(wrap(x), codes, 3, memory=50_000)
    assert found == TransferScores(
        pytest.approx(log_me(x, codes, 3), rel=1e-9), pytest.approx(h_score(x, codes, 3), rel=1e-9), n
    )


@SHAPES
def test_rotations_and_scales_change_neither(n, width):
    x, codes = problem(n, width)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((width, width)))[0]
    for turned in (x @ rotation, x * 1e4, x * 1e-4):
        assert log_me(turned, codes, 3) == pytest.approx(log_me(x, codes, 3), abs=1e-6)
        assert h_score(turned, codes, 3) == pytest.approx(h_score(x, codes, 3), rel=1e-8)
    assert h_score(x + 1000, codes, 3) == pytest.approx(h_score(x, codes, 3), rel=1e-6)


@pytest.mark.parametrize("width", [20, 200], ids=["tall", "wide"])
def test_clearer_features_score_higher(width):
    scores = [transfer_scores(*problem(100, width, noise=noise), 3) for noise in (8, 4, 2, 1, 0.5)]
    assert [s.log_me for s in scores] == sorted(s.log_me for s in scores)
    assert [s.h_score for s in scores] == sorted(s.h_score for s in scores)


def test_digits_score_above_blurred_above_shuffled_ones():
    images, codes = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    blurred = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    shuffled = rng.permutation(images)
    scores = [transfer_scores(x, codes, 10) for x in (images, blurred, shuffled)]
    assert scores[0].log_me > scores[1].log_me + 0.05 > scores[2].log_me + 0.1
    assert scores[0].h_score > scores[1].h_score + 1 > scores[2].h_score + 2
    assert scores[0].h_score == pytest.approx(dense_h_score(images, codes, ledoit_wolf(images)[1]), rel=1e-8)


def test_shrinkage_keeps_noise_of_many_values_from_looking_perfect():
    (noise, codes), (clear, _) = problem(40, 400, noise=1e6), problem(40, 400, noise=0.5)
    assert h_score(noise, codes, 3, shrinkage=0) == pytest.approx(h_score(clear, codes, 3, shrinkage=0)) == 2
    assert h_score(noise, codes, 3) < 0.6
    assert h_score(clear, codes, 3) > 1.9


def test_useless_features_give_the_evidence_of_none():
    rng = np.random.default_rng(4)
    codes = np.repeat([0, 1], 50)
    paired = np.repeat(rng.standard_normal((50, 5)), 2, axis=0)
    x = paired * np.tile([1, -1], 50)[:, None]  # orthogonal to both labels
    none = 0.5 * (np.log(100 / (2 * np.pi * 50)) - 1)
    assert log_me(x, codes, 2) == pytest.approx(none, abs=1e-9)
    assert log_me(np.zeros((100, 3)), codes, 2) == pytest.approx(none, abs=1e-12)
    assert h_score(np.ones((100, 3)), codes, 2) == 0
    assert h_score(np.ones((100, 300)), codes, 2) == 0


@pytest.mark.parametrize("width", [3, 10, 64], ids=["exact", "with noise beside", "wide"])
def test_labels_as_features_are_finite_and_best(width):
    _, codes = problem(40, 3)
    x = np.concatenate([np.eye(3)[codes], 1e-3 * np.random.default_rng(0).standard_normal((40, width - 3))], axis=1)
    found = log_me(x, codes, 3)
    assert np.isfinite(found)
    assert found > log_me(problem(40, width, noise=0.3)[0], codes, 3)


def test_classes_without_images_do_not_count(wrap):
    x, codes = problem(50, 6)
    assert transfer_scores(wrap(x), 2 * codes, 6) == TransferScores(
        pytest.approx(log_me(x, codes, 3)), pytest.approx(h_score(x, codes, 3)), 50
    )


@pytest.mark.parametrize("seed", range(5))
def test_one_value_an_image_is_enough(seed):
    x, codes = problem(50, 1, seed=seed)
    assert h_score(x, codes, 3) == pytest.approx(dense_h_score_of_one(x[:, 0], codes), rel=1e-10)


@pytest.mark.parametrize("width", [6, 40], ids=["tall", "wide"])
def test_columns_that_follow_from_others_add_nothing(width):
    x, codes = problem(30, width)
    x[:, 3] = x[:, :3].sum(axis=1)
    mixed = x @ np.linalg.qr(np.random.default_rng(1).standard_normal((width, width)))[0]
    twice = np.concatenate([mixed, mixed], axis=1)
    assert log_me(twice, codes, 3) == pytest.approx(log_me(x, codes, 3), abs=1e-6)
    assert h_score(twice, codes, 3, shrinkage=0) == pytest.approx(dense_h_score(x, codes, 0), rel=1e-6)


def dense_h_score_of_one(x, codes):
    means = np.array([x[codes == number].mean() for number in range(3)])[codes]
    return means.var() / x.var()


def test_a_sample_scores_as_its_images(wrap):
    x, codes = problem(200, 6)
    found = transfer_scores(wrap(x), codes, 3, rows=50, seed=3)
    assert found.images == 50
    chosen = sampled_positions(200, 50, 3)
    assert found.log_me == pytest.approx(log_me(x[chosen], codes[chosen], 3), rel=1e-9)
    assert found != transfer_scores(x, codes, 3, rows=50, seed=4)


def test_what_cannot_be_scored_is_refused():
    x, codes = problem(20, 3)
    with pytest.raises(UsageError, match="shape"):
        log_me(x, codes[1:], 3)
    with pytest.raises(UsageError, match="0 to 1"):
        log_me(x, codes, 2)
    with pytest.raises(UsageError, match="integers"):
        log_me(x, codes.astype(float), 3)
    with pytest.raises(UsageError, match="one class"):
        log_me(x, np.zeros(20, int), 3)
    with pytest.raises(UsageError, match=r"shrinkage=1\.5"):
        h_score(x, codes, 3, shrinkage=1.5)
    for wide in (1, 30):
        with pytest.raises(ValueError, match="NaN"):
            log_me(np.full((20, wide), np.nan), codes, 3)
