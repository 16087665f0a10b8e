"""How a source's records become windows of n_ctx + 1 tokens: a sampling mode is a row of SAMPLING."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from input_pipeline.errors import require
from input_pipeline.order import Reader, draws_below, ordered_elements, stream_key
from input_pipeline.sources import Source
from input_pipeline.tfrecords import EXPECTED, FEATURE, FRAMING_BYTES, READ_BUFFER_BYTES, TokenReader, parse_text
from input_pipeline.window_counts import too_short


@dataclass(frozen=True)
class SamplingMode:
    """How records become windows: int64 [n_ctx + 1]."""

    prepare: Callable[[Source], None]  # finds out, before a graph is built, what `train` will need
    train: Callable[[Source, tf.Tensor], tf.data.Dataset]  # (source, first sample) -> windows, for ever
    evaluate: Callable[[Source], tf.data.Dataset]  # -> (window, number of its labels to score), every record once
    count: Callable[[Source], int]  # how many windows `evaluate` gives


def _prepare_chunks(source: Source) -> None:
    _ = source.window_counts if source.drop_short else (source.windows_per_record, source.counts)
    _ = source.segment_starts


def _train_chunks(source: Source, first: tf.Tensor) -> tf.data.Dataset:
    if source.drop_short:

        def windows(path: tf.Tensor, ranges: tf.Tensor) -> tf.data.Dataset:
            return _chunk_windows(_records_in(path, ranges), source)

        return _ordered(source, source.window_counts, source.segment_starts, windows, first)
    first_record, first_window = first // source.windows_per_record, first % source.windows_per_record
    return _chunk_windows(_training_records(source, first_record), source).skip(first_window)


def _evaluate_chunks(source: Source) -> tf.data.Dataset:
    count = tf.constant(source.n_ctx, tf.int64)
    return _chunk_windows(_records(list(source.files)), source).map(lambda window: (window, count))


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
    _ = source.counts, source.segment_starts


def _train_random_windows(source: Source, first: tf.Tensor) -> tf.data.Dataset:
    """A window of each `stitch` documents in a row; many at once, since each operation takes longer than its work."""
    key = stream_key(source.seed, source.index, "window")

    def windows(block: tf.Tensor, serialized: tf.Tensor) -> tf.Tensor:
        documents = _parse(serialized, source)
        joined = _joined(documents, source.eos_id)
        starts = joined.row_splits[:: source.stitch]
        sizes = starts[1:] - starts[:-1]
        worst = tf.argmin(sizes)
        in_worst = documents.row_lengths()[worst * source.stitch : (worst + 1) * source.stitch]
        enough = require(
            sizes[worst] > source.n_ctx,
            *too_short(source, source.key, tf.size(in_worst), tf.reduce_min(in_worst), sizes[worst]),
        )
        with tf.control_dependencies([enough]):
            begins = starts[:-1] + draws_below(sizes - source.n_ctx, key, block)
        return tf.gather(joined.flat_values, begins[:, None] + tf.range(source.n_ctx + 1, dtype=tf.int64))

    first_block = first // _WINDOWS_AT_ONCE
    documents = _WINDOWS_AT_ONCE * source.stitch
    records = _training_records(source, first_block * documents)
    blocks = records.batch(documents, drop_remainder=True).enumerate(first_block)
    drawn = blocks.map(windows, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return drawn.unbatch().skip(first % _WINDOWS_AT_ONCE)


def _prepare_fixed_windows(source: Source) -> None:
    _ = source.window_counts


def _train_fixed_windows(source: Source, first: tf.Tensor) -> tf.data.Dataset:
    # a group is of documents in a row, so a file is one part
    whole = [[0] for _ in source.files]
    return _ordered(source, source.window_counts, whole, lambda path, _: _group_windows(path, source), first)


def _group_windows(path: tf.Tensor, source: Source) -> tf.data.Dataset:
    """The windows of a file's groups of `stitch` documents, as `group_windows` counts them."""

    def text(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _joined(_parse(serialized, source), source.eos_id).flat_values, tf.equal(
            tf.size(serialized), source.stitch
        )

    texts = _records(path).batch(source.stitch).map(text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    nothing = tf.zeros([0], tf.int64)

    def cut(waiting: tf.Tensor, piece: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The group before is cut once it is known that no documents are left over for it."""
        text, is_group = piece
        if_group = (text, _windows_to_the_end(waiting, source.n_ctx))
        if_left_over = (tf.concat([waiting, text], axis=0), tf.zeros([0, source.n_ctx + 1], tf.int64))
        return tf.cond(is_group, lambda: if_group, lambda: if_left_over)

    ended = texts.concatenate(tf.data.Dataset.from_tensors((nothing, True)))
    return ended.scan(nothing, cut).unbatch()


def _evaluate_documents(source: Source) -> tf.data.Dataset:
    """The documents joined into one text, cut into windows that overlap by a token; the last is filled with padding."""
    groups = _records(list(source.files)).batch(_DOCUMENTS_AT_ONCE)
    texts = groups.map(
        lambda serialized: (_joined(_parse(serialized, source), source.eos_id).flat_values, False),
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


_RECORDS_AT_ONCE = 64
_BYTES_BEHIND = 64 << 10
_DOCUMENTS_AT_ONCE = 64
_WINDOWS_AT_ONCE = 16

SAMPLING: dict[str, SamplingMode] = {
    "chunks": SamplingMode(_prepare_chunks, _train_chunks, _evaluate_chunks, _count_chunks),
    "documents_fixed": SamplingMode(
        _prepare_fixed_windows, _train_fixed_windows, _evaluate_documents, _count_documents
    ),
    "documents_random": SamplingMode(_prepare_documents, _train_random_windows, _evaluate_documents, _count_documents),
}


def _training_records(source: Source, first_record: tf.Tensor) -> tf.data.Dataset:
    return _ordered(source, source.counts, source.segment_starts, _records_in, first_record)


def _ordered(
    source: Source, counts: list[int], starts: list[list[int]], read: Reader, first: tf.Tensor
) -> tf.data.Dataset:
    key = stream_key(source.seed, source.index)
    return ordered_elements(source.files, counts, starts, read, key, source.shuffle, first)


def _records(paths: tf.Tensor | list[str]) -> tf.data.Dataset:
    """The serialized records of one file or of several, one after another."""
    return tf.data.TFRecordDataset(paths, buffer_size=READ_BUFFER_BYTES)


def _records_in(path: tf.Tensor, ranges: tf.Tensor) -> tf.data.Dataset:
    """The serialized records of one file that begin in each of the byte ranges, int64 [parts, 2]."""

    def part(span: tf.Tensor) -> tf.data.Dataset:
        # enough for the records behind the part too, with which it is found to have ended
        buffer = tf.minimum(span[1] - span[0], READ_BUFFER_BYTES) + _BYTES_BEHIND
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=path[None], compression_type="", buffer_size=buffer, byte_offsets=span[:1]
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        # many at once, since each operation takes longer than its work
        inside = records.batch(_RECORDS_AT_ONCE).scan(span[0], lambda place, some: _before(some, place, span[1]))
        return inside.take_while(lambda some: tf.size(some) > 0).unbatch()

    return tf.data.Dataset.from_tensor_slices(ranges).flat_map(part)


def _before(records: tf.Tensor, place: tf.Tensor, end: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where the records (string [records]) end whose first is at byte `place`, and those that begin before `end`."""
    sizes = tf.cast(tf.strings.length(records), tf.int64) + FRAMING_BYTES
    begins = place + tf.cumsum(sizes, exclusive=True)
    return place + tf.reduce_sum(sizes), records[: tf.reduce_sum(tf.cast(begins < end, tf.int32))]


def _parse(serialized: tf.Tensor, source: Source) -> tf.RaggedTensor:
    """string [records] -> int64 [records, (tokens)], every id checked."""
    text = parse_text(serialized)
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
    with tf.control_dependencies([has_text, in_vocabulary]):
        return text.with_flat_values(tf.identity(ids))


def _joined(documents: tf.RaggedTensor, eos_id: int) -> tf.RaggedTensor:
    """int64 [documents, (tokens)] -> the same with one eos after each document, where it does not end in one."""
    last = tf.gather(documents.flat_values, documents.row_splits[1:] - 1)
    missing = tf.cast(tf.not_equal(last, eos_id), tf.int64)
    ends = tf.RaggedTensor.from_row_lengths(tf.fill([tf.reduce_sum(missing)], tf.constant(eos_id, tf.int64)), missing)
    return tf.concat([documents, ends], axis=1)


def _windows(tokens: tf.Tensor, number: int | tf.Tensor, n_ctx: int) -> tf.Tensor:
    """int64 [tokens] -> int64 [number, n_ctx + 1]: each begins with the last token of the one before."""
    starts = tf.range(tf.cast(number, tf.int64)) * n_ctx
    return tf.gather(tokens, starts[:, None] + tf.range(n_ctx + 1, dtype=tf.int64))


def _windows_to_the_end(tokens: tf.Tensor, n_ctx: int) -> tf.Tensor:
    """int64 [tokens] -> int64 [windows, n_ctx + 1] that hold every token: the last one ends where the text ends."""
    last = tf.size(tokens, out_type=tf.int64) - 1 - n_ctx
    starts = tf.minimum(tf.range(tf.maximum(last + n_ctx, 0), delta=n_ctx), last)
    return tf.gather(tokens, starts[:, None] + tf.range(n_ctx + 1, dtype=tf.int64))
