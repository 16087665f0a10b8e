"""Every architecture option trained, saved, restored and evaluated, in the graphs that the Estimator runs.

The training step is cut into microbatches and recomputes its activations, under dropout. Its loss and gradients must be
those of the microbatches taken one by one, whole and without recomputing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.layout import parse
from mesh.randomness import fold_in, make_key
from model_fns import Run, evaluate_spec, train_spec
from sample import Sampling
from tests.test_options import OPTIONS, option_config, some_weights
from tests.tiny import cpu_devices, random_tokens
from training.checkpoints import CheckpointHook, newest_checkpoint
from training.hooks import StopOnSignal
from training.step import mean_gradients, num_microbatches

ROWS, COUNT = 4, 2  # sequences in a batch, and into how many microbatches it is cut
DEVICES = cpu_devices(1)
Values = dict[str, np.ndarray]


def settings(directory: Path) -> dict[str, Any]:
    """What is trained besides the option."""
    return {
        "model_path": str(directory),
        "train_batch_size": ROWS,
        "embed_dropout": 0.2,
        "res_dropout": 0.2,
        "attn_dropout": 0.2,
        "beta1": 0.0,  # so that adam_m is the gradient
    }


def tokens_of(config: ModelConfig) -> Values:
    """A batch in which rows of either microbatch hold labels that are not scored, three of them in each."""
    tokens = random_tokens(ROWS, config.n_ctx + 1, vocab=config.n_vocab)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    labels[[0, 0, 2, 1, 1, 1], [0, 5, 2, 1, 2, 3]] = -1
    return {"inputs": inputs, "labels": labels}


def run_of(config: ModelConfig) -> Run:
    return Run(config, parse("x:1", "", 1), DEVICES, 100, 0, Sampling(), StopOnSignal())


def session() -> tf.Session:
    options = DEVICES.session_config()
    options.graph_options.rewrite_options.disable_meta_optimizer = True  # takes longer than the steps themselves
    return tf.Session(config=options)


def load(weights: Values, session: tf.Session) -> None:
    for variable in tf.global_variables():
        if variable.op.name in weights:
            variable.load(weights[variable.op.name], session)


@dataclass(frozen=True)
class Trained:
    """Two steps from `weights`: the first one's loss and gradients, and all variables before they were saved."""

    weights: Values
    loss: float
    gradients: Values
    variables: Values


def train(config: ModelConfig) -> Trained:
    """Two steps of the Estimator's training graph and hooks, and a checkpoint."""
    with tf.Graph().as_default():
        features = {name: tf.constant(value) for name, value in tokens_of(config).items()}
        spec = train_spec(run_of(config), features, {"batch_size": ROWS})
        hooks = {type(hook): hook for hook in spec.training_hooks}
        restore, save = hooks[mtf.MtfRestoreHook], hooks[CheckpointHook]
        restore.begin()
        save.begin()
        variables = {variable.op.name: variable for variable in tf.global_variables()}
        names = [name.removesuffix("/adam_m") for name in variables if name.endswith("/adam_m")]
        weights = some_weights({name: tuple(variables[name].shape.as_list()) for name in names})
        with session() as session_:
            session_.run(tf.global_variables_initializer())
            load(weights, session_)
            restore.after_create_session(session_, None)
            save.after_create_session(session_, None)
            steps = []
            for _ in range(2):
                loss, _ = session_.run([spec.loss, spec.train_op])
                for prepare in save.before:  # among other things, bring the variables back from the devices
                    prepare(session_)
                steps.append((float(loss), session_.run(variables)))
            save.end(session_)
    (loss, first), (_, last) = steps
    return Trained(weights, loss, {name: first[f"{name}/adam_m"] for name in names}, last)


def one_by_one(config: ModelConfig, weights: Values) -> tuple[float, Values]:
    """The loss and the gradients of the first step: the means of its microbatches'."""
    tokens = tokens_of(config)
    with tf.Graph().as_default():
        run = run_of(config.model_copy(update={"train_batch_size": ROWS // COUNT}))
        graph = run.graph({}, ROWS // COUNT)
        key = make_key(graph.mesh, config.seed, 0)
        results = []
        for i in range(COUNT):
            batch = graph.import_batch({name: tf.constant(value[i::COUNT]) for name, value in tokens.items()})
            of_batch = fold_in(key, mtf.constant(graph.mesh, i, dtype=tf.int32))
            gradients, losses = mean_gradients(graph, batch, of_batch)
            by_name = {v.name: g for v, g in zip(graph.graph.trainable_variables, gradients, strict=True)}
            results.append((losses["loss"], by_name))
        lowering = graph.lower()
        fetches = tf.nest.map_structure(lowering.export_to_tf_tensor, results)
        copy = lowering.copy_masters_to_slices()
        with session() as session_:
            session_.run(tf.global_variables_initializer())
            load(weights, session_)
            session_.run(copy)
            found = session_.run(fetches)
    mean = {name: np.mean([gradients[name] for _, gradients in found], axis=0) for name in weights}
    return float(np.mean([loss for loss, _ in found])), mean


def evaluate(config: ModelConfig, trained: Values) -> list[dict[str, np.ndarray]]:
    """What evaluation adds up, with the variables `trained` and with those of the newest checkpoint."""
    tokens = tokens_of(config)
    scored = (tokens["labels"] >= 0).astype(np.float32)
    with tf.Graph().as_default():
        features = {name: tf.constant(value) for name, value in tokens.items()}
        features |= {"weights": tf.constant(scored), "label_bytes": tf.constant(scored.astype(np.int32))}
        spec = evaluate_spec(run_of(config), features, {"batch_size": ROWS})
        [restore] = spec.evaluation_hooks
        restore.begin()
        saver = next(iter(tf.get_collection(tf.GraphKeys.SAVERS)), None) or tf.train.Saver()  # as the Estimator's
        found = []
        with session() as session_:
            for from_checkpoint in (False, True):
                session_.run(tf.global_variables_initializer())
                if from_checkpoint:
                    saver.restore(session_, newest_checkpoint(config.model_path))
                else:
                    load(trained, session_)
                restore.after_create_session(session_, None)
                found.append(session_.run(spec.eval_metrics[1]))
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_trained_saved_and_restored(tmp_path: Path, name: str) -> None:
    plain = option_config(tmp_path, name, **settings(tmp_path))
    cut = option_config(
        tmp_path, name, **settings(tmp_path), recompute_grad=True, tokens_per_mb_per_replica=ROWS // COUNT * plain.n_ctx
    )
    assert num_microbatches(cut, run_of(cut).layout) == COUNT

    trained = train(cut)
    loss, gradients = one_by_one(plain, trained.weights)
    assert trained.loss == pytest.approx(loss, abs=1e-5)
    assert trained.gradients.keys() == gradients.keys()
    for variable, gradient in gradients.items():
        tolerance = 1e-5 * max(1, np.abs(gradient).max())
        np.testing.assert_allclose(trained.gradients[variable], gradient, atol=tolerance, err_msg=variable)
    told = [variable for variable, gradient in gradients.items() if np.abs(gradient).max() > 1e-5]
    assert len(told) > 0.7 * len(gradients)  # what attention of radius 1 compares, for one, does not matter

    before, after = evaluate(plain, trained.variables)
    assert before == after
    assert np.isfinite(list(after.values())).all()
    assert all((trained.variables[variable] != trained.weights[variable]).any() for variable in told)
