"""Raw values to ids to vectors, against the tables read by hand."""

import numpy as np
import pytest
import tensorflow as tf

from qianmo.layers.embed import Embed, Embedded, pool
from qianmo.layers.encode import BAD_DENSE, BAD_LENGTH, Encode
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=3, dim=4),
        Categorical(name="seen", num_ids=3, dim=4, table="user", max_length=2, pooling="sum"),
        Categorical(name="city", dtype="string", vocabulary=("rome", "oslo"), dim=4),
        Categorical(name="age", vocabulary=(18, 25), dim=2),
        Categorical(name="tag", dtype="string", hash_buckets=5, dim=2),
        Dense(name="price", mean=2.0, variance=4.0),
    ),
    labels=("y",),
)


def rows(**changes):
    found = {
        "user": np.array([0, 2, 3, -1]),
        "seen": np.array([[0, 1], [2, 0], [0, 0], [9, 1]]),
        "seen_length": np.array([2, 1, 0, 2]),
        "city": np.array(["oslo", "rome", "bonn", "oslo"]),
        "age": np.array([25, 18, 19, 25]),
        "tag": np.array(["a", "b", "c", "a"]),
        "price": np.array([2.0, 4.0, 0.0, 6.0], np.float32),
    }
    return {k: tf.constant(v) for k, v in {**found, **changes}.items()}


def test_ids():
    encoded = Encode(SCHEMA)(rows())
    assert encoded.ids["user"].numpy().tolist() == [1, 3, 0, 0]
    assert encoded.ids["seen"].numpy().tolist() == [[1, 2], [3, 1], [1, 1], [0, 2]]
    assert encoded.ids["city"].numpy().tolist() == [2, 1, 0, 2]
    assert encoded.ids["age"].numpy().tolist() == [2, 1, 0, 2]
    tags = encoded.ids["tag"].numpy()
    assert ((tags >= 1) & (tags <= 5)).all()
    assert tags[0] == tags[3]
    np.testing.assert_allclose(encoded.dense.numpy()[:, 0], [0, 1, -1, 2])
    assert encoded.status.numpy().tolist() == [0, 0, 0, 0]


def test_dense_values_are_standardised_before_they_narrow():
    schema = Schema(
        features=(Dense(name="price", mean=1000.0, variance=1.0), SCHEMA.features[0]), labels=("y",)
    )
    batch = {"price": tf.constant([1001.0, 1003.0]), "user": tf.constant([0, 1], tf.int64)}
    encode = Encode(schema, dtype="mixed_bfloat16")
    dense = encode(batch).dense
    assert dense.dtype == tf.bfloat16
    assert tf.cast(dense[:, 0], tf.float32).numpy().tolist() == [1, 3]


def test_unreadable_values_get_a_status_and_leave_neighbours_alone():
    clean = Encode(SCHEMA)(rows())
    encoded = Encode(SCHEMA)(
        rows(
            price=np.array([np.nan, 4.0, np.inf, 6.0], np.float32),
            seen_length=np.array([2, -1, 0, 5]),
        )
    )
    assert encoded.status.numpy().tolist() == [BAD_DENSE, BAD_LENGTH, BAD_DENSE, BAD_LENGTH]
    np.testing.assert_allclose(encoded.dense.numpy()[:, 0], [0, 1, 0, 2])
    assert encoded.lengths["seen"].numpy().tolist() == [2, 0, 0, 2]
    assert encoded.ids["user"].numpy().tolist() == clean.ids["user"].numpy().tolist()


@pytest.mark.parametrize(
    ("keep", "kept"), [("last", [[3, 4], [1, 0]]), ("first", [[2, 3], [1, 9]])]
)
def test_lists_wider_than_declared_are_cut_at_the_declared_end(keep, kept):
    schema = Schema(
        features=(Categorical(name="a", num_ids=10, max_length=2, keep=keep),), labels=("y",)
    )
    encode = tf.function(
        Encode(schema).call,
        input_signature=[
            {
                "a": tf.TensorSpec([None, None], tf.int64),
                "a_length": tf.TensorSpec([None], tf.int64),
            }
        ],
    )
    wide = {
        "a": tf.constant([[1, 2, 3], [0, 8, 8]], tf.int64),
        "a_length": tf.constant([3, 1], tf.int64),
    }
    encoded = encode(wide)
    assert encoded.lengths["a"].numpy().tolist() == [2, 1]
    ids = encoded.ids["a"].numpy()
    assert ids[0].tolist() == kept[0]
    assert ids[1, 0] == 1  # what lies behind the length is padding and of no account
    narrow = encode({"a": tf.constant([[5]], tf.int64), "a_length": tf.constant([1], tf.int64)})
    assert narrow.ids["a"].numpy().tolist() == [[6]]
    empty = encode({"a": tf.zeros([1, 0], tf.int64), "a_length": tf.zeros([1], tf.int64)})
    assert empty.lengths["a"].numpy().tolist() == [0]


