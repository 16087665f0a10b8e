"""Every architecture option against the numpy model: logits, gradients, cached decoding, and any mesh."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config import ModelConfig
from input_pipeline.masking import NOT_SCORED
from mesh import mtf
from models import gpt
from models.context import Context
from models.dims import make_dims
from tests.reference_entmax import numpy_loss
from tests.reference_model import ReferenceModel
from tests.tiny import MtfSession, random_tokens, tiny_config

FLOAT = mtf.VariableDType(tf.float32)
ROWS, LENGTH = 2, 7  # an odd length, shorter than n_ctx


def layers(*names: str) -> dict[str, Any]:
    return {"attention_types": [[list(names), 1]], "n_layer": len(names)}


def experts(count: int, *moe_layers: int, **settings: Any) -> dict[str, Any]:
    return {"moe_layers": moe_layers, "moe_params": {"moe_num_experts": count, "moe_hidden_size": 10, **settings}}


def masked(*names: str) -> dict[str, Any]:
    return layers(*names) | {"mlm_training": True, "mlm_mask_id": 3}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": layers("global"),
    "local": layers("global", "local") | {"local_attention_radius": 3},
    "local, radius 1": layers("local") | {"local_attention_radius": 1},
    "local, wide": layers("local") | {"local_attention_radius": 20},
    "linear": layers("linear", "global"),
    "none": layers("global", "none"),
    "axial": layers("global") | {"axial_pos_emb": [3, 4], "n_ctx": 12},
    "rotary": layers("global") | {"rotary_emb": True},
    "glu": layers("global") | {"mlp_glu": True},
    "scalenorm": layers("global") | {"scalenorm": True},
    "rezero": layers("global") | {"rezero": True},
    "memory": layers("global", "linear") | {"num_mem_kv": 3},
    "macaron": layers("global") | {"macaron": True},
    "shared": layers("global", "global") | {"share_parameters": True},
    "untied": layers("global") | {"no_weight_tie": True},
    "scaled": layers("global") | {"scale_by_in": True, "scale_by_depth": True},
    "prelu": layers("global") | {"activation_function": "prelu"},
    "softmax": layers("global") | {"activation_function": "softmax"},
    "logsoftmax + glu": layers("global") | {"activation_function": "logsoftmax", "mlp_glu": True},
    "psoftplus + shared": layers("global", "local") | {"activation_function": "psoftplus", "share_parameters": True},
    "entmax": layers("global") | {"entmax_loss": True},
    "local + memory": layers("local") | {"num_mem_kv": 2, "local_attention_radius": 3},
    "local + rotary": layers("local") | {"rotary_emb": True, "local_attention_radius": 3},
    "linear + rotary": layers("linear") | {"rotary_emb": True},
    "rezero + macaron": layers("global") | {"rezero": True, "macaron": True},
    "glu + scalenorm + macaron": layers("global") | {"mlp_glu": True, "scalenorm": True, "macaron": True},
    "shared + linear": layers("linear", "global") | {"share_parameters": True},
    "untied + none": layers("none", "global") | {"no_weight_tie": True},
    "untied + entmax": layers("global") | {"no_weight_tie": True, "entmax_loss": True},
    "moe + none": layers("global", "none") | experts(4, 1),
    "moe + macaron + shared": layers("none", "local")
    | experts(3, 0, 1, moe_second_policy_eval="none")
    | {"macaron": True, "share_parameters": True},
    "moe + rezero + glu": layers("linear", "none")
    | experts(5, 1, moe_second_policy_eval="threshold", moe_second_threshold_eval=0.3)
    | {"rezero": True, "mlp_glu": True, "moe_activation": "prelu"},
    "mlm global": masked("global"),
    "mlm local": masked("local") | {"local_attention_radius": 3},
    "mlm linear": masked("linear"),
    "mlm none": masked("none", "local") | {"local_attention_radius": 20},
    "mlm memory": masked("global", "linear", "local") | {"num_mem_kv": 3, "local_attention_radius": 2},
    "mlm + rotary": masked("linear", "local") | {"rotary_emb": True, "local_attention_radius": 1},
    "mlm + entmax": masked("global") | {"entmax_loss": True},
}


def option_config(directory: Path, name: str, **changes: Any) -> ModelConfig:
    return tiny_config(directory, **({"n_embd": 12, "n_head": 2, "n_vocab": 20} | OPTIONS[name] | changes))


def some_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model tells in the logits."""
    random = np.random.default_rng(0)
    return {name: (0.4 * random.normal(size=shape)).astype(np.float32) for name, shape in sorted(shapes.items())}


