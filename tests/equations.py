"""The zoo's models in NumPy, transcribed from their equations: raw rows to logits, in float64.

A transcription reads a model's weights and the sizes in its config, and calls nothing of it. `w`
gives the value of a weight, and `sg` the value that it has where a gradient is stopped: moving a
weight in `w` alone gives the derivative that an optimiser sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema

Array = Any
W = Callable[[Any], Array]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logsumexp(x: Array) -> Array:
    return np.log(np.exp(x).sum(-1))


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(y: Array, z: Array) -> Array:
    """BCE of each row, summed over labels."""
    return (-y * np.log(sigmoid(z)) - (1 - y) * np.log(sigmoid(-z))).sum(1)


def affine(w: W, layer: Any, x: Array) -> Array:
    return x @ w(layer.kernel) + w(layer.bias)


def mlp(w: W, layer: Any, x: Array) -> list[Array]:
    """Outputs of all layers, after x itself."""
    outputs = [x]
    for dense in layer._layers:
        outputs.append(relu(affine(w, dense, outputs[-1])))
    return outputs


def tower(w: W, layer: Any, h: Array) -> Array:
    return affine(w, layer.head, mlp(w, layer.mlp, h)[-1])


class Rows:
    """A batch past the embedding seam: vectors, first-order terms and numbers by feature."""

    def __init__(self, model: Any, w: W, features: dict[str, Array]) -> None:
        self.schema: Schema = model.schema
        self.domain = np.zeros(len(next(iter(features.values()))), np.int64)
        if self.schema.domain_feature:
            self.domain = self._ids(self.schema.domain_feature, features[self.schema.domain])
        self.vector: dict[str, Array] = {}
        self.first_order: dict[str, Array] = {}
        self.number: dict[str, Array] = {}
        for f in self.schema.features:
            owners = self.schema.owners(f.domains) if f.domains else None
            own = np.ones(len(self.domain)) if owners is None else np.array(owners)[self.domain]
            if isinstance(f, Dense):
                assert f.variance is not None
                self.number[f.name] = own * (features[f.name] - f.mean) / np.sqrt(f.variance)
                continue
            table, first, _ = model.embed.rows(f.table)
            rows = w(table)[first + self._ids(f, features[f.name])]
            if f.is_list:  # the mean of the valid ones
                length = features[f.length_name]
                valid = np.arange(f.max_length) < length[:, None]
                rows = (rows * valid[:, :, None]).sum(1) / np.maximum(length, 1)[:, None]
            rows = rows * own[:, None]
            self.vector[f.name], self.first_order[f.name] = rows[:, : f.dim], rows[:, f.dim :]

    @staticmethod
    def _ids(f: Categorical, raw: Array) -> Array:
        """Row 0 for what is unknown, and from 1 on by the identity or the vocabulary."""
        if f.num_ids:
            return np.where((raw >= 0) & (raw < f.num_ids), raw + 1, 0)
        known = {value: i for i, value in enumerate(f.vocabulary or (), 1)}
        return np.vectorize(lambda value: known.get(value, 0))(raw)

    def _order(self, names: Sequence[str] = ()) -> list[str]:
        """Shared features before owned ones, and lists last; of some features only the latter."""
        features = [f for f in self.schema.categorical if not names or f.name in names]
        key = (lambda f: f.is_list) if names else (lambda f: (f.domains, f.is_list))
        return [f.name for f in sorted(features, key=key)]

    def fields(self) -> Array:
        """V, [B, F, D]."""
        return np.stack([self.vector[name] for name in self._order()], 1)

    def dense(self, names: Sequence[str] = ()) -> Array:
        return np.stack([x for name, x in self.number.items() if not names or name in names], 1)

    def flat(self, names: Sequence[str] = ()) -> Array:
        """x: all vectors and dense features, or those of some features."""
        numbers = [x[:, None] for n, x in self.number.items() if not names or n in names]
        return np.concatenate([*(self.vector[n] for n in self._order(names)), *numbers], 1)

    def linear(self) -> Array:
        """s, [B, K]: the sum of first-order terms."""
        s = np.sum([*self.first_order.values()], 0)
        assert s.shape == (len(self.domain), len(self.schema.labels))
        return s


def pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def fm(v: Array) -> Array:
    products = [(v[:, i] * v[:, j]).sum(1) for i, j in pairs(v.shape[1])]
    return np.sum(products, 0)[:, None]


def bi_interaction(v: Array) -> Array:
    return np.sum([v[:, i] * v[:, j] for i, j in pairs(v.shape[1])], 0)


def fwfm(w: W, layer: Any, v: Array) -> Array:
    r = w(layer.r)
    found = sum(r[k] * v[:, i] * v[:, j] for k, (i, j) in enumerate(pairs(v.shape[1])))
    return found if layer.per_dim else found.sum(1, keepdims=True)


def cin(w: W, layer: Any, v: Array, act: Callable[[Array], Array] = lambda x: x) -> Array:
    """X^k_u = act(sum_ih W^k_ihu X^0_i * X^{k-1}_h + b_u); half of the maps go on, half out."""
    x, pooled = v, []
    for k, (kernel, bias) in enumerate(layer._weights):
        weight = w(kernel).reshape(v.shape[1], x.shape[1], -1)
        maps = np.einsum("ihu,bid,bhd->bud", weight, v, x) + w(bias)[:, None]
        x = direct = act(maps)
        if layer.split_half and k < len(layer.units) - 1:
            x, direct = np.split(x, 2, 1)
        pooled.append(direct.sum(2))
    return np.concatenate(pooled, 1)


def cross(w: W, layer: Any, x0: Array, rank: int | None = None) -> Array:
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, where W_l may be a product of that rank."""
    x = x0
    for one in layer._crosses:
        *kernels, bias = (w(v) for v in one.trainable_weights)
        width = x.shape[1]
        shapes = [(width, width)] if rank is None else [(width, rank), (rank, width)]
        assert [kernel.shape for kernel in kernels] == shapes
        x = x0 * (np.linalg.multi_dot([x, *kernels]) + bias) + x
    return x


