"""Products in which every row has a kernel of its own choice, and Mesh-TensorFlow's mixture-of-experts layer.

Left to itself that layer draws from Python's `random`, cuts its groups to the mesh, and cannot train without a mask of
what is padding. Here its caller makes the groups and the draws, and the layer runs in its evaluation form in training
too: that form takes the same steps, and neither crashes nor adds summaries, which a TPU cannot have inside a loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import rows_of
from mesh.layout import MeshLayout
from mesh.operations import SlicewiseOperation

# What Mesh-TensorFlow's layer calls the batch, the experts and the features where it exchanges tokens; see
# with_expert_rules for how they are split. The sequence goes with them here.
BATCH, SEQUENCE, EXPERTS, FEATURES = "batch_unsplit", "sequence_unsplit", "expert_unsplit", "d_model_split"


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
    importance: mtf.Tensor | None = None,
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """[groups, group, embd] -> (the same shape, balancing loss): each token through its two best experts.

    out = sum of gate_e * wo_e(activation(wi_e(x))) over the two (arXiv:2006.16668), the gates being a softmax
    renormalized over both, in float32. The variables top_2_gating/kernel [embd, experts], wi/kernel [experts, embd,
    hidden] and wo/kernel [experts, hidden, embd] of the current scope are those that the caller has made; the layer
    would draw their first values by itself. Where `importance` [groups, group] is 0 a position goes to no expert;
    elsewhere it is 1.
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


def _own_products(x: tf.Tensor, choice: tf.Tensor, kernel: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
    """Slices [..., in], [...] and [experts, in, out] -> [..., out]; rows of other slices' experts are 0."""
    rows, local = rows_of(x), tf.reshape(choice, [-1]) - start
    positions = [tf.where(tf.equal(local, expert)) for expert in range(kernel.shape[0])]
    products = [
        tf.matmul(tf.gather_nd(rows, chosen), weights)
        for chosen, weights in zip(positions, tf.unstack(kernel), strict=True)
    ]
    shape = [rows.shape[0], kernel.shape[2]]
    out = tf.scatter_nd(tf.concat(positions, 0), tf.concat(products, 0), tf.constant(shape, tf.int64))
    return tf.reshape(out, [*x.shape[:-1], kernel.shape[2]])


def _all_products(x: tf.Tensor, choice: tf.Tensor, kernel: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
    """The same on a TPU, where shapes are fixed: every row times every kernel, all but the chosen one times 0."""
    rows, local = rows_of(x), tf.reshape(choice, [-1, 1]) - start
    out = tf.add_n(
        [
            tf.matmul(tf.where_v2(tf.equal(local, expert), rows, tf.zeros_like(rows)), weights)
            for expert, weights in enumerate(tf.unstack(kernel))
        ]
    )
    return tf.reshape(out, [*x.shape[:-1], kernel.shape[2]])


def two_best(scores: mtf.Tensor, least: float, choices: mtf.Dimension) -> tuple[mtf.Tensor, mtf.Tensor]:
    """float32 `scores` [..., experts] -> (int32 experts, their gates), each [..., choices], the best one first.

    The gates are a softmax renormalized over the two. A second expert whose gate is not above `least` is -1.
    """
    experts = scores.shape.dims[-1]
    gates, best = mtf.top_k(mtf.softmax(scores, experts), experts, choices)
    gates /= mtf.reduce_sum(gates, reduced_dim=choices)

    def kept(best_: tf.Tensor, gates_: tf.Tensor) -> tf.Tensor:
        second = best_[..., 1:]
        return tf.concat([best_[..., :1], tf.where_v2(gates_[..., 1:] > least, second, -tf.ones_like(second))], -1)

    chosen = SlicewiseOperation(kept, [best, gates], [(best.shape, tf.int32)], name="chosen_experts").outputs[0]
    return chosen, gates


def expert_product(x: mtf.Tensor, choice: mtf.Tensor, kernel: mtf.Tensor, name: str) -> mtf.Tensor:
    """`x` [..., in] times the kernel of `kernel` [experts, in, out] that int32 `choice` [...] says: [..., out].

    A choice of -1 gives 0. Only what is chosen is computed, except on a TPU. The kernel may be split over the mesh in
    any way, but no dimension of `choice` over the axis of the experts.
    """
    experts, in_dim, out_dim = kernel.shape.dims
    *tokens, last = x.shape.dims
    assert tokens == choice.shape.dims and last == in_dim, (x.shape, choice.shape, kernel.shape)

    def backward(fn: Callable[..., tf.Tensor], wanted: int) -> Callable[..., tf.Tensor]:
        def slope(
            x_: tf.Tensor, choice_: tf.Tensor, kernel_: tf.Tensor, dy: tf.Tensor, start: tf.Tensor | int
        ) -> tf.Tensor:
            # of this use alone: where layers share the kernel, x stems from an earlier one
            inputs = tf.stop_gradient(x_), tf.stop_gradient(kernel_)
            found = tf.gradients([fn(inputs[0], choice_, inputs[1], start)], [inputs[wanted]], [dy])[0]
            return tf.convert_to_tensor(found)  # of gathered rows it is a list of slices

        return slope

    def gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
        dx, d_kernel = (
            SlicewiseOperation(
                backward(_own_products, wanted),
                [*op.inputs, grad_ys[0]],
                [(of.shape, of.dtype)],
                reduced_dims=reduced,
                starts_of=[experts],
                tpu_fn=backward(_all_products, wanted),
                name=f"{name}_gradient",
            ).outputs[0]
            for wanted, of, reduced in ((0, x, [experts, out_dim]), (1, kernel, tokens))
        )
        return [dx, None, d_kernel]

    return SlicewiseOperation(
        _own_products,
        [x, choice, kernel],
        [(mtf.Shape([*tokens, out_dim]), x.dtype)],
        reduced_dims=[experts, in_dim],
        starts_of=[experts],
        gradient=gradient,
        tpu_fn=_all_products,
        name=name,
    ).outputs[0]


def with_expert_rules(layout: MeshLayout) -> MeshLayout:
    """`layout` with rules for the names that the tensors of layers of experts have between them.

    Where the experts are not split over its axis, the batch stays split, and so does the sequence outside training;
    else every processor along that axis would compute all of it. The features stay split as they are.
    """
    rules = dict(layout.rules)
    experts = [rules[dim] for dim in ("experts", "expert_hidden") if dim in rules]
    for dim, name in (("batch", BATCH), ("sequence", SEQUENCE)):
        if dim in rules and rules[dim] not in experts:
            rules[name] = rules[dim]
    if "embd" in rules:
        rules[FEATURES] = rules["embd"]
    return replace(layout, rules=rules)