def test_an_uncounted_vocabulary_is_refused():
    with pytest.raises(ValueError, match="`vocabulary` should hold at least one value"):
        Encode(Schema(features=(Categorical(name="a"),), labels=("y",)))
    with pytest.raises(ValueError, match=r"dense features \['a'\]"):
        Encode(Schema(features=(Dense(name="a"),), labels=("y",)))


def test_vectors_are_the_rows_of_the_fused_tables():
    encoded = Encode(SCHEMA)(rows())
    embed = Embed(SCHEMA, linear_dim=1)
    embedded = embed(encoded)
    assert [v.shape.as_list() for v in embed.trainable_variables] == [[9, 3], [7, 5]]
    for variable in embed.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    embedded = embed(encoded)

    def table(name):
        variable, first, end = embed.rows(name)
        return variable.numpy()[first:end]

    user = table("user")
    seen = np.stack([user[1] + user[2], user[3], 0 * user[0], user[0] + user[2]])
    expected = np.stack([user[[1, 3, 0, 0]], table("city")[[2, 1, 0, 2]], seen], 1)
    np.testing.assert_allclose(embedded.fields[1], expected[:, :, :4], rtol=1e-6)
    linear = np.concatenate(
        [
            np.stack([table("age")[[2, 1, 0, 2]], table("tag")[encoded.ids["tag"]]], 1)[:, :, 2:],
            expected[:, :, 4:],
        ],
        1,
    )
    np.testing.assert_allclose(embedded.linear, linear, rtol=1e-6)
    np.testing.assert_allclose(
        embedded.flat,
        np.concatenate(
            [np.reshape(f, [4, -1]) for f in embedded.fields] + [encoded.dense.numpy()], 1
        ),
    )
    assembled = embed.assemble(embed.vectors(encoded), encoded.dense, embedded.domain)
    tf.nest.map_structure(np.testing.assert_array_equal, assembled, embedded)


def test_gradients_touch_the_rows_of_the_batch_alone():
    embed = Embed(SCHEMA)
    encode = Encode(SCHEMA)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(embed(encode(rows())).flat)
    for gradient in tape.gradient(loss, embed.trainable_variables):
        assert isinstance(gradient, tf.IndexedSlices)


def test_l2_reads_the_batch():
    embed = Embed(SCHEMA, l2=0.5)
    embedded = embed(Encode(SCHEMA)(rows()), training=True)
    squares = sum(float(tf.reduce_sum(f**2)) for f in embedded.fields)
    np.testing.assert_allclose(embed.losses, [0.5 * squares / 4], rtol=1e-6)
    embed(Encode(SCHEMA)(rows()), training=False)
    assert embed.losses == []


def test_l2_is_as_wide_as_the_weights():
    embed = Embed(SCHEMA, l2=0.5, dtype="mixed_bfloat16")
    embed(Encode(SCHEMA)(rows()), training=True)
    assert [loss.dtype for loss in embed.losses] == [tf.float32]


@pytest.mark.parametrize("how", ["mean", "sum", "sqrtn", "max"])
def test_pooling(how):
    vectors = np.random.default_rng(1).normal(size=(3, 4, 2)).astype(np.float32) - 3
    lengths = [4, 2, 0]
    reduce = {
        "mean": lambda v: v.mean(0),
        "sum": lambda v: v.sum(0),
        "sqrtn": lambda v: v.sum(0) / np.sqrt(len(v)),
        "max": lambda v: v.max(0),
    }[how]
    expected = [reduce(v[:n]) if n else np.zeros(2) for v, n in zip(vectors, lengths, strict=True)]
    pooled = pool(tf.constant(vectors), tf.constant(lengths), how)
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)
    garbage = vectors.copy()
    garbage[1, 2:] = 1e30  # padding must not reach the result
    np.testing.assert_allclose(
        pool(tf.constant(garbage), tf.constant(lengths), how)[1], expected[1]
    )


