"""Sums over the batches of an evaluation."""

import tensorflow.compat.v1 as tf


def running_sum(name: str, value: tf.Tensor) -> tuple[tf.Variable, tf.Tensor]:
    """A metric (value, update) that adds up `value` over the batches, in float64: float32 loses tokens past 2^24."""
    with tf.device("/cpu:0"):
        total = tf.get_variable(
            f"sum_of_{name}",
            [],
            tf.float64,
            tf.zeros_initializer(),
            trainable=False,
            collections=[tf.GraphKeys.LOCAL_VARIABLES, tf.GraphKeys.METRIC_VARIABLES],
        )
        return total, tf.assign_add(total, tf.cast(value, tf.float64))
