"""What is used of tensorflow-recommenders, whose classes are those of whatever `tf.keras` is.

TensorFlow decides that when `tf.keras` is first used: it is tf_keras if TF_USE_LEGACY_KERAS is set
by then, and else Keras 3, which tensorflow-recommenders refuses. So importing this module sets the
variable; nothing else of this package does.
"""

from __future__ import annotations

import os

import tensorflow as tf

_VARIABLE = "TF_USE_LEGACY_KERAS"


def _use_tf_keras() -> None:
    """Has `tf.keras` be tf_keras.

    Raises:
      ImportError: it is Keras 3 already, or the variable says that it should be.
    """
    before = os.environ.get(_VARIABLE)
    os.environ.setdefault(_VARIABLE, "1")
    version = getattr(tf.keras, "version", None)  # tf_keras has none
    if version is not None and version().startswith("3."):
        if before is None:
            del os.environ[_VARIABLE]
        raise ImportError(
            "qianmo's models are made of tf_keras, but `tf.keras` is Keras 3 in this process: set "
            f"{_VARIABLE}=1 in the environment, or import qianmo.models before `tf.keras` is used."
        )


_use_tf_keras()

from tensorflow_recommenders.layers.feature_interaction import Cross  # noqa: E402
from tensorflow_recommenders.tasks import Retrieval  # noqa: E402

__all__ = ["Cross", "Retrieval"]
