"""Training steps of a tiny model on one batch, in a bare session: on any mesh of CPU devices, from given weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

import optimizers
from config import ModelConfig
from mesh import mtf
from mesh.devices import LocalDevices, local_mesh
from mesh.experts import with_expert_rules
from mesh.layout import MeshLayout, parse
from mesh.randomness import make_key
from models import gpt
from models.context import Context, variable_dtype
from models.dims import make_dims
from tests.tiny import cpu_devices, random_tokens


@dataclass(frozen=True)
class Step:
    """One step of an mtf graph."""

    loss: mtf.Tensor
    gradients: dict[str, mtf.Tensor]
    updates: list[mtf.Operation]


@dataclass(frozen=True)
class Steps:
    """What some steps gave."""

    losses: list[float]
    gradients: dict[str, np.ndarray]  # of the first step
    weights: dict[str, np.ndarray]  # after the last
    beside: Any = None  # what `beside` of run_steps found, with the weights of the first


def training_loss(config: ModelConfig, mesh: mtf.Mesh) -> mtf.Tensor:
    """The mean objective of a batch."""
    tokens = random_tokens(config.train_batch_size, config.n_ctx + 1, vocab=config.n_vocab)
    dims = make_dims(config, config.train_batch_size)
    shape = mtf.Shape([dims.batch, dims.sequence])
    inputs, labels = (mtf.import_tf_tensor(mesh, rows, shape) for rows in (tokens[:, :-1], tokens[:, 1:]))
    key = make_key(mesh, config.seed, tf.constant(0))
    ctx = Context(config, mesh, dims, variable_dtype(config, is_training=True), dropout_key=key)
    losses = gpt.losses(ctx, inputs, labels)
    loss = mtf.reduce_mean(losses.objective)
    return loss if losses.auxiliary is None else loss + losses.auxiliary


def train_step(config: ModelConfig) -> Callable[[mtf.Mesh], Step]:
    """A builder of a step, the same batch and the same dropout every time."""

    def build(mesh: mtf.Mesh) -> Step:
        loss = training_loss(config, mesh)
        variables = mesh.graph.trainable_variables
        gradients = mtf.gradients([loss], [variable.outputs[0] for variable in variables])
        updates, _ = optimizers.apply_gradients(config, gradients, mtf.constant(mesh, config.lr), tf.constant(0))
        return Step(loss, {v.name: g for v, g in zip(variables, gradients, strict=True)}, updates)

    return build


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model tells in the loss."""
    with tf.Graph().as_default():
        training_loss(config, mtf.Mesh(mtf.Graph(), "mesh"))
        random = np.random.default_rng(0)
        shapes = {v.op.name: v.shape.as_list() for v in tf.trainable_variables()}
        return {name: (0.2 * random.normal(size=shape)).astype(np.float32) for name, shape in sorted(shapes.items())}


def without_rewriting(config: tf.ConfigProto) -> tf.ConfigProto:
    """`config` for graphs that take longer to optimise than to run."""
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config


def load(weights: dict[str, np.ndarray], session: tf.Session) -> None:
    """Set every variable: those named in `weights` to their values, the others to their first ones."""
    session.run(tf.global_variables_initializer())
    for variable in tf.global_variables():
        if variable.op.name in weights:
            variable.load(weights[variable.op.name], session)


def run_steps(
    config: ModelConfig,
    mesh_shape: str,
    rules: str,
    steps: int,
    beside: Callable[[MeshLayout, LocalDevices], Callable[[tf.Session], Any]] | None = None,
) -> Steps:
    """`steps` steps from `weights_of(config)` on the CPU devices that the mesh asks for.

    `beside` may add to the TensorFlow graph what shares the variables of training, on every device: they are half the
    time that a graph of its own takes to build. What it returns runs before the first step.
    """
    weights = weights_of(config)
    layout = parse(mesh_shape, rules, 1)
    devices = cpu_devices(layout.size)
    with tf.Graph().as_default(), tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, with_expert_rules(layout), devices)
        step = train_step(config)(mesh)
        whole = {name: mtf.anonymize(gradient) for name, gradient in step.gradients.items()}
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        loss = lowering.export_to_tf_tensor(step.loss)
        gradients = {name: lowering.export_to_tf_tensor(gradient) for name, gradient in whole.items()}
        updates = [lowering.lowered_operation(update) for update in step.updates]
        to_slices, to_masters = lowering.copy_masters_to_slices(), lowering.copy_slices_to_masters()
        run_beside = beside(layout, devices) if beside else None
        with tf.Session(config=without_rewriting(devices.session_config())) as session:
            load(weights, session)
            session.run(to_slices)
            found = run_beside(session) if run_beside else None
            first = session.run(gradients)
            losses = [float(session.run([loss, updates])[0]) for _ in range(steps)]
            session.run(to_masters)
            after = session.run({v.op.name: v for v in tf.trainable_variables()})
    return Steps(losses, first, after, found)
