"""Keras 3 and tf_keras in one process: what decides, and what is said where they do not fit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

UNSET = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
SENTENCE = (
    "ImportError: qianmo's models are made of tf_keras, but `tf.keras` is Keras 3 in this process: "
    "set TF_USE_LEGACY_KERAS=1 in the environment, or import qianmo.models before `tf.keras` is "
    "used."
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**UNSET, **environment},
    )


def test_importing_the_package_and_its_layers_changes_nothing() -> None:
    done = run(
        "import os, qianmo, qianmo.layers.fm, qianmo.layers.schema, qianmo.export.paths\n"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ\n"
        "import tensorflow as tf\n"
        "assert tf.keras.version().startswith('3.')\n"
        "assert qianmo.layers.fm.FM()(tf.ones([1, 2, 3])).numpy() == 3\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_models_makes_tf_keras_of_what_was_not_used() -> None:
    done = run(
        "import tensorflow as tf, tf_keras, qianmo.models.zoo\n"
        "assert tf.keras.layers.Dense is tf_keras.layers.Dense\n"
        "assert tf.losses.MeanSquaredError is tf_keras.losses.MeanSquaredError\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("environment", [{}, {"TF_USE_LEGACY_KERAS": "0"}])
def test_importing_models_where_keras_3_is_in_use_says_so(environment: dict[str, str]) -> None:
    done = run(
        "import os, tensorflow as tf\n"
        "if 'TF_USE_LEGACY_KERAS' not in os.environ:\n"
        "    tf.keras.layers\n"
        "before = dict(os.environ)\n"
        "try:\n"
        "    import qianmo.models.zoo\n"
        "finally:\n"
        "    assert os.environ == before\n",
        **environment,
    )
    assert done.stderr.splitlines()[-1] == SENTENCE


@pytest.mark.parametrize(
    ("bottom", "said"),
    [
        ("keras.layers.Dense(4)", "`bottom` of Road should be of tf_keras"),
        ("Bottom(networks=[keras.layers.Dense(4)])", "`networks` of Bottom should be of tf_keras"),
        (
            "keras.Model(x := keras.Input([4]), keras.layers.Dense(2)(x))",
            "Received: Functional of Keras 3. Build it with tf_keras, or set TF_USE_LEGACY_KERAS=1",
        ),
    ],
)
def test_a_layer_of_keras_3_is_refused_by_name(bottom: str, said: str) -> None:
    done = run(
        "import keras\n"
        "from qianmo.layers.bottom import Bottom\n"
        "from qianmo.layers.tower import Tower\n"
        "from qianmo.models.road import Road\n"
        "schema = {'features': [{'name': 'user', 'num_ids': 3}], 'labels': ['y']}\n"
        f"Road(schema, {bottom}, Tower(1)).build()\n"
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: `")
    assert said in last
