"""Domains on the road: their places, what they own, and rows computed apart."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from qianmo.layers.by_domain import by_domain
from qianmo.layers.embed import Embed, fields_of
from qianmo.layers.encode import BAD_DENSE, Encode
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.layers.select import Select

SCHEMA = Schema(
    features=(
        Categorical(name="tab", vocabulary=(7, 1, 4), dim=3),
        Categorical(name="user", num_ids=5, dim=3),
        Categorical(name="topic", num_ids=5, dim=3, domains=(1, 4)),
        Categorical(name="seen", num_ids=5, dim=3, table="user", max_length=2, domains=(1, 4)),
        Categorical(name="search", num_ids=9, dim=3, domains=(7,)),
        Dense(name="price", mean=1.0, variance=4.0, domains=(4,)),
        Dense(name="age", mean=0.0, variance=1.0),
    ),
    labels=("y",),
    domain="tab",
)


def rows():
    """Of domains 1, 7, unknown, 4; what a row's domain does not own holds garbage."""
    found = {
        "tab": np.array([1, 7, 99, 4]),
        "user": np.array([0, 1, 2, 3]),
        "topic": np.array([4, 3, 2, 1]),
        "seen": np.array([[1, 2], [3, 4], [0, 0], [4, 0]]),
        "seen_length": np.array([2, 2, 1, 1]),
        "search": np.array([8, 7, 6, 5]),
        "price": np.array([np.nan, 5.0, 5.0, 5.0], np.float32),
        "age": np.array([1.0, 2.0, 3.0, np.nan], np.float32),
    }
    return {k: tf.constant(v) for k, v in found.items()}


def test_owned_features_are_zeros_in_foreign_rows():
    embed = Embed(SCHEMA, linear_dim=1, seed=1)
    encoded = Encode(SCHEMA)(rows())
    embed(encoded)
    table = embed.tables["3"]
    table.assign(np.random.default_rng(0).normal(size=table.shape))
    embedded = embed(encoded)

    def vectors(name):
        _, first, end = embed.rows(name)
        return table.numpy()[first:end]

    user, topic, search = vectors("user"), vectors("topic"), vectors("search")
    none = np.zeros(4)
    expected = {
        "tab": vectors("tab")[[2, 1, 0, 3]],
        "user": user[[1, 2, 3, 4]],
        "topic": [topic[5], none, none, topic[2]],
        "seen": [(user[2] + user[3]) / 2, none, none, user[5]],
        "search": [none, search[8], none, none],
    }
    names = [f.name for f in embed.features_of(3)]
    assert set(names) == set(expected)
    both = np.concatenate([embedded.fields[0], embedded.linear], 2)
    for place, name in enumerate(names):
        np.testing.assert_allclose(both[:, place], expected[name], rtol=1e-6, err_msg=name)
    assert embedded.domain.numpy().tolist() == [2, 1, 0, 3]
    np.testing.assert_allclose(embedded.dense, [[0, 1], [0, 2], [0, 3], [2, 0]])
    assert encoded.status.numpy().tolist() == [0, 0, 0, BAD_DENSE]
    assembled = embed.assemble(embed.vectors(encoded), encoded.dense, embedded.domain)
    tf.nest.map_structure(np.testing.assert_array_equal, assembled, embedded)


def test_an_owned_feature_is_looked_up_for_its_own_rows_alone():
    embed = Embed(SCHEMA, seed=1)
    encode = Encode(SCHEMA)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(embed(encode(rows())).flat)
    (gradient,) = tape.gradient(loss, embed.trainable_variables)
    assert isinstance(gradient, tf.IndexedSlices)
    # tab and user of 4 rows, topic of 2, search of 1, the lists of 2 rows with 2 places each.
    assert len(gradient.indices) == 4 + 4 + 2 + 1 + 4
    _, first, end = embed.rows("search")
    touched = gradient.indices.numpy()
    assert touched[(touched >= first) & (touched < end)].tolist() == [first + 8]


def test_a_batch_without_an_owning_domain():
    first = {k: v[1:3] for k, v in rows().items()}  # of domain 7 and an unknown one
    embedded = Embed(SCHEMA, seed=1)(Encode(SCHEMA)(first))
    assert np.isfinite(embedded.flat).all()
    assert not embedded.dense[:, 0].numpy().any()


@pytest.mark.parametrize("batch", [0, 1, 50])
def test_rows_are_computed_by_their_own_domain(batch):
    random = np.random.default_rng(0)
    x, kernels = random.normal(size=(batch, 3)), random.normal(size=(4, 3, 2))
    domain = random.integers(0, 3, batch)  # domain 3 is empty, domain 0 unknown
    counts = []

    def compute(p, part):
        counts.append(len(part["x"]))
        return tf.matmul(part["x"], kernels[p + 1])

    y = by_domain(compute, {"x": tf.constant(x)}, tf.constant(domain), 3)
    known = (domain > 0)[:, None]
    np.testing.assert_allclose(y, known * np.einsum("bi,bij->bj", x, kernels[domain]))
    assert counts == [(domain == p).sum() for p in (1, 2, 3)]


def test_select_keeps_the_features_named_in_the_order_of_a_model_of_these_alone():
    embed = Embed(SCHEMA, linear_dim=1, seed=1)
    embedded = embed(Encode(SCHEMA)(rows()))
    names = [f.name for f in embed.features_of(3)]
    kept = Select(SCHEMA, ["search", "seen", "age", "tab"])(embedded)
    alone = [
        dataclasses.replace(f, domains=())
        for f in SCHEMA.features
        if f.name in ("search", "seen", "tab")
    ]
    ordered = fields_of(dataclasses.replace(SCHEMA, features=alone, label_domains={}), 3)
    places = [names.index(f.name) for f in ordered]
    assert places != sorted(places)  # a list, which all share, before one that a domain owns
    np.testing.assert_array_equal(kept.fields[0], embedded.fields[0].numpy()[:, places])
    np.testing.assert_array_equal(kept.linear, embedded.linear.numpy()[:, places])
    np.testing.assert_array_equal(kept.dense, embedded.dense[:, 1:])
    np.testing.assert_array_equal(kept.domain, embedded.domain)
    only = Select(SCHEMA, ["age"])(embedded)
    assert only.fields == ()
    np.testing.assert_array_equal(only.flat, embedded.dense[:, 1:])
    with pytest.raises(ValueError, match=r"should name some of the schema's. Received: \['x'\]"):
        Select(SCHEMA, ["x"])
