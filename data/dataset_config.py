"""The dataset config that points a model at the tfrecords just made."""

import json
import os
from typing import Any, NamedTuple

from config import DATASET_CONFIG_DIR, read_text
from data.files import exists, is_remote, join
from errors import UserError

DEFAULT_CONFIG = ""  # stands for configs/dataset_configs/NAME.json

_ROOT = str(DATASET_CONFIG_DIR.parent.parent)


class PlannedFile(NamedTuple):
    """A file to write: where, and what."""

    path: str
    text: str


def plan_dataset_config(path: str | None, name: str, output_dir: str, tokenizer: dict[str, Any]) -> PlannedFile | None:
    """The dataset config of a set of tfrecords, to be written when the set is complete.

    Args:
        path: where to; DEFAULT_CONFIG for the usual place; None for no dataset config.
        name: the set's name.
        output_dir: the set's folder.
        tokenizer: its path, vocab_size, eos_id and padding_id.

    Returns:
        None if nothing is to be written: none is wanted, or the very same is there already.

    Raises:
        UserError: the file exists with other content.
    """
    if path is None:
        return None
    path = path or str(DATASET_CONFIG_DIR / f"{name}.json")
    is_file = is_remote(tokenizer["path"]) or exists(tokenizer["path"])
    values = {
        "n_vocab": tokenizer["vocab_size"],
        "path": join(_from_root(output_dir), f"{name}_*.tfrecords"),
        "eval_path": "",
        "tokenizer_path": _from_root(tokenizer["path"]) if is_file else tokenizer["path"],
        "tokenizer_is_pretrained": not is_file,
        "eos_id": tokenizer["eos_id"],
        "padding_id": tokenizer["padding_id"],
    }
    text = json.dumps({key: value for key, value in values.items() if value is not None}, indent=2) + "\n"
    if not exists(path):
        return PlannedFile(path, text)
    if read_text(path) != text:
        raise UserError(f"--write_dataset_config {path} exists with other content; remove it or give another path")
    return None


def _from_root(path: str) -> str:
    """A local path as a command started in the project's folder finds it."""
    if is_remote(path):
        return path
    absolute = os.path.abspath(path)
    return os.path.relpath(absolute, _ROOT) if absolute.startswith(_ROOT + os.sep) else absolute
