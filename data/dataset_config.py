"""The dataset config that points a model at tfrecords and the tokenizer that made them."""

import json
import os
from typing import Any, NamedTuple

from config import DATASET_CONFIG_DIR, read_text
from data.files import exists, is_remote, write_text
from errors import UserError

DEFAULT_CONFIG = ""  # stands for configs/dataset_configs/NAME.json

_ROOT = str(DATASET_CONFIG_DIR.parent.parent)


class PlannedConfig(NamedTuple):
    """A dataset config to write: where, its text, and whether it names no records for evaluation."""

    path: str
    text: str
    lacks_eval: bool

    def write(self) -> str:
        """Write it; a sentence that says so."""
        write_text(self.path, self.text)
        advice = "; its eval_path is empty: give --eval_path, or put it in, to evaluate" if self.lacks_eval else ""
        return f"dataset config: {self.path}{advice}"


def plan_dataset_config(
    path: str | None,
    name: str,
    records: str,
    eval_records: str,
    tokenizer: dict[str, Any],
    overwrite: bool = False,
) -> PlannedConfig | None:
    """A dataset config, to be written when what it names is there.

    Args:
        path: where to; DEFAULT_CONFIG for the usual place; None for no dataset config.
        name: the dataset's id in the usual place.
        records: glob of the files to train on.
        eval_records: glob of those to evaluate on; "" if there are none.
        tokenizer: its path, vocab_size, eos_id and padding_id.
        overwrite: whether another dataset config may be replaced.

    Returns:
        None if nothing is to be written: none is wanted, or the very same is there already.

    Raises:
        UserError: the file exists with other content.
    """
    if path is None:
        return None
    path = path or str(DATASET_CONFIG_DIR / f"{name}.json")
    # One that is yet to be written is a JSON file; what else is not there is a name on the model hub.
    is_file = is_remote(tokenizer["path"]) or exists(tokenizer["path"]) or tokenizer["path"].endswith(".json")
    values = {
        "n_vocab": tokenizer["vocab_size"],
        "path": _from_root(records),
        "eval_path": _from_root(eval_records) if eval_records else "",
        "tokenizer_path": _from_root(tokenizer["path"]) if is_file else tokenizer["path"],
        "tokenizer_is_pretrained": not is_file,
        "eos_id": tokenizer["eos_id"],
        "padding_id": tokenizer["padding_id"],
    }
    text = json.dumps({key: value for key, value in values.items() if value is not None}, indent=2) + "\n"
    if overwrite or not exists(path):
        return PlannedConfig(path, text, not eval_records)
    if read_text(path) != text:
        raise UserError(f"--write_dataset_config {path} exists with other content; remove it or give another path")
    return None


def _from_root(path: str) -> str:
    """A local path as a command started in the project's folder finds it."""
    if is_remote(path):
        return path
    absolute = os.path.abspath(path)
    return os.path.relpath(absolute, _ROOT) if absolute.startswith(_ROOT + os.sep) else absolute