def labels_of(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """What each of the first LENGTH positions is scored on: the token after it or, of a masked model, some tokens."""
    if not config.mlm_training:
        return tokens[:, 1:]
    chosen = np.random.default_rng(2).random(tokens[:, 1:].shape) < 0.5
    return np.where(chosen, tokens[:, 1:], NOT_SCORED)


def build_all(config: ModelConfig, tokens: np.ndarray, decoded: bool):
    """A builder of: logits, the loss's gradients, and the logits of decoding from the states before position 3."""
    length = tokens.shape[1] - 1
    scored = labels_of(config, tokens) != NOT_SCORED

    def build(mesh: mtf.Mesh) -> dict[str, Any]:
        dims = make_dims(config, ROWS, length)
        shape = mtf.Shape([dims.batch, dims.sequence])
        inputs = mtf.import_tf_tensor(mesh, tokens[:, :-1], shape)
        labels = mtf.import_tf_tensor(mesh, labels_of(config, tokens), shape)
        weights = mtf.import_tf_tensor(mesh, (scored / scored.sum()).astype(np.float32), shape)
        until = 3
        ctx = Context(config, mesh, dims, FLOAT, keep_states_until=mtf.constant(mesh, until, dtype=tf.int32))
        found: dict[str, Any] = {"logits": gpt.logits(ctx, inputs)}
        loss = mtf.reduce_sum(gpt.losses(Context(config, mesh, dims, FLOAT), inputs, labels).objective * weights)
        variables = mesh.graph.trainable_variables
        gradients = mtf.gradients([loss], [variable.outputs[0] for variable in variables])
        found["gradients"] = {v.name: g for v, g in zip(variables, gradients, strict=True)}
        found["loss"] = loss
        if decoded:
            states, found["decoded"] = ctx.states, []
            for position in range(until, length):
                at = mtf.constant(mesh, position, dtype=tf.int32)
                one = Context(config, mesh, dims, FLOAT, position=at, states=dict(states))
                token = mtf.import_tf_tensor(mesh, tokens[:, position], mtf.Shape([dims.batch]))
                found["decoded"].append(gpt.logits(one, token))
                states = one.states
        return found

    return build


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with tf.Graph().as_default():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        dims = make_dims(config, ROWS, LENGTH)
        inputs = mtf.zeros(mesh, mtf.Shape([dims.batch, dims.sequence]), tf.int32)
        gpt.logits(Context(config, mesh, dims, FLOAT), inputs)
        return {v.op.name: tuple(v.shape.as_list()) for v in tf.global_variables()}


def objective(config: ModelConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> float:
    """Mean of cross entropy, or entmax loss, + z_loss log(z)^2 under the numpy model, over what is scored."""
    model = ReferenceModel(config, weights)
    losses = []
    for row, labels in zip(tokens, labels_of(config, tokens), strict=True):
        logits = model.logits(row[:-1])
        at = np.flatnonzero(labels != NOT_SCORED)
        logits, labels = logits[at], labels[at]
        log_z = np.log(np.exp(logits).sum(-1))
        cross_entropy = log_z - logits[np.arange(len(at)), labels]
        loss = numpy_loss(logits, labels) if config.entmax_loss else cross_entropy
        losses.extend(loss + config.z_loss * log_z**2)
    return float(np.mean(losses))


@pytest.mark.parametrize("name", OPTIONS)
def test_option_equals_the_numpy_model(tmp_path: Path, name: str) -> None:
    config = option_config(tmp_path, name)
    decoded = not config.mlm_training
    tokens = random_tokens(ROWS, LENGTH + 1, vocab=config.n_vocab)
    weights = some_weights(shapes_of(config))
    found = MtfSession().run(build_all(config, tokens, decoded), weights)

    model = ReferenceModel(config, weights)
    expected = np.stack([model.logits(row[:-1]) for row in tokens])
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)
    if decoded:
        np.testing.assert_allclose(np.stack(found["decoded"], axis=1), expected[:, 3:], atol=1e-4)
    assert found["loss"] == pytest.approx(objective(config, weights, tokens), abs=1e-4)
    assert found["gradients"].keys() == weights.keys()
    random = np.random.default_rng(1)
    for variable, gradient in found["gradients"].items():
        direction = random.normal(size=gradient.shape)
        step = 1e-4
        ahead, behind = (
            objective(config, weights | {variable: weights[variable] + sign * step * direction}, tokens)
            for sign in (1, -1)
        )
        expected_slope = (ahead - behind) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(expected_slope, abs=1e-4, rel=1e-4), variable


@pytest.mark.parametrize("name", OPTIONS)
def test_later_tokens_change_earlier_logits_of_masked_models_alone(tmp_path: Path, name: str) -> None:
    config = option_config(tmp_path, name)
    tokens = random_tokens(ROWS, LENGTH, vocab=config.n_vocab)
    changed = tokens.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % config.n_vocab

    def build(mesh: mtf.Mesh) -> list[mtf.Tensor]:
        dims = make_dims(config, ROWS, LENGTH)
        shape = mtf.Shape([dims.batch, dims.sequence])
        ctx = Context(config, mesh, dims, FLOAT)
        return [gpt.logits(ctx, mtf.import_tf_tensor(mesh, rows, shape)) for rows in (tokens, changed)]

    before, after = MtfSession().run(build, some_weights(shapes_of(config)))
    if config.mlm_training:
        assert np.abs(before[:, :4] - after[:, :4]).max() > 1e-2
    else:
        np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-2


ON_FOUR_DEVICES = [
    name for name in OPTIONS if "+" not in name and name != "plain" and not OPTIONS[name].get("mlm_training")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR_DEVICES)
def test_option_on_four_devices_equals_one(tmp_path: Path, name: str) -> None:
    config = option_config(tmp_path, name)
    tokens = random_tokens(ROWS, LENGTH + 1, vocab=config.n_vocab)
    assert_devices_agree(config, tokens, ["batch:x,heads:y,intermediate_expanded:y,vocab:y", "batch:x,embd:y"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "memory", "layout"),
    [
        (("global", "linear"), 0, "sequence:x,memory_length:y"),
        (("local", "linear"), 3, "batch:x,heads:y,intermediate_expanded:y,vocab:y"),
    ],
)
def test_masked_model_on_four_devices_equals_one(
    tmp_path: Path, kinds: tuple[str, ...], memory: int, layout: str
) -> None:
    changes = masked(*kinds) | {"num_mem_kv": memory, "local_attention_radius": 3}
    config = tiny_config(tmp_path, **({"n_embd": 12, "n_head": 2, "n_vocab": 20} | changes))
    assert_devices_agree(config, random_tokens(ROWS, config.n_ctx + 1, vocab=config.n_vocab), [layout])


def assert_devices_agree(config: ModelConfig, tokens: np.ndarray, layouts: list[str]) -> None:
    """Logits and gradients on a mesh of four devices are those of one."""
    weights = some_weights(shapes_of(config))
    build = build_all(config, tokens, decoded=False)
    one = MtfSession().run(build, weights)
    for layout in layouts:
        several = MtfSession("x:2,y:2", layout).run(build, weights)
        np.testing.assert_allclose(several["logits"], one["logits"], atol=1e-4, err_msg=layout)
        for variable, gradient in one["gradients"].items():
            np.testing.assert_allclose(several["gradients"][variable], gradient, atol=1e-4, err_msg=variable)
