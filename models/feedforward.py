"""Feed-forward layers."""

import math

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import linear
from models.activations import activation
from models.context import Context

KERNEL_STDDEV = 0.02  # GPT-2


def dense(ctx: Context, x: mtf.Tensor, out: mtf.Dimension, name: str, stddev: float = KERNEL_STDDEV) -> mtf.Tensor:
    """[..., in] -> [..., out]: x kernel + bias, variables `name`/{kernel [in, out], bias [out]}."""
    in_dim = x.shape.dims[-1]
    with tf.variable_scope(name):
        kernel = ctx.normal("kernel", [in_dim, out], stddev)
        bias = ctx.constant("bias", [out], 0.0)
    return linear(x, kernel) + bias


def mlp(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: c_proj(activation(c_fc(x))), then dropout (GPT-2)."""
    config, dims = ctx.config, ctx.dims
    # GPT-2 shrinks what is added to the residual stream, so that its variance does not grow with depth.
    stddev = KERNEL_STDDEV / math.sqrt(config.n_layer) if config.scale_by_depth else KERNEL_STDDEV
    with tf.variable_scope("mlp"):
        with tf.variable_scope("conv1d_main"):
            hidden = activation(config.activation_function, dense(ctx, x, dims.intermediate_expanded, "c_fc"))
            out = dense(ctx, hidden, dims.embd, "c_proj", stddev)
        return ctx.dropout(out, config.res_dropout, "res_dropout")
