"""A checkpoint trained here, read by transformers' GPT-Neo: the same logits, losses and gradients."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config import ModelConfig, load_model_config
from main import main
from mesh import mtf
from models import gpt
from models.context import Context
from models.dims import make_dims
from tests.record_files import write_records
from tests.tiny import MtfSession, random_tokens

pytestmark = pytest.mark.slow  # PyTorch, transformers and TensorFlow in a process of their own

REFERENCE = Path(__file__).with_name("parity_reference.py")
TOLERANCE = 1e-4

# Sizes that differ from each other, so that a transposed or mixed-up dimension shows.
N_VOCAB, N_CTX, N_EMBD, N_LAYER = 67, 12, 24, 2
TRAIN_STEPS = 120
SETTINGS = {
    "n_head": 3,
    "n_embd": N_EMBD,
    "n_layer": N_LAYER,
    "n_ctx": N_CTX,
    "n_vocab": N_VOCAB,
    "attention_types": [[["global", "local"], 1]],
    "local_attention_radius": 5,  # less than n_ctx, and no divisor of it
    "lr": 0.03,  # high, so that seconds of training take the weights to where gelu and the softmax bend
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "train_batch_size": 4,
    "train_steps": TRAIN_STEPS,
    "eos_id": 0,
    "padding_id": 1,
}


@dataclass(frozen=True)
class Trained:
    """A run of main.py, and what transformers makes of its checkpoint on the tokens `inputs` and `labels`."""

    config: ModelConfig
    checkpoint: str
    inputs: np.ndarray
    labels: np.ndarray
    reference: dict[str, np.ndarray]

    def weights(self) -> dict[str, np.ndarray]:
        """The model's variables in the checkpoint, by name."""
        reader = tf.train.load_checkpoint(self.checkpoint)
        names = [
            name for name in reader.get_variable_to_shape_map() if name.startswith("gpt2/") and "/adam_" not in name
        ]
        return {name: reader.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("parity")
    write_records(folder / "text_0_24.tfrecords", random_tokens(24, N_CTX + 1, vocab=N_VOCAB).tolist())
    settings = SETTINGS | {
        "datasets": [[str(folder / "*.tfrecords"), "", 1, "chunks", 1.0]],
        "model_path": str(folder / "model"),
    }
    (folder / "parity.json").write_text(json.dumps(settings))
    assert main(["--model", str(folder / "parity.json"), "--gpu_ids", "cpu:0"]) == 0

    run_config = folder / "model" / "config.json"
    checkpoint = str(folder / "model" / f"model.ckpt-{TRAIN_STEPS}")
    tokens = random_tokens(2, 3, N_CTX, seed=1, vocab=N_VOCAB)
    np.savez(folder / "tokens.npz", inputs=tokens[0], labels=tokens[1])
    arguments = [checkpoint, run_config, folder / "tokens.npz", folder / "reference.npz"]
    environment = os.environ | {"USE_TF": "0", "USE_TORCH": "1"}  # transformers' switches: load its PyTorch half only
    subprocess.run([sys.executable, REFERENCE, *arguments], check=True, env=environment)
    reference = dict(np.load(folder / "reference.npz"))
    return Trained(load_model_config(str(run_config)), checkpoint, tokens[0], tokens[1], reference)


@pytest.fixture(scope="module")
def ours(trained: Trained) -> dict[str, np.ndarray]:
    """What parity_reference.py calculates, from the graph that training and evaluation build."""
    dims = make_dims(trained.config, batch_size=len(trained.inputs))

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        inputs, labels = (
            mtf.import_tf_tensor(mesh, tokens, mtf.Shape([dims.batch, dims.sequence]))
            for tokens in (trained.inputs, trained.labels)
        )
        ctx = Context(trained.config, mesh, dims, mtf.VariableDType(tf.float32))
        logits = gpt.logits(ctx, inputs)
        losses = gpt.losses(ctx, inputs, labels)
        objective = mtf.reduce_mean(losses.objective)
        variables = mesh.graph.trainable_variables
        gradients = mtf.gradients([objective], [variable.outputs[0] for variable in variables])
        by_name = {variable.name: gradient for variable, gradient in zip(variables, gradients, strict=True)}
        return by_name | {
            "logits": logits,
            "cross_entropy": mtf.reduce_mean(losses.cross_entropy),
            "objective": objective,
        }

    return MtfSession().run(build, trained.weights())


def test_logits(trained: Trained, ours: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(ours["logits"], trained.reference["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mistake", ["wider_window", "exact_gelu", "scaled_queries"])
def test_logits_would_tell_a_mistake(trained: Trained, mistake: str) -> None:
    difference = np.abs(trained.reference[f"wrong/{mistake}"] - trained.reference["logits"])
    assert difference.max() > 5 * TOLERANCE


def test_losses(trained: Trained, ours: dict[str, np.ndarray]) -> None:
    for name in ("cross_entropy", "objective"):
        np.testing.assert_allclose(ours[name], trained.reference[name], rtol=0, atol=TOLERANCE)
    assert trained.reference["objective"] - trained.reference["cross_entropy"] > 10 * TOLERANCE


def test_gradient_of_every_variable(trained: Trained, ours: dict[str, np.ndarray]) -> None:
    names = trained.weights().keys()
    assert names == {name for name in trained.reference if name.startswith("gpt2/")}
    for name in names:
        expected = trained.reference[name]
        largest = np.abs(expected).max()
        assert largest > 10 * TOLERANCE, f"{name}: too small to tell anything"
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=TOLERANCE * min(1, largest), err_msg=name)


def test_checkpoint_has_gpt_neos_variables(trained: Trained) -> None:
    layer = {
        "norm_1/g": [24],
        "norm_1/b": [24],
        "attn/q": [24, 24],
        "attn/k": [24, 24],
        "attn/v": [24, 24],
        "attn/o": [24, 24],
        "attn/compute_output_bias/o_b": [24],
        "norm_2/g": [24],
        "norm_2/b": [24],
        "mlp/conv1d_main/c_fc/kernel": [24, 96],
        "mlp/conv1d_main/c_fc/bias": [96],
        "mlp/conv1d_main/c_proj/kernel": [96, 24],
        "mlp/conv1d_main/c_proj/bias": [24],
    }
    model = {
        "gpt2/wte": [67, 24],
        "gpt2/wpe": [12, 24],
        **{f"gpt2/h0/{name}": shape for name, shape in layer.items()},
        **{f"gpt2/h1/{name}": shape for name, shape in layer.items()},
        "gpt2/ln_f/g": [24],
        "gpt2/ln_f/b": [24],
    }
    slots = {f"{name}/{slot}": shape for name, shape in model.items() for slot in ("adam_m", "adam_v")}
    reader = tf.train.load_checkpoint(trained.checkpoint)
    assert reader.get_variable_to_shape_map() == model | slots | {"global_step": []}
    dtypes = reader.get_variable_to_dtype_map()
    assert dtypes.pop("global_step") == tf.int64
    assert set(dtypes.values()) == {tf.float32}
    assert reader.get_tensor("global_step") == TRAIN_STEPS
