"""One experiment: main.py under supervision, and all it writes in a record."""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pymongo.errors
from sacred.observers import RunObserver
from sacred.run import Run

from config import ModelConfig
from errors import UserError
from tracking import provenance
from tracking.artifacts import Artifacts
from tracking.events_tail import EventsTail
from tracking.files import is_remote, version
from tracking.metrics_tail import MetricsTail
from tracking.processes import Signals
from tracking.recording import record
from tracking.supervisor import MISTAKE, Limits, Supervisor
from tracking.tensorboard import TensorBoard
from tracking.transcript import Transcript
from tracking.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

_OTHER_ACTIONS = ("eval", "predict", "check_dataset", "export", "auto_layout", "auto_layout_and_mesh_shape")
_WATCH_LOCAL, _WATCH_REMOTE = 1.0, 10.0  # seconds between looks at what main.py wrote
_MAIN = str(Path(__file__).resolve().parent.parent / "main.py")


class Experiment:
    """What the command line asks for, run and recorded once."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: ModelConfig,
        forwarded: Sequence[str],
        signals: Signals,
        transcript: Transcript,
    ):
        """`forwarded` are the arguments that main.py gets; what is printed comes into `transcript`."""
        self._args = args
        self._config = config
        self._forwarded = forwarded
        self._signals = signals
        self._transcript = transcript
        self._wandb: WandbSink | None = None
        self._since = time.time()
        self._begun = False
        self._checkpoint = os.path.join(config.model_path, "checkpoint")
        self._first_checkpoint = version(self._checkpoint)

    def record(self, observer: RunObserver, argv: Sequence[str]) -> None:
        """Run main.py and record it; `argv` is the whole command line. Raises Interrupted or MainFailed."""
        args = self._args
        meta = {"command_line": provenance.command_line(argv), "arguments": provenance.arguments(args)}
        name = args.experiment_name or self._config.name
        if args.wandb:
            self._wandb = WandbSink(args.wandb, name, self._config, args.record_dir)
        with contextlib.ExitStack() as stack:
            copies = stack.enter_context(tempfile.TemporaryDirectory(prefix="run_experiment_"))
            if self._trains() and not args.no_tensorboard:
                stack.enter_context(TensorBoard(self._config.model_path))
            try:
                record(
                    name,
                    self._config,
                    observer,
                    self._transcript,
                    meta,
                    provenance.requested_devices(args),
                    lambda run: self._work(run, copies),
                )
            except (OSError, pymongo.errors.PyMongoError) as error:
                if self._begun:
                    raise
                raise UserError(
                    f"the record of this run cannot be begun ({error}); correct that and run again"
                ) from error

    def _work(self, run: Run, copies: str) -> dict[str, float]:
        """Supervise main.py and record what it writes; returns the last value of each metric."""
        args, config, self._begun = self._args, self._config, True
        sacred_id = args.sacred_id or str(run._id)
        logger.info("run %s of experiment %r", run._id, run.experiment_info["name"])
        tail = MetricsTail(config.model_path, sacred_id, self._since, config.train_steps)
        if tail.stride > 1:
            logger.info("one of every %d steps is recorded", tail.stride)
        latest: dict[str, float] = {}

        def add(path: str, name: str, content_type: str) -> None:
            run.add_artifact(path, name, content_type=content_type)

        artifacts = Artifacts(add, copies, config.model_path, sacred_id, args.output)

        # a TPU runs many steps before it returns to the host, so there main.py keeps no metrics.jsonl
        events = EventsTail(config.model_path, self._since, config.tokens_per_batch, tail.stride) if args.tpu else None

        def watch() -> bool:
            points = tail.read() + (events.read() if events else [])
            for point in points:
                run.log_scalar(point.name, point.value, point.step)
            if self._wandb is not None:
                self._wandb.log(points)
            latest.update((point.name, point.value) for point in points)
            if "devices" not in run.info and (found := provenance.used_devices(self._transcript.text())):
                run.info["devices"] = found
            return artifacts.record_predictions() or bool(points)

        supervisor = self._supervisor(undisturbed(watch))
        command = [sys.executable, _MAIN, *self._forwarded]
        # main.py names its result files by the run's id
        own_id = [] if args.sacred_id else ["--sacred_id", sacred_id]
        code = 1
        try:
            supervisor.run([*command, *own_id], [*resuming(command), *own_id], self._may_resume)
            code = 0
        finally:
            if supervisor.restarts:
                run.info["restarts"] = supervisor.restarts
            undisturbed(lambda: artifacts.record_config(is_ours=code == 0))()
            if self._wandb is not None:
                self._wandb.finish(code)
        return latest

    def _supervisor(self, watch: Callable[[], bool]) -> Supervisor:
        args = self._args
        limits = Limits(
            initial_heartbeat=args.initial_heartbeat_timeout,
            heartbeat=args.heartbeat_timeout,
            stop=args.stop_timeout,
            retries=args.max_retries,
            retry_wait=args.retry_wait,
        )
        # --check_dataset says with exit code 1 that the datasets do not fit; anything else would be a crash
        final = (MISTAKE, 1) if args.check_dataset else (MISTAKE,)
        every = _WATCH_REMOTE if is_remote(self._config.model_path) else _WATCH_LOCAL
        return Supervisor(limits, self._signals, self._transcript, watch, final, args.recreate_command, every)

    def _trains(self) -> bool:
        return not any(getattr(self._args, action) for action in _OTHER_ACTIONS)

    def _may_resume(self) -> bool:
        """Whether what is in model_path is of this run: --new is not sent twice, and might not have come to delete."""
        return (
            not self._args.new or self._first_checkpoint is None or version(self._checkpoint) != self._first_checkpoint
        )


def undisturbed(watch: Callable[[], bool]) -> Callable[[], bool]:
    """`watch`, for which a file that cannot be read now is no reason to end main.py."""
    warned: set[str] = set()

    def careful() -> bool:
        try:
            return watch()
        except OSError as error:
            if str(error) not in warned:
                warned.add(str(error))
                logger.warning("what main.py wrote cannot be read (%s); trying again", error)
            return False

    return careful


def resuming(command: Sequence[str]) -> list[str]:
    """The command of a second try: without --new, however far it was abbreviated."""
    return [word for word in command if not (len(word) > 3 and "--new".startswith(word))]
