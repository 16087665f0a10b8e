"""How many windows each file gives where that depends on its records' lengths: counted once, then remembered.

A position in the training order is found by these counts, so that a resumed run need not read what it has trained on.
"""

import json
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import tensorflow.compat.v1 as tf
from tqdm import tqdm

from config import read_text
from data.files import write_text
from errors import UserError
from input_pipeline.tfrecords import TokenReader

if TYPE_CHECKING:
    from input_pipeline.sources import Source

logger = logging.getLogger(__name__)

Counter: TypeAlias = Callable[[np.ndarray, np.ndarray, "Source", str], int]

CACHE_NAME = "window_counts.json"  # in model_path; --new leaves it, since it tells of the data and not of the model


def whole_windows(lengths: np.ndarray, ends: np.ndarray, source: "Source", path: str) -> int:
    """Windows in records of `lengths` tokens cut one by one, those that are too short for a window left out."""
    del ends, path
    return int(((lengths - 1) // source.n_ctx).clip(0).sum())


def group_windows(lengths: np.ndarray, ends: np.ndarray, source: "Source", path: str) -> int:
    """Windows in groups of `stitch` documents, each joined and read to its last token.

    The documents left over at a file's end belong to its last group. UserError where a group is too short for a window.

    Args:
        lengths: int [documents], tokens in each.
        ends: bool [documents], whether its last token is an eos, so that joining adds none.
        source, path: where they are from.
    """
    joined = lengths + ~ends
    groups = max(1, len(joined) // source.stitch)
    tokens = np.add.reduceat(joined, np.arange(groups) * source.stitch)
    shortest = int(tokens.argmin())
    if tokens[shortest] <= source.n_ctx:
        documents = lengths[shortest * source.stitch :][: source.stitch]
        raise UserError("".join(map(str, too_short(source, path, len(documents), documents.min(), tokens[shortest]))))
    return int((-(-(tokens - 1) // source.n_ctx)).sum())


_Word = TypeVar("_Word")


def too_short(
    source: "Source", where: str, documents: _Word, shortest: _Word, tokens: _Word
) -> tuple[str | _Word, ...]:
    """The words for so many documents in a row that hold too few tokens for a window; numbers may be tensors."""
    return (
        f"{source.title}: ", documents, f" documents in a row of {where}, the shortest of ", shortest, " tokens, hold ",
        tokens, f" in all, and a window needs n_ctx + 1 = {source.n_ctx + 1}; set stitch (now {source.stitch}) so that "
        "stitch * (tokens of the shortest document + 1) >= n_ctx + 1",
    )  # fmt: skip


def count_windows(source: "Source", count: Counter) -> list[int]:
    """`count` for each of the source's files; files that an earlier run counted are not read again.

    Raises:
        UserError: naming a file that can't be read.
    """
    cache = os.path.join(source.model_path, CACHE_NAME)
    known = _load(cache)
    keys = {path: _key(source, count.__name__, path) for path in source.files}
    unknown = [path for path in source.files if keys[path] not in known]
    if unknown:
        with TokenReader() as reader, tqdm(unknown, desc=f"counting windows of {source.title}", unit="file") as bar:
            for path in bar:
                batches = [(records.lengths, records.ends_in(source.eos_id)) for records in reader.read(path)]
                if batches:
                    lengths, ends = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
                known[keys[path]] = count(lengths, ends, source, path) if batches else 0
        _save(cache, known)
    return [known[keys[path]] for path in source.files]


def _key(source: "Source", how: str, path: str) -> str:
    stat = tf.io.gfile.stat(path)
    return " ".join(map(str, (path, stat.length, stat.mtime_nsec, how, source.n_ctx, source.stitch, source.eos_id)))


def _load(cache: str) -> dict[str, int]:
    try:
        known = json.loads(read_text(cache)) if tf.io.gfile.exists(cache) else {}
        return {key: int(count) for key, count in known.items()}
    except (UserError, ValueError, AttributeError, TypeError):  # not ours, or from another version: count again
        return {}


def _save(cache: str, known: dict[str, int]) -> None:
    try:
        write_text(cache, json.dumps(known, indent=1) + "\n")
    except UserError as error:
        logger.warning("the next start counts again: %s", error)
