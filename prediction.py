"""Prompts in, continuations out."""

import itertools
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig, read_text
from data.encoders import Encoder, load_encoder
from errors import UserError
from mesh.layout import MeshLayout

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Once upon a time"
SEPARATOR = "---"


def require_encoder(config: ModelConfig) -> Encoder:
    """The tokenizer of the first dataset that has one; UserError where none has."""
    for source in config.datasets:
        if source.dataset.tokenizer_path is not None:
            return load_encoder(source.dataset)
    raise UserError("datasets name no tokenizer, which prompts need; give a dataset config with a tokenizer_path")


def read_prompts(path: str | None, per_line: bool) -> list[str]:
    """The prompts of a file: all of it, or its parts between lines '---', or each of its lines."""
    if path is None:
        return [DEFAULT_PROMPT]
    try:
        text = read_text(path)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    if not text.strip():
        raise UserError(f"--prompt {path!r} is empty; write the text to continue into it")
    lines = text.removesuffix("\n").split("\n")
    if per_line:
        return [line for line in lines if line]
    groups = itertools.groupby(lines, key=lambda line: line.rstrip() == SEPARATOR)
    prompts = ["\n".join(group) for is_separator, group in groups if not is_separator]
    if not prompts:
        raise UserError(f"--prompt {path!r} holds separators {SEPARATOR!r} alone; write the text to continue into it")
    return prompts


def encode_prompt(
    encoder: Encoder, text: str, config: ModelConfig, max_new_tokens: int | None, eos_id: int
) -> list[int]:
    """Token ids of a prompt; the front of one that leaves no room in n_ctx is left out of what the model sees."""
    ids = encoder.encode(text) or [eos_id]
    if max(ids) >= config.n_vocab:
        raise UserError(
            f"the prompt {text[:40]!r} has token id {max(ids)} but n_vocab is {config.n_vocab}; "
            "use the tokenizer the model was trained with"
        )
    if len(ids) < config.n_ctx:
        return ids
    room = min(max_new_tokens or config.n_ctx, max(1, config.n_ctx // 2))
    kept = config.n_ctx - room
    logger.warning(
        "the prompt %r has %d tokens of the context's %d; the model sees its last %d, to make room for %d new ones",
        text[:40],
        len(ids),
        config.n_ctx,
        kept,
        room,
    )
    return ids[-kept:]


def decode_length(
    prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int | None, layout: MeshLayout
) -> int:
    """Positions that the longest prompt and its continuation need, rounded up to what the layout can split."""
    if max_new_tokens is None:
        return config.n_ctx
    needed = max(len(prompt) for prompt in prompts) + max_new_tokens
    ways = layout.ways("sequence") * layout.ways("memory_length")
    return min(config.n_ctx, -(-needed // ways) * ways)


def write(
    path: str,
    stream: TextIO,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    rows: Iterable[Mapping[str, np.ndarray]],
    encoder: Encoder,
    as_json: bool,
) -> None:
    """Write each prompt with its continuation to `stream` as it comes and, once all are there, to the file `path`."""
    blocks = []
    for number, (prompt, ids, row) in enumerate(zip(prompts, encoded, rows, strict=False)):
        new_ids = row["tokens"][len(ids) : int(row["length"])].tolist()
        block = _block(number, prompt, _continuation(encoder, ids, new_ids), len(new_ids), as_json)
        print(block, file=stream, flush=True)
        blocks.append(block + "\n")
    try:
        tf.io.gfile.makedirs(os.path.dirname(path) or ".")
        with tf.io.gfile.GFile(path + ".tmp", "w") as file:
            file.write("".join(blocks))
        tf.io.gfile.rename(path + ".tmp", path, overwrite=True)
    except tf.errors.OpError as error:
        raise UserError(
            f"--output {path!r} cannot be written ({error.message}); the texts are above; choose another file"
        ) from error


def _continuation(encoder: Encoder, prompt: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text of `new_ids` behind the prompt; alone, some tokenizers leave out the space before its first word."""
    whole, before = encoder.decode([*prompt, *new_ids]), encoder.decode(prompt)
    return whole.removeprefix(before) if whole.startswith(before) else encoder.decode(new_ids)


def _block(number: int, prompt: str, continuation: str, new_tokens: int, as_json: bool) -> str:
    if as_json:
        record: dict[str, Any] = {"prompt": prompt, "continuation": continuation, "new_tokens": new_tokens}
        return json.dumps(record, ensure_ascii=False)
    return f"======== {number + 1}: {new_tokens} new tokens ========\n{prompt}{continuation}"
