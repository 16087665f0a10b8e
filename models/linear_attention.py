"""Linear attention (arXiv:1812.01243, arXiv:2006.16236): time linear in the length, a constant state to decode.

q is the softmax over features. Causal, with k = exp: out_i = q_i . sum_{j <= i} k_j v_j^T / (q_i . (sum_{j <= i} k_j +
1e-6)). In a masked language model, with k the softmax over the sequence: out_i = q_i . sum_j k_j v_j^T.
"""

import tensorflow.compat.v1 as tf

from mesh import mtf
from models.context import Context
from models.memory import learned_memory

CHUNK = 64  # positions whose pairs are formed; earlier chunks come in as one sum
EPSILON = 1e-6


def linear_attention(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor) -> mtf.Tensor:
    """q, k, v and the result: [batch, sequence, heads, features_per_head], without `sequence` in a decoding step.

    Dropout thins the features of the queries, as there are no weights of single positions to thin. All but the result
    is float32, the states of decoding too: a bfloat16 sum over positions stops growing after some hundred of them.
    """
    features, dtype = ctx.dims.features_per_head, q.dtype
    q, k, v = (mtf.cast(x, tf.float32) for x in (q, k, v))
    values = mtf.Dimension("value_features", features.size)  # a name that no layout splits
    q = ctx.dropout(mtf.softmax(q, features), ctx.config.attn_dropout, "attn/attn_dropout")
    v = mtf.rename_dimension(v, features.name, values.name)
    if not ctx.causal:
        out = _at_once(ctx, q, k, v, values)
    elif ctx.decodes:
        out = _step(ctx, q, mtf.exp(k), v, values)
    else:
        out = _by_chunks(ctx, q, mtf.exp(k), v, values)
    return mtf.cast(mtf.rename_dimension(out, values.name, features.name), dtype)


def _at_once(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, values: mtf.Dimension) -> mtf.Tensor:
    """Every position at once. The softmax of the keys goes over the sequence and learned memory together."""
    dims = ctx.dims
    sequence, features = dims.sequence, dims.features_per_head
    memory = learned_memory(ctx)
    sums = mtf.Shape([dims.batch, dims.heads, features])
    peak = mtf.reduce_max(mtf.stop_gradient(k), output_shape=sums)
    if memory is not None:
        peak = mtf.maximum(peak, mtf.reduce_max(mtf.stop_gradient(memory.k), reduced_dim=memory.dim))
    weights = mtf.exp(k - peak)
    total, products = mtf.reduce_sum(weights, reduced_dim=sequence), mtf.einsum([weights, v], sums + values)
    if memory is not None:
        weights = mtf.exp(memory.k - peak)
        memory_v = mtf.rename_dimension(memory.v, features.name, values.name)
        total += mtf.reduce_sum(weights, reduced_dim=memory.dim)
        products += mtf.einsum([weights, memory_v], sums + values)
    return mtf.einsum([q, products / total], v.shape)


def _memory_sums(ctx: Context, values: mtf.Dimension) -> tuple[mtf.Tensor | float, mtf.Tensor | float]:
    """What learned memory adds to the sums of k v^T and of k at every position."""
    memory = learned_memory(ctx)
    if memory is None:
        return 0.0, 0.0
    heads, features = ctx.dims.heads, ctx.dims.features_per_head
    k = mtf.exp(memory.k)
    v = mtf.rename_dimension(memory.v, features.name, values.name)
    return mtf.einsum([k, v], mtf.Shape([heads, features, values])), mtf.reduce_sum(k, reduced_dim=memory.dim)


def _step(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, values: mtf.Dimension) -> mtf.Tensor:
    """One position: q and k [batch, heads, features], v and the result [batch, heads, value_features]."""
    products, keys = f"{ctx.layer}kv", f"{ctx.layer}k"
    ctx.states[products] += mtf.einsum([k, v], ctx.states[products].shape)
    ctx.states[keys] += k
    memory_kv, memory_k = _memory_sums(ctx, values)
    numerator = mtf.einsum([q, ctx.states[products] + memory_kv], v.shape)
    denominator = mtf.reduce_sum(q * (ctx.states[keys] + memory_k + EPSILON), reduced_dim=ctx.dims.features_per_head)
    return numerator / denominator


def _by_chunks(ctx: Context, q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, values: mtf.Dimension) -> mtf.Tensor:
    """The whole sequence: pairs of positions inside chunks, prefix sums across them."""
    dims = ctx.dims
    length, heads, features = dims.sequence.size, dims.heads, dims.features_per_head
    within = mtf.Dimension("chunk_length", min(CHUNK, length))
    seen = mtf.Dimension("chunk_memory", within.size)
    chunks = mtf.Dimension("chunks", -(-length // within.size))
    padded = mtf.Dimension("padded_sequence", chunks.size * within.size)

    if ctx.keep_states_until is not None:
        _keep_sums(ctx, k, v, values)

    def in_chunks(x: mtf.Tensor, position: mtf.Dimension) -> mtf.Tensor:
        x = mtf.rename_dimension(x, dims.sequence.name, padded.name)
        x = mtf.pad(x, [0, padded.size - length], padded.name)
        return mtf.reshape(x, mtf.Shape([dims.batch, chunks, position, *x.shape.dims[2:]]))

    q, k, v = in_chunks(q, within), in_chunks(k, seen), in_chunks(v, seen)
    per_chunk = [dims.batch, chunks, heads, features]
    memory_kv, memory_k = _memory_sums(ctx, values)
    before_kv = mtf.cumsum(mtf.einsum([k, v], mtf.Shape([*per_chunk, values])), chunks, exclusive=True) + memory_kv
    before_k = mtf.cumsum(mtf.reduce_sum(k, output_shape=mtf.Shape(per_chunk)), chunks, exclusive=True) + memory_k

    causal = mtf.greater_equal(mtf.range(ctx.mesh, within, tf.int32), mtf.range(ctx.mesh, seen, tf.int32))
    pairs = mtf.einsum([q, k], mtf.Shape([dims.batch, chunks, heads, within, seen])) * mtf.cast(causal, q.dtype)
    out_shape = mtf.Shape([dims.batch, chunks, within, heads, values])
    numerator = mtf.einsum([q, before_kv], out_shape) + mtf.einsum([pairs, v], out_shape)
    denominator = mtf.einsum([q, before_k + EPSILON], out_shape - values)
    denominator += mtf.reduce_sum(pairs, output_shape=out_shape - values)
    out = mtf.reshape(numerator / denominator, mtf.Shape([dims.batch, padded, heads, values]))
    return mtf.rename_dimension(mtf.slice(out, 0, length, padded.name), padded.name, dims.sequence.name)


def _keep_sums(ctx: Context, k: mtf.Tensor, v: mtf.Tensor, values: mtf.Dimension) -> None:
    """Put the sums over the positions before `keep_states_until` into the states."""
    dims = ctx.dims
    before = mtf.less(mtf.range(ctx.mesh, dims.sequence, tf.int32), ctx.keep_states_until)
    k = k * mtf.cast(before, k.dtype)
    shape = mtf.Shape([dims.batch, dims.heads, dims.features_per_head])
    ctx.states[f"{ctx.layer}kv"] = mtf.einsum([k, v], shape + values)
    ctx.states[f"{ctx.layer}k"] = mtf.reduce_sum(k, output_shape=shape)
