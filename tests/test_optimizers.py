"""Learning-rate schedules, clipping and AdamW against hand-derived numbers and plain numpy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import optimizers
from config import ModelConfig
from mesh import mtf
from mesh.devices import local_mesh
from mesh.layout import parse
from tests.tiny import MtfSession, cpu_devices, tiny_config

WARMUP = {"warmup_steps": 10}
# step -> rate, by hand, for lr 0.001 and train_steps 100; cos(pi / 4) = 0.7071067812, cos(pi / 10) = 0.9510565163,
# cos(pi / 20) = 0.9876883406, cos(pi / 100) = 0.9995065604, cos(9 pi / 100) = 0.9602936857
SCHEDULES: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"lr_decay": "cosine"}, {0: 1e-3, 25: 0.8681980515e-3, 50: 0.55e-3, 75: 0.2318019485e-3, 100: 1e-4, 10**6: 1e-4}),
    ({"lr_decay": "linear"}, {0: 1e-3, 1: 0.991e-3, 25: 0.775e-3, 50: 0.55e-3, 99: 0.109e-3, 100: 1e-4, 10**6: 1e-4}),
    ({"lr_decay": "cosine", "lr_decay_end": 50}, {0: 1e-3, 25: 0.55e-3, 50: 1e-4, 51: 1e-4, 99: 1e-4}),
    ({"lr_decay": "linear", "lr_decay_end": 200}, {0: 1e-3, 50: 0.775e-3, 100: 0.55e-3, 200: 1e-4, 201: 1e-4}),
    (
        {"lr_decay": "cosine", **WARMUP},
        {0: 0.0, 1: 0.0999777952e-3, 5: 0.4972298766e-3, 9: 0.8839189427e-3, 10: 0.9779754323e-3, 100: 1e-4},
    ),
    ({"lr_decay": "linear", **WARMUP}, {0: 0.0, 5: 0.4775e-3, 9: 0.8271e-3, 10: 0.91e-3, 50: 0.55e-3, 100: 1e-4}),
]


@pytest.mark.parametrize(("settings", "rates"), SCHEDULES)
def test_learning_rate(tmp_path: Path, settings: dict[str, Any], rates: dict[int, float]) -> None:
    config = tiny_config(tmp_path, lr=0.001, train_steps=100, **settings)
    with tf.Graph().as_default(), tf.Session() as session:
        step = tf.placeholder(tf.int64, [])
        rate = optimizers.learning_rate(config, step)
        found = [session.run(rate, {step: number}) for number in rates]
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-5, atol=0)


DECAYED = [
    "gpt2/wte",
    "gpt2/wpe",
    "gpt2/axial_wpe_1",
    "gpt2/h0/attn/q",
    "gpt2/h11/attn/o",
    "gpt2/h0/attn/attention/mem_k",
    "gpt2/h0/mlp/conv1d_main/c_fc/kernel",
    "gpt2/h0/mlp/conv1d_main/c_proj/kernel",
    "gpt2/h0/top_2_gating/kernel",
    "gpt2/h0/wi/kernel",
    "gpt2/wte_final_linear/conv1d_main/linear_out/kernel",
]
NOT_DECAYED = [
    "gpt2/h0/norm_1/g",
    "gpt2/h0/norm_2/b",
    "gpt2/h0/norm_rezero_1/g",
    "gpt2/ln_f/g",
    "gpt2/ln_f/b",
    "gpt2/h0/attn/compute_output_bias/o_b",
    "gpt2/h0/mlp/conv1d_main/c_fc/bias",
    "gpt2/h0/mlp/conv1d_main/c_proj/bias",
    "gpt2/h0/mlp/conv1d_main/activation_prelu/slope",
    "gpt2/wte_final_linear/conv1d_main/linear_out/bias",
]


def test_weight_decay_goes_by_name() -> None:
    assert [name for name in DECAYED + NOT_DECAYED if optimizers.is_decayed(name)] == DECAYED


@pytest.mark.parametrize(("mesh_shape", "layout"), [("x:1", ""), ("x:2", "rows:x")])
def test_global_norm(mesh_shape: str, layout: str) -> None:
    def build(mesh: mtf.Mesh) -> mtf.Tensor:
        rows, one = mtf.Dimension("rows", 2), mtf.Dimension("one", 1)
        matrix = mtf.import_tf_tensor(mesh, np.array([[3], [-4]], np.float32), mtf.Shape([rows, one]))
        vector = mtf.import_tf_tensor(mesh, np.array([12], np.float32), mtf.Shape([one]))
        return optimizers.global_norm([matrix, vector])

    assert MtfSession(mesh_shape, layout).run(build) == pytest.approx(13.0)


SHAPES = {"gpt2/wte": (5, 3), "gpt2/h0/norm_1/g": (3,), "gpt2/h0/mlp/conv1d_main/c_fc/bias": (4,), "gpt2/ln_f/b": (3,)}
Values = dict[str, np.ndarray]


def random_values(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def numpy_adamw(config: ModelConfig, weights: Values, steps: Sequence[Values], rates: Sequence[float]) -> Values:
    """The weights after `steps` of gradients, and the slots under `<name>/adam_m` and `<name>/adam_v`; float64."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    m = {name: np.zeros_like(value) for name, value in weights.items()}
    v = {name: np.zeros_like(value) for name, value in weights.items()}
    for gradients, rate in zip(steps, rates, strict=True):
        norm = np.sqrt(sum(np.sum(gradient.astype(np.float64) ** 2) for gradient in gradients.values()))
        limit = config.gradient_clipping
        scale = limit / norm if limit is not None and norm > limit else 1.0
        for name in weights:
            gradient = scale * gradients[name].astype(np.float64)
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * gradient
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * gradient**2
            update = m[name] / (np.sqrt(v[name]) + config.epsilon)
            if name == "gpt2/wte":  # neither a norm nor a bias
                update = update + config.weight_decay * weights[name]
            weights[name] = weights[name] - rate * update
    slots = {f"{name}/adam_m": m[name] for name in m} | {f"{name}/adam_v": v[name] for name in v}
    return weights | slots


