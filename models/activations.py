"""Activation functions by the names that configs use."""

from collections.abc import Callable

import tensorflow as tf

from mesh import mtf
from mesh.operations import elementwise


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GPT-2 (https://arxiv.org/abs/1606.08415)."""
    return tf.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": _gelu,
    "relu": tf.nn.relu,
    "sigmoid": tf.nn.sigmoid,
    "tanh": tf.nn.tanh,
    "selu": tf.nn.selu,
    "elu": tf.nn.elu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "softplus": tf.nn.softplus,
}


def activation(name: str, x: mtf.Tensor) -> mtf.Tensor:
    """`x` through the element-wise function called `name`; same shape."""
    return elementwise(ACTIVATIONS[name], x, name)
