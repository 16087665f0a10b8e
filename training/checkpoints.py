"""Checkpoint files of a model directory."""

import os
from collections.abc import Callable, Sequence

import tensorflow.compat.v1 as tf

from errors import UserError

CHECKPOINTS_KEPT = 10  # GPT-Neo keeps ten


def latest_step(model_path: str) -> int:
    """The global step of the newest checkpoint in `model_path`; 0 where there is none."""
    path = tf.train.latest_checkpoint(model_path)
    return 0 if path is None else int(tf.train.load_checkpoint(path).get_tensor("global_step"))


class CheckpointHook(tf.train.SessionRunHook):
    """Saves `model.ckpt-N` at the start of a run, every so many steps and at the end: sharded, with relative paths.

    TensorFlow's own hook also writes the graph as text each time, which takes longer than all else for a graph that is
    unrolled over many devices, and saves once more what was just restored. Make it when all variables exist.
    """

    def __init__(self, model_path: str, every_steps: int, before_save: Callable[[tf.Session], None]):
        self._prefix = os.path.join(model_path, "model.ckpt")
        self._model_path = model_path
        self._every_steps = every_steps
        self._before_save = before_save
        self._saver = tf.train.Saver(sharded=True, max_to_keep=CHECKPOINTS_KEPT, save_relative_paths=True)
        tf.add_to_collection(tf.GraphKeys.SAVERS, self._saver)  # where the Estimator looks for what restores

    def begin(self) -> None:
        self._step = tf.train.get_global_step()
        state = tf.train.get_checkpoint_state(self._model_path)
        if state is not None:  # so that the number kept counts earlier runs' checkpoints too
            self._saver.recover_last_checkpoints(state.all_model_checkpoint_paths)

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        self._saved = latest_step(self._model_path)
        if tf.train.latest_checkpoint(self._model_path) is None:
            self._save(session, int(session.run(self._step)))

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(self._step)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        # the value fetched beside the training operation may be from before or after it
        if run_values.results + 1 >= self._saved + self._every_steps:
            step = int(run_context.session.run(self._step))
            if step >= self._saved + self._every_steps:
                self._save(run_context.session, step)

    def end(self, session: tf.Session) -> None:
        step = int(session.run(self._step))
        if step != self._saved:
            self._save(session, step)

    def _save(self, session: tf.Session, step: int) -> None:
        self._before_save(session)
        self._saver.save(session, self._prefix, global_step=step)
        self._saved = step


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
