"""The graph that TPUs run gives the numbers that local devices give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import optimizers
from config import ModelConfig
from mesh import mtf
from mesh.devices import local_mesh
from mesh.experts import with_expert_rules
from mesh.layout import MeshLayout, parse
from mesh.randomness import make_key
from models import gpt
from models.context import Context
from models.dims import make_dims
from tests.simd_emulation import run_steps, without_rewriting
from tests.tiny import cpu_devices, random_tokens, tiny_config

STEPS = 10
BY_HEADS = "batch:x,heads:y,vocab:y,intermediate_expanded:y"
BY_WIDTH = "batch:x,embd:y,memory_length:y"
ONE_LAYER = {"n_layer": 1, "attention_types": [[["global"], 1]], "res_dropout": 0.1}
MIXED = {"attention_types": [[["local", "linear"], 1]], "local_attention_radius": 3}
EXPERTS = ONE_LAYER | {"moe_layers": [0], "moe_params": {"moe_num_experts": 4, "moe_hidden_size": 8}}
# What sends tokens to experts and back rounds them to bfloat16: Mesh-TensorFlow's all-to-all on a TPU.
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "plain, by heads": (ONE_LAYER, BY_HEADS, 1e-5),
    "plain, by width": (ONE_LAYER, BY_WIDTH, 1e-5),
    "local and linear": (MIXED, BY_HEADS, 1e-5),
    "experts": (EXPERTS, "batch:x,experts:x,heads:y,vocab:y", 1e-2),
}


def train_step(config: ModelConfig) -> Any:
    """A builder of the loss and the updates of a step on the same batch."""
    tokens = random_tokens(config.train_batch_size, config.n_ctx + 1, vocab=config.n_vocab)

    def build(mesh: mtf.Mesh) -> tuple[mtf.Tensor, list[mtf.Operation]]:
        dims = make_dims(config, config.train_batch_size)
        shape = mtf.Shape([dims.batch, dims.sequence])
        inputs, labels = (mtf.import_tf_tensor(mesh, rows, shape) for rows in (tokens[:, :-1], tokens[:, 1:]))
        key = make_key(mesh, config.seed, tf.constant(0))
        ctx = Context(config, mesh, dims, mtf.VariableDType(tf.float32), dropout_key=key)
        losses = gpt.losses(ctx, inputs, labels)
        loss = mtf.reduce_mean(losses.objective)
        if losses.auxiliary is not None:
            loss += losses.auxiliary
        gradients = mtf.gradients([loss], [variable.outputs[0] for variable in mesh.graph.trainable_variables])
        updates, _ = optimizers.apply_gradients(config, gradients, mtf.constant(mesh, config.lr))
        return loss, updates

    return build


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    with tf.Graph().as_default():
        train_step(config)(mtf.Mesh(mtf.Graph(), "mesh"))
        random = np.random.default_rng(0)
        shapes = {v.op.name: v.shape.as_list() for v in tf.trainable_variables()}
        return {name: (0.2 * random.normal(size=shape)).astype(np.float32) for name, shape in sorted(shapes.items())}


def local_losses(layout: MeshLayout, build: Any, weights: dict[str, np.ndarray]) -> list[float]:
    devices = cpu_devices(layout.size)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, layout, devices)
        loss, updates = build(mesh)
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        fetches = [lowering.export_to_tf_tensor(loss), [lowering.lowered_operation(update) for update in updates]]
        copy = lowering.copy_masters_to_slices()
        with tf.Session(config=without_rewriting(devices.session_config())) as session:
            session.run(tf.global_variables_initializer())
            for variable in tf.global_variables():
                if variable.op.name in weights:
                    variable.load(weights[variable.op.name], session)
            session.run(copy)
            return [float(session.run(fetches)[0]) for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cores_compute_what_local_devices_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, rules, tolerance = CASES[name]
    config = tiny_config(tmp_path, **changes)
    build, weights, layout = train_step(config), weights_of(config), with_expert_rules(parse("x:2,y:2", rules, 4))
    expected = local_losses(layout, build, weights)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(run_steps(monkeypatch, layout, build, weights, STEPS), expected, atol=tolerance)
