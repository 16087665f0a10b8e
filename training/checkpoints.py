"""Checkpoint files of a model directory."""

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from errors import UserError

CHECKPOINTS_KEPT = 10  # GPT-Neo keeps ten


def latest_step(model_path: str) -> int:
    """The global step of the newest checkpoint in `model_path`; 0 where there is none."""
    path = tf.train.latest_checkpoint(model_path)
    return 0 if path is None else int(tf.train.load_checkpoint(path).get_tensor("global_step"))


def checkpoint_hook(
    model_path: str, every_steps: int, listener: tf.train.CheckpointSaverListener
) -> tf.train.CheckpointSaverHook:
    """Saves `model.ckpt-N` (sharded, with relative paths) every so many steps, at the start and at the end."""
    saver = tf.train.Saver(tf.global_variables(), sharded=True, max_to_keep=CHECKPOINTS_KEPT, save_relative_paths=True)
    tf.add_to_collection(tf.GraphKeys.SAVERS, saver)
    return tf.train.CheckpointSaverHook(model_path, save_steps=every_steps, saver=saver, listeners=[listener])


def verify_checkpoint(model_path: str, variables: Sequence[tf.Variable]) -> None:
    """Raise UserError when the newest checkpoint cannot hold `variables`: one is missing or has another shape."""
    path = tf.train.latest_checkpoint(model_path)
    if path is None:
        return
    try:
        stored = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise UserError(
            f"checkpoint {path!r} cannot be read ({str(error).splitlines()[0]}); "
            f"let {model_path}/checkpoint name an older one, or start again with --new"
        ) from error
    for variable in variables:
        name, shape = variable.op.name, variable.shape.as_list()
        if name not in stored:
            raise UserError(
                f"checkpoint {path!r} has no variable {name!r}, which the config asks for; "
                "use the config it was trained with, another model_path, or start again with --new"
            )
        if list(stored[name]) != shape:
            raise UserError(
                f"checkpoint {path!r} holds {name!r} of shape {list(stored[name])} but the config makes it {shape}; "
                "use the config it was trained with, another model_path, or start again with --new"
            )
