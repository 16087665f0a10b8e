"""Normalization of the residual stream, and the gate that stands in its place."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from models.context import Context

EPSILON = 1e-5


def layer_norm(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: zero mean and unit variance over embd, then gain g and bias b (arXiv:1607.06450)."""
    embd = ctx.dims.embd
    with tf.variable_scope(name):
        g = ctx.constant("g", [embd], 1.0, tf.float32)
        b = ctx.constant("b", [embd], 0.0, tf.float32)
    return mtf.cast(_standardize(ctx, x) * g + b, x.dtype)


def scale_norm(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: as layer_norm with one learned scalar g for gain (arXiv:1910.05895, but centred)."""
    with tf.variable_scope(name):
        return mtf.cast(_standardize(ctx, x) * ctx.constant("g", [], 1.0, tf.float32), x.dtype)


def _standardize(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """The statistics and the result are float32: variances of bfloat16 values would be good to two digits."""
    embd = ctx.dims.embd
    x = mtf.cast(x, tf.float32)
    centred = x - mtf.reduce_mean(x, reduced_dim=embd)
    variance = mtf.reduce_mean(mtf.square(centred), reduced_dim=embd)
    return centred * mtf.rsqrt(variance + EPSILON)


def normalize(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """What a sub-layer sees of the residual stream `x` [..., embd]: under rezero the stream itself."""
    if ctx.config.rezero:
        return x
    return scale_norm(ctx, x, name) if ctx.config.scalenorm else layer_norm(ctx, x, name)


def gate(ctx: Context, branch: mtf.Tensor, name: str) -> mtf.Tensor:
    """What of a sub-layer's output [..., embd] joins the stream: under rezero a learned share g of it, at first 0.

    arXiv:2003.04887
    """
    if not ctx.config.rezero:
        return branch
    with tf.variable_scope(name):
        return branch * ctx.constant("g", [], 0.0)
