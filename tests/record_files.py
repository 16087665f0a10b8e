"""Tiny tfrecords, configs that name them, and a session that runs an input function."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config import ModelConfig, make_model_config
from data.encoders import SpecialIds
from inputs import explain_input_error
from mesh.devices import use_graph_mode

use_graph_mode()

EOS, PADDING, N_VOCAB = 0, 1000, 1000
SPECIAL = SpecialIds(EOS, PADDING)


def example(**features: Any) -> bytes:
    """A serialized tf.train.Example of int64 lists."""
    lists = {name: tf.train.Int64List(value=ids) for name, ids in features.items()}
    feature = {name: tf.train.Feature(int64_list=ids) for name, ids in lists.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write_serialized(path: Path, serialized: Sequence[bytes]) -> str:
    """A tfrecords file of these records."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in serialized:
            writer.write(record)
    return str(path)


def write_records(path: Path, records: Sequence[Sequence[int]]) -> str:
    """A tfrecords file whose feature `text` holds these token ids."""
    return write_serialized(path, [example(text=tokens) for tokens in records])


def numbered_chunks(first: int, count: int, size: int = 5) -> list[list[int]]:
    """`count` records of `size` tokens; the number of a record, from `first` on, is its first token // 10."""
    return [[10 * number + place for place in range(size)] for number in range(first, first + count)]


def damage(path: str, offset: int) -> None:
    """Change one byte."""
    content = bytearray(Path(path).read_bytes())
    content[offset] ^= 0xFF
    Path(path).write_bytes(content)


def config_of(datasets: Sequence[Any], **changes: Any) -> ModelConfig:
    """n_ctx 4, n_vocab 1000, eos 0, padding 1000."""
    values = {
        "n_head": 1,
        "n_embd": 4,
        "n_layer": 1,
        "n_ctx": 4,
        "n_vocab": N_VOCAB,
        "eos_id": EOS,
        "padding_id": PADDING,
        "lr": 0.1,
        "train_batch_size": 4,
        "train_steps": 8,
        "model_path": "unused",
        "datasets": datasets,
    }
    return make_model_config(values | changes, "tiny")


def entry(pattern: Path | str, mode: str = "chunks", stitch: int = 1, weight: float = 1.0) -> list[Any]:
    """An inline entry of `datasets` that trains and evaluates on the same files."""
    return [str(pattern), str(pattern), stitch, mode, weight]


def plain_session_config() -> tf.ConfigProto:
    """Without optimizing the graph, which takes longer than reading the few batches of a test."""
    config = tf.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config


def plain_session() -> tf.Session:
    """A session of that kind, on the default graph."""
    return tf.Session(config=plain_session_config())


def batches(input_fn: Any, number: int, batch_size: int = 4) -> list[dict[str, np.ndarray]]:
    """The features of up to `number` batches, in a graph and session of their own."""
    with tf.Graph().as_default(), plain_session() as session:
        iterator = tf.data.make_initializable_iterator(input_fn({"batch_size": batch_size}))
        return _read(session, iterator, iterator.get_next(), number)


def batches_from(input_fn: Any, steps: Sequence[int], number: int, batch_size: int = 4) -> list[list[dict[str, Any]]]:
    """For each of `steps`, the features of up to `number` batches where that is the graph's global step."""
    with tf.Graph().as_default(), plain_session() as session:
        step = tf.train.create_global_step()
        iterator = tf.data.make_initializable_iterator(input_fn({"batch_size": batch_size}))
        element = iterator.get_next()
        found = []
        for value in steps:
            session.run(step.assign(value))
            found.append(_read(session, iterator, element, number))
        return found


def _read(session: tf.Session, iterator: Any, element: Any, number: int) -> list[dict[str, np.ndarray]]:
    found: list[dict[str, np.ndarray]] = []
    session.run(iterator.initializer)
    try:
        while len(found) < number:
            value = session.run(element)
            features, labels = value if isinstance(value, tuple) else (value, None)
            if labels is not None:
                np.testing.assert_array_equal(labels, features["labels"])
            found.append(features)
    except tf.errors.OutOfRangeError:
        pass
    return found


def column(found: Sequence[dict[str, np.ndarray]], name: str = "inputs", place: int = 0) -> list[int]:
    """One column of a feature of all batches, as one list."""
    return [int(value) for batch in found for value in batch[name][:, place]]


def explained(input_fn: Any, config: Any = None, number: int = 20) -> str:
    """The sentence for the error that reading `number` batches raises."""
    with pytest.raises(tf.errors.OpError) as caught:
        batches(input_fn, number)
    explanation = explain_input_error(caught.value, config)
    assert explanation is not None
    return str(explanation)