def mtf_adamw(config: ModelConfig, weights: Values, steps: Sequence[Values]) -> tuple[Values, list[float]]:
    """What `numpy_adamw` returns, from apply_gradients in a graph; and each step's norm before clipping."""
    devices = cpu_devices(1)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, parse("x:1", "", 1), devices)
        step = tf.placeholder(tf.int64, [])
        fed = {name: tf.placeholder(tf.float32, shape) for name, shape in SHAPES.items()}
        gradients = []
        for name, shape in SHAPES.items():
            dims = mtf.Shape([mtf.Dimension(f"dim_{size}", size) for size in shape])
            initializer = tf.constant_initializer(weights[name])
            mtf.get_variable(mesh, name, dims, dtype=mtf.VariableDType(tf.float32), initializer=initializer)
            gradients.append(mtf.import_tf_tensor(mesh, fed[name], dims))
        tf_rate = optimizers.learning_rate(config, step)
        rate = mtf.import_fully_replicated(mesh, tf_rate, mtf.Shape([]), name="rate")
        updates, norm = optimizers.apply_gradients(config, gradients, rate)
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        operations = [lowering.lowered_operation(update) for update in updates]
        tf_norm = lowering.export_to_tf_tensor(norm)
        to_slices, to_masters = lowering.copy_masters_to_slices(), lowering.copy_slices_to_masters()
        with tf.Session(config=devices.session_config()) as session:
            session.run(tf.global_variables_initializer())
            session.run(to_slices)
            norms = []
            for number, values in enumerate(steps):
                feed = {fed[name]: values[name] for name in SHAPES} | {step: number}
                norms.append(session.run([tf_norm, operations], feed)[0])
            session.run(to_masters)
            return {variable.op.name: session.run(variable) for variable in tf.global_variables()}, norms


@pytest.mark.parametrize("gradient_clipping", [None, 1.0, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_three_steps_of_adamw(tmp_path: Path, gradient_clipping: float | None, weight_decay: float) -> None:
    settings = {"gradient_clipping": gradient_clipping, "weight_decay": weight_decay}
    config = tiny_config(tmp_path, lr=0.1, lr_decay="linear", train_steps=10, beta1=0.8, epsilon=1e-3, **settings)
    weights, steps = random_values(0), [random_values(seed) for seed in (1, 2, 3)]

    found, norms = mtf_adamw(config, weights, steps)

    expected = numpy_adamw(config, weights, steps, rates=[0.1, 0.091, 0.082])
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=0, err_msg=name)
    unclipped = [np.linalg.norm(np.concatenate([value.ravel() for value in values.values()])) for values in steps]
    np.testing.assert_allclose(norms, unclipped, rtol=1e-5)
    assert min(norms) > 1.0  # the limit of 1.0 acts, that of 1e6 does not
