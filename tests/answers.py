"""What a tiny model answers, by the graphs that main.py evaluates and predicts with, from variables already there."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh.devices import LocalDevices
from mesh.layout import MeshLayout
from model_fns import Run, evaluate_spec, predict_spec
from sample import Sampling
from tests.tiny import random_tokens
from training.hooks import StopOnSignal

EOS_ID, PADDING_ID = 0, 1  # as in tests/tiny.py
SEED = 3  # of the draws
# What is drawn at this temperature is the likeliest token, as at 0, which has a graph of its own: on several devices,
# where that takes seconds to build, this number is fed to the graph that draws. On one device, 0 is what is tested.
NEARLY_ZERO = 1e-30


@dataclass(frozen=True)
class Answers:
    """Of one batch each."""

    losses: dict[str, float]  # per token
    greedy: dict[str, np.ndarray]  # as predict_spec's predictions
    sampled: dict[str, np.ndarray]


def evaluation_features(config: ModelConfig) -> dict[str, tf.Tensor]:
    """A batch whose last row is padding."""
    rows = config.train_batch_size
    tokens = random_tokens(rows, config.n_ctx + 1, seed=1, vocab=config.n_vocab)
    weights = np.ones([rows, config.n_ctx], np.float32)
    weights[-1] = 0
    return {
        "inputs": tf.constant(tokens[:, :-1]),
        "labels": tf.constant(tokens[:, 1:]),
        "weights": tf.constant(weights),
        "label_bytes": tf.ones([rows, config.n_ctx], tf.int32),
    }


def prompt_features(config: ModelConfig) -> dict[str, tf.Tensor]:
    """Prompts of 1, 3, 4, 6, 1, ... tokens, padded."""
    rows = config.train_batch_size
    lengths = np.resize([1, 3, 4, 6], rows).astype(np.int32)
    tokens = random_tokens(rows, config.n_ctx, seed=2, vocab=config.n_vocab)
    return {
        "inputs": tf.constant(np.where(np.arange(config.n_ctx) < lengths[:, None], tokens, PADDING_ID)),
        "prompt_length": tf.constant(lengths),
        "prompt_number": tf.range(rows),
    }


def answers_of(config: ModelConfig) -> Callable[[MeshLayout, LocalDevices], Callable[[tf.Session], Answers]]:
    """A builder of evaluation and prediction; what it returns runs them."""

    def build(layout: MeshLayout, devices: LocalDevices) -> Callable[[tf.Session], Answers]:
        def run_with(sampling: Sampling) -> Run:
            return Run(config, layout, devices, 1, EOS_ID, sampling, StopOnSignal())

        params = {"batch_size": config.train_batch_size}
        evaluation = evaluate_spec(run_with(Sampling()), evaluation_features(config), params)
        prompts, temperature = prompt_features(config), tf.placeholder_with_default(1.0, [])
        sampling = Sampling(temperature, seed=SEED)
        drawn = predict_spec(run_with(sampling), prompts, params).predictions
        likeliest, fed = drawn, {temperature: NEARLY_ZERO}
        if layout.size == 1:
            likeliest, fed = predict_spec(run_with(Sampling(temperature=0)), prompts, params).predictions, {}

        def run(session: tf.Session) -> Answers:
            sums = {name: float(value[0]) for name, value in session.run(evaluation.eval_metrics[1]).items()}
            losses = {name: sums[name] / sums["tokens"] for name in ("cross_entropy", "objective")}
            return Answers(losses, session.run(likeliest, fed), session.run(drawn))

        return run

    return build
