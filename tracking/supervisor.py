"""Keeps main.py going: ends it when it stalls, starts it again when it fails, and stops when it should."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracking.processes import Signals, end, send, start
from tracking.transcript import Pump, Transcript

logger = logging.getLogger(__name__)

MISTAKE = 2  # main.py's exit code for what only its user can put right
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_LONGEST_WAIT = 600.0  # seconds between tries
_POLL = 0.1  # seconds between looks at the process


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal; main.py has ended."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class MainFailed(Exception):
    """main.py failed and is not started again.

    Attributes:
      code: the exit code to pass on.
    """

    def __init__(self, sentence: str, code: int, output: str):
        super().__init__(f"{sentence}; the end of its output:\n{output}" if output else sentence)
        self.sentence = sentence
        self.code = code


@dataclass(frozen=True)
class Limits:
    """How patient supervision is; seconds unless said otherwise.

    Attributes:
      initial_heartbeat: without a sign of life before the first metrics.
      heartbeat: without a sign of life after them.
      stop: from SIGTERM to SIGKILL.
      retries: how many times in a row main.py may fail without having made a new step.
      retry_wait: before the first new try; twice as long before each following one.
    """

    initial_heartbeat: float
    heartbeat: float
    stop: float
    retries: int
    retry_wait: float


@dataclass(frozen=True)
class _End:
    """How one try ended: its exit code (below 0: the signal's number), and why it was ended if it was."""

    code: int
    stalled: float | None
    output: str

    def __str__(self) -> str:
        if self.stalled is not None:
            return f"main.py gave no sign of life for {self.stalled:g} seconds and was ended"
        if self.code < 0:
            return f"main.py was killed by {signal.Signals(-self.code).name}"
        return f"main.py failed with exit code {self.code}"


class Supervisor:
    """Runs main.py until it is done, with as many tries as that takes and the limits allow."""

    def __init__(
        self,
        limits: Limits,
        signals: Signals,
        transcript: Transcript,
        watch: Callable[[], bool],
        final_codes: Sequence[int] = (MISTAKE,),
        recreate: str | None = None,
        watch_every: float = 1.0,
    ):
        """`watch`, called every so many seconds, records what is new in main.py's files and tells whether anything was.

        A try that ends with one of `final_codes` is the last. `recreate` is a shell command run between tries.
        """
        self._limits = limits
        self._signals = signals
        self._transcript = transcript
        self._watch = watch
        self._final_codes = final_codes
        self._recreate = recreate
        self._watch_every = watch_every
        self.restarts: list[str] = []  # why each of them was necessary

    def run(self, command: Sequence[str], resume: Sequence[str], may_resume: Callable[[], bool] = lambda: True) -> None:
        """Run `command` and, where it fails, `resume` again and again, if `may_resume()` says that this is safe.

        Raises:
          Interrupted: a signal came; main.py has ended by itself if it did so in time.
          MainFailed: main.py ended for good without having done its work.
        """
        failures = 0
        while True:
            made_progress, ended = self._try(command)
            if self._signals.signum is not None and ended.code != 0:
                raise Interrupted(self._signals.signum)
            if ended.code == 0:
                return
            if ended.stalled is None and ended.code in _STOPPED:  # by someone else, who wanted it to stop
                raise Interrupted(ended.code - 128)
            failures = 1 if made_progress else failures + 1
            self._judge(ended, failures, may_resume)
            self._pause(ended, failures)
            command = resume

    def _judge(self, ended: _End, failures: int, may_resume: Callable[[], bool]) -> None:
        """Raise MainFailed where there should be no other try."""
        code = ended.code if ended.code > 0 else 128 - ended.code
        why = None
        if ended.stalled is None and ended.code in self._final_codes:
            why = str(ended)
        elif not may_resume():
            why = f"{ended}, before --new had deleted the earlier model, which must not be trained further"
        elif failures > self._limits.retries:
            why = f"{ended}, {failures} times in a row without a new step"
        if why:
            raise MainFailed(why, code, ended.output)

    def _pause(self, ended: _End, failures: int) -> None:
        """Wait, longer each time, and run the recreate command."""
        wait = min(self._limits.retry_wait * 2 ** (failures - 1), _LONGEST_WAIT)
        logger.warning("%s; starting it again in %g seconds (try %d)", ended, wait, failures + 1)
        self.restarts.append(str(ended))
        until = time.monotonic() + wait
        while time.monotonic() < until and self._signals.signum is None:
            time.sleep(_POLL)
        if self._recreate and self._signals.signum is None:
            logger.info("running --recreate_command %s", self._recreate)
            _, hook = self._try(["/bin/sh", "-c", self._recreate], watched=False)
            if hook.code:
                logger.warning("--recreate_command ended with exit code %d", hook.code)
        if self._signals.signum is not None:
            raise Interrupted(self._signals.signum)

    def _try(self, command: Sequence[str], watched: bool = True) -> tuple[bool, _End]:
        """Run a command to its end: (whether it made progress, how it ended)."""
        process = start(command, {"PYTHONUNBUFFERED": "1"})
        assert process.stdout is not None and process.stderr is not None
        pumps = [
            Pump(process.stdout, sys.stdout, self._transcript),
            Pump(process.stderr, sys.stderr, self._transcript),
        ]
        for pump in pumps:
            pump.start()
        self._signals.process = process
        if self._signals.signum is not None:  # it came just before
            send(process, self._signals.signum)
        progress, stalled = False, None
        try:
            progress, stalled = self._attend(process, pumps, watched)
        finally:
            end(process, self._limits.stop)
            self._signals.process = None
        for pump in pumps:
            pump.join(timeout=5)  # what it started may hold the pipes open
        progress |= watched and self._watch()
        return progress, _End(process.wait(), stalled, pumps[1].last_lines())

    def _attend(
        self, process: subprocess.Popen[bytes], pumps: Sequence[Pump], watched: bool
    ) -> tuple[bool, float | None]:
        """Watch the process until it ends or should be ended: (progress, seconds without a sign of life)."""
        limits, progress = self._limits, False
        last_life = next_look = time.monotonic()
        stopping: float | None = None
        while process.poll() is None:
            time.sleep(_POLL)
            now = time.monotonic()
            if now >= next_look:
                next_look = now + self._watch_every
                if watched and self._watch():
                    progress, last_life = True, now
            last_life = max(last_life, *(pump.last_write for pump in pumps))
            if self._signals.signum is not None:
                stopping = stopping or now
                if now - stopping > limits.stop:
                    logger.warning("main.py did not end within %g seconds and is killed", limits.stop)
                    end(process, patience=0)
                continue
            patience = limits.heartbeat if progress else limits.initial_heartbeat
            if now - last_life > patience:
                logger.warning("no sign of life for %g seconds: ending main.py", patience)
                return progress, patience
        return progress, None
