"""Platt scaling of logits, by label and domain: fitted on held-out rows, and exported in the graph.

A small domain can be badly calibrated while the whole looks fine. The scaling moves its predicted
rate to the observed one; it changes the order of scores between domains, and never within one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker

PRIOR_ROWS = 1000  # m, how many rows of its own outweigh a domain's prior
MIN_SLOPE = 0.05  # of a, so that the order of scores stays
RIDGE = 1e-3  # precision of the prior where the logits tell nothing, as when all are equal
_MOST_STEPS = 100
_GAIN = 1e-9  # of the objective, below which no further step is taken

Floats = npt.NDArray[np.float64]


class Scaling(NamedTuple):
    """Scales logits z [B, K] of rows of domain d to a_dk z + b_dk.

    Attributes:
      a: float32 [P + 1, K], by the domain's index; index 0 is that of unknown domains. [1, K]
        where the schema has no domains.
      b: the same.
    """

    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]

    @property
    def reads_domain(self) -> bool:
        """Whether domains differ."""
        return len(self.a) > 1

    def __call__(self, logits: tf.Tensor, domain: tf.Tensor) -> tf.Tensor:
        """Scaled logits, float32 [B, K], of logits [B, K] and indices of domains [B]."""
        a, b = (tf.constant(part, tf.float32) for part in self)
        if self.reads_domain:
            a, b = tf.gather(a, domain), tf.gather(b, domain)
        return a * tf.cast(logits, tf.float32) + b

    def to_config(self, schema: Schema) -> dict[str, Any]:
        """Label -> "all", and each domain -> [a, b], for readers."""
        feature = schema.domain_feature
        known = () if feature is None else feature.vocabulary or range(feature.num_ids)
        names = ["all", *(f"domain {value}" for value in known)]
        pairs = np.stack([self.a, self.b], 2).tolist()
        return {
            label: {name: row[k] for name, row in zip(names, pairs, strict=True)}
            for k, label in enumerate(schema.labels)
        }


def indices(schema: Schema) -> int:
    """Rows of a scaling: P + 1, or 1 where no feature tells the domain."""
    return 1 if schema.domain_feature is None else schema.num_domains + 1


Calibration = Mapping[str, Scaling]  # by head
NONE: Calibration = {}


def calibrated(
    model: Ranker, scaling: Scaling | None, logits: tf.Tensor, features: Mapping[str, tf.Tensor]
) -> tf.Tensor:
    """Logits of rows scaled by their domains; as they are where `scaling` is None.

    Args:
      model: what made the logits.
      scaling: of the head that did.
      logits: [B, K].
      features: the raw domain at least, where the schema has one.

    Raises:
      ValueError: a scaling of other labels or domains.
    """
    if scaling is None:
        return logits
    shape = (indices(model.schema), len(model.schema.labels))
    if scaling.a.shape != shape or scaling.b.shape != shape:
        raise ValueError(
            f"the calibration should have shape {shape}, for the schema's domains and labels. "
            f"Received: {scaling.a.shape} and {scaling.b.shape}"
        )
    return scaling(logits, model.encode.domain(features))


def tolerance_factor(calibration: Calibration) -> float:
    """How much more than the logits' their scaled ones may differ: the largest slope, at least 1.

    Two kernels that round a logit z differently make a_dk times that difference of a z + b.
    """
    return max([1.0, *(float(scaling.a.max()) for scaling in calibration.values())])


def fit(
    schema: Schema, logits: npt.ArrayLike, labels: npt.ArrayLike, domain: npt.ArrayLike
) -> Scaling:
    """Fits a scaling of each binary label, and of each domain shrunk towards the label's.

    With x_i = (z_i, 1), theta = (a, b), p_i(theta) = sigmoid(theta . x_i), N rows that have the
    label, and D of them in domain d:

        L(theta; R, theta', Q) = sum_{i in R} BCE(y_i, theta . x_i)
                                 + (theta - theta')^T Q (theta - theta') / 2
        I(theta)  = (1 / N) sum_i p_i(theta) (1 - p_i(theta)) x_i x_i^T
        theta_0   = argmin L(theta; all rows,  (1, 0),   m I((1, 0)) + r 1)
        theta_d   = argmin L(theta; rows of d, theta_0,  m I(theta_0) + r 1)

    I is what one row tells of theta on average (Fisher's information), so that the prior is worth
    m = `PRIOR_ROWS` rows: a domain of D rows like the others lies D / (D + m) of the way from the
    label's theta_0 to its own maximum likelihood. A domain without rows, or one that is unknown,
    has theta_0. r = `RIDGE` keeps the minimum unique and finite whatever the rows are: separable,
    of one class, or none. Minima are over a >= `MIN_SLOPE`. A rating has a = 1, b = 0.

    Rows are not weighted, as they are not in the metrics.

    Args:
      schema: kinds of the labels, and the feature that tells the domain; without one, theta_0
        alone is fitted.
      logits: z, finite, [N, K].
      labels: y, in [0, 1], NaN where a row does not have the label, [N, K].
      domain: indices of the rows' domains, 0 for unknown ones, [N].

    Raises:
      ValueError: no rows, logits that are not finite, or labels outside [0, 1].

    References:
      Platt 1999, Probabilistic outputs for support vector machines. The prior is added.

    Example:
    >>> schema = Schema.from_config({"features": [{"name": "x", "num_ids": 2}], "labels": ["y"]})
    >>> z = np.zeros((100_000, 1))
    >>> y = np.arange(100_000)[:, None] % 4 == 0  # a quarter, and predicted to be a half
    >>> f"{fit(schema, z, y, np.zeros(100_000)).b[0, 0]:.2f}"  # log(1 / 3), less 1 % of the way
    '-1.08'
    """
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    index = np.asarray(domain, np.int64)
    _check(schema, z, y)
    theta = np.tile(np.array([1.0, 0.0]), (indices(schema), len(schema.labels), 1))
    for k, label in enumerate(schema.labels):
        own = ~np.isnan(y[:, k])
        if schema.kind(label) == "rating" or not own.any():
            continue
        x = np.stack([z[own, k], np.ones(own.sum())], 1)
        targets, of = y[own, k], index[own]
        start = theta[0, k].copy()
        overall = _minimum(x, targets, start, _precision(x, start))
        theta[:, k] = overall
        precision = _precision(x, overall)
        order = np.argsort(of, kind="stable")
        starts = np.searchsorted(of[order], np.arange(len(theta) + 1))
        for d in range(1, len(theta)):
            rows = order[starts[d] : starts[d + 1]]
            if len(rows):
                theta[d, k] = _minimum(x[rows], targets[rows], overall, precision)
    found = theta.astype(np.float32)
    return Scaling(found[..., 0], found[..., 1])


def _check(schema: Schema, z: Floats, y: Floats) -> None:
    if not len(z):
        raise ValueError("There are no rows to fit a calibration on. Give some.")
    bad = np.flatnonzero(~np.isfinite(z).all(1))
    if len(bad):
        raise ValueError(
            f"The logits of row {bad[0]} should be finite to fit a calibration. "
            f"Received: {z[bad[0]].tolist()}"
        )
    for k, label in enumerate(schema.labels):
        bad = np.flatnonzero((y[:, k] < 0) | (y[:, k] > 1))
        if schema.kind(label) == "binary" and len(bad):
            raise ValueError(
                f"label `{label}` should be in [0, 1]. Received in row {bad[0]}: {y[bad[0], k]}"
            )


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


def _precision(x: Floats, theta: Floats) -> Floats:
    """The matrix m I(theta) + r 1 of `fit`."""
    p = _sigmoid(x @ theta)
    return np.asarray(PRIOR_ROWS * (x.T * (p * (1 - p) / len(x))) @ x + RIDGE * np.eye(2))


def _minimum(x: Floats, y: Floats, prior: Floats, precision: Floats) -> Floats:
    """The minimum of L over a >= MIN_SLOPE; L is convex, so one beyond the bound moves onto it."""
    theta = _newton(x, y, prior, precision, prior, slice(0, 2))
    if theta[0] < MIN_SLOPE:
        theta = np.array([MIN_SLOPE, theta[1]])
        theta = _newton(x, y, prior, precision, theta, slice(1, 2))
    return theta


def _newton(
    x: Floats, y: Floats, prior: Floats, precision: Floats, theta: Floats, free: slice
) -> Floats:
    """Newton's method on the free part of theta, with steps halved until the objective falls."""

    def objective(theta: Floats) -> float:
        z, off = x @ theta, theta - prior
        return float((np.logaddexp(0, z) - y * z).sum() + off @ precision @ off / 2)

    value = objective(theta)
    for _ in range(_MOST_STEPS):
        p = _sigmoid(x @ theta)
        gradient = (x.T @ (p - y) + precision @ (theta - prior))[free]
        curvature = ((x.T * (p * (1 - p))) @ x + precision)[free, free]
        step = np.linalg.solve(curvature, gradient)
        gain = gradient @ step / 2  # of the quadratic model
        if gain < _GAIN:
            break
        size = 1.0
        while size > _GAIN:
            tried = theta.copy()
            tried[free] -= size * step
            if (new := objective(tried)) < value:
                theta, value = tried, new
                break
            size /= 2
        else:
            break  # the objective's own rounding is all that is left
    return theta
