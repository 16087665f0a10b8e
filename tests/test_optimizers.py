"""Learning-rate schedules, clipping, AdamW and Adafactor against hand-derived numbers and plain numpy."""

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
from tests.training_steps import train_step, without_rewriting
from tests.variable_order import Accesses

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


def run_steps(
    config: ModelConfig, weights: Values, steps: Sequence[Values], mesh_shape: str = "x:1", layout: str = ""
) -> tuple[Values, list[float]]:
    """What the references return, from apply_gradients in a graph; and each step's norm before clipping.

    Dimension i of a variable, of size n, is called "dim<i>_<n>".
    """
    parsed = parse(mesh_shape, layout, 1)
    devices = cpu_devices(parsed.size)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, parsed, devices)
        step = tf.placeholder(tf.int64, [])
        fed = {name: tf.placeholder(tf.float32, value.shape) for name, value in weights.items()}
        gradients = []
        for name, value in weights.items():
            dims = mtf.Shape([mtf.Dimension(f"dim{i}_{size}", size) for i, size in enumerate(value.shape)])
            initializer = tf.constant_initializer(value)
            mtf.get_variable(mesh, name, dims, dtype=mtf.VariableDType(tf.float32), initializer=initializer)
            gradients.append(mtf.import_tf_tensor(mesh, fed[name], dims))
        tf_rate = optimizers.learning_rate(config, step)
        rate = mtf.import_fully_replicated(mesh, tf_rate, mtf.Shape([]), name="rate")
        updates, norm = optimizers.apply_gradients(config, gradients, rate, step)
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        operations = [lowering.lowered_operation(update) for update in updates]
        tf_norm = lowering.export_to_tf_tensor(norm)
        to_slices, to_masters = lowering.copy_masters_to_slices(), lowering.copy_slices_to_masters()
        with tf.Session(config=without_rewriting(devices.session_config())) as session:
            session.run(tf.global_variables_initializer())
            session.run(to_slices)
            norms = []
            for number, values in enumerate(steps):
                feed = {fed[name]: values[name] for name in weights} | {step: number}
                norms.append(session.run([tf_norm, operations], feed)[0])
            session.run(to_masters)
            return {variable.op.name: session.run(variable) for variable in tf.global_variables()}, norms


@pytest.mark.parametrize("gradient_clipping", [None, 1.0, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_three_steps_of_adamw(tmp_path: Path, gradient_clipping: float | None, weight_decay: float) -> None:
    settings = {"gradient_clipping": gradient_clipping, "weight_decay": weight_decay}
    config = tiny_config(tmp_path, lr=0.1, lr_decay="linear", train_steps=10, beta1=0.8, epsilon=1e-3, **settings)
    weights, steps = random_values(0), [random_values(seed) for seed in (1, 2, 3)]

    found, norms = run_steps(config, weights, steps)

    expected = numpy_adamw(config, weights, steps, rates=[0.1, 0.091, 0.082])
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=0, err_msg=name)
    unclipped = [np.linalg.norm(np.concatenate([value.ravel() for value in values.values()])) for values in steps]
    np.testing.assert_allclose(norms, unclipped, rtol=1e-5)
    assert min(norms) > 1.0  # the limit of 1.0 acts, that of 1e6 does not


FACTORED = {  # variable -> (shape, its largest dimension, its second largest)
    "gpt2/wte": ((130, 128), 0, 1),
    "gpt2/h0/attn/q": ((128, 128), 0, 1),
    "gpt2/h0/wi/kernel": ((2, 128, 132), 2, 1),
}
WHOLE = {"gpt2/wpe": (127, 140), "gpt2/h0/norm_1/b": (128,), "gpt2/h0/norm_rezero_1/g": ()}


def adafactor_values(seed: int, scale: float) -> Values:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, (shape, _, _) in FACTORED.items()} | WHOLE
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def rms(x: np.ndarray) -> np.floating:
    return np.sqrt(np.mean(x**2))


