"""The inner loop against one task after another, and against finite differences, in float64."""

import numpy as np
import pytest
import tensorflow as tf

from qianmo.layers.inner_loop import InnerLoop, Support, flat, of_flat, tower_size
from qianmo.layers.tower import DenseShape, Tower

T, S, Q, H, K = 4, 5, 6, 4, 2
UNITS = (7, 3)
rng = np.random.default_rng(0)
SUPPORT_H = rng.normal(size=(T, S, H))
QUERY_H = rng.normal(size=(T, Q, H))
LABELS = rng.integers(0, 2, (T, S, K)).astype(float)
QUERY_LABELS = rng.integers(0, 2, (T, Q, K)).astype(float)
WEIGHTS = np.ones((T, S, K))
WEIGHTS[0, 2:] = 0  # two rows, then padding
WEIGHTS[1, :, 1] = [1, 0, 1, 0, 1]  # a label that some rows lack
WEIGHTS[2] = 0  # no rows at all
RATES = ("fixed", "rank_one", "per_weight")


def tower():
    made = Tower(K, UNITS, activation="tanh", seed=1, dtype="float64")
    made(tf.zeros([1, H], tf.float64))
    return made


def support():
    return Support(*(tf.constant(x) for x in (SUPPORT_H, LABELS, WEIGHTS)))


def inner(tower, **arguments):
    made = InnerLoop(**{"step_size": 0.3, **arguments}, dtype="float64")
    made.build(tower.dense_shapes(H))
    draw = np.random.default_rng(4)
    for v in made.trainable_variables:
        v.assign(v + draw.uniform(0, 0.2, v.shape))
    return made


def rates_of(inner, layer):
    """Step sizes of a kernel and a bias, as full arrays."""
    if inner.rates == "fixed":
        return inner.step_size, inner.step_size
    found = {name: v.value() for name, v in inner._rates[str(layer)].items()}
    if inner.rates == "rank_one":
        return found["in"][:, None] * found["out"], found["bias"]
    return found["kernel"], found["bias"]


def forward(weights, a):
    for layer in range(len(weights) // 2):
        a = a @ weights[2 * layer] + weights[2 * layer + 1]
        a = tf.tanh(a) if layer < len(UNITS) else a
    return a


def one_by_one(tower, inner):
    """Query logits, each task by plain gradient descent on copies of the weights."""
    logits = []
    for task in range(T):
        weights = [tf.identity(v) for v in tower.trainable_variables]
        num = WEIGHTS[task].sum(0) + inner.c
        share = tf.math.divide_no_nan(tf.constant(WEIGHTS[task]), num)
        for _ in range(inner.steps):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                bce = tf.nn.sigmoid_cross_entropy_with_logits(
                    LABELS[task], forward(weights, tf.constant(SUPPORT_H[task]))
                )
                loss = tf.reduce_sum(share * bce)
            gradients = tape.gradient(loss, weights)
            for layer in range(len(UNITS) + 1):
                if inner.last_layer_only and layer < len(UNITS):
                    continue
                for i, rate in zip((2 * layer, 2 * layer + 1), rates_of(inner, layer), strict=True):
                    weights[i] = weights[i] - rate * gradients[i]
        logits.append(forward(weights, tf.constant(QUERY_H[task])))
    return tf.stack(logits)


def outer(logits):
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(QUERY_LABELS, logits))


def score(tower, inner):
    return tower(tf.constant(QUERY_H), correction=inner.adapt(tower, support())).logits


