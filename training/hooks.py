"""Session hooks: the progress line, metrics.jsonl, TensorBoard scalars, and stopping on a signal."""

import json
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import tensorflow.compat.v1 as tf
from tqdm import tqdm

from config import ModelConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class StopOnSignal(tf.train.SessionRunHook):
    """Ask training to stop after the current step on the first SIGINT or SIGTERM; the second ends the process at once.

    Used as a context manager around everything that should end cleanly; `signum` then tells which signal came, if any.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        logger.warning("%s: stopping after this step; once more ends at once", signal.Signals(signum).name)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: Any) -> None:
        if self.signum is not None:
            run_context.request_stop()

    def __deepcopy__(self, memo: dict) -> "StopOnSignal":
        return self  # Estimator copies its parameters; a copy would not hear the signal


def progress_bar(title: str, unit: str, total: int, first: int = 0) -> tqdm:
    """A bar on standard error: redrawn in a terminal, a line every ten seconds in a log."""
    often = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=first, desc=title, unit=unit, dynamic_ncols=True, mininterval=often)


class BatchBar(tf.train.SessionRunHook):
    """A progress bar over the batches of an evaluation."""

    def __init__(self, title: str, total: int):
        self._bar = progress_bar(title, "batch", total)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        self._bar.update(1)

    def end(self, session: tf.Session) -> None:
        self._bar.close()


class ProgressHook(tf.train.SessionRunHook):
    """One progress line, and every step's metrics in TensorBoard and in `<model_path>/metrics.jsonl`."""

    def __init__(self, config: ModelConfig, metrics: dict[str, tf.Tensor]):
        self._config = config
        self._metrics = metrics
        self._bar: tqdm | None = None

    def begin(self) -> None:
        self._step = tf.train.get_global_step()

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        first = int(session.run(self._step))
        self._last_time = time.monotonic()
        if self._bar is not None:  # the session was recovered after a lost worker
            self._bar.n = first
            return
        self._writer = tf.summary.FileWriterCache.get(self._config.model_path)
        self._log = tf.io.gfile.GFile(os.path.join(self._config.model_path, METRICS_FILE), "a")
        self._bar = progress_bar(f"train {self._config.name}", "step", self._config.train_steps, first)

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(self._metrics)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        assert self._bar is not None
        now = time.monotonic()
        metrics = {name: float(value) for name, value in run_values.results.items()}
        metrics["tokens_per_second"] = self._config.tokens_per_batch / (now - self._last_time)
        self._last_time = now
        self._bar.update(1)
        step = self._bar.n  # steps done, the number a checkpoint made now would carry
        self._writer.add_summary(_summary(metrics), step)
        self._log.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        rate = (self._bar.format_dict["rate"] or 0.0) * self._config.tokens_per_batch
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.2e}, {rate or metrics['tokens_per_second']:,.0f} tokens/s",
            refresh=False,
        )

    def end(self, session: tf.Session) -> None:
        if self._bar is not None:
            self._bar.close()
            self._log.close()
            self._writer.flush()


def _summary(values: dict[str, float]) -> tf.Summary:
    return tf.Summary(value=[tf.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
