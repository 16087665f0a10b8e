"""Softmax attention (arXiv:1706.03762), over everything before a position or over a window.

In a masked language model there is no before: a position sees what follows it as well (arXiv:1810.04805).
"""

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.softmax import HIDDEN, masked_softmax
from models.context import Context
from models.memory import learned_memory, remember


def global_attention(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor) -> mtf.Tensor:
    """Every position attends to itself and all before it; in a masked language model, to all there are.

    q, k, v and the result: [batch, sequence, heads, features_per_head], without `sequence` in a decoding step.
    """
    return _attend_to_all(ctx, q, k, v, radius=None)


def local_attention(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor) -> mtf.Tensor:
    """Position i attends to positions i - local_attention_radius + 1 ... i. Shapes as in global_attention.

    In a masked language model the window reaches as far ahead: ... i + local_attention_radius - 1. Where it is narrower
    than the sequence, blocks of `radius` positions attend to themselves and their neighbours, so that time and memory
    grow with the length and not with its square.
    """
    radius = ctx.config.local_attention_radius
    if ctx.decodes or radius >= ctx.dims.sequence.size:
        return _attend_to_all(ctx, q, k, v, radius)
    if ctx.keep_states_until is not None:
        remember(ctx, k, "k")
        remember(ctx, v, "v")
    return _attend_by_blocks(ctx, q, k, v, radius)


def _attend_to_all(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, radius: int | None) -> mtf.Tensor:
    dims = ctx.dims
    k, v = remember(ctx, k, "k"), remember(ctx, v, "v")
    key = mtf.range(ctx.mesh, dims.memory_length, tf.int32)
    query = ctx.position if ctx.position is not None else mtf.range(ctx.mesh, dims.sequence, tf.int32)
    pairs = mtf.Shape([*query.shape.dims, dims.memory_length])
    visible = _visible(ctx, query, key, pairs, radius)
    scores_shape = mtf.Shape([dims.batch, dims.heads, *pairs.dims])
    return _softmax_mix(ctx, q, k, v, visible, scores_shape, dims.memory_length)


def _visible(
    ctx: Context, query: mtf.Tensor, key: mtf.Tensor, pairs: mtf.Shape, radius: int | None
) -> mtf.Tensor | None:
    """Which positions `key` the positions `query` may see: bool `pairs`, or None where they may see all."""
    if radius is None and not ctx.causal:
        return None
    distance = mtf.sub(mtf.broadcast(query, pairs), mtf.broadcast(key, pairs))
    if radius is None:
        return mtf.greater_equal(distance, 0)
    ahead = 0 if ctx.causal else radius - 1
    return mtf.logical_and(mtf.greater_equal(distance, -ahead), mtf.less(distance, radius))


def _softmax_mix(
    ctx: Context,
    q: mtf.Tensor,
    k: mtf.Tensor,
    v: mtf.Tensor,
    visible: mtf.Tensor | None,
    scores_shape: mtf.Shape,
    keys: mtf.Dimension,
) -> mtf.Tensor:
    """Values averaged by the softmax, over `keys` and learned memory together, of the visible q k scores.

    Scores and softmax are float32.
    """
    dtype = q.dtype
    q, k = mtf.cast(q, tf.float32), mtf.cast(k, tf.float32)
    scores = mtf.einsum([q, k], scores_shape)
    memory = learned_memory(ctx)
    rate = ctx.config.attn_dropout
    if memory is None:
        weights = ctx.dropout(mtf.cast(masked_softmax(scores, visible), dtype), rate, "attn/attn_dropout")
        return mtf.einsum([weights, v], q.shape)
    if visible is not None:
        scores += (1.0 - mtf.cast(visible, scores.dtype)) * HIDDEN
    to_memory = mtf.einsum([q, memory.k], scores_shape - keys + memory.dim)
    # one softmax over both (Mesh-TensorFlow's `extra_logit` would let no gradient into the second)
    highest = [
        mtf.reduce_max(mtf.stop_gradient(x), reduced_dim=d) for x, d in ((scores, keys), (to_memory, memory.dim))
    ]
    peak = mtf.maximum(*highest)
    weights, memory_weights = mtf.exp(scores - peak), mtf.exp(to_memory - peak)
    total = mtf.reduce_sum(weights, reduced_dim=keys) + mtf.reduce_sum(memory_weights, reduced_dim=memory.dim)
    weights = ctx.dropout(mtf.cast(weights / total, dtype), rate, "attn/attn_dropout")
    memory_weights = ctx.dropout(mtf.cast(memory_weights / total, dtype), rate, "attn/memory_dropout")
    return mtf.einsum([weights, v], q.shape) + mtf.einsum([memory_weights, mtf.cast(memory.v, dtype)], q.shape)


def _attend_by_blocks(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, radius: int) -> mtf.Tensor:
    """Windowed attention over a whole sequence, cut into blocks of `radius` positions."""
    dims = ctx.dims
    length = dims.sequence.size
    blocks = mtf.Dimension("attention_blocks", -(-length // radius))  # names that no layout splits
    within = mtf.Dimension("block_length", radius)
    padded = mtf.Dimension("padded_sequence", blocks.size * radius)
    neighbours = (-1, 0) if ctx.causal else (-1, 0, 1)  # the blocks that a window reaches into
    window = mtf.Dimension("block_window", len(neighbours) * radius)
    features = [dims.heads, dims.features_per_head]

    def in_blocks(x: mtf.Tensor) -> mtf.Tensor:
        x = mtf.rename_dimension(x, dims.sequence.name, padded.name)
        x = mtf.pad(x, [0, padded.size - length], padded.name)
        return mtf.reshape(x, mtf.Shape([dims.batch, blocks, within, *features]))

    def with_neighbours(x: mtf.Tensor) -> mtf.Tensor:
        x = in_blocks(x)
        shifted = [mtf.shift(x, -offset, blocks, wrap=False) if offset else x for offset in neighbours]
        return mtf.rename_dimension(mtf.concat(shifted, within.name), within.name, window.name)

    begin = mtf.range(ctx.mesh, blocks, tf.int32) * radius
    query = begin + mtf.range(ctx.mesh, within, tf.int32)
    key = begin + mtf.range(ctx.mesh, window, tf.int32) - radius
    pairs = mtf.Shape([blocks, within, window])
    place = mtf.broadcast(key, pairs)
    inside = mtf.logical_and(mtf.greater_equal(place, 0), mtf.less(place, length))
    visible = mtf.logical_and(_visible(ctx, query, key, pairs, radius), inside)
    scores_shape = mtf.Shape([dims.batch, dims.heads, *pairs.dims])
    mixed = _softmax_mix(ctx, in_blocks(q), with_neighbours(k), with_neighbours(v), visible, scores_shape, window)
    mixed = mtf.reshape(mixed, mtf.Shape([dims.batch, padded, *features]))
    mixed = mtf.slice(mixed, 0, length, padded.name)
    return mtf.rename_dimension(mixed, padded.name, dims.sequence.name)
