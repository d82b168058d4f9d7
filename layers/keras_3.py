"""Layers of Keras 3, which a model of tf_keras would call and neither train nor save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import tf_keras


def _is_keras_3(value: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "keras" for kind in type(value).__mro__)


def refuse_keras_3(model: tf_keras.Model) -> None:
    """Looks at what a model and its layers are made of.

    Raises:
      ValueError: a part is a layer or a model of Keras 3.
    """
    for layer in (model, *model.submodules):
        # Keras keeps lists of its own of what the public attributes hold.
        for name in sorted(vars(layer), key=lambda name: name.startswith("_")):
            value = vars(layer)[name]
            parts: Iterable[object] = value if isinstance(value, list | tuple) else [value]
            if isinstance(value, Mapping):
                parts = value.values()
            for part in parts:
                if _is_keras_3(part):
                    raise ValueError(
                        f"`{name}` of {type(layer).__name__} should be of tf_keras, whose weights "
                        f"are trained and saved with the model. Received: {type(part).__name__} of "
                        "Keras 3. Build it with tf_keras, or set TF_USE_LEGACY_KERAS=1 before "
                        "`tf.keras` is first used."
                    )
