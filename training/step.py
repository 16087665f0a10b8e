"""A training step: losses, gradients over all microbatches, updates."""

from dataclasses import dataclass

import tensorflow.compat.v1 as tf

import optimizers
from config import ModelConfig
from mesh import mtf
from mesh.devices import LocalDevices
from mesh.layout import MeshLayout
from mesh.operations import one_at_a_time
from mesh.plan import TrainingGraph, variables_described
from mesh.randomness import fold_in, make_key
from model_graph import Features, ModelGraph
from models import gpt
from models.dims import Dims, make_dims


def num_microbatches(config: ModelConfig, layout: MeshLayout) -> int:
    """Into how many microbatches a training batch is cut: the fewest, dividing the batch of one replica, whose tokens
    do not exceed `tokens_per_mb_per_replica` (but at least one sequence each)."""
    if config.tokens_per_mb_per_replica is None:
        return 1
    per_replica = config.train_batch_size // layout.ways("batch")
    at_most = min(per_replica, max(1, config.tokens_per_mb_per_replica // config.n_ctx))
    size = next(size for size in range(at_most, 0, -1) if per_replica % size == 0)
    return per_replica // size


def mean_gradients(
    graph: ModelGraph, features: dict[str, mtf.Tensor], key: mtf.Tensor
) -> tuple[list[mtf.Tensor], dict[str, mtf.Tensor]]:
    """Gradients of the mean objective for every trainable variable, and the mean losses, over all microbatches.

    A label outside the vocabulary, such as the padding id of GPT-2, is not scored.
    """
    config, dims = graph.config, graph.dims
    count = num_microbatches(config, graph.layout)

    def scored(labels: mtf.Tensor) -> mtf.Tensor:
        inside = mtf.logical_and(mtf.greater_equal(labels, 0), mtf.less(labels, config.n_vocab))
        return mtf.cast(inside, tf.float32)

    num_scored = mtf.maximum(mtf.reduce_sum(scored(features["labels"])), 1.0)

    def mean_losses(batch: dict[str, mtf.Tensor], dims: Dims, key: mtf.Tensor) -> dict[str, mtf.Tensor]:
        per_token = gpt.losses(graph.context(dims, dropout_key=key), batch["inputs"], batch["labels"])
        weights = scored(batch["labels"])
        losses = {
            "loss": mtf.reduce_sum(per_token.objective * weights) / num_scored,
            "cross_entropy": mtf.reduce_sum(per_token.cross_entropy * weights) / num_scored,
        }
        if per_token.auxiliary is not None:
            losses["auxiliary_loss"] = per_token.auxiliary / count
            losses["loss"] += losses["auxiliary_loss"]
        return losses

    if count == 1:
        losses = mean_losses(features, dims, key)
        return mtf.gradients([losses["loss"]], [v.outputs[0] for v in graph.graph.trainable_variables]), losses

    microbatch_dims = make_dims(config, dims.batch.size // count)
    # serialize_training_step deals row b to microbatch b % count, so each microbatch can read its number off its rows
    rows = mtf.mod(mtf.range(graph.mesh, dims.batch, tf.int32), count)

    def microbatch(batch: dict[str, mtf.Tensor]) -> dict[str, mtf.Tensor]:
        return mean_losses(batch, microbatch_dims, fold_in(key, mtf.reduce_max(batch["microbatch"])))

    return one_at_a_time(*mtf.serialize_training_step(features | {"microbatch": rows}, microbatch, dims.batch, count))


@dataclass(frozen=True)
class TrainingStep:
    """A training step as Mesh-TensorFlow operations.

    Attributes:
      losses: means over the batch, by name.
      gradients: of all trainable variables, before they are clipped.
      norm: the global norm of them.
      norms: under log_grads, the norm of each.
      rate: the learning rate.
      updates: what assigns to variables.
    """

    losses: dict[str, mtf.Tensor]
    gradients: list[mtf.Tensor]
    norm: mtf.Tensor
    norms: dict[str, mtf.Tensor]
    rate: tf.Tensor
    updates: list[mtf.Operation]


def training_step(graph: ModelGraph, features: Features, global_step: tf.Tensor) -> TrainingStep:
    """The step after `global_step` [] of them, on the `inputs` and `labels` [batch, sequence] of `features`."""
    config = graph.config
    batch = graph.import_batch({name: features[name] for name in ("inputs", "labels")})
    gradients, losses = mean_gradients(graph, batch, make_key(graph.mesh, config.seed, global_step))
    tf_rate = optimizers.learning_rate(config, global_step)
    rate = mtf.import_fully_replicated(graph.mesh, tf_rate, mtf.Shape([]), name="learning_rate")
    updates, norm = optimizers.apply_gradients(config, gradients, rate, global_step)
    norms = optimizers.gradient_norms(gradients) if config.log_grads else {}
    return TrainingStep(losses, gradients, norm, norms, tf_rate, updates)


def training_graph(config: ModelConfig, layout: MeshLayout) -> TrainingGraph:
    """A training step of `config` to be looked at, on any mesh: no variable is made, and nothing can be run."""
    devices = LocalDevices(tuple(f"/device:CPU:{i}" for i in range(layout.size)))  # mere names
    with variables_described():
        graph = ModelGraph(config, layout, devices, config.train_batch_size, is_training=True)
        tokens = tf.placeholder(tf.int32, [config.train_batch_size, config.n_ctx])
        step = training_step(graph, {"inputs": tokens, "labels": tokens}, tf.placeholder(tf.int64, []))
    return TrainingGraph(graph.graph, step.gradients, [*step.losses.values(), step.norm, *step.norms.values()])
