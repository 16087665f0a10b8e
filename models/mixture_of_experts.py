"""Layers of experts in place of the feed-forward layer (arXiv:1701.06538, arXiv:2006.16668)."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.experts import Routing, top_2_experts
from mesh.randomness import uniform
from models.activations import activation
from models.context import Context

_TOKENS = "moe_sequence"  # positions under a name that no layout splits: a group of them is routed as a whole


def mixture(ctx: Context, x: mtf.Tensor) -> tuple[mtf.Tensor, ...]:
    """[..., embd] -> ([..., embd], in training also the auxiliary loss, a float32 scalar): see top_2_experts.

    In training the tokens of a group compete for room with their experts. A group is a part of one sequence: neither
    the mesh nor the microbatches change who competes with whom. Outside training a token is a group by itself, with
    room for it in every expert: no other token matters to it.
    """
    config, params = ctx.config, ctx.config.moe
    training = ctx.dropout_key is not None
    rows, importance = _grouped(x, params.moe_group_size if training else 1)

    def hidden_activation(hidden: mtf.Tensor) -> mtf.Tensor:
        active = activation(ctx, config.moe_activation, hidden)
        # without its leading dimension of 1, so that a draw is cut along the experts
        thinned = ctx.dropout(mtf.reshape(active, active.shape.dims[1:]), params.moe_dropout_rate, "moe/hidden_dropout")
        return mtf.reshape(thinned, active.shape)

    routing = _routing(ctx, rows)
    out, loss = top_2_experts(rows, routing, hidden_activation, ctx.variable_dtype, config.seed, importance)
    out = ctx.dropout(_ungrouped(out, x), config.res_dropout, "moe/res_dropout")
    return (out, mtf.cast(loss, tf.float32)) if training else (out,)


def _routing(ctx: Context, rows: mtf.Tensor) -> Routing:
    """How the groups `rows` [groups, group, embd] are routed, at random only in training."""
    params = ctx.config.moe
    experts, hidden = params.moe_num_experts, params.moe_hidden_size
    if ctx.dropout_key is None:
        policy = "all" if params.moe_second_policy_eval == "random" else params.moe_second_policy_eval
        # a group of one token with room for one
        return Routing(experts, hidden, float(experts), 1, policy, params.moe_second_threshold_eval, False, 0.0)
    policy = params.moe_second_policy_train
    threshold: float | mtf.Tensor = params.moe_second_threshold_train
    if policy == "random":
        # Mesh-TensorFlow takes a token where a draw is below gate / threshold: where gate > draw * threshold
        draw = uniform(ctx.dropout_key, mtf.Shape(rows.shape.dims[:-1]), f"{ctx.layer}moe/second_choice")
        policy, threshold = "threshold", draw * max(params.moe_second_threshold_train, 1e-9)
    return Routing(
        experts,
        hidden,
        params.moe_capacity_factor_train,
        params.moe_min_expert_capacity,
        policy,
        threshold,
        params.moe_use_second_place_loss,
        params.moe_loss_coef,
    )


def _grouped(x: mtf.Tensor, limit: int) -> tuple[mtf.Tensor, mtf.Tensor | None]:
    """[batch, sequence, embd] or [batch, embd] -> ([groups, group, embd], importance [groups, group] or None).

    Each sequence is cut into the fewest groups of at most `limit` tokens. Where they do not come out even, the last one
    is filled up, and the importance is 0 there.
    """
    batch, *positions, embd = x.shape.dims
    length = positions[0].size if positions else 1
    count = -(-length // limit)
    size = -(-length // count)
    rows = mtf.reshape(x, mtf.Shape([batch, mtf.Dimension(_TOKENS, length), embd]))
    groups, group = mtf.Dimension(batch.name, batch.size * count), mtf.Dimension("group", size)
    if count * size == length:
        return mtf.reshape(rows, mtf.Shape([groups, group, embd])), None
    rows = mtf.pad(rows, [0, count * size - length], _TOKENS)
    tokens = rows.shape.dims[1]
    real = mtf.cast(mtf.less(mtf.range(x.mesh, tokens, tf.int32), length), x.dtype)
    importance = mtf.broadcast(real, mtf.Shape([batch, tokens]))
    return mtf.reshape(rows, mtf.Shape([groups, group, embd])), mtf.reshape(importance, mtf.Shape([groups, group]))


def _ungrouped(rows: mtf.Tensor, like: mtf.Tensor) -> mtf.Tensor:
    """[groups, group, embd] -> the shape of `like`, from which _grouped made it."""
    batch, *positions, embd = like.shape.dims
    tokens = mtf.Dimension(_TOKENS, rows.shape.size // (batch.size * embd.size))
    whole = mtf.reshape(rows, mtf.Shape([batch, tokens, embd]))
    length = positions[0].size if positions else 1
    if tokens.size != length:
        whole = mtf.slice(whole, 0, length, _TOKENS)
    return mtf.reshape(whole, like.shape)
