"""Evaluation tasks: texts of whose last tokens the model's predictions are scored. A task is a row of TASKS."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig
from data import lambada
from mesh import mtf
from mesh.layout import MeshLayout
from models.scoring import Scores

Features = dict[str, tf.Tensor]
Texts = Sequence[tuple[list[int], int]]  # token ids, and how many of the last ones are scored: at least one


@dataclass(frozen=True)
class Task:
    """What a task owns.

    Attributes:
      fetch: downloads what the task reads, where it is not there.
      read: the texts for a config and an eos_id.
      sums: adds up a batch's scores.
      metrics: from the sums over all batches, float64, to what is reported.
    """

    fetch: Callable[[ModelConfig], None]
    read: Callable[[ModelConfig, int], Texts]
    sums: Callable[[Scores], dict[str, mtf.Tensor]]
    metrics: Callable[[Mapping[str, tf.Tensor]], dict[str, tf.Tensor]]


def _last_word_sums(scores: Scores) -> dict[str, mtf.Tensor]:
    batch, scored = scores.is_scored.shape.dims
    wrong = mtf.reduce_sum(scores.is_scored - scores.is_likeliest, output_shape=mtf.Shape([batch]))
    is_text = mtf.reduce_max(scores.is_scored, output_shape=mtf.Shape([batch]))
    last = mtf.one_hot(mtf.constant(wrong.mesh, scored.size - 1, dtype=tf.int32), scored)
    return {
        "texts": mtf.reduce_sum(is_text),
        "tokens": mtf.reduce_sum(scores.is_scored),
        "loss": mtf.reduce_sum(scores.loss),
        "words_right": mtf.reduce_sum(is_text * mtf.cast(mtf.equal(wrong, 0), tf.float32)),
        "last_tokens_right": mtf.reduce_sum(scores.is_likeliest * last),
    }


def _last_word_metrics(sums: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    texts, tokens = sums["texts"], sums["tokens"]
    return {
        "last_word_accuracy": sums["words_right"] / texts,
        "last_token_accuracy": sums["last_tokens_right"] / texts,
        "perplexity_per_word": tf.exp(sums["loss"] / texts),
        "perplexity_per_token": tf.exp(sums["loss"] / tokens),
        "texts": texts,
        "tokens": tokens,
    }


TASKS = {"lambada": Task(lambada.fetch, lambada.texts_of, _last_word_sums, _last_word_metrics)}


def read_texts(name: str, config: ModelConfig, eos_id: int) -> Texts:
    """The texts of the task called `name`; of one that is too long for the context, the end."""
    texts = TASKS[name].read(config, eos_id)
    return [(tokens[-config.n_ctx - 1 :], min(scored, config.n_ctx)) for tokens, scored in texts]


def task_length(texts: Texts, layout: MeshLayout) -> int:
    """Positions that the longest text needs, rounded up to what the layout can split."""
    ways = layout.ways("sequence") * layout.ways("memory_length")
    needed = max(len(tokens) - 1 for tokens, _ in texts)
    return -(-needed // ways) * ways


def task_input_fn(texts: Texts, length: int, padding_id: int) -> Callable[[Mapping[str, Any]], tf.data.Dataset]:
    """Every text once, in order; the last batch is filled up with rows of padding of which nothing is scored.

    Features: "inputs" int32 [batch, length]; "labels" int32 [batch, scored], the scored tokens of each text at the
    right and -1 to the left of them; "positions" int32 [batch, scored], where the token before each label stands.
    """
    width = max(scored for _, scored in texts)

    def input_fn(params: Mapping[str, Any]) -> tf.data.Dataset:
        rows = -(-len(texts) // params["batch_size"]) * params["batch_size"]
        labels, positions = np.full([2, rows, width], -1, np.int32)
        for row, (tokens, scored) in enumerate(texts):
            labels[row, width - scored :] = tokens[-scored:]
            positions[row, width - scored :] = np.arange(len(tokens) - 1 - scored, len(tokens) - 1)
        # only the tokens there are: padded, they could be too many for a graph
        ids = tf.constant(np.concatenate([tokens for tokens, _ in texts]).astype(np.int32))
        ends = np.cumsum([len(tokens) for tokens, _ in texts] + [0] * (rows - len(texts)))
        starts = np.concatenate([[0], ends[:-1]])

        def features(start: tf.Tensor, end: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor) -> Features:
            inputs = ids[start : tf.maximum(start, end - 1)]
            inputs = tf.pad(inputs, [[0, length - tf.size(inputs)]], constant_values=padding_id)
            return {"inputs": tf.ensure_shape(inputs, [length]), "labels": labels, "positions": positions}

        dataset = tf.data.Dataset.from_tensor_slices((starts, ends, labels, positions)).map(features)
        return dataset.batch(params["batch_size"], drop_remainder=True)

    return input_fn
