"""Session hooks for TPUs, where one run of the session is many steps, or all batches of an evaluation."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import tensorflow.compat.v1 as tf
from tqdm import tqdm

from config import ModelConfig
from mesh import mtf
from training.hooks import BatchBar, progress_bar
from training.sums import running_sum

_BATCHES_DONE = "batches_done"  # collection of the graph


def loss_for_host(metrics: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """metrics["loss"] [], or NaN where any of `metrics` is no longer a finite number.

    The loss of a run's last step is all that its hooks can fetch. The Estimator ends training when it is NaN, before
    anything is saved, and weights that are not finite are not so again: the last step tells of all of them.
    """
    finite = tf.reduce_all(tf.math.is_finite(tf.stack(list(metrics.values()))))
    return tf.where_v2(finite, metrics["loss"], float("nan"))


def summaries_by_host(model_path: str, scalars: Mapping[str, tf.Tensor], train_op: tf.Tensor) -> Any:
    """A host call that writes `scalars` [] of every step to TensorBoard's events in `model_path`.

    As in metrics.jsonl, the step is the number of steps done: it is read after `train_op`, which counts it.
    """
    for name, value in scalars.items():
        tf.add_to_collection(mtf.utils.SCALAR_SUMMARIES_COLLECTION_KEY, (name, value))
    with tf.control_dependencies([train_op]):
        return mtf.utils.create_host_call(model_path)


class RunProgressHook(tf.train.SessionRunHook):
    """The progress line, renewed whenever the TPU comes back to its host, with the loss of the last step.

    The metrics of every step are written by the host as the TPU goes on, to TensorBoard's events.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self._bar: tqdm | None = None

    def begin(self) -> None:
        self._step = tf.train.get_global_step()
        self._loss = tf.get_collection(tf.GraphKeys.LOSSES)[-1]  # the Estimator's, on the host

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        first = int(session.run(self._step))
        self._last_time = time.monotonic()
        if self._bar is None:
            self._bar = progress_bar(f"train {self._config.name}", "step", self._config.train_steps, first)
        else:  # the session was recovered after a lost worker
            self._bar.n = first

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(self._loss)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        assert self._bar is not None
        # fetched beside the steps, the value could be from before them
        steps = int(run_context.session.run(self._step)) - int(self._bar.n)
        now = time.monotonic()
        speed = steps * self._config.tokens_per_batch / (now - self._last_time)
        self._last_time = now
        self._bar.set_postfix_str(f"loss {run_values.results:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(steps)

    def end(self, session: tf.Session) -> None:
        self.close()

    def close(self) -> None:
        """End the progress line; once more does no harm."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def count_batches() -> tf.Operation:
    """An operation for each batch of an evaluation to run on the host, where OneRunBar looks at the count."""
    count, update = running_sum("batches", tf.constant(1))
    tf.add_to_collection(_BATCHES_DONE, count)
    return update.op


class OneRunBar(BatchBar):
    """The bar of an evaluation whose batches are all one run: a thread looks how many the host has counted."""

    _INTERVAL = 1.0  # seconds

    def begin(self) -> None:
        (self._done,) = tf.get_collection(_BATCHES_DONE)

    def before_run(self, run_context: tf.train.SessionRunContext) -> None:
        self._over = threading.Event()
        self.closing.callback(self._over.set)
        self._thread = threading.Thread(target=self._watch, args=(run_context.session,), daemon=True)
        self._thread.start()

    def _watch(self, session: tf.Session) -> None:
        while not self._over.wait(self._INTERVAL):
            try:
                self.show(int(session.run(self._done)))
            except (tf.errors.OpError, RuntimeError):  # whatever ended the session is raised by the run itself
                return

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        self._over.set()
        self._thread.join()
        self.show(self.total)
