"""Activation functions by the names that configs use; each works on every element alone."""

from collections.abc import Callable

import tensorflow as tf

from mesh import mtf
from mesh.operations import elementwise


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GPT-2 (arXiv:1606.08415)."""
    return tf.nn.gelu(x, approximate=True)


def _triangle(x: tf.Tensor) -> tf.Tensor:
    """The first four terms of a triangle wave's Fourier series."""
    return tf.sin(x) - tf.sin(3 * x) / 9 + tf.sin(5 * x) / 25 - tf.sin(7 * x) / 49


def _square(x: tf.Tensor) -> tf.Tensor:
    """The first four terms of a square wave's Fourier series."""
    return tf.cos(x) - tf.cos(3 * x) / 3 + tf.cos(5 * x) / 5 - tf.cos(7 * x) / 7


def _elish(x: tf.Tensor) -> tf.Tensor:
    """arXiv:1808.00783"""
    return tf.where(x > 0, x, tf.exp(tf.minimum(x, 0)) - 1) * tf.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": _gelu,
    "relu": tf.nn.relu,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
    "selu": tf.nn.selu,
    "elu": tf.nn.elu,
    "abs": tf.abs,
    "sin": tf.sin,
    "cos": tf.cos,
    "sign": tf.sign,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "softplus": tf.nn.softplus,
    "lrelu001": lambda x: tf.nn.leaky_relu(x, 0.01),
    "lrelu020": lambda x: tf.nn.leaky_relu(x, 0.20),
    "id": tf.identity,
    "triangle_relax": _triangle,
    "square_relax": _square,
    "spike": lambda x: 1 / (1 + tf.square(x)),
    "spike2": lambda x: tf.exp(-tf.square(x)),
    "tanhshrink": lambda x: x - tf.tanh(x),
    "softsign": tf.nn.softsign,
    "bipolarsigmoid": lambda x: 2 * tf.sigmoid(x) - 1,
    "elish": _elish,
    "arcsinh": tf.asinh,
    "maxsig": lambda x: tf.maximum(x, tf.sigmoid(x)),
    "cosid": lambda x: tf.cos(x) - x,
    "minsin": lambda x: tf.minimum(x, tf.sin(x)),
    "maxtanh": lambda x: tf.maximum(x, tf.tanh(x)),
    "mish": lambda x: x * tf.tanh(tf.nn.softplus(x)),
    "tanhexp": lambda x: x * tf.tanh(tf.exp(x)),
    "lisht": lambda x: x * tf.tanh(x),
    "seagull": lambda x: tf.math.log1p(tf.square(x)),
    "snake": lambda x: x + tf.square(tf.sin(x)),
    "roottanh": lambda x: tf.pow(tf.square(x) + 1, 1 / 3) * tf.tanh(x),
    "softplusmone": lambda x: tf.nn.softplus(x) - 1,
}


def activation(name: str, x: mtf.Tensor) -> mtf.Tensor:
    """`x` through the element-wise function called `name`; same shape."""
    return elementwise(ACTIVATIONS[name], x, name)