@pytest.mark.parametrize("how", ["mean", "sum", "sqrtn", "max"])
def test_padding_neither_reads_nor_trains_the_row_of_its_id(how):
    schema = Schema(
        features=(Categorical(name="a", num_ids=3, dim=2, max_length=3, pooling=how),),
        labels=("y",),
    )
    embed, encode = Embed(schema), Encode(schema)
    embedded = {}
    for padding in (0, 2):
        lists = {"a": [[0, 1, padding], [padding] * 3], "a_length": [2, 0]}
        with tf.GradientTape() as tape:
            encoded = encode({k: tf.constant(v, tf.int64) for k, v in lists.items()})
            assert encoded.ids["a"][0, 2] == 1 + padding
            if not embedded:
                embed(encoded)
                embed.tables["2"].assign([[0, 0], [1, 2], [3, 4], [np.nan, np.nan]])
            embedded[padding] = embed(encoded).flat
        named = tape.gradient(embedded[padding], embed.tables["2"]).indices
        assert set(named.numpy()) == {0, 1, 2}
    np.testing.assert_array_equal(embedded[0], embedded[2])
    assert np.all(np.isfinite(embedded[0]))


def test_interactions_refuse_fields_of_unequal_dims():
    embedded = Embedded(
        (tf.zeros([1, 2, 4]), tf.zeros([1, 1, 2])),
        tf.zeros([1, 3, 0]),
        tf.zeros([1, 0]),
        tf.zeros([1], tf.int64),
    )
    with pytest.raises(ValueError, match=r"one embedding `dim`. Received: \[4, 2\]"):
        _ = embedded.stacked


LOWEST = -(2**63)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int64", (LOWEST, -1, 0, 2**63 - 1, 5)),
        ("int64", (-1, LOWEST)),
        ("string", ("[UNK]", "a", "", "a\0", "\0unknown", "\0")),
        ("string", ("\0unknown", "[UNK]")),
        ("string", ("", "-1")),
    ],
)
def test_a_vocabulary_may_hold_any_value(dtype, values, tmp_path):
    """Also those by which libraries mark what they do not know, before and after a save."""
    schema = Schema(
        features=(Categorical(name="a", dtype=dtype, vocabulary=values),), labels=("y",)
    )
    others = {"int64": [7, LOWEST + 1], "string": ["b", "a\0\0"]}[dtype]
    encode = Encode(schema)
    expected = [*range(1, len(values) + 1), 0, 0]

    @tf.function(input_signature=[tf.TensorSpec([None], dtype)])
    def ids(raw):
        return encode.ids({"a": raw})["a"]

    raw = tf.constant([*values, *others], dtype)
    assert ids(raw).numpy().tolist() == expected
    module = tf.Module()
    module.ids, module.encode = ids, encode
    tf.saved_model.save(module, tmp_path)
    del module
    assert tf.saved_model.load(tmp_path).ids(raw).numpy().tolist() == expected


def test_dropped_values_train_the_row_of_unknown_ones():
    """A share of the values in training, others at each call, the same after a restart."""
    schema = Schema(
        features=(
            Categorical(name="item", num_ids=9, dim=2, drop_rate=0.3),
            Categorical(name="tag", num_ids=9, dim=2),
        ),
        labels=("y",),
    )
    embed = Embed(schema, seed=5)
    ids = {name: tf.fill([4000], 3) for name in ("item", "tag")}
    encoded = Encode(schema)(ids)
    plain = embed(encoded).flat.numpy()
    table, first, _ = embed.rows("item")

    def dropped(embed):
        flat = embed(encoded, training=True).flat.numpy()
        np.testing.assert_array_equal(flat[:, 2:], plain[:, 2:])
        is_unknown = (flat[:, :2] == table[first].numpy()).all(1)
        np.testing.assert_array_equal(flat[~is_unknown], plain[~is_unknown])
        return is_unknown

    one, two = dropped(embed), dropped(embed)
    assert abs(one.mean() - 0.3) < 0.03  # 4 standard deviations of 4000 draws
    assert (one != two).any()
    resumed = Embed(schema, seed=5)
    resumed(encoded)
    assert (dropped(resumed) == one).all()
    resumed.set_weights(embed.get_weights())
    assert (dropped(resumed) == dropped(embed)).all()
    np.testing.assert_array_equal(embed(encoded).flat, plain)


