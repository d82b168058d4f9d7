"""Metrics of two models on the same rows, and their differences with standard errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qianmo.layers import metrics
from qianmo.layers.schema import Domain

RESAMPLES = 200
# A metric needs so many users with a positive row and with a negative one; GAUC, with both.
FEWEST_USERS = 30
METRICS = ("auc", "gauc")
_WEIGHTS = 2**24  # numbers that the bootstrap holds at a time

Floats = npt.NDArray[np.float64]


class Place(NamedTuple):
    """The rows of a domain that have a label, and their scores.

    Attributes:
      label, domain: which.
      single: what the domain's single model is called; empty if there is none.
      labels: 0 or 1, [N].
      unit: the number of each row's user, [N].
      scores: "fused" and, if there is one, "single" -> [N].
    """

    label: str
    domain: Domain
    single: str
    labels: Floats
    unit: npt.NDArray[np.int64]
    scores: Mapping[str, Floats]

    def users(self, metric: str) -> int:
        """How many users tell something of a metric."""
        positive = np.unique(self.unit[self.labels > 0])
        negative = np.unique(self.unit[self.labels == 0])
        if metric == "gauc":
            return len(np.intersect1d(positive, negative))
        return min(len(positive), len(negative))

    def resampled(self, metric: str, counts: npt.NDArray[np.float32]) -> Floats:
        """A metric of each of `scores` under draws [R, users] of the users: [scores, R]."""
        if metric == "gauc":
            each = [
                metrics.resampled_gauc(self.labels, scores, self.unit, counts)
                for scores in self.scores.values()
            ]
        else:
            weights = counts[:, self.unit]
            each = [
                metrics.resampled_auc(self.labels, scores, weights)
                for scores in self.scores.values()
            ]
        return np.stack(each)


def draws(users: int, rows: int) -> Iterator[npt.NDArray[np.float32]]:
    """How often each user is drawn, some resamples at a time; before them, every user once."""
    yield np.ones((1, users), np.float32)
    random = np.random.default_rng(1)
    at_once = max(1, _WEIGHTS // max(rows, users))
    for start in range(0, RESAMPLES, at_once):
        # Users independently of each other: means do not tell it from as many draws every time.
        yield random.poisson(1.0, (min(at_once, RESAMPLES - start), users)).astype(np.float32)


def measure(places: Sequence[Place], *, grouped: bool) -> list[dict[str, Any]]:
    """AUC and, where rows are `grouped` by user, GAUC of each place, with their differences.

    Returns:
      An entry for each place and, with domain "mean", for the means over each label's domains that
      have a single model. In it "auc" and "gauc" are None where too few users tell.
    """
    names = METRICS if grouped else METRICS[:1]
    wanted = [
        (place, name) for place in places for name in names if place.users(name) >= FEWEST_USERS
    ]
    parts: list[list[Floats]] = [[] for _ in wanted]
    users = 1 + max(int(place.unit.max()) for place in places)
    for counts in draws(users, max(len(place.labels) for place in places)):
        for (place, name), part in zip(wanted, parts, strict=True):
            part.append(place.resampled(name, counts))
    values = {
        (place.label, place.domain, name): np.concatenate(part, 1)
        for (place, name), part in zip(wanted, parts, strict=True)
    }
    entries: list[dict[str, Any]] = []
    for place in places:
        entry: dict[str, Any] = {
            "label": place.label,
            "domain": place.domain,
            "single": place.single or None,
            "rows": len(place.labels),
            "users": len(np.unique(place.unit)),
            "positives": int(place.labels.sum()),
        }
        for name in METRICS:
            value = values.get((place.label, place.domain, name))
            entry[name] = None if value is None else difference(value)
        entries.append(entry)
    for label in dict.fromkeys(place.label for place in places):
        own = [place for place in places if place.label == label and place.single]
        entry = {"label": label, "domain": "mean", "single": "of each domain"}
        for name in METRICS:
            each = [values[k] for p in own if (k := (label, p.domain, name)) in values]
            entry[name] = difference(np.mean(each, 0)) if len(each) > 1 else None
        if any(entry[name] for name in METRICS):
            entries.append(entry)
    return entries


def difference(values: Floats) -> dict[str, Any]:
    """What a metric's values say, [scores, 1 + resample]: the first of the rows as they are.

    Returns:
      `fused` and, with a single model's values, `single`, `difference`, its `standard_error`, and a
      `verdict`: "worse" or "better" by more than two standard errors, or "alike".
    """
    found: dict[str, Any] = {"fused": float(values[0, 0])}
    if len(values) > 1:
        gain = values[0] - values[1]
        error = float(np.nanstd(gain[1:], ddof=1))
        worse, better = gain[0] < -2 * error, gain[0] > 2 * error
        found["single"] = float(values[1, 0])
        found["difference"] = float(gain[0])
        found["standard_error"] = error
        found["verdict"] = "worse" if worse else "better" if better else "alike"
    return found


def seesaw(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on each domain that is worse off by more than two standard errors."""
    return [
        f"domain {entry['domain']}, {entry['label']}: {name.upper()} is {-one['difference']:.4f} "
        f"below the single model's (standard error {one['standard_error']:.4f})"
        for entry in entries
        for name in METRICS
        if (one := entry[name] or {}).get("verdict") == "worse" and entry["domain"] != "mean"
    ]
