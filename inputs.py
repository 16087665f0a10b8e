"""Input functions of the Estimator: record files in, batches of token ids out.

The batch of a training step is a pure function of the config and the step. A sampling mode is a row of SAMPLING: how a
source's records become windows of n_ctx + 1 tokens, of which the first n_ctx are inputs and the last n_ctx labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig
from data.encoders import SpecialIds
from data.encoders import special_ids as default_special_ids
from errors import UserError
from input_pipeline.errors import explain_input_error, require
from input_pipeline.order import draw_below, interleave_schedule, ordered_records, samples_before, stream_key, turns
from input_pipeline.report import DatasetReport, check_dataset
from input_pipeline.sources import Source, resolve_sources, verify_inputs
from input_pipeline.tfrecords import EXPECTED, FEATURE, READ_BUFFER_BYTES, TokenReader, parse_text

__all__ = [
    "SAMPLING",
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
        batches = windows.batch(params["batch_size"], drop_remainder=True)
        return _finished(batches.map(_inputs_and_labels))

    return input_fn


def eval_input_fn(
    config: ModelConfig, special_ids: SpecialIds, num_steps: int, token_bytes: np.ndarray | None
) -> InputFn:
    """`num_steps` batches for evaluation: training's features, and what to score.

    Records come in file order from the first, several datasets by turns until each is used up. A batch that they do not
    fill is filled with padding; so is every batch past their end. documents_random is read as one text: windows follow
    each other, so that every token but the first is a label once.

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

    def score(window: tf.Tensor, count: tf.Tensor) -> tuple[Features, tf.Tensor]:
        features, labels = _inputs_and_labels(window)
        scored = tf.range(config.n_ctx, dtype=tf.int64) < count[:, None]
        if skipped_label is not None:
            scored &= tf.not_equal(labels, skipped_label)
        known = scored & (labels >= 0) & (labels < len(table))
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


@dataclass(frozen=True)
class SamplingMode:
    """How records become windows: int64 [n_ctx + 1]."""

    prepare: Callable[[Source], None]  # finds out, before a graph is built, what `train` will need
    train: Callable[[Source, tf.Tensor], tf.data.Dataset]  # (source, first sample) -> windows, for ever
    evaluate: Callable[[Source], tf.data.Dataset]  # -> (window, number of its labels to score), every record once
    count: Callable[[Source], int]  # how many windows `evaluate` gives


def _prepare_chunks(source: Source) -> None:
    if not source.drop_short:
        _ = source.windows_per_record
    _ = source.counts


def _train_chunks(source: Source, first: tf.Tensor) -> tf.data.Dataset:
    if source.drop_short:
        # Which records fall out is known only once they are parsed, so all samples before the first are read as well.
        return _chunk_windows(_training_records(source, tf.zeros_like(first)), source).skip(first)
    first_record, first_window = first // source.windows_per_record, first % source.windows_per_record
    return _chunk_windows(_training_records(source, first_record), source).skip(first_window)


def _evaluate_chunks(source: Source) -> tf.data.Dataset:
    count = tf.constant(source.n_ctx, tf.int64)
    return _chunk_windows(_records_in_file_order(source), source).map(lambda window: (window, count))