def test_a_drop_rate_of_one_is_refused():
    with pytest.raises(ValueError, match=r"`drop_rate` should be in \[0, 1\). Received: 1"):
        Categorical(name="item", num_ids=9, drop_rate=1)


MISSING = Schema(
    features=(
        Dense(name="a", mean=2.0, variance=4.0),
        Dense(name="b", mean=2.0, variance=4.0, indicator=True),
        Dense(name="c", mean=2.0, variance=4.0, default=6.0),
        Dense(name="d", mean=2.0, variance=4.0, default=0.0, indicator=True),
    ),
    labels=("y",),
)


def test_no_value_is_read_as_the_default_or_the_mean_and_told_by_the_indicator():
    nan, inf = np.nan, np.inf
    x = tf.constant([4.0, nan, inf], tf.float32)
    encoded = Encode(MISSING)({name: x for name in "abcd"})
    assert MISSING.dense_columns == ("a", "b", "c", "d", "b", "d")
    assert encoded.dense.shape == (3, MISSING.dense_width)
    expected = [[1, 1, 1, 1, 0, 0], [0, 0, 2, -1, 1, 1], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(encoded.dense, expected)
    # NaN is an error of `a` alone, which has neither; an infinite value is one of all.
    assert encoded.status.numpy().tolist() == [0, BAD_DENSE, BAD_DENSE]
    others = MISSING.with_features(MISSING.features[1:])
    assert Encode(others)({name: x for name in "bcd"}).status.numpy().tolist() == [0, 0, BAD_DENSE]


def test_what_a_row_does_not_own_is_not_missing():
    scene = Categorical(name="scene", dtype="string", vocabulary=("home", "search"))
    depth = Dense(name="depth", mean=2.0, variance=4.0, default=6.0, indicator=True)
    owned = Dense(name="owned", mean=2.0, variance=4.0, domains=("search",), indicator=True)
    schema = Schema(features=(scene, depth, owned), labels=("y",), domain="scene")
    nan = np.nan
    encoded = Encode(schema)(
        {
            "scene": tf.constant(["search", "home", "elsewhere", "search"]),
            "depth": tf.constant([nan, 4.0, nan, 2.0], tf.float32),
            "owned": tf.constant([4.0, nan, nan, nan], tf.float32),
        }
    )
    assert encoded.ids["scene"].numpy().tolist() == [2, 1, 0, 2]
    expected = [[2, 1, 1, 0], [1, 0, 0, 0], [2, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(encoded.dense, expected)
    assert encoded.status.numpy().tolist() == [0] * 4


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e-30, 3e30])
def test_dense_values_of_any_scale_are_standardised_alike(scale):
    """float32 holds x times the scale to 6e-8 of x, and |x| is below 8 deviations here."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    x = (values * scale).astype(np.float32)
    exact = x.astype(np.float64)
    schema = Schema(
        features=(Dense(name="x", mean=exact.mean(), variance=exact.var()),), labels=("y",)
    )
    found = Encode(schema)({"x": tf.constant(x)}).dense[:, 0].numpy()
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(found, expected, atol=8 * 1.2e-7)


def test_a_small_spread_around_a_large_mean_is_kept():
    """Seconds of a day, of which float32 arithmetic on the mean would keep steps of 128."""
    x = np.float32(1.7e9) + 128 * np.arange(8, dtype=np.float32)
    mean, variance = x.astype(np.float64).mean(), x.astype(np.float64).var()
    schema = Schema(features=(Dense(name="x", mean=mean, variance=variance),), labels=("y",))
    found = Encode(schema)({"x": tf.constant(x)}).dense[:, 0].numpy()
    np.testing.assert_allclose(found, (np.arange(8) - 3.5) / np.sqrt(5.25), rtol=1e-6)
