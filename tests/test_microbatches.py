"""A training step cut into microbatches, or with its activations recomputed, is the plain step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from input_pipeline.masking import NOT_SCORED
from mesh import mtf
from mesh.layout import parse
from mesh.randomness import fold_in, make_key
from model_fns import Run, train_spec
from models import gpt
from models.context import Context
from models.dims import make_dims
from sample import Sampling
from tests.tiny import MtfSession, cpu_devices, random_tokens, tiny_config
from training.checkpoints import CheckpointHook
from training.hooks import StopOnSignal
from training.step import num_microbatches

BATCH = 4
TOKENS = random_tokens(BATCH, 9)
DROPOUT: dict[str, Any] = {"embed_dropout": 0.2, "res_dropout": 0.2, "attn_dropout": 0.2}
Step = tuple[float, dict[str, np.ndarray]]


def first_step(
    folder: Path, mesh: tuple[str, str] = ("x:1", ""), labels: np.ndarray = TOKENS[:, 1:], **changes: Any
) -> Step:
    """(loss, {variable: gradient}) of a run's first step on TOKENS: the graph and the hooks of the Estimator."""
    layout = parse(*mesh, num_devices=1)
    devices = cpu_devices(layout.size)
    folder.mkdir(exist_ok=True)
    settings = {"model_path": str(folder), "train_batch_size": BATCH, "beta1": 0.0, **changes}
    run = Run(tiny_config(folder, **settings), layout, devices, 1, 0, Sampling(), StopOnSignal())
    with tf.Graph().as_default():
        features = {"inputs": tf.constant(TOKENS[:, :-1]), "labels": tf.constant(labels)}
        spec = train_spec(run, features, {"batch_size": BATCH})
        for operation in tf.get_default_graph().get_operations():  # of a loop: no microbatch before the last one ended
            assert operation.type != "Enter" or operation.get_attr("parallel_iterations") == 1, operation.name
        hooks = {type(hook): hook for hook in spec.training_hooks}
        restore, save = hooks[mtf.MtfRestoreHook], hooks[CheckpointHook]
        restore.begin()
        save.begin()
        with tf.Session(config=devices.session_config()) as session:
            session.run(tf.global_variables_initializer())
            restore.after_create_session(session, None)
            save.after_create_session(session, None)
            loss, _ = session.run([spec.loss, spec.train_op])
            save.end(session)
    checkpoint = tf.train.load_checkpoint(str(folder))
    slots = [name for name in checkpoint.get_variable_to_shape_map() if name.endswith("/adam_m")]
    # beta1 is 0 and nothing is clipped, so adam_m is the gradient itself
    return float(loss), {name.removesuffix("/adam_m"): checkpoint.get_tensor(name) for name in slots}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return first_step(tmp_path_factory.mktemp("plain"))


def assert_same(found: Step, expected: Step, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], abs=tolerance, rel=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.abs(gradient).max() > 1e-5, f"{name}: too small to tell anything"
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("tokens", "ways", "count"),
    [(None, 1, 1), (256, 1, 1), (32, 1, 1), (31, 1, 2), (16, 1, 2), (8, 1, 4), (1, 1, 4), (16, 2, 1), (8, 2, 2)],
)
def test_number_of_microbatches(tmp_path: Path, tokens: int | None, ways: int, count: int) -> None:
    config = tiny_config(tmp_path, train_batch_size=4, n_ctx=8, tokens_per_mb_per_replica=tokens)
    assert num_microbatches(config, parse(f"x:{ways}", "batch:x", ways)) == count


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        (("x:1", ""), {"tokens_per_mb_per_replica": 8}),
        (("x:2", "batch:x"), {"tokens_per_mb_per_replica": 8}),
        (("x:1", ""), {"tokens_per_mb_per_replica": 16, "recompute_grad": True}),
    ],
)
def test_step_is_the_plain_one(tmp_path: Path, plain: Step, mesh: tuple[str, str], settings: dict[str, Any]) -> None:
    assert_same(first_step(tmp_path, mesh, **settings), plain, 1e-6)


def test_recomputing_draws_the_same_dropout(tmp_path: Path, plain: Step) -> None:
    kept = first_step(tmp_path / "kept", **DROPOUT)
    recomputed = first_step(tmp_path / "recomputed", recompute_grad=True, **DROPOUT)
    assert abs(kept[0] - plain[0]) > 1e-3  # something was dropped
    assert_same(recomputed, kept, 0)


def test_each_microbatch_draws_its_own_dropout(tmp_path: Path) -> None:
    """Of n microbatches, number i holds rows i, i + n, ... and draws from the step's key with i folded in."""
    loss, _ = first_step(tmp_path, tokens_per_mb_per_replica=16, **DROPOUT)
    config = tiny_config(tmp_path, **DROPOUT)
    dims = make_dims(config, batch_size=2)

    def build(mesh: mtf.Mesh) -> list[mtf.Tensor]:
        losses = []
        for i in range(2):
            inputs, labels = (
                mtf.import_tf_tensor(mesh, tokens, mtf.Shape([dims.batch, dims.sequence]))
                for tokens in (TOKENS[i::2, :-1], TOKENS[i::2, 1:])
            )
            key = fold_in(make_key(mesh, config.seed, 0), mtf.constant(mesh, i, dtype=tf.int32))
            ctx = Context(config, mesh, dims, mtf.VariableDType(tf.float32), dropout_key=key)
            losses.append(mtf.reduce_mean(gpt.losses(ctx, inputs, labels).objective))
        return losses

    assert loss == pytest.approx(np.mean(MtfSession().run(build)), abs=1e-6)


MASKED: dict[str, Any] = {"mlm_training": True, "mlm_mask_id": 31, "n_layer": 1, "attention_types": [[["linear"], 1]]}


def test_the_loss_of_a_masked_model_is_the_mean_over_the_masked_tokens_of_the_whole_batch(tmp_path: Path) -> None:
    """Rows hold 5, 1, 0 and 2 of them, so that the mean of the microbatches' means is another number."""
    labels = np.full([BATCH, 8], NOT_SCORED, np.int32)
    for row, count in enumerate((5, 1, 0, 2)):
        labels[row, 2 : 2 + count] = TOKENS[row, 2 : 2 + count]
    whole = first_step(tmp_path / "whole", labels=labels, **MASKED)
    config = tiny_config(tmp_path, **MASKED)
    dims = make_dims(config, BATCH)

    def build(mesh: mtf.Mesh) -> mtf.Tensor:
        inputs, targets = (
            mtf.import_tf_tensor(mesh, tokens, mtf.Shape([dims.batch, dims.sequence]))
            for tokens in (TOKENS[:, :-1], labels)
        )
        return gpt.losses(Context(config, mesh, dims, mtf.VariableDType(tf.float32)), inputs, targets).objective

    assert whole[0] == pytest.approx(MtfSession().run(build)[labels != NOT_SCORED].mean(), abs=1e-6)
    settings = MASKED | {"tokens_per_mb_per_replica": 8, "recompute_grad": True}
    assert_same(first_step(tmp_path / "cut", ("x:2", "batch:x"), labels, **settings), whole, 1e-6)


def test_a_batch_without_a_masked_token_teaches_nothing(tmp_path: Path) -> None:
    loss, gradients = first_step(tmp_path, labels=np.full([BATCH, 8], NOT_SCORED, np.int32), **MASKED)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
