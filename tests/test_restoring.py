"""Checkpoints that hold other floating-point types than the graph: GPT-Neo stored bfloat16 models as bfloat16."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import serving
from mesh.layout import parse
from model_fns import Run, predict_spec
from sample import Sampling
from tests.tiny import cpu_devices, random_tokens, tiny_config
from tests.workspace import Workspace
from training.hooks import StopOnSignal

E, V, CONTEXT = 16, 32, 8
ONE_LAYER = {"n_layer": 1, "attention_types": [[["global"], 1]], "eval_batch_size": 5}
SHAPES = {
    "wte": [V, E],
    "wpe": [CONTEXT, E],
    "h0/norm_1/g": [E],
    "h0/norm_1/b": [E],
    "h0/attn/q": [E, E],
    "h0/attn/k": [E, E],
    "h0/attn/v": [E, E],
    "h0/attn/o": [E, E],
    "h0/attn/compute_output_bias/o_b": [E],
    "h0/norm_2/g": [E],
    "h0/norm_2/b": [E],
    "h0/mlp/conv1d_main/c_fc/kernel": [E, 4 * E],
    "h0/mlp/conv1d_main/c_fc/bias": [4 * E],
    "h0/mlp/conv1d_main/c_proj/kernel": [4 * E, E],
    "h0/mlp/conv1d_main/c_proj/bias": [E],
    "ln_f/g": [E],
    "ln_f/b": [E],
}


def write_checkpoint(folder: Path, *weights: tf.DType, step: tf.DType = tf.int64) -> None:
    """model.ckpt-5 of a model of one layer, stored as the types `weights` in turn, Adam's slots as float32.

    Its numbers are bfloat16 ones, whatever type holds them.
    """
    random = np.random.default_rng(0)
    bfloat16 = tf.bfloat16.as_numpy_dtype
    values = {"global_step": np.array(5, step.as_numpy_dtype)}
    for (name, shape), dtype in zip(SHAPES.items(), itertools.cycle(weights)):
        values[f"gpt2/{name}"] = (0.2 * random.normal(size=shape)).astype(bfloat16).astype(dtype.as_numpy_dtype)
        for slot in ("adam_m", "adam_v"):
            values[f"gpt2/{name}/{slot}"] = np.abs(0.01 * random.normal(size=shape)).astype(np.float32)
    folder.mkdir()
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(
            tf.raw_ops.SaveV2(
                prefix=str(folder / "model.ckpt-5"),
                tensor_names=list(values),
                shape_and_slices=[""] * len(values),
                tensors=list(values.values()),
            )
        )
    tf.train.update_checkpoint_state(str(folder), "model.ckpt-5")


def workspace(folder: Path, weights: tf.DType, step: tf.DType = tf.int64) -> Workspace:
    folder.mkdir()
    run = Workspace(folder, train_steps=7, **ONE_LAYER)
    write_checkpoint(run.model_path, weights, step=step)
    return run


def evaluation(run: Workspace, *flags: str) -> float:
    assert run.main("--eval", *flags) == 0
    return json.loads((run.model_path / "eval_.jsonl").read_text().splitlines()[-1])["cross_entropy"]


@pytest.mark.slow
def test_a_bfloat16_checkpoint_evaluates_and_trains_on_as_its_float32_numbers(tmp_path: Path) -> None:
    stored, cast = workspace(tmp_path / "stored", tf.bfloat16), workspace(tmp_path / "cast", tf.float32)
    expected = evaluation(cast)
    assert evaluation(stored) == expected
    assert evaluation(stored, "--set", "precision=bfloat16") == pytest.approx(expected, rel=0.02)
    for run in (stored, cast):
        assert run.main() == 0
    assert [line["step"] for line in stored.metrics()] == [6, 7]
    assert stored.losses() == cast.losses()
    weights = stored.weights()
    for name, value in cast.weights().items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)
    checkpoint = tf.train.load_checkpoint(str(stored.model_path))  # saved as float32, and restored as that below
    dtypes = checkpoint.get_variable_to_dtype_map()
    assert dtypes.pop("global_step") == tf.int64
    assert set(dtypes.values()) == {tf.float32}
    assert stored.main("--set", "train_steps=8") == 0
    assert stored.metrics()[-1]["step"] == 8


def run_of(folder: Path) -> Run:
    """A bfloat16 model, whose checkpoint is in `folder`, on one device."""
    config = tiny_config(folder, model_path=str(folder), precision="bfloat16", **ONE_LAYER)
    return Run(config, parse("x:1", "", 1), cpu_devices(1), 1, 0, Sampling(temperature=0), StopOnSignal())


def prediction(run: Run) -> dict[str, np.ndarray]:
    """Greedy continuations of two prompts by the checkpoint of `run`, restored as Estimator does."""
    assert run.devices is not None
    with tf.Graph().as_default():
        features = {
            "inputs": tf.constant(random_tokens(2, CONTEXT)),
            "prompt_length": tf.constant([2, 3]),
            "prompt_number": tf.constant([0, 1]),
        }
        spec = predict_spec(run, features, {})
        creator = tf.train.ChiefSessionCreator(
            tf.train.Scaffold(),  # what Estimator makes where a specification has none
            config=run.devices.session_config(),
            checkpoint_filename_with_path=f"{run.config.model_path}/model.ckpt-5",
        )
        with tf.train.MonitoredSession(creator, hooks=spec.prediction_hooks) as session:
            return session.run(spec.predictions)


def test_prediction_casts_every_floating_point_type(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "float32", tf.float32)
    write_checkpoint(tmp_path / "mixed", tf.bfloat16, tf.float16, tf.float64)
    expected, found = (prediction(run_of(tmp_path / name)) for name in ("float32", "mixed"))
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def test_an_export_in_bfloat16_is_half_as_large(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", tf.float32)
    serving.export(run_of(tmp_path / "model"), 1, str(tmp_path / "export"))
    exported = tf.train.load_checkpoint(str(tmp_path / "export" / "variables" / "variables"))
    dtypes = exported.get_variable_to_dtype_map()
    assert dtypes.pop("global_step", tf.int64) == tf.int64
    assert dtypes.keys() == {f"gpt2/{name}" for name in SHAPES}
    for name, dtype in dtypes.items():
        assert dtype == (tf.float32 if "norm" in name or "ln_f" in name else tf.bfloat16), name
    stored = tf.train.load_checkpoint(str(tmp_path / "model"))
    np.testing.assert_array_equal(exported.get_tensor("gpt2/wte"), stored.get_tensor("gpt2/wte"))


def test_integers_are_not_cast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workspace(tmp_path / "run", tf.bfloat16, step=tf.int32)
    assert run.main("--eval") == 2
    assert (
        "holds 'global_step' as int32, which cannot become int64: only floating-point types" in capsys.readouterr().err
    )
