"""From an evaluation's sums to what is printed and kept."""

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig
from data.encoders import load_encoder
from errors import UserError

TASK = "validation"


def token_byte_lengths(config: ModelConfig) -> np.ndarray | None:
    """Bytes of text behind each token id, int32 [at least n_vocab]; None where the datasets' tokenizer cannot tell.

    None also for a masked language model: the bits of its guesses, each made from the text on both sides, are no code
    for that text, so that bits per byte would not compare with those of other models.
    """
    if config.mlm_training:
        return None
    tables: list[np.ndarray] = []
    for source in config.datasets:
        table = load_encoder(source.dataset).token_byte_lengths() if source.dataset.tokenizer_path else None
        if table is None or (tables and not np.array_equal(table, tables[0])):
            return None
        tables.append(table)
    return np.pad(tables[0], (0, max(0, config.n_vocab - len(tables[0])))) if tables else None


def summarize(sums: Mapping[str, Any], knows_bytes: bool) -> dict[str, Any]:
    """Token-weighted means from what the model function's evaluation returned.

    Losses are in nats per token; perplexity = exp(cross entropy); bits_per_byte is null where the bytes are not known,
    and whatever is no longer a number is null as well.

    Raises:
        UserError: no token was scored.
    """
    tokens, size = int(sums["tokens"]), int(sums["bytes"])
    if not tokens:
        raise UserError(
            "eval_path holds no token to score in the batches that were read; check it with --check_dataset"
        )
    cross_entropy = float(sums["cross_entropy"])
    bits = cross_entropy / math.log(2)
    result = {
        "task": TASK,
        "global_step": int(sums["global_step"]),
        "time": time.time(),
        "loss": float(sums["objective"]),
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),  # exp() of more has no float
        "bits_per_token": bits,
        "bits_per_byte": bits * tokens / size if knows_bytes and size else None,
        "tokens": tokens,
        "bytes": size if knows_bytes else None,
    }
    return _with_null(result)


def summarize_task(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation task from what the model function's evaluation returned."""
    metrics = {name: float(value) for name, value in found.items() if name not in ("loss", "global_step")}
    counts = {name: int(metrics[name]) for name in ("texts", "tokens")}
    about = {"task": task, "global_step": int(found["global_step"]), "time": time.time()}
    return _with_null(about | metrics | counts)


def _with_null(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with null for what is no finite number, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in result.items()
    }


def report(result: Mapping[str, Any], model_path: str, sacred_id: str) -> None:
    """Print `result` as one JSON line and append it to `<model_path>/eval_<sacred_id>.jsonl`."""
    line = json.dumps(result)
    path = os.path.join(model_path, f"eval_{sacred_id}.jsonl")
    try:
        print(line, flush=True)
    finally:  # kept also when nobody reads what is printed
        _append(path, line)


def _append(path: str, line: str) -> None:
    try:
        with tf.io.gfile.GFile(path, "a") as file:
            file.write(line + "\n")
    except tf.errors.OpError as error:
        raise UserError(
            f"{path!r} cannot be written ({error.message}); the result is the line above; make room or give yourself "
            "the right to write there"
        ) from error
