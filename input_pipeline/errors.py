"""Mistakes in data that show only while it is read: assertions inside the input graph, and the sentences for them."""

import logging
import re

import tensorflow.compat.v1 as tf

from config import ModelConfig
from errors import UserError
from input_pipeline.tfrecords import FEATURE, TokenReader, find_files

logger = logging.getLogger(__name__)

_MARKED = re.compile(r"<input error>(.*?)</input error>", re.DOTALL)
_OTHER_RECORD = re.compile(r"Could not parse example|Data types don't match")
_DAMAGED = re.compile(r"(corrupted|truncated) record at \d+")


def require(condition: tf.Tensor, *words: str | tf.Tensor) -> tf.Operation:
    """An assertion whose failure `explain_input_error` turns into the sentence that the words and numbers spell."""
    parts = [word if isinstance(word, str) or word.dtype == tf.string else tf.strings.as_string(word) for word in words]
    return tf.debugging.Assert(condition, [tf.strings.join(["<input error>", *parts, "</input error>"])])


def explain_input_error(error: BaseException, config: ModelConfig | None = None) -> UserError | None:
    """The user's mistake behind an exception that a session raised while it read data, or None if it is no such thing.

    Recognises the assertions made with `require`, records that are no tf.train.Example with an int64 `text`, and
    damaged files. TensorFlow does not say which file is damaged: with `config`, all files of its datasets are read to
    find it.
    """
    if not isinstance(error, tf.errors.OpError):
        return None
    message = error.message or ""
    if marked := _MARKED.search(message):
        return UserError(re.sub(r"\\(['\"\\])", r"\1", marked[1]))
    if isinstance(error, tf.errors.DataLossError) and _DAMAGED.search(message):
        return (config and _find_damage(config)) or UserError(
            "a tfrecords file is damaged or cut short; --check_dataset names it"
        )
    if isinstance(error, tf.errors.InvalidArgumentError) and _OTHER_RECORD.search(message):
        return (config and _find_damage(config)) or UserError(
            f"a tfrecords file holds something else than tf.train.Examples with an int64 feature `{FEATURE}`; "
            "--check_dataset names it"
        )
    return None


def _find_damage(config: ModelConfig) -> UserError | None:
    patterns = {
        (pattern, key, source.dataset.id): None  # a dict keeps their order and drops repetitions
        for source in config.datasets
        for key, pattern in (("path", source.dataset.path), ("eval_path", source.dataset.eval_path))
        if pattern
    }
    logger.info("looking for the file that can't be read")
    with TokenReader() as reader:
        try:
            for pattern in patterns:
                for path in find_files(*pattern):
                    for _ in reader.read(path):
                        pass
        except UserError as error:
            return error
    return None
