"""The folder `model_path`: made, described by config.json, and emptied by --new."""

import fnmatch
import json
import logging
import os
import re
import sys

import tensorflow.compat.v1 as tf

from config import ModelConfig, config_to_json, load_model_config, read_text
from config_fields import EVAL_TASKS
from errors import UserError
from training.checkpoints import reason

logger = logging.getLogger(__name__)

_CONFIG = "config.json"
# What runs write there, besides config.json, which the next run replaces.
_WRITTEN = (
    *("checkpoint", "model.ckpt-*", "graph.pbtxt", "metrics.jsonl", "events.out.tfevents.*"),
    *("eval_*.jsonl", "predictions_*_[0-9]*.txt", "config.json.tmp", "metrics.jsonl.tmp"),
)
# Written there as well, but about the data, not about the model: --new leaves them.
_ABOUT_DATA = ("window_counts.json", "dataset_examples.txt")
# And in folders: curves of evaluations, which the Estimator keeps apart, and SavedModels.
_EVENTS = r"events\.out\.tfevents\..*"
_WRITTEN_IN_FOLDERS = {"eval": _EVENTS, "export": r"\d+(\.tmp)?"} | {f"eval_{task}": _EVENTS for task in EVAL_TASKS}


def make_model_dir(config: ModelConfig) -> None:
    """Create `model_path`; UserError where it can't be written or holds a config.json that is none of ours."""
    folder = config.model_path
    path = os.path.join(folder, _CONFIG)
    try:
        tf.io.gfile.makedirs(folder)
        if tf.io.gfile.exists(path) and not _is_ours(path):
            raise UserError(
                f"model_path {folder!r} holds a {_CONFIG} that no run wrote and that training would replace; choose "
                "another model_path"
            )
        _write(path + ".tmp", config)
        tf.io.gfile.remove(path + ".tmp")
    except tf.errors.OpError as error:
        raise UserError(
            f"model_path {folder!r} cannot be written ({reason(error)}); choose a folder you may write to"
        ) from error


def _is_ours(path: str) -> bool:
    try:
        return "model_path" in json.loads(read_text(path))
    except (UserError, ValueError, TypeError):
        return False


def _write(path: str, config: ModelConfig) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(config_to_json(config))


# Keys that change what a model computes and none of its variables: a checkpoint cannot tell that they are wrong.
_INVISIBLE = (
    "n_head",
    "activation_function",
    "layer_attention",
    "local_attention_radius",
    "rotary_emb",
    "mlm_training",
)


def warn_of_changes(config: ModelConfig) -> None:
    """Warn where the model in `model_path` was trained as another one that has the same variables."""
    try:
        trained = load_model_config(os.path.join(config.model_path, _CONFIG))
    except UserError:  # trained elsewhere, or long ago
        return
    for key in _INVISIBLE:
        was, now = getattr(trained, key), getattr(config, key)
        if was != now and (key != "local_attention_radius" or "local" in config.layer_attention):
            logger.warning("%s is %s, but the model in %s was trained with %s", key, now, config.model_path, was)


class KeepConfig(tf.train.SessionRunHook):
    """Writes the run's config.json once the graph is built, when the checkpoint is known to be of this config."""

    def __init__(self, config: ModelConfig):
        self._config = config

    def begin(self) -> None:
        path = os.path.join(self._config.model_path, _CONFIG)
        _write(path + ".tmp", self._config)
        tf.io.gfile.rename(path + ".tmp", path, overwrite=True)


def delete_model(model_path: str, yes: bool) -> None:
    """Delete what runs wrote in `model_path`, if there is a model and the user agrees; other files stay."""
    if not tf.io.gfile.isdir(model_path):
        return
    names = [name.rstrip("/") for name in tf.io.gfile.listdir(model_path)]
    written = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _WRITTEN)]
    others = sorted({*names} - {*written, *_ABOUT_DATA, _CONFIG})
    if others and not any(name == "checkpoint" or name.startswith("model.ckpt-") for name in written):
        raise UserError(
            f"--new would delete what is in model_path {model_path!r}, but no model was trained there (it holds "
            f"{others[0]!r}); correct model_path"
        )
    if not written:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"--new would delete the model in {model_path!r} and nobody is there to ask; add --yes")
        if input(f"delete the model in {model_path!r} and start again at step 0? [y/N] ").strip().lower() not in (
            "y",
            "yes",
        ):
            raise UserError(f"--new: {model_path!r} was kept; run without --new to go on from its last checkpoint")
    try:
        for name in written:
            tf.io.gfile.remove(os.path.join(model_path, name))
        for folder, written_there in _WRITTEN_IN_FOLDERS.items():
            _delete_in(os.path.join(model_path, folder), written_there)
        left = sorted({name.rstrip("/") for name in tf.io.gfile.listdir(model_path)} - {*_ABOUT_DATA, _CONFIG})
    except tf.errors.OpError as error:
        raise UserError(f"--new cannot delete {model_path!r} ({reason(error)}); delete it by hand") from error
    if left:
        logger.info("--new: %s in %s stays", ", ".join(left), model_path)


def _delete_in(folder: str, pattern: str) -> None:
    """Delete what the regular expression `pattern` matches in `folder`, and the folder if that leaves it empty."""
    if not tf.io.gfile.isdir(folder):
        return
    for name in tf.io.gfile.listdir(folder):
        if re.fullmatch(pattern, name.rstrip("/")):
            path = os.path.join(folder, name)
            (tf.io.gfile.rmtree if tf.io.gfile.isdir(path) else tf.io.gfile.remove)(path)
    if not tf.io.gfile.listdir(folder):
        tf.io.gfile.rmtree(folder)
