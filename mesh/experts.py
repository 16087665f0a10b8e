"""Mesh-TensorFlow's mixture-of-experts layer, told so much that its results depend on nothing but its inputs.

Left to itself the layer draws from Python's `random`, cuts its groups to the mesh, and cannot train without a mask of
what is padding. Here its caller makes the groups and the draws, and the layer runs in its evaluation form in training
too: that form takes the same steps, and neither crashes nor adds summaries, which a TPU cannot have inside a loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.layout import MeshLayout
from mesh.randomness import StatelessNormal


@dataclass(frozen=True)
class Routing:
    """How the tokens of a group find their experts.

    Attributes:
      experts: how many there are.
      hidden: width of each.
      capacity_factor: an expert takes group size * capacity_factor / experts tokens, at most the group,
      min_capacity: but at least so many; the tokens that come first in the group are taken.
      second_policy: "all", "none" or "threshold": which tokens also go to their second expert.
      second_threshold: what the second gate must exceed under "threshold": a number, or float32 [groups, group].
      second_place_loss: whether the second choices are to be balanced too.
      loss_weight: weight of the balancing loss.
    """

    experts: int
    hidden: int
    capacity_factor: float
    min_capacity: int
    second_policy: str
    second_threshold: float | mtf.Tensor
    second_place_loss: bool
    loss_weight: float


def top_2_experts(
    x: mtf.Tensor,
    routing: Routing,
    activation: Callable[[mtf.Tensor], mtf.Tensor],
    variable_dtype: mtf.VariableDType,
    seed: int,
    importance: mtf.Tensor | None = None,
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """[groups, group, embd] -> (the same shape, balancing loss): each token through its two best experts.

    out = sum of gate_e * wo_e(activation(wi_e(x))) over the two (arXiv:2006.16668), the gates being a softmax
    renormalized over both, in float32. Variables in the current scope: top_2_gating/kernel [embd, experts], wi/kernel
    [experts, embd, hidden], wo/kernel [experts, hidden, embd], first drawn as Mesh-TensorFlow does but by `seed` and
    their names. Where `importance` [groups, group] is 0 a position goes to no expert; elsewhere it is 1.
    """
    from mesh_tensorflow.transformer import moe  # here, because it takes most of a second and few models need it

    _, group, embd = x.shape.dims
    settings = moe.HParams(
        moe_gating="top_2",
        moe_num_experts=routing.experts,
        moe_hidden_size=routing.hidden,
        moe_group_size=group.size,
        moe_capacity_factor_eval=routing.capacity_factor,
        moe_min_expert_capacity=routing.min_capacity,
        moe_second_policy_eval=routing.second_policy,
        moe_second_threshold_eval=routing.second_threshold,
        moe_use_second_place_loss=routing.second_place_loss,
        moe_loss_coef=routing.loss_weight,
        moe_dropout_rate=0.0,  # the caller's activation drops
        moe_word_embed_mode=None,
        moe_use_experts_attention=False,
    )
    with tf.variable_scope(tf.get_variable_scope(), custom_getter=_stateless_start(seed)):
        return moe.transformer_moe_layer_v1(
            x,
            embd,
            settings,
            train=False,
            variable_dtype=variable_dtype,
            layout="",  # as if nothing were split, so that the groups stay as they came
            mesh_shape="",
            nonpadding=importance,
            activation=activation,
        )


def _stateless_start(seed: int) -> Callable[..., tf.Variable]:
    """A custom_getter of tf.variable_scope that keys the truncated normal initial values by seed and name."""

    def get(getter: Callable[..., tf.Variable], name: str, initializer: Any, **kwargs: Any) -> tf.Variable:
        if isinstance(initializer, tf.truncated_normal_initializer):
            initializer = StatelessNormal(initializer.stddev, seed, name, truncated=True)
        return getter(name=name, initializer=initializer, **kwargs)

    return get


def with_expert_rules(layout: MeshLayout) -> MeshLayout:
    """`layout` with rules for the names that Mesh-TensorFlow's layer gives the dimensions of its own tensors.

    Between its two exchanges of tokens the layer calls the batch `batch_unsplit` and the features `d_model_split`.
    Where the experts are not split over the batch's axis, the batch stays split; else every processor along that axis
    would compute all of it. The features stay split as they are.
    """
    rules = dict(layout.rules)
    if "batch" in rules and rules["batch"] != rules.get("experts"):
        rules["batch_unsplit"] = rules["batch"]
    if "embd" in rules:
        rules["d_model_split"] = rules["embd"]
    return replace(layout, rules=rules)
