"""Feed-forward layers."""

import math

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import add_bias, linear
from models.activations import activation
from models.context import Context

KERNEL_STDDEV = 0.02  # GPT-2


def kernel_stddev(ctx: Context, in_dim: mtf.Dimension, by_depth: bool = False) -> float:
    """Spread of a dense kernel's initial values, under scale_by_depth (where `by_depth` applies) and scale_by_in."""
    stddev = KERNEL_STDDEV
    if by_depth and ctx.config.scale_by_depth:
        # GPT-2 shrinks what is added to the residual stream, so that its variance does not grow with depth
        stddev /= math.sqrt(ctx.config.n_layer)
    if ctx.config.scale_by_in:
        stddev /= math.sqrt(in_dim.size)
    return stddev


def dense(ctx: Context, x: mtf.Tensor, out: mtf.Dimension, name: str, by_depth: bool = False) -> mtf.Tensor:
    """[..., in] -> [..., out]: x kernel + bias, variables `name`/{kernel [in, out], bias [out]}."""
    in_dim = x.shape.dims[-1]
    with tf.variable_scope(name):
        kernel = ctx.normal("kernel", [in_dim, out], kernel_stddev(ctx, in_dim, by_depth))
        bias = ctx.constant("bias", [out], 0.0)
    return add_bias(linear(x, kernel), bias)


def mlp(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: c_proj(activation(c_fc(x))), then dropout (GPT-2); gated under mlp_glu."""
    config, dims = ctx.config, ctx.dims
    with tf.variable_scope(name):
        with tf.variable_scope("conv1d_main"):
            hidden = _gated(ctx, x) if config.mlp_glu else _plain(ctx, x)
            out = dense(ctx, hidden, dims.embd, "c_proj", by_depth=True)
        return ctx.dropout(out, config.res_dropout, f"{name}/res_dropout")


def _plain(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """[..., embd] -> [..., intermediate_expanded]"""
    return activation(ctx, ctx.config.activation_function, dense(ctx, x, ctx.dims.intermediate_expanded, "c_fc"))


def _gated(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """[..., embd] -> [..., intermediate_expanded]: value * activation(gate) (arXiv:2002.05202).

    One kernel [embd, 2 * intermediate_expanded] holds both, the value's half first.
    """
    embd, hidden = ctx.dims.embd, ctx.dims.intermediate_expanded
    both = mtf.Dimension(hidden.name, 2 * hidden.size)
    with tf.variable_scope("c_fc"):
        kernel = ctx.normal("kernel", [embd, both], kernel_stddev(ctx, embd))
        bias = ctx.constant("bias", [both], 0.0)
    kernels, biases = _halves(kernel, hidden), _halves(bias, hidden)
    value, gate = (add_bias(linear(x, kernel), bias) for kernel, bias in zip(kernels, biases, strict=True))
    return value * activation(ctx, ctx.config.activation_function, gate)


def _halves(x: mtf.Tensor, half: mtf.Dimension) -> list[mtf.Tensor]:
    """[..., twice `half`] -> its two halves [..., half].

    A split last dimension gives each processor a piece of one half, so it is put together before it is cut.
    """
    *front, both = x.shape.dims
    pair, whole_half = mtf.Dimension("glu", 2), mtf.Dimension("glu_half", half.size)  # names that no layout splits
    whole = mtf.rename_dimension(x, both.name, "glu_both")
    halves = mtf.unstack(mtf.reshape(whole, mtf.Shape([*front, pair, whole_half])), pair)
    return [mtf.rename_dimension(part, whole_half.name, half.name) for part in halves]
