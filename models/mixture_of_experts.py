"""Layers of experts in place of the feed-forward layer (arXiv:1701.06538, arXiv:2006.16668)."""

import math

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import linear
from mesh.experts import BATCH, EXPERTS, SEQUENCE, Routing, expert_product, top_2_experts, two_best
from mesh.randomness import uniform
from models.activations import activation
from models.context import Context

_CHOICE = mtf.Dimension("choice", 2)  # a token's first and its second expert
_TOKENS = "moe_sequence"  # positions under a name that no layout splits: a group of them is routed as a whole


def mixture(ctx: Context, x: mtf.Tensor) -> tuple[mtf.Tensor, ...]:
    """[..., embd] -> ([..., embd], in training also the auxiliary loss, a float32 scalar): two experts for each token.

    In training Mesh-TensorFlow's layer lets the tokens of a group compete for room with their experts. A group is a
    part of one sequence: neither the mesh nor the microbatches change who competes with whom. Outside training every
    token finds room, so that no other one matters to it. In that layer such room would cost each token all experts,
    which is why only what is chosen is computed there.
    """
    gating, wi, wo = _kernels(ctx, x.shape.dims[-1])
    if ctx.dropout_key is None:
        return (_with_room_for_all(ctx, x, gating, wi, wo),)
    rows, importance = _grouped(x, ctx.config.moe.moe_group_size)
    out, loss = top_2_experts(
        rows, _routing(ctx, rows), lambda hidden: _thinned_activation(ctx, hidden), ctx.stored_dtype, importance
    )
    return ctx.dropout(_ungrouped(out, x), ctx.config.res_dropout, "moe/res_dropout"), mtf.cast(loss, tf.float32)


def _kernels(ctx: Context, embd: mtf.Dimension) -> list[mtf.Tensor]:
    """The layer's variables, which start as Mesh-TensorFlow's do: truncated normals, of variance 1 / inputs."""
    params = ctx.config.moe
    count, experts = (mtf.Dimension(name, params.moe_num_experts) for name in (EXPERTS, "experts"))
    hidden = mtf.Dimension("expert_hidden", params.moe_hidden_size)
    shapes = {"top_2_gating": [embd, count], "wi": [experts, embd, hidden], "wo": [experts, hidden, embd]}
    kernels = []
    for name, shape in shapes.items():
        dtype = tf.float32 if name == "top_2_gating" else None
        with tf.variable_scope(name):
            kernels.append(ctx.normal("kernel", shape, 1 / math.sqrt(shape[-2].size), dtype, truncated=True))
    return kernels


def _with_room_for_all(ctx: Context, x: mtf.Tensor, gating: mtf.Tensor, wi: mtf.Tensor, wo: mtf.Tensor) -> mtf.Tensor:
    """[..., embd] -> the same: the sum of gate * expert(x) over a token's two experts, whatever other tokens choose."""
    params = ctx.config.moe
    # names on the same axes as before, or on none where the experts lie on that axis
    rows = _renamed(x, {"batch": BATCH, "sequence": SEQUENCE})
    *tokens, embd = rows.shape.dims
    scores = linear(mtf.cast(rows, tf.float32), gating)
    # the second choices that are drawn in training are all taken
    least = {"all": -1.0, "random": -1.0, "threshold": params.moe_second_threshold_eval, "none": 1.0}
    choice, gates = two_best(scores, least[params.moe_second_policy_eval], _CHOICE)
    hidden = expert_product(mtf.broadcast(rows, mtf.Shape([*tokens, _CHOICE, embd])), choice, wi, "wi")
    with tf.variable_scope("wi"):
        hidden = activation(ctx, ctx.config.moe_activation, hidden)
    out = expert_product(hidden, choice, wo, "wo")
    mixed = mtf.einsum([out, mtf.cast(gates, out.dtype)], output_shape=rows.shape)
    return _renamed(mixed, {BATCH: "batch", SEQUENCE: "sequence"})


def _renamed(x: mtf.Tensor, names: dict[str, str]) -> mtf.Tensor:
    return mtf.reshape(x, mtf.Shape([mtf.Dimension(names.get(dim.name, dim.name), dim.size) for dim in x.shape.dims]))


def _thinned_activation(ctx: Context, hidden: mtf.Tensor) -> mtf.Tensor:
    """[1, experts, ..., hidden] -> the same, through the activation function and dropout."""
    active = activation(ctx, ctx.config.moe_activation, hidden)
    flat = mtf.reshape(active, active.shape.dims[1:])  # so that a draw is cut along the experts
    return mtf.reshape(ctx.dropout(flat, ctx.config.moe.moe_dropout_rate, "moe/hidden_dropout"), active.shape)


def _routing(ctx: Context, rows: mtf.Tensor) -> Routing:
    """How the groups `rows` [groups, group, embd] are routed in training."""
    params = ctx.config.moe
    policy = params.moe_second_policy_train
    threshold: float | mtf.Tensor = params.moe_second_threshold_train
    if policy == "random":
        # Mesh-TensorFlow takes a token where a draw is below gate / threshold: where gate > draw * threshold
        assert ctx.dropout_key is not None
        draw = uniform(ctx.dropout_key, mtf.Shape(rows.shape.dims[:-1]), f"{ctx.layer}moe/second_choice")
        policy, threshold = "threshold", draw * max(params.moe_second_threshold_train, 1e-9)
    return Routing(
        params.moe_num_experts,
        params.moe_hidden_size,
        params.moe_capacity_factor_train,
        params.moe_min_expert_capacity,
        policy,
        threshold,
        params.moe_use_second_place_loss,
        params.moe_loss_coef,
    )


def _grouped(x: mtf.Tensor, limit: int) -> tuple[mtf.Tensor, mtf.Tensor | None]:
    """[batch, sequence, embd] -> ([groups, group, embd], importance [groups, group] or None).

    Each sequence is cut into the fewest groups of at most `limit` tokens. Where they do not come out even, the last one
    is filled up, and the importance is 0 there.
    """
    batch, sequence, embd = x.shape.dims
    length = sequence.size
    count = -(-length // limit)
    size = -(-length // count)
    rows = _renamed(x, {sequence.name: _TOKENS})
    groups, group = mtf.Dimension(batch.name, batch.size * count), mtf.Dimension("group", size)
    if count * size == length:
        return mtf.reshape(rows, mtf.Shape([groups, group, embd])), None
    rows = mtf.pad(rows, [0, count * size - length], _TOKENS)
    tokens = rows.shape.dims[1]
    real = mtf.cast(mtf.less(mtf.range(x.mesh, tokens, tf.int32), length), x.dtype)
    importance = mtf.broadcast(real, mtf.Shape([batch, tokens]))
    return mtf.reshape(rows, mtf.Shape([groups, group, embd])), mtf.reshape(importance, mtf.Shape([groups, group]))


def _ungrouped(rows: mtf.Tensor, like: mtf.Tensor) -> mtf.Tensor:
    """[groups, group, embd] -> the shape of `like` [batch, sequence, embd], from which _grouped made it."""
    batch, sequence, embd = like.shape.dims
    tokens = mtf.Dimension(_TOKENS, rows.shape.size // (batch.size * embd.size))
    whole = mtf.reshape(rows, mtf.Shape([batch, tokens, embd]))
    if tokens.size != sequence.size:
        whole = mtf.slice(whole, 0, sequence.size, _TOKENS)
    return mtf.reshape(whole, like.shape)
