"""Activation functions by the names that configs use."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import tensorflow as tf

from mesh import mtf
from mesh.elementwise import elementwise, with_slope
from mesh.randomness import uniform
from models.context import Context

# What an activation function is to the layer that calls it: [..., width] -> the same shape.
Activation = Callable[[Context, mtf.Tensor], mtf.Tensor]

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR
_RRELU_SLOPES = (1 / 8, 1 / 3)  # arXiv:1505.00853
_LEAST = 0.1  # what learned numbers count as below it, where a power or a logarithm of them would not be finite


def _gelu(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The tanh form of GPT-2 (arXiv:1606.08415): x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); and its slope.

    TensorFlow's own takes twice as many passes over the data, forward and back.
    """
    square = x * x
    share = tf.sigmoid(x * (_GELU_CUBIC * square + _GELU_LINEAR))
    inner = x * (3 * _GELU_CUBIC * square + _GELU_LINEAR)
    return x * share, share * (1 + inner * (1 - share))


def _triangle(x: tf.Tensor) -> tf.Tensor:
    """The first four terms of a triangle wave's Fourier series."""
    return tf.sin(x) - tf.sin(3 * x) / 9 + tf.sin(5 * x) / 25 - tf.sin(7 * x) / 49


def _square(x: tf.Tensor) -> tf.Tensor:
    """The first four terms of a square wave's Fourier series."""
    return tf.cos(x) - tf.cos(3 * x) / 3 + tf.cos(5 * x) / 5 - tf.cos(7 * x) / 7


def _elish(x: tf.Tensor) -> tf.Tensor:
    """arXiv:1808.00783"""
    return tf.where(x > 0, x, tf.exp(tf.minimum(x, 0)) - 1) * tf.sigmoid(x)


_FIXED: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
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
    "tanhexp": lambda x: x * tf.tanh(tf.exp(tf.minimum(x, 20))),  # tanh is 1 long before exp overflows
    "lisht": lambda x: x * tf.tanh(x),
    "seagull": lambda x: tf.math.log1p(tf.square(x)),
    "snake": lambda x: x + tf.square(tf.sin(x)),
    "roottanh": lambda x: tf.pow(tf.square(x) + 1, 1 / 3) * tf.tanh(x),
    "softplusmone": lambda x: tf.nn.softplus(x) - 1,
}


def _fixed(fn: Callable[[tf.Tensor], tf.Tensor], name: str, ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    return elementwise(fn, x, name)


def _prelu(x: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    """arXiv:1502.01852"""
    return tf.where(x > 0, x, slope * x)


def _proottanh(x: tf.Tensor, p: tf.Tensor, q: tf.Tensor, a: tf.Tensor) -> tf.Tensor:
    """(|x|^p + a)^(1/q) tanh x; of the distance from 0, so that the power exists on both sides of it."""
    power = tf.pow(tf.maximum(tf.abs(x), 1e-6), p)  # away from 0, where the slope of a small power is infinite
    return tf.pow(tf.maximum(power + a, 1e-6), 1 / tf.maximum(q, 1)) * tf.tanh(x)


def _aria(
    x: tf.Tensor, a: tf.Tensor, k: tf.Tensor, b: tf.Tensor, nu: tf.Tensor, c: tf.Tensor, q: tf.Tensor
) -> tf.Tensor:
    """Richard's curve times x: x (a + (k - a) / (c + q exp(-b x))^(1/nu)) (arXiv:1805.08878).

    The power is taken by logarithms, in which exp(-b x) does not overflow.
    """
    log_c, log_q = tf.math.log(tf.maximum(c, _LEAST)), tf.math.log(tf.maximum(q, _LEAST))
    log_sum = log_c + tf.nn.softplus(log_q - b * x - log_c)
    return x * (a + (k - a) * tf.exp(-log_sum / tf.maximum(nu, _LEAST)))


# name -> (function of x and learned numbers, what these are called and start at)
_LEARNED: dict[str, tuple[Callable[..., tf.Tensor], Mapping[str, float]]] = {
    "prelu": (_prelu, {"slope": 0.2}),
    "parcsinh": (lambda x, a, b: b * tf.asinh(a * x), {"a": 1.0, "b": 1.0}),
    "psoftplus": (lambda x, a, b, c: b * tf.nn.softplus(a * x) + c, {"a": 1.0, "b": 1.0, "c": 0.0}),
    "proottanh": (_proottanh, {"p": 2.0, "q": 3.0, "a": 1.0}),  # at first roottanh
    "aria": (_aria, {"a": 0.0, "k": 1.0, "b": 1.0, "nu": 1.0, "c": 1.0, "q": 1.0}),  # at first silu
}


def _learned(
    fn: Callable[..., tf.Tensor], starts: Mapping[str, float], name: str, ctx: Context, x: mtf.Tensor
) -> mtf.Tensor:
    """`fn` of every element and of the variables activation_<name>/<number> [], which belong to the layer."""
    with tf.compat.v1.variable_scope(f"activation_{name}"):
        numbers = [ctx.constant(number, [], start, tf.float32) for number, start in starts.items()]
    return elementwise(fn, x, name, numbers)


def _rrelu(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """Leaky ReLU whose slope is drawn anew in every training step; its mean outside training (arXiv:1505.00853)."""
    least, greatest = _RRELU_SLOPES
    if ctx.dropout_key is None:
        return elementwise(lambda x: tf.nn.leaky_relu(x, (least + greatest) / 2), x, "rrelu")
    drawn = uniform(ctx.dropout_key, mtf.Shape([]), f"{ctx.layer}{tf.compat.v1.get_variable_scope().name}/rrelu")
    return elementwise(_prelu, x, "rrelu", [mtf.stop_gradient(least + (greatest - least) * drawn)])


def _shifted(x: mtf.Tensor) -> tuple[mtf.Tensor, mtf.Tensor, mtf.Tensor]:
    """x less its maximum over the last dimension, the exponentials of that, and their sum over it, all float32."""
    last = x.shape.dims[-1]
    x = mtf.cast(x, tf.float32)
    shifted = x - mtf.reduce_max(mtf.stop_gradient(x), reduced_dim=last)
    exponentials = elementwise(tf.exp, shifted, "exp")
    return shifted, exponentials, mtf.reduce_sum(exponentials, reduced_dim=last)


def _softmax(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """exp(x) / sum of exp(x) over the last dimension, which may be split over the mesh."""
    _, exponentials, total = _shifted(x)
    return mtf.cast(exponentials * elementwise(tf.math.reciprocal, total, "reciprocal"), x.dtype)


def _log_softmax(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """The logarithm of `_softmax`."""
    shifted, _, total = _shifted(x)
    return mtf.cast(shifted - elementwise(tf.math.log, total, "log"), x.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": lambda ctx, x: with_slope(_gelu, x, "gelu"),
    **{name: partial(_fixed, fn, name) for name, fn in _FIXED.items()},
    **{name: partial(_learned, fn, starts, name) for name, (fn, starts) in _LEARNED.items()},
    "rrelu": _rrelu,
    "softmax": _softmax,
    "logsoftmax": _log_softmax,
}


def activation(ctx: Context, name: str, x: mtf.Tensor) -> mtf.Tensor:
    """`x` [..., width] through the function called `name`, same shape.

    The numbers that it learns, if any, are variables activation_<name>/<number> in the current scope.
    """
    return ACTIVATIONS[name](ctx, x)
