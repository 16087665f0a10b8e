"""Checkpoint files of a model directory."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow.compat.v1 as tf
from tensorflow.python.training.saver import BulkSaverBuilder

from errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 10  # GPT-Neo keeps ten


def newest_checkpoint(model_path: str) -> str | None:
    """The path, without suffix, of the checkpoint that `<model_path>/checkpoint` names; None where there is none.

    TensorFlow takes checkpoints that it cannot find for none at all, and training would begin anew beside them.

    Raises:
        UserError: the folder holds checkpoints and does not say which is the newest, or lacks some of its files.
    """
    if not tf.io.gfile.exists(model_path):
        return None
    if not tf.io.gfile.isdir(model_path):
        raise UserError(f"model_path {model_path!r} is a file; give the path of a folder")
    state = os.path.join(model_path, "checkpoint")
    present = sorted(_checkpoints_in(model_path), key=_step_in_name)
    write = f"write the line 'model_checkpoint_path: \"{(present or ['model.ckpt-N'])[-1]}\"' into it"
    if not tf.io.gfile.exists(state):
        if all(_step_in_name(name) == 0 for name in present):  # the first one may have been interrupted
            return None
        raise UserError(
            f"model_path {model_path!r} holds {present[-1]} but no file {state!r} that names it as the newest; {write}"
        )
    try:
        found = tf.train.get_checkpoint_state(model_path)
    except ValueError:  # the file names none
        found = None
    if found is None:
        raise UserError(f"{state!r} names no checkpoint; {write}, or start again with --new")
    path = str(found.model_checkpoint_path)
    missing = _missing_files(path)
    if missing:
        raise UserError(f"{state!r} names {os.path.basename(path)!r}, but {missing!r} is not there; {_others(path)}")
    return path


def _checkpoints_in(folder: str) -> list[str]:
    names = tf.io.gfile.listdir(folder)
    return [name.removesuffix(".index") for name in names if name.startswith("model.ckpt-") and name.endswith(".index")]


def _step_in_name(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _missing_files(path: str) -> str | None:
    """A file that the checkpoint `path` lacks."""
    folder, base = os.path.split(path)
    names = set(tf.io.gfile.listdir(folder)) if tf.io.gfile.exists(folder) else set()
    if base in names:  # a checkpoint in TensorFlow's first format is one file
        return None
    if f"{base}.index" not in names:
        return f"{path}.index"
    shards = [name for name in names if name.startswith(f"{base}.data-")]
    if not shards:
        return f"{path}.data-00000-of-00001"
    count = shards[0].rpartition("-")[2]
    wanted = (f"{base}.data-{number:05}-of-{count}" for number in range(int(count)))
    return next((os.path.join(folder, name) for name in wanted if name not in names), None)


def latest_step(model_path: str) -> int:
    """The global step of the newest checkpoint in `model_path`; 0 where there is none. UserError if it is damaged."""
    path = newest_checkpoint(model_path)
    if path is None:
        return 0
    try:
        return int(tf.train.load_checkpoint(path).get_tensor("global_step"))
    except (tf.errors.OpError, ValueError) as error:
        raise damaged_checkpoint(path, error) from error


def damaged_checkpoint(path: str, error: Exception) -> UserError:
    """The sentence for a checkpoint that is there and can't be read."""
    return UserError(f"checkpoint {path!r} cannot be read ({reason(error)}); {_others(path)}")


def _others(path: str) -> str:
    """What to do when the checkpoint `path` is of no use."""
    folder, base = os.path.split(path)
    names = _checkpoints_in(folder) if tf.io.gfile.exists(folder) else []
    others = ", ".join(name for name in names if name != base) or "none"
    return (
        f"copy it again, or let {os.path.join(folder, 'checkpoint')!r} name another one (there: {others}), or start "
        "again with --new"
    )


def reason(error: Exception) -> str:
    """Why TensorFlow failed, in its own words: what stands between the graph's tracebacks and its nodes' names."""
    lines = str(getattr(error, "message", error)).split("\n\t [[")[0].split("\n")
    return lines[-1].strip() or type(error).__name__


class CheckpointSaver(tf.train.Saver):
    """The saver of all variables of the graph; make it when all of them exist.

    A variable that the checkpoint holds as another floating-point type is cast while it is restored: GPT-Neo stored
    the weights of bfloat16 models as bfloat16. What is saved has the types of the graph.

    Attributes:
      cast_types: the types that the newest checkpoint in `model_path` holds variables as and that are cast.
    """

    def __init__(self, model_path: str):
        super().__init__(sharded=True, max_to_keep=CHECKPOINTS_KEPT, save_relative_paths=True)
        self._dtypes = {variable.op.name: variable.dtype.base_dtype for variable in tf.global_variables()}
        path = newest_checkpoint(model_path)
        stored = {} if path is None else self._stored_otherwise(path)
        self.cast_types = sorted({dtype.name for dtype in stored.values()})
        self._casting = tf.train.Saver(sharded=True, builder=_CastingBuilder(stored)) if stored else None

    def restore(self, sess: tf.Session, save_path: str) -> None:
        """Restore all variables; a session that is recovered may find a checkpoint that this run has saved since."""
        if self._casting is not None and self._stored_otherwise(save_path):
            self._casting.restore(sess, save_path)
        else:
            super().restore(sess, save_path)

    def _stored_otherwise(self, path: str) -> dict[str, tf.DType]:
        """{variable: its type in the checkpoint} where that is not the graph's."""
        stored = tf.train.load_checkpoint(path).get_variable_to_dtype_map()
        return {name: stored[name] for name, dtype in self._dtypes.items() if stored.get(name, dtype) != dtype}


