"""Session hooks: the progress line, metrics.jsonl, TensorBoard scalars, and stopping on a signal."""

import contextlib
import io
import json
import logging
import math
import os
import signal
import socket
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
# Seconds that a line of metrics may wait in a buffer while others look on; a remote file is sent whole each time.
_FLUSH_LOCAL, _FLUSH_REMOTE = 1.0, 60.0


class Stopped(KeyboardInterrupt):
    """A signal that came while there was nothing to save."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StopOnSignal(tf.train.SessionRunHook):
    """What SIGINT and SIGTERM do, as a context manager around everything that should end cleanly.

    While training steps run, the first signal lets the current step finish and a checkpoint be saved; `signum` then
    tells which signal came. At any other time there is nothing to save and Stopped is raised at once. A second signal
    ends the process, and so does a thread of this object where TensorFlow keeps the main thread from raising.

    Attributes:
      signum: the signal that came, if any.
      closing: what to close on leaving, whether training ended or failed.
    """

    _PATIENCE = 5.0  # seconds for the main thread to raise Stopped

    def __init__(self) -> None:
        self.signum: int | None = None
        self.closing = contextlib.ExitStack()
        self._is_training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            ours, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno())
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)
            threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_training = False
        if self._previous:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup.close()
        self.closing.close()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if not self._is_training:
            raise Stopped(signum)
        logger.warning("%s: stopping after this step; once more ends at once", signal.Signals(signum).name)

    def _watch(self, arriving: socket.socket) -> None:
        """End the process where `_on_signal` cannot: Python calls it only between two calls into TensorFlow."""
        with arriving:
            signum = self._next_signal(arriving)
            if not self._is_training:
                arriving.settimeout(self._PATIENCE)
            try:
                ends = signum and self._next_signal(arriving)
            except TimeoutError:
                ends = signum
        if ends:
            sys.stdout.flush()
            print("\ninterrupted", file=sys.stderr, flush=True)
            os._exit(128 + ends)

    def _next_signal(self, arriving: socket.socket) -> int:
        """The next of our signals; 0 when `__exit__` has closed the other end."""
        while received := arriving.recv(1):
            if received[0] in self._previous:
                return received[0]
        return 0

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        self._is_training = True

    def before_run(self, run_context: tf.train.SessionRunContext) -> None:
        for signum in self._previous:  # TPUEstimator puts the default handler in place before every run
            signal.signal(signum, self._on_signal)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: Any) -> None:
        if self.signum is not None:
            run_context.request_stop()

    def end(self, session: tf.Session) -> None:
        self._is_training = False

    def __deepcopy__(self, memo: dict) -> "StopOnSignal":
        return self  # Estimator copies its parameters; a copy would not hear the signal


class _LogLines(io.TextIOBase):
    """Standard error as tqdm's output where it is no terminal: each state of the bar is a line of its own."""

    def write(self, text: str) -> int:
        state = text.strip()
        return sys.stderr.write(f"{state}\n") if state else 0

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(title: str, unit: str, total: int, first: int = 0) -> tqdm:
    """A bar on standard error: redrawn in a terminal, a line every ten seconds in a log."""
    if sys.stderr.isatty():
        # a container's terminal may say that it has no size at all, and tqdm would show nothing
        has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        size: dict[str, Any] = {"dynamic_ncols": True} if has_size else {"ncols": 100, "nrows": 20}
        return tqdm(total=total, initial=first, desc=title, unit=unit, mininterval=0.5, **size)
    return tqdm(total=total, initial=first, desc=title, unit=unit, file=_LogLines(), ascii=True, mininterval=10.0)


class BatchBar(tf.train.SessionRunHook):
    """A progress bar over the batches of an evaluation; a context manager, which closes it.

    Attributes:
      total: the number of batches.
      closing: what to close on leaving.
    """

    def __init__(self, title: str, total: int):
        self.total = total
        self.closing = contextlib.ExitStack()
        self._title = title
        self._bar: tqdm | None = None

    def __enter__(self) -> "BatchBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        if self._bar is None:
            self._bar = progress_bar(self._title, "batch", self.total)
            self.closing.callback(self._bar.close)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        assert self._bar is not None
        self.show(int(self._bar.n) + 1)

    def show(self, done: int) -> None:
        """Let the bar say that `done` batches are done."""
        assert self._bar is not None
        self._bar.update(done - self._bar.n)


class FiniteHook(tf.train.SessionRunHook):
    """Raises NanLossDuringTrainingError when a metric is no longer finite: put before what saves the weights."""

    def __init__(self, metrics: dict[str, tf.Tensor]):
        self._metrics = metrics

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(self._metrics)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        if not all(math.isfinite(value) for value in run_values.results.values()):
            raise tf.train.NanLossDuringTrainingError


class ProgressHook(tf.train.SessionRunHook):
    """One progress line, and every step's metrics in TensorBoard and in `<model_path>/metrics.jsonl`.

    `details` are scalars too many for a line: they go to TensorBoard alone.
    """

    def __init__(self, config: ModelConfig, metrics: dict[str, tf.Tensor], details: dict[str, tf.Tensor]):
        self._config = config
        self._metrics = metrics
        self._details = details
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
        path = os.path.join(self._config.model_path, METRICS_FILE)
        self._log = open_metrics(path, first)
        self._flush_seconds = _FLUSH_REMOTE if "://" in path else _FLUSH_LOCAL
        self._next_flush = self._last_time
        self._bar = progress_bar(f"train {self._config.name}", "step", self._config.train_steps, first)

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs([self._metrics, self._details])

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        assert self._bar is not None
        now = time.monotonic()
        metrics, details = ({name: float(x) for name, x in found.items()} for found in run_values.results)
        metrics["tokens_per_second"] = self._config.tokens_per_batch / (now - self._last_time)
        self._last_time = now
        self._bar.update(1)
        step = self._bar.n  # steps done, the number a checkpoint made now would carry
        self._writer.add_summary(_summary(metrics | details), step)
        self._log.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        if now >= self._next_flush:
            self._log.flush()
            self._next_flush = now + self._flush_seconds
        rate = (self._bar.format_dict["rate"] or 0.0) * self._config.tokens_per_batch
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.2e}, {rate or metrics['tokens_per_second']:,.0f} tokens/s",
            refresh=False,
        )

    def flush(self, session: tf.Session | None = None) -> None:
        """Write out what is still in buffers, before a checkpoint is saved: a run that goes on from it makes no more
        of these steps."""
        if self._bar is not None:
            self._log.flush()
            self._writer.flush()

    def end(self, session: tf.Session) -> None:
        self.close()

    def close(self) -> None:
        """End the progress line and write out everything; once more does no harm."""
        if self._bar is not None:
            self.flush()
            self._bar.close()
            self._log.close()
            self._bar = None


def open_metrics(path: str, step: int) -> Any:
    """The file `path` of metrics, to append to. Lines of steps past `step`, which a run that was killed after its last
    checkpoint left and which will be made again, are removed, and so is a line that it left unfinished."""
    if tf.io.gfile.exists(path):
        with tf.io.gfile.GFile(path) as file:
            lines = file.read().splitlines(keepends=True)
        kept = [line for line in lines if _is_of_step(line, step)]
        if kept != lines:
            with tf.io.gfile.GFile(path + ".tmp", "w") as file:
                file.write("".join(kept))
            tf.io.gfile.rename(path + ".tmp", path, overwrite=True)
    return tf.io.gfile.GFile(path, "a")


def _is_of_step(line: str, last: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError):
        return False


def _summary(values: dict[str, float]) -> tf.Summary:
    return tf.Summary(value=[tf.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
