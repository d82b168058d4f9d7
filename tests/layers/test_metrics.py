"""Metrics against scikit-learn where it is installed, and against loops over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qianmo.layers import metrics

RANDOM = np.random.default_rng(0)
N = 400
LABELS = (RANDOM.random(N) < 0.3).astype(np.float32)
# Few distinct scores, so that ties are many.
SCORES = np.round(RANDOM.normal(size=N) + LABELS, 1).astype(np.float32)
WEIGHTS = RANDOM.random(N)
PROBABILITIES = 1 / (1 + np.exp(-SCORES.astype(np.float64)))
GROUPS = RANDOM.integers(0, 60, N)


def pairwise_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    wins = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            pair = weights[i] * weights[j]
            total += pair
            wins += pair * (1.0 if scores[i] > scores[j] else 0.5 * (scores[i] == scores[j]))
    return wins / total if total else math.nan


def test_auc_equals_all_pairs() -> None:
    ones = np.ones(N)
    assert metrics.auc(LABELS, SCORES) == pytest.approx(
        pairwise_auc(LABELS, SCORES, ones), abs=1e-14
    )
    assert metrics.auc(LABELS, SCORES, WEIGHTS) == pytest.approx(
        pairwise_auc(LABELS, SCORES, WEIGHTS), abs=1e-13
    )


def test_auc_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a peer, not a need")
    assert metrics.auc(LABELS, SCORES) == pytest.approx(
        sklearn.roc_auc_score(LABELS, SCORES), abs=1e-13
    )
    assert metrics.auc(LABELS, SCORES, WEIGHTS) == pytest.approx(
        sklearn.roc_auc_score(LABELS, SCORES, sample_weight=WEIGHTS), abs=1e-13
    )


def test_auc_with_known_answers() -> None:
    assert metrics.auc([0, 0, 1, 1], [1, 2, 3, 4]) == 1.0
    assert metrics.auc([1, 1, 0, 0], [1, 2, 3, 4]) == 0.0
    assert metrics.auc([0, 1, 0, 1], [7, 7, 7, 7]) == 0.5
    assert math.isnan(metrics.auc([1, 1], [0.1, 0.2]))
    assert math.isnan(metrics.auc([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.auc([], []))
    # A class whose rows have no weight is missing.
    assert math.isnan(metrics.auc([0, 1], [0.1, 0.2], [0.0, 1.0]))


def test_auc_tells_apart_scores_that_differ_in_the_last_bit() -> None:
    low = np.float32(0.5)
    assert metrics.auc([0, 1], np.array([low, np.nextafter(low, np.float32(1))])) == 1.0


@pytest.mark.parametrize("as_strings", [False, True])
def test_gauc_equals_a_loop_over_groups(as_strings: bool) -> None:
    groups = np.array([f"u{g}" for g in GROUPS]) if as_strings else GROUPS
    total = rows = left_out = 0.0
    for group in np.unique(groups):
        own = groups == group
        value = pairwise_auc(LABELS[own], SCORES[own], np.ones(own.sum()))
        if math.isnan(value):
            left_out += 1
        else:
            total += own.sum() * value
            rows += own.sum()
    assert left_out > 0
    assert metrics.gauc(LABELS, SCORES, groups) == pytest.approx(total / rows, abs=1e-13)


def test_gauc_limits() -> None:
    assert metrics.gauc(LABELS, SCORES, np.zeros(N)) == metrics.auc(LABELS, SCORES)
    assert math.isnan(metrics.gauc(LABELS, SCORES, np.arange(N)))
    assert math.isnan(metrics.gauc([], [], []))
    # A constant added to all of a group's scores changes nothing.
    assert metrics.gauc(LABELS, SCORES + 100 * GROUPS, GROUPS) == pytest.approx(
        metrics.gauc(LABELS, SCORES, GROUPS), abs=1e-3
    )


def test_log_loss_equals_the_equation_and_scikit_learn() -> None:
    expected = -np.mean(
        [math.log(p) if y else math.log(1 - p) for y, p in zip(LABELS, PROBABILITIES, strict=True)]
    )
    assert metrics.log_loss(LABELS, PROBABILITIES) == pytest.approx(expected, rel=1e-12)
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a peer, not a need")
    assert metrics.log_loss(LABELS, PROBABILITIES) == pytest.approx(
        sklearn.log_loss(LABELS, PROBABILITIES), rel=1e-12
    )


def test_log_loss_limits() -> None:
    assert metrics.log_loss([0, 1, 1], [0.5, 0.5, 0.5]) == pytest.approx(math.log(2))
    # A soft label, as frequencies give: the loss is least at p = y, where it is the entropy.
    assert metrics.log_loss([0.25], [0.25]) == pytest.approx(0.5623351446)
    saturated = metrics.log_loss([0], np.array([1.0], np.float32))
    assert saturated == pytest.approx(-math.log(np.finfo(np.float32).eps), rel=1e-6)


def test_pcoc() -> None:
    assert metrics.pcoc(LABELS, PROBABILITIES) == pytest.approx(PROBABILITIES.sum() / LABELS.sum())
    assert metrics.pcoc(LABELS, LABELS) == 1.0
    assert math.isnan(metrics.pcoc([0, 0], [0.1, 0.2]))
    # A float32 sum over this many rows would be off by more than that.
    many = np.full(1_000_000, 0.1, np.float32)
    assert metrics.pcoc(np.ones(many.size), many) == pytest.approx(float(np.float32(0.1)), rel=1e-9)


def test_calibration_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip(
        "sklearn.calibration", reason="scikit-learn is a peer, not a need"
    )
    table = metrics.calibration(LABELS, PROBABILITIES, num_bins=7)
    observed, predicted = sklearn.calibration_curve(
        LABELS, PROBABILITIES, n_bins=7, strategy="quantile"
    )
    np.testing.assert_allclose(table.observed, observed, rtol=1e-12)
    np.testing.assert_allclose(table.predicted, predicted, rtol=1e-12)


def test_resamples_are_metrics_with_weights() -> None:
    drawn = np.random.default_rng(7).poisson(1.0, (5, N))
    drawn[4] = LABELS == 0  # no positive was drawn
    expected = [metrics.auc(LABELS, SCORES, row) for row in drawn]
    np.testing.assert_allclose(metrics.resampled_auc(LABELS, SCORES, drawn), expected, rtol=1e-12)
    assert math.isnan(expected[4])
    counts = np.random.default_rng(8).poisson(1.0, (5, 60))
    counts[4] = 0
    found = metrics.resampled_gauc(LABELS, SCORES, GROUPS, counts)
    for row, value in zip(counts[:4], found, strict=False):
        # A group that was drawn twice is two groups.
        parts = [np.flatnonzero(g == GROUPS) for g in np.repeat(np.arange(60), row)]
        groups = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        rows = np.concatenate(parts)
        assert value == pytest.approx(metrics.gauc(LABELS[rows], SCORES[rows], groups))
    assert math.isnan(found[4])


def test_calibration_accounts_for_every_row() -> None:
    table = metrics.calibration(LABELS, PROBABILITIES, num_bins=10)
    assert table.rows.sum() == N
    assert (np.diff(table.predicted) > 0).all()
    assert table.predicted @ table.rows == pytest.approx(PROBABILITIES.sum())
    assert table.observed @ table.rows == pytest.approx(LABELS.sum())


def test_calibration_never_parts_equal_probabilities() -> None:
    table = metrics.calibration([0, 1, 1, 1, 0, 1], [0.5] * 5 + [0.9], num_bins=4)
    np.testing.assert_array_equal(table.rows, [5, 1])
    np.testing.assert_allclose(table.observed, [0.6, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([0, 1], [0.5]), "`labels` and `scores` .* Received: 2 and 1"),
        (lambda: metrics.auc([0, 0.5], [0.1, 0.2]), "0 or 1. Received in row 1: 0.5"),
        (lambda: metrics.auc([0, 1], [0.1, np.nan]), "finite. Received in row 1: 1.0 and nan"),
        (lambda: metrics.auc([0, 1], [1, 2], [1, -1]), "`weights` should be >= 0. Received: -1"),
        (lambda: metrics.auc([0, 1], [1, 2], [1]), "`labels` and `weights` .* Received: 2 and 1"),
        (lambda: metrics.gauc([0, 1], [1, 2], [1]), "`labels` and `groups` .* Received: 2 and 1"),
        (lambda: metrics.log_loss([0], [1.5]), r"in \[0, 1\]. Received in row 0: 1.5. Logits need"),
        (lambda: metrics.pcoc([0], [-0.5]), r"in \[0, 1\]. Received in row 0: -0.5"),
        (lambda: metrics.calibration([0], [0.5], 0), "`num_bins` should be >= 1. Received: 0"),
        (lambda: metrics.calibration([], []), "`labels` should hold at least one row"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_ranks_against_a_loop() -> None:
    rng = np.random.default_rng(6)
    scores = rng.integers(0, 6, (40, 9)).astype(np.float64)  # with ties
    right = rng.integers(0, 9, 40)
    left_out = rng.random((40, 9)) < 0.2
    left_out[np.arange(40), right] = False
    scores[left_out] = -np.inf
    found = metrics.ranks(scores, right)
    for row in range(40):
        others = [j for j in range(9) if j != right[row] and not left_out[row, j]]
        assert found[row] == 1 + sum(scores[row, j] >= scores[row, right[row]] for j in others)


def test_metrics_of_ranks() -> None:
    found = metrics.retrieval([1, 2, 10, 11, 500], (1, 10, 100))
    assert found["rows"] == 5
    assert (found["hr_1"], found["hr_10"], found["hr_100"]) == (0.2, 0.6, 0.8)
    gains = 1 + 1 / math.log2(3) + 1 / math.log2(11)
    assert found["ndcg_10"] == pytest.approx(gains / 5)
    assert found["mrr"] == pytest.approx((1 + 0.5 + 0.1 + 1 / 11 + 0.002) / 5)
    with pytest.raises(ValueError, match="at least one row"):
        metrics.retrieval([])
