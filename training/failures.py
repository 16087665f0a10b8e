"""From what TensorFlow raises while a graph runs to what its user can do about it."""

import contextlib
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

from config import ModelConfig
from errors import UserError
from inputs import explain_input_error
from training.checkpoints import damaged_checkpoint, latest_step, newest_checkpoint, reason

_SAVES = ("SaveV2", "MergeV2Checkpoints")  # operations
# How TensorFlow's local file system says what the system said. A full disk has the error code of a full memory.
_DISK = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system")


@contextlib.contextmanager
def explained(config: ModelConfig, batch_key: str) -> Iterator[None]:
    """Turn what TensorFlow raises for a user's mistake into the UserError that says it.

    `batch_key` names the batch that is run, such as "train_batch_size".
    """
    try:
        yield
    except tf.train.NanLossDuringTrainingError as error:
        raise UserError(
            f"the loss or its gradient is no longer a finite number; lr {config.lr} may be too high or warmup_steps "
            f"{config.warmup_steps} too few; the checkpoint of step {latest_step(config.model_path)} in "
            f"{config.model_path} was made before that, so lower lr and run again, or start again with --new"
        ) from error
    except tf.errors.OpError as error:
        explanation = _explanation(error, config, batch_key)
        if explanation is None:
            raise
        raise explanation from error


def _explanation(error: tf.errors.OpError, config: ModelConfig, batch_key: str) -> UserError | None:
    why = reason(error)
    operation = error.op.type if error.op is not None else ""
    if operation == "RestoreV2":
        return damaged_checkpoint(newest_checkpoint(config.model_path) or config.model_path, error)
    if operation in _SAVES or why.endswith(_DISK):
        return UserError(
            f"model_path {config.model_path!r} cannot be written ({why}); put that right and run the same command, "
            "which goes on from the last checkpoint"
        )
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return UserError(
            f"the devices ran out of memory; lower {batch_key} {getattr(config, batch_key)}, set "
            "tokens_per_mb_per_replica or recompute_grad, or split more dimensions in layout; --plan says what a "
            "training step needs"
        )
    return explain_input_error(error, config)
