"""Self-attention: one function for each type, and the table that configs name them by.

Queries are not divided by sqrt(features_per_head): the query kernel's initial scale carries that factor.
"""

from collections.abc import Callable

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import add_bias, linear
from models.context import Context
from models.linear_attention import linear_attention
from models.positions import rotate
from models.softmax_attention import global_attention, local_attention

ATTENTION: dict[str, Callable[[Context, mtf.Tensor, mtf.Tensor, mtf.Tensor], mtf.Tensor]] = {
    "global": global_attention,
    "local": local_attention,
    "linear": linear_attention,
}


def attention(ctx: Context, x: mtf.Tensor, kind: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: project, mix by ATTENTION[kind], project back, dropout."""
    dims = ctx.dims
    embd, heads, folded = dims.embd, dims.heads, dims.heads_folded
    input_scale = embd.size**-0.5
    with tf.variable_scope("attn"):
        q = _project(ctx, x, "q", input_scale * dims.features_per_head.size**-0.5)
        k = _project(ctx, x, "k", input_scale)
        v = _project(ctx, x, "v", input_scale)
        if ctx.config.rotary_emb:
            q, k = rotate(ctx, q), rotate(ctx, k)
        mixed = ATTENTION[kind](ctx, q, k, v)
        mixed = mtf.reshape(mixed, mtf.Shape([*ctx.activation_dims, folded]))
        o = ctx.normal("o", [folded, embd], (heads.size * dims.features_per_head.size) ** -0.5)
        with tf.variable_scope("compute_output_bias"):
            out = add_bias(linear(mixed, o), ctx.constant("o_b", [embd], 0.0))
        return ctx.dropout(out, ctx.config.res_dropout, "attn/res_dropout")


def _project(ctx: Context, x: mtf.Tensor, name: str, stddev: float) -> mtf.Tensor:
    """[..., embd] -> [..., heads, features_per_head]"""
    dims = ctx.dims
    kernel = ctx.normal(name, [dims.embd, dims.heads_folded], stddev)
    return mtf.reshape(linear(x, kernel), mtf.Shape([*ctx.activation_dims, dims.heads, dims.features_per_head]))
