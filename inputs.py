"""Input functions of the Estimator: record files in, batches of token ids out.

The batch of a training step is a pure function of the config and the step. input_pipeline/sampling.py makes windows of
n_ctx + 1 tokens of the records; the first n_ctx are inputs, the last n_ctx labels. Those of a masked language model are
made of the first n_ctx, by input_pipeline/masking.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig
from data.encoders import SpecialIds
from data.encoders import special_ids as default_special_ids
from errors import UserError
from input_pipeline.errors import explain_input_error
from input_pipeline.masking import masked
from input_pipeline.order import interleave_schedule, samples_before, turns
from input_pipeline.report import DatasetReport, check_dataset
from input_pipeline.sampling import SAMPLING
from input_pipeline.sources import resolve_sources, verify_inputs

__all__ = [
    "DatasetReport",
    "check_dataset",
    "count_eval_examples",
    "eval_input_fn",
    "explain_input_error",
    "predict_input_fn",
    "train_input_fn",
    "verify_inputs",
]

Features = dict[str, tf.Tensor]
InputFn = Callable[[Mapping[str, Any]], tf.data.Dataset]


def train_input_fn(config: ModelConfig, special_ids: SpecialIds) -> InputFn:
    """Training batches, for ever: ({"inputs", "labels": int32 [batch, n_ctx]}, labels), batch = params["batch_size"].

    A label outside the vocabulary is not scored: a padding_id past it, and what a masked language model need not guess.
    Step s trains on samples s * batch ... (s + 1) * batch - 1 of a fixed order. The dataset begins at the graph's
    global step, which it reads when its iterator is initialized, after the checkpoint is restored. Several datasets
    take turns by their weights.

    Raises:
        UserError: where a dataset's files are missing, empty or no tfrecords; and see `explain_input_error`.
    """
    sources = resolve_sources(config, special_ids, evaluate=False)
    schedule = interleave_schedule([source.weight for source in sources])
    for source in sources:
        SAMPLING[source.sampling_mode].prepare(source)

    def input_fn(params: Mapping[str, Any]) -> tf.data.Dataset:
        step = tf.train.get_global_step()
        first = tf.zeros([], tf.int64) if step is None else tf.cast(step, tf.int64) * params["batch_size"]
        streams = [
            SAMPLING[source.sampling_mode].train(source, samples_before(schedule, index, first))
            for index, source in enumerate(sources)
        ]
        windows = _take_turns(streams, turns(schedule, first))
        if config.mlm_training:
            windows = masked(windows, config, special_ids, first, evaluate=False)
        batches = windows.batch(params["batch_size"], drop_remainder=True)
        return _finished(batches.map(_inputs_and_labels))

    return input_fn


def eval_input_fn(
    config: ModelConfig, special_ids: SpecialIds, num_steps: int, token_bytes: np.ndarray | None
) -> InputFn:
    """`num_steps` batches for evaluation: training's features, and what to score.

    Records come in file order from the first, several datasets by turns until each is used up. A batch that they do not
    fill is filled with padding; so is every batch past their end. documents_random is read as one text: windows follow
    each other, so that every token but the first is a label once. A masked language model is scored on the tokens that
    were chosen, the same ones each time.

    Args:
        num_steps: number of batches; ceil(count_eval_examples / batch size) reads everything.
        token_bytes: int [vocabulary], the bytes of text that each token stands for, or None where nobody knows.

    Returns:
        input_fn(params) -> dataset of (features, labels); features as in training, and "weights" float32 [batch, n_ctx]
        (1 where the label is scored; 0 at padding), "label_bytes" int32 [batch, n_ctx] (0 where not scored or unknown).
    """
    sources = resolve_sources(config, special_ids, evaluate=True)
    schedule = interleave_schedule([source.weight for source in sources])
    table = np.zeros(1, np.int32) if token_bytes is None else np.asarray(token_bytes, np.int32)
    padding_id = special_ids.padding_id
    skipped_label = padding_id if _is_only_padding(config, special_ids, token_bytes) else None

    def score(*sample: tf.Tensor) -> tuple[Features, tf.Tensor]:
        *tokens, count = sample
        features, labels = _inputs_and_labels(*tokens)
        scored = (tf.range(config.n_ctx, dtype=tf.int64) < count[:, None]) & (labels >= 0)
        if skipped_label is not None:
            scored &= tf.not_equal(labels, skipped_label)
        known = scored & (labels < len(table))
        label_bytes = tf.gather(table, tf.where(known, labels, tf.zeros_like(labels)))
        features |= {
            "weights": tf.cast(scored, tf.float32),
            "label_bytes": tf.where(known, label_bytes, tf.zeros_like(label_bytes)),
        }
        return features, labels

    def input_fn(params: Mapping[str, Any]) -> tf.data.Dataset:
        streams = [SAMPLING[source.sampling_mode].evaluate(source) for source in sources]
        windows = _take_turns(streams, turns(schedule, tf.zeros([], tf.int64)))
        nothing = (tf.fill([config.n_ctx + 1], tf.constant(padding_id, tf.int64)), tf.zeros([], tf.int64))
        filled = windows.concatenate(tf.data.Dataset.from_tensors(nothing).repeat())
        if config.mlm_training:
            filled = masked(filled, config, special_ids, tf.zeros([], tf.int64), evaluate=True)
        batches = filled.batch(params["batch_size"], drop_remainder=True).take(num_steps)
        return _finished(batches.map(score))

    return input_fn


def predict_input_fn(prompts: Sequence[Sequence[int]], batch_size: int, length: int, padding_id: int) -> InputFn:
    """Prompts to continue, in their order.

    Features: "inputs" int32 [batch, length], filled up with `padding_id` on the right; "prompt_length" int32 [batch];
    "prompt_number" int32 [batch], counted from 0. The last batch is filled up with padding of the full length, which
    leaves nothing to continue.

    Raises:
        UserError: where there is no prompt, or one is empty or longer than `length`.
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) <= length:
            raise UserError(f"prompt {number} holds {len(prompt)} tokens; it must hold between 1 and {length}")
    rows = -(-len(prompts) // batch_size) * batch_size
    inputs = np.full([rows, length], padding_id, np.int32)
    lengths = np.full(rows, length, np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)

    def input_fn(params: Mapping[str, Any]) -> tf.data.Dataset:
        numbers = np.arange(rows, dtype=np.int32)
        features = {"inputs": inputs, "prompt_length": lengths, "prompt_number": numbers}
        return tf.data.Dataset.from_tensor_slices(features).batch(batch_size, drop_remainder=True)

    return input_fn


def count_eval_examples(config: ModelConfig, special_ids: SpecialIds | None = None) -> int:
    """How many windows of n_ctx + 1 tokens evaluation reads in all.

    Chunks are counted by their files' records; documents, and chunks under remove_partial_sequences, by reading them.

    Raises:
        UserError: where files are missing or unreadable, or hold no window at all.
    """
    sources = resolve_sources(config, special_ids or default_special_ids(config), evaluate=True)
    return sum(SAMPLING[source.sampling_mode].count(source) for source in sources)


def _inputs_and_labels(tokens: tf.Tensor, labels: tf.Tensor | None = None) -> tuple[Features, tf.Tensor]:
    """Features of windows [batch, n_ctx + 1], cut into inputs and labels, or of inputs with labels of their own."""
    inputs, labels = (tokens[:, :-1], tokens[:, 1:]) if labels is None else (tokens, labels)
    inputs, labels = tf.cast(inputs, tf.int32), tf.cast(labels, tf.int32)
    return {"inputs": inputs, "labels": labels}, labels


def _take_turns(streams: Sequence[tf.data.Dataset], choices: tf.data.Dataset) -> tf.data.Dataset:
    if len(streams) == 1:
        return streams[0]
    return tf.data.Dataset.choose_from_datasets(streams, choices, stop_on_empty_dataset=False)


def _finished(batches: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    return batches.prefetch(2).with_options(options)


def _is_only_padding(config: ModelConfig, special_ids: SpecialIds, token_bytes: np.ndarray | None) -> bool:
    """Whether padding_id stands for nothing but padding: not for text, and not for the end of it."""
    padding_id = special_ids.padding_id
    if padding_id == special_ids.eos_id:
        return False
    in_text = token_bytes is not None and padding_id < len(token_bytes) and token_bytes[padding_id] > 0
    return padding_id >= config.n_vocab or not in_text
