"""What attention sees besides the sequence: learned keys and values, and the cache of decoding."""

from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import cache_update, rename
from models.context import Context


@dataclass(frozen=True)
class LearnedMemory:
    """Keys and values [memory_kv, heads, features_per_head], float32, that every position sees (arXiv:1907.01470)."""

    dim: mtf.Dimension
    k: mtf.Tensor
    v: mtf.Tensor


def learned_memory(ctx: Context) -> LearnedMemory | None:
    """The layer's num_mem_kv learned keys and values, or None where the config has none."""
    if not ctx.config.num_mem_kv:
        return None
    heads, features = ctx.dims.heads, ctx.dims.features_per_head
    dim = mtf.Dimension("memory_kv", ctx.config.num_mem_kv)
    with tf.variable_scope("attention"):
        k, v = (
            ctx.normal(name, [dim, heads, features], features.size**-0.5, tf.float32) for name in ("mem_k", "mem_v")
        )
    return LearnedMemory(dim, k, v)


def remember(ctx: Context, x: mtf.Tensor, name: str) -> mtf.Tensor:
    """Keys or values of every position seen so far.

    Whole sequence: [batch, sequence, heads, features] -> [batch, memory_length, heads, features]. Decoding step:
    [batch, heads, features] -> [memory_length, batch, heads, features], with this position written into the cache.
    """
    dims = ctx.dims
    state = f"{ctx.layer}{name}"
    if ctx.position is not None:
        ctx.states[state] = cache_update(ctx.states[state], x, ctx.position)
        return ctx.states[state]
    x = rename(x, dims.sequence.name, dims.memory_length.name)
    if ctx.keep_states_until is not None:
        # positions past the wanted one are in the cache too; they are overwritten before they are seen
        cached_shape = mtf.Shape([dims.memory_length, dims.batch, dims.heads, dims.features_per_head])
        ctx.states[state] = mtf.transpose(x, cached_shape)
    return x