@pytest.mark.parametrize(
    ("steps", "shrinkage", "rates", "last_layer_only", "form"),
    [
        (1, 0.0, "fixed", False, "dual"),
        (3, 2.0, "fixed", False, "dual"),
        (3, 2.0, "fixed", True, "dual"),
        (3, 0.0, "rank_one", False, "dual"),
        (2, 2.0, "rank_one", True, "auto"),
        (3, 2.0, "fixed", False, "materialised"),
        (2, 2.0, "rank_one", False, "materialised"),
        (2, 0.0, "per_weight", False, "materialised"),
        (2, 2.0, "per_weight", True, "auto"),
    ],
)
def test_it_equals_a_loop_over_tasks(steps, shrinkage, rates, last_layer_only, form):
    phi = tower()
    loop = inner(
        phi,
        steps=steps,
        shrinkage=shrinkage,
        rates=rates,
        last_layer_only=last_layer_only,
        form=form,
    )
    variables = phi.trainable_variables + loop.trainable_variables
    with tf.GradientTape() as tape:
        logits = score(phi, loop)
        loss = outer(logits)
    with tf.GradientTape() as reference_tape:
        reference = one_by_one(phi, loop)
        reference_loss = outer(reference)
    np.testing.assert_allclose(logits, reference, atol=1e-9)
    moves = np.abs(logits - phi(tf.constant(QUERY_H)).logits).max((1, 2))
    assert moves[2] == 0  # no support
    assert moves[0] > 1e-3
    zeros = tf.UnconnectedGradients.ZERO
    pairs = zip(
        tape.gradient(loss, variables, unconnected_gradients=zeros),
        reference_tape.gradient(reference_loss, variables, unconnected_gradients=zeros),
        strict=True,
    )
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("rates", RATES)
def test_the_outer_gradient_is_that_of_finite_differences(rates):
    phi = tower()
    loop = inner(phi, steps=2, shrinkage=1.0, rates=rates)
    variables = phi.trainable_variables + loop.trainable_variables
    with tf.GradientTape() as tape:
        loss = outer(score(phi, loop))
    gradients = tape.gradient(loss, variables)
    draw = np.random.default_rng(7)
    directions = [draw.normal(size=v.shape) for v in variables]
    slope = sum(float(tf.reduce_sum(g * d)) for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-5, [v.numpy() for v in variables]
    losses = []
    for sign in (1, -1):
        for v, value, d in zip(variables, values, directions, strict=True):
            v.assign(value + sign * step * d)
        losses.append(float(outer(score(phi, loop))))
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("form", ["dual", "materialised"])
def test_first_order_leaves_out_the_way_through_the_inner_step(form):
    phi = tower()
    loop = inner(phi, first_order=True, form=form)
    with tf.GradientTape() as tape:
        loss = outer(score(phi, loop))
    found = tape.gradient(loss, phi.trainable_variables)
    # By definition: the gradient at phi_t, taken for that at phi.
    expected = [np.zeros(v.shape) for v in phi.trainable_variables]
    for task in range(T):
        weights = [tf.identity(v) for v in phi.trainable_variables]
        share = tf.math.divide_no_nan(tf.constant(WEIGHTS[task]), WEIGHTS[task].sum(0))
        with tf.GradientTape() as inner_tape:
            inner_tape.watch(weights)
            logits = forward(weights, tf.constant(SUPPORT_H[task]))
            bce = tf.nn.sigmoid_cross_entropy_with_logits(LABELS[task], logits)
            inner_loss = tf.reduce_sum(share * bce)
        steps = inner_tape.gradient(inner_loss, weights)
        weights = [w - 0.3 * g for w, g in zip(weights, steps, strict=True)]
        with tf.GradientTape() as outer_tape:
            outer_tape.watch(weights)
            logits = forward(weights, tf.constant(QUERY_H[task]))
            bce = tf.nn.sigmoid_cross_entropy_with_logits(QUERY_LABELS[task], logits)
            outer_loss = tf.reduce_sum(bce) / (T * Q * K)
        for total, g in zip(expected, outer_tape.gradient(outer_loss, weights), strict=True):
            total += g.numpy()
    for g, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-9)


def float32_case(**arguments):
    phi = Tower(1, (32,), seed=2)
    phi(tf.zeros([1, 16]))
    loop = InnerLoop(steps=3, shrinkage=2.0, rates="rank_one", **arguments)
    draw = np.random.default_rng(9)
    h = draw.normal(size=(256, 20, 16)).astype(np.float32)
    labels = draw.integers(0, 2, (256, 20, 1)).astype(np.float32)
    counts = draw.integers(0, 21, 256)
    weights = (np.arange(20) < counts[:, None])[:, :, None].astype(np.float32)
    query = draw.normal(size=(256, 8, 16)).astype(np.float32)
    return phi, loop, [h, labels, weights], query


def adapted(phi, loop, arrays, query):
    correction = loop.adapt(phi, Support(*(tf.constant(x) for x in arrays)))
    return phi(tf.constant(query), correction=correction).logits.numpy()


@pytest.mark.parametrize("form", ["dual", "materialised"])
def test_a_task_is_the_same_in_any_company(form):
    phi, loop, arrays, query = float32_case(form=form)
    together = adapted(phi, loop, arrays, query)
    for task in (0, 100, 255):
        alone = adapted(phi, loop, [x[task : task + 1] for x in arrays], query[task : task + 1])
        np.testing.assert_allclose(alone[0], together[task], atol=1e-6)
    order = np.random.default_rng(1).permutation(20)  # rows of the support
    np.testing.assert_allclose(
        adapted(phi, loop, [x[:, order] for x in arrays], query), together, atol=1e-6
    )
    wider = [
        np.pad(x, ((0, 0), (0, 7), (0, 0)), constant_values=v)
        for x, v in zip(arrays, (5, 1, 0), strict=True)
    ]
    np.testing.assert_allclose(adapted(phi, loop, wider, query), together, atol=1e-6)
    other = [x.copy() for x in arrays]
    other[0][1:], other[1][1:] = 3 * other[0][1:], 1 - other[1][1:]
    np.testing.assert_allclose(adapted(phi, loop, other, query)[0], together[0], atol=1e-6)