def numpy_adafactor(config: ModelConfig, weights: Values, steps: Sequence[Values], rates: Sequence[float]) -> Values:
    """The weights and slots after `steps` of gradients, float64, by algorithms 4 and 5 of arXiv:1804.04235."""
    state: Values = {name: value.astype(np.float64) for name, value in weights.items()}
    for t, (gradients, rate) in enumerate(zip(steps, rates, strict=True), 1):
        decay = 1 - t**-0.8
        norm = np.sqrt(sum(np.sum(gradient.astype(np.float64) ** 2) for gradient in gradients.values()))
        for name in weights:
            g = gradients[name].astype(np.float64) * min(1.0, (config.gradient_clipping or np.inf) / norm)
            squared = g**2 + config.ada_epsilon1

            def running(slot: str, mean: np.ndarray, name: str = name, decay: float = decay) -> np.ndarray:
                old = state.get(f"{name}_slot_{slot}", np.zeros_like(mean))
                state[f"{name}_slot_{slot}"] = decay * old + (1 - decay) * mean
                return state[f"{name}_slot_{slot}"]

            if name in FACTORED:
                _, largest, second = FACTORED[name]
                vr = np.expand_dims(running("vr", squared.mean(largest)), largest)
                vc = np.expand_dims(running("vc", squared.mean(second)), second)
                u = g / np.sqrt(vr * vc / vr.mean(second, keepdims=True))
            else:
                u = g / np.sqrt(running("v", squared))
            u = u / max(1.0, rms(u)) * rate * max(config.ada_epsilon2, rms(state[name]))
            if config.beta1:
                m = config.beta1 * state.get(f"{name}_slot_m", np.zeros_like(u)) + (1 - config.beta1) * u
                u = state[f"{name}_slot_m"] = m
            if "norm" not in name:
                u = u + rate * config.weight_decay * state[name]
            state[name] = state[name] - u
    return state


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        (("x:1", ""), {"beta1": 0.0, "weight_decay": 0.1, "gradient_clipping": 1.0}),
        (("x:2,y:2", "dim0_130:x,dim1_128:y"), {"beta1": 0.9, "weight_decay": 0.1}),
        (("x:2,y:2", "dim2_132:x,dim0_128:x,dim1_140:y"), {"beta1": 0.9, "ada_epsilon1": 1e-3, "ada_epsilon2": 0.5}),
    ],
)
def test_four_steps_of_adafactor(tmp_path: Path, mesh: tuple[str, str], settings: dict[str, Any]) -> None:
    settings = {"opt_name": "adafactor", "lr": 0.1, "lr_decay": "linear", "train_steps": 10} | settings
    config = tiny_config(tmp_path, **settings)
    weights = adafactor_values(0, 0.5)
    weights["gpt2/h0/norm_1/b"][:] = 0  # grows from nothing, by epsilon2
    steps = [adafactor_values(seed, 10.0**-seed) for seed in (1, 2, 3, 4)]
    steps[0]["gpt2/wpe"][:5] = 0  # rows that no token has reached yet

    found, _ = run_steps(config, weights, steps, *mesh)

    expected = numpy_adafactor(config, weights, steps, rates=[0.1, 0.091, 0.082, 0.073])
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
        assert np.abs(expected[name] - weights.get(name, 0)).max() > 1e-9, f"{name}: nothing to compare"


def test_adafactor_factors_the_two_largest_dimensions() -> None:
    def factored(*sizes: int) -> list[int] | None:
        dims = [mtf.Dimension(f"dim{i}", size) for i, size in enumerate(sizes)]
        found = optimizers.factored_dims(mtf.Shape(dims))
        return found and [dims.index(dim) for dim in found]

    assert factored(500) is None
    assert factored(127, 5000) is None
    assert factored(128, 5000) == [1, 0]
    assert factored(128, 128) == [0, 1]
    assert factored(8, 200, 150) == [1, 2]


@pytest.mark.parametrize("mesh", [("x:1", ""), ("x:2,y:2", "batch:x,heads:y,vocab:y")])
@pytest.mark.parametrize("gradient_clipping", [None, 1.0])
def test_no_update_comes_before_the_step_has_read_the_weight(
    tmp_path: Path, mesh: tuple[str, str], gradient_clipping: float | None
) -> None:
    layout = parse(*mesh, 1)
    config = tiny_config(tmp_path, weight_decay=0.1, gradient_clipping=gradient_clipping)
    with tf.Graph().as_default() as tf_graph:
        graph = mtf.Graph()
        mtf_mesh, mesh_impl = local_mesh(graph, layout, cpu_devices(layout.size))
        step = train_step(config)(mtf_mesh)
        lowering = mtf.Lowering(graph, {mtf_mesh: mesh_impl}, autostack=False)
        updated = tf.group([lowering.lowered_operation(update) for update in step.updates])
        nodes = tf.graph_util.extract_sub_graph(tf_graph.as_graph_def(), [updated.name]).node
    accesses = Accesses(nodes, {node.name: node for node in nodes})
    weights = {name for name in accesses.writes if "/adam_" not in name}
    assert len(weights) == len(graph.trainable_variables) * layout.size
    assert weights <= {name for name, reads in accesses.reads.items() if reads}
    assert not accesses.unordered()
