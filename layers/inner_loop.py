"""Adapts a tower to many tasks at once, by gradient steps on each task's own support rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import tensorflow as tf
import tf_keras

from qianmo.layers.label_heads import LabelMoments, elementwise
from qianmo.layers.mlp import Correction, Layer
from qianmo.layers.own_weights import Own
from qianmo.layers.tower import DenseShape, TowerOutput

Rates = Literal["fixed", "rank_one", "per_weight"]
Form = Literal["auto", "dual", "materialised"]


class AdaptableTower(Protocol):
    """What the inner loop asks of a tower; `Tower` is one."""

    def dense_shapes(self, h_dim: int) -> list[DenseShape]:
        """Its dense layers, in the order in which a correction counts them."""

    def __call__(self, h: tf.Tensor, *, correction: Correction | None = None) -> TowerOutput:
        """Logits of h, [..., H], by the dense layers as the correction makes them."""


class Support(NamedTuple):
    """Support rows of T tasks, S places each.

    Attributes:
      h: what crossed the tower seam, [T, S, H].
      labels: [T, S, K], in the labels' own units, finite.
      weights: [T, S, K]; 0 where a place is empty or a row does not have that label, else 1.
    """

    h: tf.Tensor
    labels: tf.Tensor
    weights: tf.Tensor


class _Change(NamedTuple):
    """How one dense layer differs for each task: W_t = W + kernel - x^T d,  b_t = b + bias.

    Either `kernel` or x and d are there. Leading axes are tasks, or rows after `Adaptation.rows`.
    """

    x: tf.Tensor | None  # [T, M, in]
    d: tf.Tensor | None  # [T, M, out]
    kernel: tf.Tensor | None  # [T, in, out]
    bias: tf.Tensor  # [T, 1, out]

    def of(self, a: tf.Tensor) -> tf.Tensor:
        """What it adds to the layer's output."""
        if self.kernel is not None:
            return tf.matmul(a, self.kernel) + self.bias
        return self.bias - tf.matmul(tf.matmul(a, self.x, transpose_b=True), self.d)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `InnerLoop.adapt` found: a `Correction` for inputs with leading axes [T, ...].

    Attributes:
      changes: for each dense layer of the tower, None where it stays as it is.
      losses: what the steps descend, before the first and after each: the mean inner loss of each
        task, with num_t for the number of rows, [T] each.
    """

    changes: tuple[_Change | None, ...]
    losses: tuple[tf.Tensor, ...]

    def __call__(self, number: int, a: tf.Tensor, layer: Layer) -> tf.Tensor:
        """The corrected output of one dense layer: [T, N, in] -> [T, N, out]."""
        change = self.changes[number]
        z = layer(a)
        return z if change is None else z + change.of(tf.cast(a, z.dtype))

    def rows(self, task: tf.Tensor) -> Adaptation:
        """The same for rows in any order: row i belongs to task[i]; inputs are [N, 1, in]."""
        changes = [
            c and _Change(*(x if x is None else tf.gather(x, task) for x in c))
            for c in self.changes
        ]
        return Adaptation(tuple(changes), ())


def tower_size(shapes: Sequence[DenseShape]) -> int:
    """Numbers in a tower's dense layers."""
    return sum((s.num_inputs + 1) * s.num_outputs for s in shapes)


def flat(adaptation: Adaptation, shapes: Sequence[DenseShape]) -> tf.Tensor:
    """What each task's tower differs by, as one vector a task, [T, `tower_size(shapes)`].

    A layer's kernel comes before its bias; a layer that does not adapt differs by zeros.
    """
    parts = []
    for change, shape in zip(adaptation.changes, shapes, strict=True):
        size = shape.num_inputs * shape.num_outputs
        if change is None:
            tasks = next(tf.shape(c.bias)[0] for c in adaptation.changes if c is not None)
            parts.append(tf.zeros([tasks, size + shape.num_outputs]))
            continue
        kernel = change.kernel
        if kernel is None:
            kernel = -tf.matmul(change.x, change.d, transpose_a=True)
        parts += [tf.reshape(kernel, [-1, size]), change.bias[:, 0]]
    return tf.concat([tf.cast(part, tf.float32) for part in parts], 1)


