"""Training steps of a tiny model on one batch, in a bare session: on any mesh of CPU devices, from given weights."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow.compat.v1 as tf

import optimizers
from config import ModelConfig
from mesh import mtf
from mesh.devices import local_mesh
from mesh.experts import with_expert_rules
from mesh.layout import parse
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


def train_step(config: ModelConfig) -> Callable[[mtf.Mesh], Step]:
    """A builder of a step, the same batch and the same dropout every time."""
    tokens = random_tokens(config.train_batch_size, config.n_ctx + 1, vocab=config.n_vocab)

    def build(mesh: mtf.Mesh) -> Step:
        dims = make_dims(config, config.train_batch_size)
        shape = mtf.Shape([dims.batch, dims.sequence])
        inputs, labels = (mtf.import_tf_tensor(mesh, rows, shape) for rows in (tokens[:, :-1], tokens[:, 1:]))
        key = make_key(mesh, config.seed, tf.constant(0))
        ctx = Context(config, mesh, dims, variable_dtype(config, is_training=True), dropout_key=key)
        losses = gpt.losses(ctx, inputs, labels)
        loss = mtf.reduce_mean(losses.objective)
        if losses.auxiliary is not None:
            loss += losses.auxiliary
        variables = mesh.graph.trainable_variables
        gradients = mtf.gradients([loss], [variable.outputs[0] for variable in variables])
        updates, _ = optimizers.apply_gradients(config, gradients, mtf.constant(mesh, config.lr), tf.constant(0))
        return Step(loss, {v.name: g for v, g in zip(variables, gradients, strict=True)}, updates)

    return build


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model tells in the loss."""
    with tf.Graph().as_default():
        train_step(config)(mtf.Mesh(mtf.Graph(), "mesh"))
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


def run_steps(config: ModelConfig, mesh_shape: str, rules: str, steps: int) -> Steps:
    """`steps` steps from `weights_of(config)` on the CPU devices that the mesh asks for."""
    weights = weights_of(config)
    layout = with_expert_rules(parse(mesh_shape, rules, 1))
    devices = cpu_devices(layout.size)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, layout, devices)
        step = train_step(config)(mesh)
        whole = {name: mtf.anonymize(gradient) for name, gradient in step.gradients.items()}
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        loss = lowering.export_to_tf_tensor(step.loss)
        gradients = {name: lowering.export_to_tf_tensor(gradient) for name, gradient in whole.items()}
        updates = [lowering.lowered_operation(update) for update in step.updates]
        to_slices, to_masters = lowering.copy_masters_to_slices(), lowering.copy_slices_to_masters()
        with tf.Session(config=without_rewriting(devices.session_config())) as session:
            load(weights, session)
            session.run(to_slices)
            first = session.run(gradients)
            losses = [float(session.run([loss, updates])[0]) for _ in range(steps)]
            session.run(to_masters)
            after = session.run({v.op.name: v for v in tf.trainable_variables()})
    return Steps(losses, first, after)
