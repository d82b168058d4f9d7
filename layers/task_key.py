"""The number by which a task that is named by a string is known."""

from __future__ import annotations

import tensorflow as tf


def task_key(strings: tf.Tensor) -> tf.Tensor:
    """The 64-bit FarmHash fingerprint of each string: string [B] -> int64 [B].

    It is the same in every process and graph. Among n tasks any two have one key with a probability
    of about n^2 / 2^65: of a million tasks, 3e-8.

    Example:
    >>> task_key(tf.constant(["anna", "ben"])).dtype
    tf.int64
    """
    return tf.bitcast(tf.fingerprint(strings), tf.int64)
