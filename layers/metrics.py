"""What the articles measure, in NumPy: AUC, GAUC, log loss, PCOC, calibration, hit rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Calibration(NamedTuple):
    """Rows of a reliability plot, by rising probability.

    Attributes:
      predicted: mean predicted probability of each bin.
      observed: mean label of each bin.
      rows: number of rows in each bin, int64.
    """

    predicted: Floats
    observed: Floats
    rows: npt.NDArray[np.int64]


def _checked(
    name: str, labels: npt.ArrayLike, values: npt.ArrayLike
) -> tuple[Floats, npt.NDArray[np.floating]]:
    y, x = np.asarray(labels, np.float64).ravel(), np.asarray(values).ravel()
    if y.shape != x.shape:
        raise ValueError(
            f"`labels` and `{name}` should have equal lengths. Received: {y.size} and {x.size}"
        )
    if not np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(x) & np.isfinite(y)))
    if bad.size:
        raise ValueError(
            f"`labels` and `{name}` should be finite. Received in row {bad[0]}: "
            f"{y[bad[0]]} and {x[bad[0]]}"
        )
    return y, x


def _binary(name: str, labels: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Floats, Floats]:
    y, x = _checked(name, labels, values)
    bad = np.flatnonzero((y != 0) & (y != 1))
    if bad.size:
        raise ValueError(f"`labels` should be 0 or 1. Received in row {bad[0]}: {y[bad[0]]}")
    return y, x.astype(np.float64)


def _probabilities(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike
) -> tuple[Floats, npt.NDArray[np.floating]]:
    y, p = _checked("probabilities", labels, probabilities)
    bad = np.flatnonzero((p < 0) | (p > 1))
    if bad.size:
        raise ValueError(
            f"`probabilities` should be in [0, 1]. Received in row {bad[0]}: {p[bad[0]]}. "
            "Logits need a sigmoid first."
        )
    return y, p


def _group_aucs(
    y: Floats, x: Floats, w: Floats, group: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """AUC of each group (numbered from 0), NaN where a class is missing, and its rows."""
    # By score, then by group: NumPy sorts floats by vector instructions, and short integers stably
    # in linear time; `lexsort` does neither.
    order = np.argsort(x)
    short = group.astype(np.min_scalar_type(group.max()))
    order = order[np.argsort(short[order], kind="stable")]
    y, x, w, group = y[order], x[order], w[order], group[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    ties = np.flatnonzero(new_group | np.r_[True, x[1:] != x[:-1]])
    positive = np.add.reduceat(w * y, ties)
    negative = np.add.reduceat(w * (1 - y), ties)
    # Where each group starts, counted in runs of ties.
    starts = np.flatnonzero(new_group[ties])
    sizes = np.diff(np.r_[starts, ties.size])
    before = np.cumsum(negative) - negative
    below = before - np.repeat(before[starts], sizes)
    wins = np.add.reduceat(positive * (below + negative / 2), starts)
    pairs = np.add.reduceat(positive, starts) * np.add.reduceat(negative, starts)
    aucs = np.divide(wins, pairs, out=np.full(wins.shape, np.nan), where=pairs > 0)
    return aucs, np.diff(np.r_[ties[starts], y.size])


def auc(
    labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count half.

    Args:
      labels: 0 or 1, [N].
      scores: logits or probabilities, [N].
      weights: of the rows, >= 0, [N]; None for equal ones.

    Returns:
      The area; NaN when a class is missing.

    Raises:
      ValueError: unequal lengths, labels that are not 0 or 1, values that are not finite, negative
        weights.

    Example:
    >>> auc([0, 1, 1, 0], [0.1, 0.8, 0.3, 0.3])
    0.875
    """
    y, x = _binary("scores", labels, scores)
    w = np.ones_like(y)
    if weights is not None:
        _, given = _checked("weights", labels, weights)
        w = given.astype(np.float64)
        if (w < 0).any():
            raise ValueError(f"`weights` should be >= 0. Received: {w.min()}")
    if not y.size:
        return float("nan")
    return float(_group_aucs(y, x, w, np.zeros(y.size, np.int64))[0][0])


