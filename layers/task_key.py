"""Names of tasks to the integers by which tasks are known."""

from __future__ import annotations

import tensorflow as tf


def task_key(names: tf.Tensor) -> tf.Tensor:
    """The integers by which tasks with these names are known: strings [...] -> int64 [...].

        key(x) = Fingerprint64(x), FarmHash's, its 64 bits read as int64

    Two different names share a key with a probability of 2^-64 each pair: n names all have keys of
    their own but for a chance of about n^2 / 2^65, which is 3e-8 for a million names and 0.03 for a
    billion. Tasks that share a key are one task.

    Example:
    >>> task_key(tf.constant(["anna", "ben"])).numpy()
    array([-5132957809857035456,  1957371472601595288])
    """
    flat = tf.bitcast(tf.fingerprint(tf.reshape(names, [-1])), tf.int64)
    return tf.reshape(flat, tf.shape(names))
