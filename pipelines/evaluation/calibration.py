"""Scalings of a model's logits, fitted on rows, and what they do to PCOC by label and domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.export.calibration import Calibration, Scaling, fit
from qianmo.export.precision import served_in_full
from qianmo.export.saved_model import signature_heads
from qianmo.layers import metrics
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.pipelines.data import readers
from qianmo.pipelines.evaluation.scores import FEWEST_ROWS


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of rows, as a served graph makes them, beside what happened.

    Attributes:
      schema: of the rows.
      heads: head -> logits [N, K].
      labels: [N, K]; NaN where a row does not have the label.
      index: of the rows' domains, 0 for unknown ones and where no feature tells them, [N].
      domain: raw domains, [N]; [0] where the schema names none.
    """

    schema: Schema
    heads: Mapping[str, npt.NDArray[np.float32]]
    labels: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]
    domain: npt.NDArray[Any]

    def fitted(self) -> dict[str, Scaling]:
        """The scaling of each head, see `fit`.

        Raises:
          ValueError: all labels are ratings; see also `fit`.
        """
        if all(self.schema.kind(label) == "rating" for label in self.schema.labels):
            raise ValueError(
                f"The labels {self.schema.labels} are ratings, which have no calibration. Export "
                "without it."
            )
        return {
            head: fit(self.schema, z, self.labels, self.index) for head, z in self.heads.items()
        }

    def probabilities(self, head: str, scaling: Scaling | None = None) -> npt.NDArray[Any]:
        """Probabilities of a head's binary labels, [N, K], scaled or not."""
        z = tf.constant(self.heads[head])
        scaled = z if scaling is None else scaling(z, tf.constant(self.index))
        return np.asarray(tf.sigmoid(scaled))


@served_in_full
def logits(
    model: Ranker, path: str, heads: Sequence[str] = (), *, batch_size: int = 8192
) -> Logits:
    """The logits of every row of `path`.

    Args:
      model: the model.
      path: the rows.
      heads: names of heads. Default: the serving head.
      batch_size: rows scored at a time.

    Raises:
      ExportError: a head that the model has not.
    """
    schema, names = model.schema, tuple(dict.fromkeys(signature_heads(model, heads).values()))

    def score(features: Mapping[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        encoded = model.encode({name: features[name] for name in schema.input_names})
        outputs = model.heads(model.embed(encoded), names)
        return {name: outputs[name].logits for name in names}, encoded.domain(schema)

    run = tf.function(score).get_concrete_function(readers.signature(schema)[0])
    found: dict[str, list[Any]] = {name: [] for name in names}
    columns: dict[str, list[Any]] = {"labels": [], "index": [], "domain": []}
    with readers.own_errors():
        for features, targets in readers.dataset(schema, path, batch_size=batch_size):
            outputs, index = run(features)
            for name, z in outputs.items():
                found[name].append(z.numpy())
            for name, value in {**targets, "index": index}.items():
                if name in columns:
                    columns[name].append(value.numpy())
    none = np.zeros((0, len(schema.labels)), np.float32)  # of a file without rows
    no_ids = np.zeros(0, np.int64)
    return Logits(
        schema,
        {name: np.concatenate(z or [none]) for name, z in found.items()},
        np.concatenate(columns["labels"] or [none]),
        np.concatenate(columns["index"] or [no_ids]),
        np.concatenate(columns["domain"] or [no_ids]),
    )


def _parts(rows: Logits, own: npt.NDArray[np.int64]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Numbers of the rows in `own`: of all, and of each domain."""
    yield "all", own
    if len(rows.domain):
        values, inverse = np.unique(rows.domain[own], return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(np.bincount(inverse, minlength=len(values)))
        for value, part in zip(values.tolist(), np.split(order, ends[:-1]), strict=True):
            name = value.decode() if isinstance(value, bytes) else value
            yield f"domain {name}", own[part]


def table(rows: Logits, calibration: Calibration) -> str:
    """PCOC by head, label and domain, before and after, as text."""
    lines = [f"{'head':<10}{'label':<14}{'rows of':<22}{'rows':>9}{'PCOC before':>13}{'after':>8}"]
    left_out = 0
    for head, scaling in calibration.items():
        before, after = rows.probabilities(head), rows.probabilities(head, scaling)
        for k, label in enumerate(rows.schema.labels):
            if rows.schema.kind(label) == "rating":
                lines.append(f"{head:<10}{label:<14}a rating, which stays as it is")
                continue
            y = rows.labels[:, k]
            for name, own in _parts(rows, np.flatnonzero(~np.isnan(y))):
                if name != "all" and len(own) < FEWEST_ROWS:
                    left_out += 1
                    continue
                was, now = (metrics.pcoc(y[own], p[own, k]) for p in (before, after))
                lines.append(
                    f"{head:<10}{label:<14}{name:<22}{len(own):>9,}{was:>13.3f}{now:>8.3f}"
                )
    if left_out:
        lines.append(f"({left_out} lines of fewer than {FEWEST_ROWS} rows left out.)")
    return "\n".join(lines)
