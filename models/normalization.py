"""Normalization of the residual stream."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from models.context import Context

EPSILON = 1e-5


def layer_norm(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: zero mean and unit variance over embd, then gain g and bias b (arXiv:1607.06450)."""
    embd = ctx.dims.embd
    with tf.variable_scope(name):
        g = ctx.constant("g", [embd], 1.0)
        b = ctx.constant("b", [embd], 0.0)
    centred = x - mtf.reduce_mean(x, reduced_dim=embd)
    variance = mtf.reduce_mean(mtf.square(centred), reduced_dim=embd)
    return centred * mtf.rsqrt(variance + EPSILON) * g + b
