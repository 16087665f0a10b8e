"""A checkpoint as a SavedModel: weights and graph in one folder that plain TensorFlow runs, without this project."""

import logging

import tensorflow.compat.v1 as tf

from errors import UserError
from model_fns import Run, serving_outputs
from training.checkpoints import CheckpointSaver, newest_checkpoint, reason, verify_checkpoint
from training.hooks import progress_bar

logger = logging.getLogger(__name__)

FOLDER = "export"  # in model_path

Signature = tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]  # inputs and outputs


def export(run: Run, padding_id: int, path: str) -> None:
    """Write the newest checkpoint to the folder `path`, all of it or nothing; `run` names one local device.

    Raises:
        UserError: the checkpoint is not of this config, or `path` cannot be written.
    """
    aside = f"{path}.tmp"  # to a server that watches the folder, a name that is no number is no version
    try:
        _remove(aside)  # left by an export that was killed
        _write(run, padding_id, aside)
        tf.io.gfile.rename(aside, path)
    except tf.errors.OpError as error:
        if error.op is not None and error.op.type == "RestoreV2":
            raise
        raise UserError(f"{path!r} cannot be written ({reason(error)}); put that right and export again") from error
    finally:
        _remove(aside)


def _remove(path: str) -> None:
    if tf.io.gfile.exists(path):
        tf.io.gfile.rmtree(path)


def _write(run: Run, padding_id: int, path: str) -> None:
    assert run.devices is not None
    config = run.config
    with tf.Graph().as_default(), progress_bar(f"export {config.name}", "stage", 3) as bar:
        signatures = {name: _definition(*tensors) for name, tensors in serving_signatures(run, padding_id).items()}
        verify_checkpoint(config.model_path, tf.global_variables())
        bar.update()
        with tf.Session(config=run.devices.session_config()) as session:
            checkpoint = newest_checkpoint(config.model_path)
            assert checkpoint is not None  # the action asks for one first
            CheckpointSaver(config.model_path).restore(session, checkpoint)
            bar.update()
            builder = tf.saved_model.Builder(path)
            builder.add_meta_graph_and_variables(
                session, [tf.saved_model.SERVING], signatures, clear_devices=True, strip_default_attrs=True
            )
            builder.save()
        bar.update()


def _definition(inputs: dict[str, tf.Tensor], outputs: dict[str, tf.Tensor]) -> object:
    return tf.saved_model.predict_signature_def(inputs, outputs)


def serving_signatures(run: Run, padding_id: int) -> dict[str, Signature]:
    """{name: (inputs, outputs)} of the model, with its graph.

    `tokens` int32 [rows, columns] holds up to predict_batch_size rows of up to n_ctx ids; `length` int32 [rows] says
    how many of each row are text: all where it is not given. Outputs: `logits` float32 [rows, columns, vocab];
    `samples` int32 [rows, longest], the texts with their continuations, filled up with eos_id; `sample_length` [rows].
    """
    rows, context = run.config.predict_batch_size, run.config.n_ctx
    tokens = tf.placeholder(tf.int32, [None, None], "tokens")
    given, columns = tf.unstack(tf.shape(tokens))
    length = tf.placeholder_with_default(tf.fill([given], columns), [None], "length")
    with tf.control_dependencies(_checks(tokens, length, rows, context)):
        missing = [[0, rows - given], [0, context - columns]]
        features = {
            "inputs": tf.ensure_shape(tf.pad(tokens, missing, constant_values=padding_id), [rows, context]),
            # a row of the full length leaves nothing to continue
            "prompt_length": tf.ensure_shape(tf.pad(length, missing[:1], constant_values=context), [rows]),
            "prompt_number": tf.range(rows),
        }
    found = serving_outputs(run, features)
    sample_length = tf.identity(found["length"][:given], "sample_length")
    outputs = {
        "logits": tf.identity(found["logits"][:given, :columns], "logits"),
        "samples": tf.identity(found["tokens"][:given, : tf.reduce_max(sample_length)], "samples"),
        "sample_length": sample_length,
    }
    inputs = {"tokens": tokens}
    return {
        tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: (inputs, outputs),
        "with_lengths": (inputs | {"length": length}, outputs),
    }


def _checks(tokens: tf.Tensor, length: tf.Tensor, rows: int, context: int) -> list[tf.Operation]:
    """What a caller can do wrong, in the caller's words."""
    given, columns = tf.unstack(tf.shape(tokens))
    holds = f"this model was exported for 1 to {rows} rows (predict_batch_size) of 1 to {context} tokens (n_ctx)"
    fits = (given >= 1) & (given <= rows) & (columns >= 1) & (columns <= context)
    inside = tf.reduce_all((length >= 1) & (length <= columns))
    return [
        tf.debugging.Assert(fits, ["tokens has the shape", tf.shape(tokens), "; " + holds]),
        tf.debugging.assert_equal(tf.shape(length), [given], message="length must hold a number for each row"),
        tf.debugging.Assert(inside, ["length is", length, "; each must be from 1 to the columns of tokens,", columns]),
    ]