class _CastingBuilder(BulkSaverBuilder):
    """Builds restoring operations that read `stored` types and cast them to the variables' own."""

    def __init__(self, stored: Mapping[str, tf.DType]):
        super().__init__()
        self._stored = stored

    def bulk_restore(
        self, filename_tensor: tf.Tensor, saveables: Sequence[Any], preferred_shard: int, restore_sequentially: bool
    ) -> list[tf.Tensor]:
        del preferred_shard, restore_sequentially  # as in the class above: one operation reads everything
        specs = [spec for saveable in saveables for spec in saveable.specs]
        names, slices = [spec.name for spec in specs], [spec.slice_spec for spec in specs]
        dtypes = [self._stored.get(spec.name, spec.dtype) for spec in specs]
        with tf.device("cpu:0"):
            tensors = tf.raw_ops.RestoreV2(
                prefix=filename_tensor, tensor_names=names, shape_and_slices=slices, dtypes=dtypes
            )
            return [tf.cast(tensor, spec.dtype) for tensor, spec in zip(tensors, specs, strict=True)]


class CheckpointHook(tf.train.CheckpointSaverHook):
    """Saves `model.ckpt-N` at the start of a run, every so many steps and at the end: sharded, with relative paths.

    TensorFlow's own hook also writes the graph as text each time, which takes longer than all else for a graph that is
    unrolled over many devices, and saves once more what was just restored. Make it when all variables exist.

    It is of that hook's class so that TPUEstimator leaves saving to it. When a TPU's host announces that it is going to
    shut down, TPUEstimator would otherwise save by itself: the new step, with the weights of the checkpoint before,
    since nothing would have copied the slices to the masters.
    """

    def __init__(self, model_path: str, every_steps: int, steps_per_run: int = 1):
        super().__init__(model_path, save_steps=every_steps, saver=CheckpointSaver(model_path))
        self.before: list[Callable[[tf.Session], object]] = []  # called with the session, before anything is saved
        self._prefix = os.path.join(model_path, "model.ckpt")
        self._model_path = model_path
        self._every_steps = every_steps
        self._steps_per_run = steps_per_run  # at most; a TPU runs many steps before it returns to the host
        tf.add_to_collection(tf.GraphKeys.SAVERS, self._saver)  # where the Estimator looks for what restores
        if self._saver.cast_types:
            types = ", ".join(self._saver.cast_types)
            logger.info("the checkpoint holds %s variables, which are saved as float32 from now on", types)

    def begin(self) -> None:
        self._step = tf.train.get_global_step()
        state = tf.train.get_checkpoint_state(self._model_path)
        if state is not None:  # so that the number kept counts earlier runs' checkpoints too
            self._saver.recover_last_checkpoints(state.all_model_checkpoint_paths)

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        self._saved = latest_step(self._model_path)
        if newest_checkpoint(self._model_path) is None:
            self._save(session, int(session.run(self._step)))

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(self._step)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        # the value fetched beside the training operation may be from before or after it
        if self._is_due(run_values.results + self._steps_per_run):
            step = int(run_context.session.run(self._step))
            if self._is_due(step):
                self._save(run_context.session, step)

    def _is_due(self, step: int) -> bool:
        """Whether a multiple of `every_steps` was passed since the last checkpoint."""
        return bool(step // self._every_steps > self._saved // self._every_steps)

    def end(self, session: tf.Session) -> None:
        step = int(session.run(self._step))
        if step != self._saved:
            self._save(session, step)

    def _save(self, session: tf.Session, step: int) -> None:
        for prepare in self.before:
            prepare(session)
        self._saver.save(session, self._prefix, global_step=step)
        self._saved = step


def stored_shapes(model_path: str) -> dict[str, list[int]] | None:
    """{variable: shape} of the newest checkpoint; None where there is none."""
    path = newest_checkpoint(model_path)
    if path is None:
        return None
    try:
        return dict(tf.train.load_checkpoint(path).get_variable_to_shape_map())
    except (tf.errors.OpError, ValueError) as error:
        raise damaged_checkpoint(path, error) from error


def verify_checkpoint(model_path: str, variables: Sequence[tf.Variable]) -> None:
    """Raise UserError when the newest checkpoint cannot be restored into `variables`: one is missing, or of another
    shape, or of a type that CheckpointSaver does not cast."""
    path, stored = newest_checkpoint(model_path), stored_shapes(model_path)
    if path is None or stored is None:
        return
    dtypes = tf.train.load_checkpoint(path).get_variable_to_dtype_map()
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
        dtype = variable.dtype.base_dtype
        if dtypes[name] != dtype and not (dtypes[name].is_floating and dtype.is_floating):
            raise UserError(
                f"checkpoint {path!r} holds {name!r} as {dtypes[name].name}, which cannot become {dtype.name}: only "
                "floating-point types are cast; use another model_path, or start again with --new"
            )