def _count_chunks(source: Source) -> int:
    if not source.drop_short:
        return sum(source.counts) * source.windows_per_record
    with TokenReader() as reader:
        lengths = (records.lengths for path in source.files for records in reader.read(path))
        return sum(int(((tokens - 1) // source.n_ctx).sum()) for tokens in lengths)


def _chunk_windows(records: tf.data.Dataset, source: Source) -> tf.data.Dataset:
    """Windows of each record in turn: windows_per_record, or, where short records drop out, as many as it holds."""

    def windows(serialized: tf.Tensor) -> tf.Tensor:
        tokens = _parse(serialized[None], source).flat_values
        size = tf.size(tokens, out_type=tf.int64)
        if source.drop_short:
            return _windows(tokens, (size - 1) // source.n_ctx, source.n_ctx)
        needed = source.windows_per_record * source.n_ctx + 1
        enough = require(
            size >= needed,
            f"{source.title}: a record of {source.key} holds ", size,
            f" tokens, and sampling mode chunks needs {needed}, as its first record has; set "
            "remove_partial_sequences to true to leave such records out, or sample it with documents_random",
        )  # fmt: skip
        with tf.control_dependencies([enough]):
            return _windows(tokens, source.windows_per_record, source.n_ctx)

    return records.map(windows, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()


def _prepare_documents(source: Source) -> None:
    _ = source.counts


def _train_random_windows(source: Source, first: tf.Tensor) -> tf.data.Dataset:
    key = stream_key(source.seed, source.index, "window")

    def window(sample: tf.Tensor, serialized: tf.Tensor) -> tf.Tensor:
        documents = _parse(serialized, source)
        tokens = _joined(documents, source.eos_id)
        size = tf.size(tokens, out_type=tf.int64)
        enough = require(
            size > source.n_ctx,
            f"{source.title}: {source.stitch} documents in a row of {source.key}, the shortest of ",
            tf.reduce_min(documents.row_lengths()), " tokens, hold ", size,
            f" in all, and a window needs n_ctx + 1 = {source.n_ctx + 1}; set stitch (now {source.stitch}) so that "
            "stitch * (tokens of the shortest document + 1) >= n_ctx + 1",
        )  # fmt: skip
        with tf.control_dependencies([enough]):
            begin = draw_below(size - source.n_ctx, key, sample)
        return tf.ensure_shape(tokens[begin : begin + source.n_ctx + 1], [source.n_ctx + 1])

    records = _training_records(source, first * source.stitch)
    groups = records.batch(source.stitch, drop_remainder=True).enumerate(first)
    return groups.map(window, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _evaluate_documents(source: Source) -> tf.data.Dataset:
    """The documents joined into one text, cut into windows that overlap by a token; the last is filled with padding."""
    groups = _records_in_file_order(source).batch(_DOCUMENTS_AT_ONCE)
    texts = groups.map(
        lambda serialized: (_joined(_parse(serialized, source), source.eos_id), False),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    end = tf.data.Dataset.from_tensors((tf.zeros([0], tf.int64), True))

    def cut(rest: tf.Tensor, piece: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        text, is_end = piece
        text = tf.concat([rest, text], axis=0)
        labels = tf.maximum(tf.size(text, out_type=tf.int64) - 1, 0)
        whole = labels // source.n_ctx
        number = tf.where(is_end, -(-labels // source.n_ctx), whole)
        filled = tf.concat([text, tf.fill([source.n_ctx], tf.constant(source.padding_id, tf.int64))], axis=0)
        counts = tf.minimum(labels - tf.range(number) * source.n_ctx, source.n_ctx)
        return text[whole * source.n_ctx :], (_windows(filled, number, source.n_ctx), counts)

    return texts.concatenate(end).scan(tf.zeros([0], tf.int64), cut).unbatch()


def _count_documents(source: Source) -> int:
    tokens = 0
    with TokenReader() as reader:
        for path in source.files:
            for records in reader.read(path):
                tokens += len(records.tokens) + int((~records.ends_in(source.eos_id)).sum())
    return -(-max(tokens - 1, 0) // source.n_ctx)


_DOCUMENTS_AT_ONCE = 64

SAMPLING: dict[str, SamplingMode] = {
    "chunks": SamplingMode(_prepare_chunks, _train_chunks, _evaluate_chunks, _count_chunks),
    "documents_random": SamplingMode(_prepare_documents, _train_random_windows, _evaluate_documents, _count_documents),
}


def _training_records(source: Source, first_record: tf.Tensor) -> tf.data.Dataset:
    seed = stream_key(source.seed, source.index)
    return ordered_records(source.files, source.counts, seed, source.shuffle, first_record)


def _records_in_file_order(source: Source) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(list(source.files), buffer_size=READ_BUFFER_BYTES)


def _parse(serialized: tf.Tensor, source: Source) -> tf.RaggedTensor:
    """string [records] -> int64 [records, (tokens)], every id checked."""
    text = parse_text(serialized)
    is_there = require(
        tf.reduce_all(tf.strings.length(serialized) > 0),
        f"{source.title}: a file of {source.key} holds fewer records than its name says; --check_dataset names it",
    )
    has_text = require(
        tf.reduce_all(text.row_lengths() > 0),
        f"{source.title}: a record of {source.key} has no int64 feature `{FEATURE}`, or an empty one; {EXPECTED}",
    )
    ids = text.flat_values
    strange = ((ids < 0) | (ids >= source.n_vocab)) & tf.not_equal(ids, source.padding_id)
    worst = tf.reduce_max(tf.where(strange, ids, tf.fill(tf.shape(ids), tf.int64.min)))
    in_vocabulary = require(
        tf.logical_not(tf.reduce_any(strange)),
        f"{source.title}: token id ", worst, f" in a record of {source.key} is outside the vocabulary (n_vocab "
        f"{source.n_vocab}, padding_id {source.padding_id}); raise n_vocab or use the tokenizer's own files",
    )  # fmt: skip
    with tf.control_dependencies([is_there, has_text, in_vocabulary]):
        return text.with_flat_values(tf.identity(ids))


def _joined(documents: tf.RaggedTensor, eos_id: int) -> tf.Tensor:
    """int64 [documents, (tokens)] -> int64 [tokens]: one eos after each document, where it does not end in one."""
    last = tf.gather(documents.flat_values, documents.row_splits[1:] - 1)
    missing = tf.cast(tf.not_equal(last, eos_id), tf.int64)
    ends = tf.RaggedTensor.from_row_lengths(tf.fill([tf.reduce_sum(missing)], tf.constant(eos_id, tf.int64)), missing)
    return tf.concat([documents, ends], axis=1).flat_values


def _windows(tokens: tf.Tensor, number: int | tf.Tensor, n_ctx: int) -> tf.Tensor:
    """int64 [tokens] -> int64 [number, n_ctx + 1]: each begins with the last token of the one before."""
    starts = tf.range(tf.cast(number, tf.int64)) * n_ctx
    return tf.gather(tokens, starts[:, None] + tf.range(n_ctx + 1, dtype=tf.int64))


def _inputs_and_labels(windows: tf.Tensor) -> tuple[Features, tf.Tensor]:
    windows = tf.cast(windows, tf.int32)
    labels = windows[:, 1:]
    return {"inputs": windows[:, :-1], "labels": labels}, labels


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