def of_flat(vectors: tf.Tensor, shapes: Sequence[DenseShape]) -> Adaptation:
    """The adaptation that `flat` made vectors of."""
    changes, first = [], 0
    for shape in shapes:
        size = shape.num_inputs * shape.num_outputs
        kernel = tf.reshape(
            vectors[:, first : first + size], [-1, shape.num_inputs, shape.num_outputs]
        )
        first += size + shape.num_outputs
        bias = vectors[:, None, first - shape.num_outputs : first]
        changes.append(_Change(None, None, kernel, bias))
    return Adaptation(tuple(changes), ())


@tf_keras.utils.register_keras_serializable(package="qianmo")
class InnerLoop(tf_keras.layers.Layer):
    """Gradient steps of a tower phi on each task's support rows, all tasks in one batch.

        g_t = sum_i grad_phi l(f_phi(sg(h_i)), y_i) / num_t,    num_t = n_t + c
        phi_t <- phi_t - alpha * g_t,    repeated `steps` times from phi_t = phi

    with the sum over the support rows of t and n_t their number; each label has an n_t of its own.
    Nothing depends on other tasks, on padding or on the order of rows. c >= 0, when learned, keeps
    one or two rows from moving a tower far.

    A dense layer's gradient is X^T D, with X [S, in] what entered it and D [S, out] the loss'
    gradient at its output. In the dual form W_t is never built: what a task adds to the layer's
    output at a is  -(a X^T) D,  two thin products. The materialised form builds X^T D once. Both
    are exact; "auto" takes, for each layer, the one with fewer operations.

    Args:
      steps: gradient steps, from 1 on.
      step_size: alpha, or where learned step sizes start.
      rates: "fixed"; "rank_one": alpha_io = r_i c_o, learned, which keeps the dual form;
        "per_weight": Meta-SGD, one learned for each weight.
      shrinkage: where c starts, which is then learned, but stays with `first_order`, under which
        it has no gradient; 0 for num_t = n_t.
      last_layer_only: whether only the layers that make logits adapt (ANIL).
      first_order: whether the outer gradient takes X and D as constants (FOMAML).
      label_moments: mean and variance of each label that is a rating, whose l is squared error, and
        None for each binary one, whose l is cross-entropy; empty if all are binary. A model's are
        those of its schema, see `layers.label_heads`.
      form: "auto", "dual" or "materialised".
      max_support: most support rows, by which, and by `steps`, "auto" counts operations.

    Raises:
      ValueError: an unknown name, a number out of range, or dual form with per-weight rates.

    Cost: dual, for each layer and query row, steps * S * (in + out) products; materialised in * out
      for each query row and S * in * out for each task.

    References:
      Finn et al. 2017, MAML. Li et al. 2017, Meta-SGD. Raghu et al. 2020, ANIL. The shrunk mean
      n + c, and rank-one step sizes, are additions.
    """

    def __init__(
        self,
        steps: int = 1,
        step_size: float = 0.1,
        rates: Rates = "fixed",
        shrinkage: float = 0.0,
        last_layer_only: bool = False,
        first_order: bool = False,
        label_moments: LabelMoments = (),
        form: Form = "auto",
        max_support: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, known in (
            ("rates", rates, Rates),
            ("form", form, Form),
        ):
            if value not in get_args(known):
                raise ValueError(
                    f"`{name}` should be one of {get_args(known)}. Received: {value!r}"
                )
        if form == "dual" and rates == "per_weight":
            raise ValueError("The dual form needs `rates` fixed or rank_one. Received: per_weight")
        for name, number, least in (("steps", steps, 1), ("max_support", max_support, 1)):
            if number < least:
                raise ValueError(f"`{name}` should be >= {least}. Received: {number}")
        if not step_size > 0:
            raise ValueError(f"`step_size` should be > 0. Received: {step_size}")
        if shrinkage < 0:
            raise ValueError(f"`shrinkage` should be >= 0. Received: {shrinkage}")
        self.steps = steps
        self.step_size = step_size
        self.rates = rates
        self.shrinkage = shrinkage
        self.last_layer_only = last_layer_only
        self.first_order = first_order
        self.label_moments = tuple(m and (m[0], m[1]) for m in label_moments)
        self.form = form
        self.max_support = max_support

    def build(self, shapes: Sequence[DenseShape]) -> None:
        """Makes the learned step sizes of a tower's dense layers, and c."""
        constant = tf_keras.initializers.Constant
        self._shapes = tuple(shapes)
        self._rates: dict[str, dict[str, tf.Variable]] = {}
        for number, shape in enumerate(shapes):
            if self.rates == "fixed" or not self._adapts(shape):
                continue
            sizes: dict[str, tuple[tuple[int, ...], float]] = {
                "bias": ((shape.num_outputs,), self.step_size)
            }
            if self.rates == "rank_one":
                sizes["in"] = ((shape.num_inputs,), self.step_size)
                sizes["out"] = ((shape.num_outputs,), 1.0)
            else:
                sizes["kernel"] = ((shape.num_inputs, shape.num_outputs), self.step_size)
            self._rates[str(number)] = {
                name: self.add_weight(
                    name=f"rate_{number}_{name}", shape=size, initializer=constant(value)
                )
                for name, (size, value) in sizes.items()
            }
        if self.shrinkage:
            # c = softplus(raw) stays above 0.
            raw = math.log(math.expm1(self.shrinkage))
            self._raw_c = self.add_weight(
                name="raw_c", shape=(), initializer=constant(raw), trainable=not self.first_order
            )
        self.built = True

    @property
    def own_weights(self) -> list[Own]:
        """The step sizes of each dense layer, apart for each label in the one that makes logits.

        A batch without episodes moves none, nor c.
        """
        c = [Own(self._raw_c)] if self.shrinkage else []
        return c + [
            Own(
                v,
                (*(1,) * (v.shape.rank - 1), v.shape[-1]) if shape.is_last and name != "in" else (),
            )
            for number, shape in enumerate(self._shapes)
            for name, v in self._rates.get(str(number), {}).items()
        ]

    @property
    def c(self) -> tf.Tensor:
        """What is added to the number of support rows."""
        return tf.math.softplus(self._raw_c) if self.shrinkage else tf.zeros([], self.dtype)

    def _adapts(self, shape: DenseShape) -> bool:
        return shape.is_last or not self.last_layer_only

    def is_dual(self, shape: DenseShape) -> bool:
        """Whether a dense layer of that shape adapts in the dual form."""
        if self.form != "auto" or self.rates == "per_weight":
            return self.form == "dual"
        # For as many query rows as support rows.
        rows = self.max_support * (1 if shape.is_first else self.steps)
        width = shape.num_inputs + shape.num_outputs
        size = shape.num_inputs * shape.num_outputs
        return rows * width < (rows / self.max_support + 1) * size

    def _after(
        self, number: int, shape: DenseShape, before: _Change | None, x: tf.Tensor, d: tf.Tensor
    ) -> _Change:
        """The change of one dense layer after one more step."""
        if self.rates == "fixed":
            scaled_x, scaled_d = x, self.step_size * d
            bias = -tf.reduce_sum(scaled_d, 1, keepdims=True)
        else:
            rates = {name: tf.cast(v, d.dtype) for name, v in self._rates[str(number)].items()}
            bias = -tf.reduce_sum(d, 1, keepdims=True) * rates["bias"]
            scaled_x, scaled_d = x, d
            if self.rates == "rank_one":
                scaled_x, scaled_d = x * rates["in"], d * rates["out"]
        if before is not None:
            bias += before.bias
        if self.is_dual(shape):
            if before is not None and shape.is_first:  # the same rows entered at every step
                scaled_x, scaled_d = before.x, before.d + scaled_d
            elif before is not None:
                scaled_x = tf.concat([before.x, scaled_x], 1)
                scaled_d = tf.concat([before.d, scaled_d], 1)
            return _Change(scaled_x, scaled_d, None, bias)
        kernel = -tf.matmul(scaled_x, scaled_d, transpose_a=True)
        if self.rates == "per_weight":
            kernel *= rates["kernel"]
        return _Change(None, None, kernel if before is None else before.kernel + kernel, bias)

    def adapt(
        self, tower: AdaptableTower, support: Support, steps: int | None = None
    ) -> Adaptation:
        """Runs the inner loop.

        Args:
          tower: its weights are phi.
          support: rows of T tasks. A task without rows, or with all weights 0, does not adapt.
          steps: gradient steps; None for those of the layer.
        """
        steps = self.steps if steps is None else steps
        shapes = tower.dense_shapes(support.h.shape[-1])
        if not self.built:
            self.build(shapes)
        h = tf.stop_gradient(support.h)
        weights = tf.cast(support.weights, tf.float32 if h.dtype != tf.float64 else h.dtype)
        n = tf.reduce_sum(weights, 1, keepdims=True)
        share = tf.math.divide_no_nan(weights, n + tf.cast(self.c, n.dtype))
        labels = tf.cast(support.labels, share.dtype)
        changes: list[_Change | None] = [None] * len(shapes)
        # Of the layers that h enters, the same at each step: W h + b, and the products of rows.
        firsts: dict[int, tf.Tensor] = {}
        grams: dict[int, tf.Tensor] = {}
        losses = []
        for step in range(steps + 1):
            entered: dict[int, tf.Tensor] = {}
            probes: dict[int, tf.Tensor] = {}
            with tf.GradientTape(watch_accessed_variables=False) as tape:

                def correction(
                    number: int,
                    a: tf.Tensor,
                    layer: Layer,
                    entered: dict[int, tf.Tensor] = entered,
                    probes: dict[int, tf.Tensor] = probes,
                    tape: tf.GradientTape = tape,
                ) -> tf.Tensor:
                    shape, change = shapes[number], changes[number]
                    if number not in firsts and shape.is_first:
                        firsts[number] = layer(a)
                    z = firsts[number] if shape.is_first else layer(a)
                    if not self._adapts(shape):
                        return z
                    # D is the gradient at a zero that is added to the layer's output.
                    probe = tf.zeros_like(z)
                    tape.watch(probe)
                    a = tf.cast(a, z.dtype)
                    entered[number], probes[number] = a, probe
                    z += probe
                    if change is None:
                        return z
                    if change.x is not None and shape.is_first:
                        if number not in grams:
                            grams[number] = tf.matmul(a, change.x, transpose_b=True)
                        return z + change.bias - tf.matmul(grams[number], change.d)
                    return z + change.of(a)

                logits = tower(h, correction=correction).logits
                loss = elementwise(self.label_moments, labels, logits)
                losses.append(tf.reduce_sum(share * loss, [1, 2]))
            if step == steps:
                break
            numbers = list(probes)
            gradients = tape.gradient(losses[-1], [probes[number] for number in numbers])
            for number, d in zip(numbers, gradients, strict=True):
                x = entered[number]
                if self.first_order:
                    x, d = tf.stop_gradient(x), tf.stop_gradient(d)
                changes[number] = self._after(number, shapes[number], changes[number], x, d)
        return Adaptation(tuple(changes), tuple(losses))

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = (
            *("steps", "step_size", "rates", "shrinkage", "last_layer_only", "first_order"),
            *("label_moments", "form", "max_support"),
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
