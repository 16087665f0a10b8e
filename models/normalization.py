"""Normalization of the residual stream, and the gate that stands in its place."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.layer_norm import standardize
from models.context import Context

EPSILON = 1e-5


def layer_norm(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: zero mean and unit variance over embd, then gain g and bias b (arXiv:1607.06450)."""
    embd = ctx.dims.embd
    with tf.variable_scope(name):
        g = ctx.constant("g", [embd], 1.0, tf.float32)
        b = ctx.constant("b", [embd], 0.0, tf.float32)
    return standardize(x, g, b, EPSILON)


def scale_norm(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: as layer_norm with one learned scalar g for gain (arXiv:1910.05895, but centred)."""
    with tf.variable_scope(name):
        return standardize(x, ctx.constant("g", [], 1.0, tf.float32), None, EPSILON)


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