def test_rows_in_any_order_find_their_task():
    phi, loop, arrays, query = float32_case()
    correction = loop.adapt(phi, Support(*(tf.constant(x) for x in arrays)))
    together = phi(tf.constant(query), correction=correction).logits.numpy()
    task = np.random.default_rng(2).integers(0, 256, 300)
    rows = query[task, task % 8][:, None]
    found = phi(tf.constant(rows), correction=correction.rows(tf.constant(task))).logits
    np.testing.assert_allclose(found[:, 0], together[task, task % 8], atol=1e-6)


@pytest.mark.parametrize("last_layer_only", [False, True])
def test_an_adaptation_as_vectors_is_the_same(last_layer_only):
    phi, loop, arrays, query = float32_case(form="dual", last_layer_only=last_layer_only)
    shapes = phi.dense_shapes(16)
    support = Support(*(tf.constant(x) for x in arrays))
    vectors = flat(loop.adapt(phi, support), shapes)
    assert vectors.shape == (256, tower_size(shapes))
    found = phi(tf.constant(query), correction=of_flat(vectors, shapes)).logits
    np.testing.assert_allclose(found, adapted(phi, loop, arrays, query), atol=1e-6)


def test_forms_agree_in_float32():
    phi, loop, arrays, query = float32_case(form="dual")
    other = InnerLoop.from_config({**loop.get_config(), "form": "materialised"})
    np.testing.assert_allclose(
        adapted(phi, loop, arrays, query), adapted(phi, other, arrays, query), atol=1e-6
    )


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sizes", [(64, 32), (8, 8), (30, 100), (40, 1)])
def test_auto_takes_the_form_of_fewer_products(sizes, steps, is_first):
    """Counted for a task of as many query rows as support rows."""
    num_inputs, num_outputs = sizes
    support = query = 20
    # The rows that entered the first layer are the same at every step, others come anew.
    held = support * (1 if is_first else steps)
    dual = query * held * (num_inputs + num_outputs)
    kernel = held * num_inputs * num_outputs + query * num_inputs * num_outputs
    shape = DenseShape(num_inputs, num_outputs, is_first, False)
    loop = InnerLoop(steps=steps, max_support=support)
    assert loop.is_dual(shape) == (dual < kernel)
    assert not InnerLoop(steps=steps, rates="per_weight").is_dual(shape)
    assert InnerLoop(form="dual").is_dual(shape)
    assert not InnerLoop(form="materialised").is_dual(shape)


def test_the_form_taken_is_the_one_computed():
    phi, loop, arrays, _ = float32_case()
    changes = loop.adapt(phi, Support(*(tf.constant(x) for x in arrays))).changes
    for change, shape in zip(changes, phi.dense_shapes(16), strict=True):
        assert (change.kernel is None) == loop.is_dual(shape)
    assert {loop.is_dual(shape) for shape in phi.dense_shapes(16)} == {True, False}


@pytest.mark.parametrize("rates", ["fixed", "rank_one", "per_weight"])
def test_hidden_layers_of_bfloat16_adapt(rates):
    found = []
    for policy in ("float32", "mixed_bfloat16"):
        phi = Tower(2, UNITS, seed=3, dtype=policy)
        loop = InnerLoop(steps=3, step_size=0.1, shrinkage=2.0, rates=rates)
        task = Support(*(tf.constant(x, tf.float32) for x in (SUPPORT_H, LABELS, WEIGHTS)))
        if policy != "float32":
            task = task._replace(h=tf.cast(task.h, tf.bfloat16))
        query = tf.cast(QUERY_H, task.h.dtype)
        adaptation = loop.adapt(phi, task)
        found.append(phi(query, correction=adaptation).logits - phi(query).logits)
        shapes = phi.dense_shapes(SUPPORT_H.shape[-1])
        assert flat(adaptation, shapes).dtype == tf.float32
    assert found[1].dtype == tf.float32
    assert np.abs(found[0]).max() > 0.05
    np.testing.assert_allclose(found[1], found[0], atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps.*Received: 0"),
        ({"step_size": 0.0}, "step_size"),
        ({"rates": "meta"}, "rates.*Received: 'meta'"),
        ({"form": "primal"}, "form"),
        ({"shrinkage": -1.0}, "shrinkage"),
        ({"form": "dual", "rates": "per_weight"}, "dual form"),
        ({"max_support": 0}, "max_support"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        InnerLoop(**arguments)