def gate(w: W, layer: Any, x: Array) -> Array:
    """Logits of a `PersonalGate`, [B, T, E]."""
    logits = affine(w, layer.dense, mlp(w, layer.mlp, x)[-1])
    return logits.reshape(len(x), layer.num_gates, layer.num_experts)


def of_domain(weights: Sequence[Any], w: W, domain: int, x: Array) -> Array:
    """The MLP that a domain has in stacked kernels and biases."""
    for kernels, biases in weights:
        x = relu(x @ w(kernels)[domain - 1] + w(biases)[domain - 1])
    return x


def row_by_row(domain: Array, compute: Callable[[int, slice], Array]) -> Array:
    """Each row by what its own domain computes of it."""
    return np.concatenate([compute(d, slice(i, i + 1)) for i, d in enumerate(domain)])


def star(w: W, model: Any, a: Array, domain: Array, extra: Array | float) -> Array:
    """a^l = relu(a (W_p * W) + b_p + b); an unknown domain has the centre alone."""
    layers = [*model.tower.mlp._layers, model.tower.head]
    for number, (centre, leaf) in enumerate(zip(layers, model.tower.leaves, strict=True)):

        def one(d: int, i: slice, a: Array = a, centre: Any = centre, leaf: Any = leaf) -> Array:
            kernel, bias = w(centre.kernel), w(centre.bias)
            if d:
                kernel, bias = w(leaf.kernels)[d - 1] * kernel, w(leaf.biases)[d - 1] + bias
            return a[i] @ kernel + bias

        a = row_by_row(domain, one)
        a = relu(a) if number < len(layers) - 1 else a
    return a + extra


def norm(w: W, layer: Any, x: Array, still: Array, domain: Array) -> Array:
    """The first batch in training: statistics of the domain pooled with those of all rows.

    The gradient of all rows' statistics is stopped: `still` is x there.
    """
    y = np.empty_like(x)
    for i, d in enumerate(domain):
        own = x[domain == d]
        k = len(own) / (len(own) + layer.prior_rows) if d else 0.0
        shift = own.mean(0) - still.mean(0)
        mean = still.mean(0) + k * shift
        variance = k * own.var(0) + (1 - k) * still.var(0) + k * (1 - k) * shift**2
        scale = w(layer.gamma) * (w(layer.domain_gammas)[d - 1] if d else 1)
        y[i] = scale * (x[i] - mean) / np.sqrt(variance + layer.epsilon) + w(layer.beta)
        y[i] += w(layer.domain_betas)[d - 1] if d else 0
    return y


def epnet(w: W, layer: Any, s: Array, x: Array, still: Array) -> Array:
    """x * 2 sigmoid(W_2 relu(W_1 [s ; sg(x)] + b_1) + b_2)."""
    hidden = relu(affine(w, layer.hidden, np.concatenate([s, still], 1)))
    return x * 2 * sigmoid(affine(w, layer.scale, hidden))


def gated(w: W, layer: Any, a: Array, u: Array, still: Array | None) -> Array:
    """a^l = g^l relu(W^l a + b^l), g^l = 2 sigmoid(V^l relu(U^l c + e) + f); c = [u ; sg(a^0)]."""
    c = u if still is None else np.concatenate([u, still], 1)
    for hidden, one, two in zip(layer._hidden, layer._gates, layer._scales, strict=True):
        (dense,) = two._layers
        g = 2 * sigmoid(affine(w, dense, mlp(w, one, c)[-1]))
        a = g * mlp(w, hidden, a)[-1]
    return tower(w, layer.head, a)
