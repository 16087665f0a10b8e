"""Self-attention: one function for each type, and the table that configs name them by.

Queries are not divided by sqrt(features_per_head): the query kernel's initial scale carries that factor.
"""

from collections.abc import Callable

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import linear
from mesh.operations import cache_update
from models.context import Context

MASKED = -1e9  # added to the scores of positions that may not be seen; exp() of it is 0


def attention(ctx: Context, x: mtf.Tensor, kind: str) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: project, mix by ATTENTION[kind], project back, dropout."""
    dims = ctx.dims
    embd, heads, folded = dims.embd, dims.heads, dims.heads_folded
    input_scale = embd.size**-0.5
    with tf.variable_scope("attn"):
        q = _project(ctx, x, "q", input_scale * dims.features_per_head.size**-0.5)
        k = _project(ctx, x, "k", input_scale)
        v = _project(ctx, x, "v", input_scale)
        mixed = ATTENTION[kind](ctx, q, k, v)
        mixed = mtf.reshape(mixed, mtf.Shape([*ctx.activation_dims, folded]))
        o = ctx.normal("o", [folded, embd], (heads.size * dims.features_per_head.size) ** -0.5)
        out = linear(mixed, o)
        with tf.variable_scope("compute_output_bias"):
            out += ctx.constant("o_b", [embd], 0.0)
        return ctx.dropout(out, ctx.config.res_dropout, "res_dropout")


def _project(ctx: Context, x: mtf.Tensor, name: str, stddev: float) -> mtf.Tensor:
    """[..., embd] -> [..., heads, features_per_head]"""
    dims = ctx.dims
    kernel = ctx.normal(name, [dims.embd, dims.heads_folded], stddev)
    return mtf.reshape(linear(x, kernel), mtf.Shape([*ctx.activation_dims, dims.heads, dims.features_per_head]))


def global_attention(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor) -> mtf.Tensor:
    """Every position attends to itself and all before it (arXiv:1706.03762).

    q, k, v and the result: [batch, sequence, heads, features_per_head], without `sequence` in a decoding step.
    """
    dims = ctx.dims
    k, v = (_remember(ctx, x, name) for x, name in ((k, "k"), (v, "v")))
    queries = [] if ctx.position is not None else [dims.sequence]
    scores = mtf.einsum([q, k], mtf.Shape([dims.batch, dims.heads, *queries, dims.memory_length]))
    weights = mtf.softmax(scores + _causal_mask(ctx, scores.dtype), dims.memory_length)
    weights = ctx.dropout(weights, ctx.config.attn_dropout, "attn_dropout")
    return mtf.einsum([weights, v], q.shape)


def _remember(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """Keys or values of every position seen so far.

    Whole sequence: [batch, sequence, heads, features] -> [batch, memory_length, heads, features]. Decoding step:
    [batch, heads, features] -> [memory_length, batch, heads, features], with this position written into the cache.
    """
    dims = ctx.dims
    cached_shape = mtf.Shape([dims.memory_length, dims.batch, dims.heads, dims.features_per_head])
    state = f"{tf.get_variable_scope().name}/{name}"
    if ctx.position is not None:
        ctx.states[state] = cache_update(ctx.states[state], x, ctx.position)
        return ctx.states[state]
    x = mtf.rename_dimension(x, dims.sequence.name, dims.memory_length.name)
    if ctx.keep_states:
        ctx.states[state] = mtf.transpose(x, cached_shape)
    return x


def _causal_mask(ctx: Context, dtype: tf.DType) -> mtf.Tensor:
    """[sequence, memory_length], or [memory_length] in a decoding step: 0 where visible, else MASKED."""
    dims = ctx.dims
    seen = mtf.range(ctx.mesh, dims.memory_length, tf.int32)
    now = ctx.position if ctx.position is not None else mtf.range(ctx.mesh, dims.sequence, tf.int32)
    return mtf.cast(mtf.greater(seen, now), dtype) * MASKED


ATTENTION: dict[str, Callable[[Context, mtf.Tensor, mtf.Tensor, mtf.Tensor], mtf.Tensor]] = {
    "global": global_attention,
}
