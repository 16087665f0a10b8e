"""Where a token stands: learned and axial embeddings, rotary turns."""

from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import embedding_lookup, rename
from models.context import Context

POSITION_STDDEV = 0.01  # GPT-2
ROTARY_BASE = 10_000.0  # arXiv:2104.09864


def position_embeddings(ctx: Context) -> mtf.Tensor | None:
    """What is added to the token embeddings: [sequence, embd], or [embd] in a decoding step; None under rotary_emb."""
    if ctx.config.rotary_emb:
        return None
    return axial_positions(ctx) if ctx.config.axial_pos_emb else learned_positions(ctx)


def learned_positions(ctx: Context) -> mtf.Tensor:
    """A learned vector for each position, from wpe [n_ctx, embd]."""
    dims = ctx.dims
    wpe = ctx.normal("wpe", [dims.embed_sequence, dims.embd], POSITION_STDDEV)
    if ctx.position is not None:
        return embedding_lookup(wpe, ctx.position, name="position_lookup")
    return _first(ctx, wpe)


def axial_positions(ctx: Context) -> mtf.Tensor:
    """The mean of two learned vectors (arXiv:1912.12180): position p stands in row p // b and column p % b."""
    dims = ctx.dims
    assert ctx.config.axial_pos_emb is not None
    rows, columns = (mtf.Dimension(f"axial_{i}", size) for i, size in enumerate(ctx.config.axial_pos_emb, 1))
    row = ctx.normal("axial_wpe_1", [rows, dims.embd], POSITION_STDDEV)
    column = ctx.normal("axial_wpe_2", [columns, dims.embd], POSITION_STDDEV)
    if ctx.position is not None:
        in_row = embedding_lookup(row, mtf.floordiv(ctx.position, columns.size), name="row_lookup")
        in_column = embedding_lookup(column, mtf.mod(ctx.position, columns.size), name="column_lookup")
        return (in_row + in_column) * 0.5
    grid = mtf.Shape([rows, columns, dims.embd])
    table = mtf.add(row, column, output_shape=grid) * 0.5
    return _first(ctx, mtf.reshape(table, mtf.Shape([dims.embed_sequence, dims.embd])))


def _first(ctx: Context, table: mtf.Tensor) -> mtf.Tensor:
    """[embed_sequence, ...] -> the rows of the input's positions, [sequence, ...]"""
    dims = ctx.dims
    if dims.sequence.size < dims.embed_sequence.size:
        table = mtf.rename_dimension(table, dims.embed_sequence.name, "positions")  # a name that no layout splits
        table = mtf.slice(table, 0, dims.sequence.size, "positions")
        return mtf.rename_dimension(table, "positions", dims.sequence.name)
    return rename(table, dims.embed_sequence.name, dims.sequence.name)


def rotate(ctx: Context, x: mtf.Tensor) -> mtf.Tensor:
    """Turn each head of `x` [..., heads, features_per_head] by its position (arXiv:2104.09864).

    Feature i of the first half and feature i of the second are a point that turns by position * base^(-2 i / features).
    """
    cosine, sine = (_at_positions(ctx, table) for table in (np.cos, np.sin))
    features = ctx.dims.features_per_head
    half = features.size // 2
    # x times this matrix is (-second half, first half): products with a constant work however features are split
    quarter_turn = np.zeros([features.size, features.size], np.float32)
    quarter_turn[np.arange(half) + half, np.arange(half)] = -1.0
    quarter_turn[np.arange(half), np.arange(half) + half] = 1.0
    turned = mtf.Dimension("turned_features", features.size)
    matrix = mtf.import_tf_tensor(ctx.mesh, quarter_turn, mtf.Shape([features, turned]))
    turned_x = mtf.einsum([x, mtf.cast(matrix, x.dtype)], x.shape - features + turned)
    turned_x = mtf.rename_dimension(turned_x, turned.name, features.name)
    return mtf.cast(mtf.cast(x, tf.float32) * cosine + mtf.cast(turned_x, tf.float32) * sine, x.dtype)


def _at_positions(ctx: Context, function: Callable[[np.ndarray], np.ndarray]) -> mtf.Tensor:
    """`function` of the angles at the input's positions, float32: [sequence, features], or [features] in decoding."""
    dims = ctx.dims
    half = np.arange(dims.features_per_head.size // 2)
    frequencies = ROTARY_BASE ** (-2.0 * half / dims.features_per_head.size)
    angles = np.arange(dims.sequence.size)[:, None] * np.tile(frequencies, 2)
    table = mtf.import_tf_tensor(
        ctx.mesh, function(angles).astype(np.float32), mtf.Shape([dims.sequence, dims.features_per_head])
    )
    return table if ctx.position is None else embedding_lookup(table, ctx.position, name="angle_lookup")