def gauc(labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """Mean of the groups' AUCs, weighted by their rows; groups of one class are left out.

        GAUC = sum_g n_g AUC_g / sum_g n_g

    Args:
      labels: 0 or 1, [N].
      scores: logits or probabilities, [N].
      groups: a user, or another unit, for each row: integers or strings, [N].

    Returns:
      The mean; NaN when no group has both classes.

    Raises:
      ValueError: as for `auc`.

    Example:
    >>> gauc([0, 1, 1, 0, 1], [0.1, 0.8, 0.3, 0.4, 0.9], ["a", "a", "b", "b", "c"])
    0.5
    """
    y, x = _binary("scores", labels, scores)
    names, codes = np.unique(np.asarray(groups).ravel(), return_inverse=True)
    if codes.shape != y.shape:
        raise ValueError(
            f"`labels` and `groups` should have equal lengths. Received: {y.size} and {codes.size}"
        )
    if not names.size:
        return float("nan")
    aucs, rows = _group_aucs(y, x, np.ones_like(y), codes)
    usable = np.isfinite(aucs)
    if not usable.any():
        return float("nan")
    return float(np.average(aucs[usable], weights=rows[usable]))


def resampled_auc(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike) -> Floats:
    """`auc` under each of many sets of row weights, for bootstraps: the rows are sorted once.

    Args:
      labels: 0 or 1, [N].
      scores: logits or probabilities, [N].
      weights: how often each row was drawn, [R, N].

    Returns:
      The areas, [R]; NaN where a class is missing.

    Raises:
      ValueError: as for `auc`.

    Example:
    >>> resampled_auc([0, 1, 1, 0], [0.1, 0.8, 0.3, 0.3], [[1, 1, 1, 1], [0, 1, 0, 2]])
    array([0.875, 1.   ])
    """
    y, x = _binary("scores", labels, scores)
    w = np.asarray(weights, np.float32)
    if not y.size:
        return np.full(len(w), np.nan)
    order = np.argsort(x)
    y, x, w = y[order].astype(np.float32), x[order], w[:, order]
    ties = np.flatnonzero(np.r_[True, x[1:] != x[:-1]])
    positive = np.add.reduceat(w * y, ties, axis=1).astype(np.float64)
    negative = np.add.reduceat(w * (1 - y), ties, axis=1).astype(np.float64)
    below = np.cumsum(negative, 1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.asarray((positive * below).sum(1) / np.where(pairs > 0, pairs, np.nan))


def resampled_gauc(
    labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike, counts: npt.ArrayLike
) -> Floats:
    """`gauc` for each of many draws of the groups.

    Args:
      labels: 0 or 1, [N].
      scores: logits or probabilities, [N].
      groups: the number of each row's group, 0 <= group < G, [N].
      counts: how often each group was drawn, [R, G].

    Returns:
      The means, [R]; NaN where no group with both classes was drawn.

    Raises:
      ValueError: as for `auc`.

    Example:
    >>> y, x, groups = [0, 1, 1, 0, 1], [0.1, 0.8, 0.3, 0.4, 0.9], [0, 0, 1, 1, 1]
    >>> resampled_gauc(y, x, groups, [[1, 1], [2, 0]])
    array([0.7, 1. ])
    """
    y, x = _binary("scores", labels, scores)
    drawn = np.asarray(counts, np.float64)
    if not y.size:
        return np.full(len(drawn), np.nan)
    present, codes = np.unique(np.asarray(groups), return_inverse=True)
    aucs, rows = _group_aucs(y, x, np.ones_like(y), codes)
    usable = np.isfinite(aucs)
    weights = drawn[:, present[usable]] * rows[usable]
    total = weights.sum(1)
    return np.asarray(weights @ aucs[usable] / np.where(total > 0, total, np.nan))


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean of  -y log p - (1 - y) log(1 - p).

    Args:
      labels: in [0, 1], [N].
      probabilities: [N]. They are kept eps away from 0 and 1, eps being the rounding step of the
        dtype received, so that a sigmoid that has saturated costs much but not infinitely much.

    Raises:
      ValueError: unequal lengths, values that are not finite, probabilities outside [0, 1].

    Example:
    >>> round(log_loss([0, 1], [0.2, 0.8]), 4)
    0.2231
    """
    y, p = _probabilities(labels, probabilities)
    eps = float(np.finfo(p.dtype).eps)
    q = np.clip(p.astype(np.float64), eps, 1 - eps)
    return float(-np.mean(y * np.log(q) + (1 - y) * np.log1p(-q)))


def pcoc(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Predicted over observed clicks: sum p / sum y; above 1 the model promises too much.

    Returns:
      The ratio; NaN when no label is above 0.

    Raises:
      ValueError: as for `log_loss`.

    Example:
    >>> pcoc([0, 1, 0, 1], [0.25, 1.0, 0.25, 1.0])
    1.25
    """
    y, p = _probabilities(labels, probabilities)
    observed = float(y.sum())
    return float(p.sum(dtype=np.float64)) / observed if observed else float("nan")


def calibration(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_bins: int = 10
) -> Calibration:
    """Predicted against observed rates in bins of about equal counts.

    Bins lie between the quantiles of the probabilities. Equal probabilities are never parted, so
    there may be fewer bins than asked for.

    Args:
      labels: in [0, 1], [N].
      probabilities: [N].
      num_bins: bins wanted, >= 1.

    Raises:
      ValueError: as for `log_loss`, and no bins or no rows.

    Example:
    >>> calibration([0, 1, 0, 1], [0.1, 0.2, 0.6, 0.8], num_bins=2).observed
    array([0.5, 0.5])
    """
    y, p = _probabilities(labels, probabilities)
    if num_bins < 1:
        raise ValueError(f"`num_bins` should be >= 1. Received: {num_bins}")
    if not y.size:
        raise ValueError("`labels` should hold at least one row.")
    p = p.astype(np.float64)
    edges = np.quantile(p, np.linspace(0, 1, num_bins + 1))[1:-1]
    place = np.searchsorted(edges, p)
    count = np.bincount(place, minlength=num_bins)
    used = count > 0
    sums = (np.bincount(place, weights=values, minlength=num_bins) for values in (p, y))
    predicted, observed = (total[used] / count[used] for total in sums)
    return Calibration(predicted, observed, count[used])


def ranks(scores: npt.NDArray[np.floating], right: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The rank of each row's right item, from 1 on; of items of equal score it is the last.

    Args:
      scores: of every item, [N, M]; -inf leaves one out.
      right: place of the right item in each row, [N].

    Example:
    >>> ranks(np.array([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]]), [2, 0]).tolist()
    [2, 3]
    """
    own = np.take_along_axis(scores, np.asarray(right)[:, None], 1)
    # A score that is not a number is no better than any other.
    return np.asarray(scores.shape[1] - (scores < own).sum(1), np.int64)


def retrieval(ranks: npt.ArrayLike, sizes: Sequence[int] = (10,)) -> dict[str, float]:
    """Hit rates, NDCG and MRR of the ranks of one right item a row.

        HR@k = share of rank <= k,   NDCG@10 = mean of [rank <= 10] / log2(1 + rank)
        MRR = mean of 1 / rank

    Args:
      ranks: from 1 on, [N].
      sizes: the k of the hit rates.

    Example:
    >>> retrieval([1, 3, 40])["ndcg_10"]
    0.5
    """
    r = np.asarray(ranks, np.float64)
    if not r.size:
        raise ValueError("`ranks` should hold at least one row.")
    return {
        "rows": r.size,
        **{f"hr_{k}": float((r <= k).mean()) for k in sizes},
        "ndcg_10": float(np.where(r <= 10, 1 / np.log2(1 + r), 0.0).mean()),
        "mrr": float((1 / r).mean()),
    }
