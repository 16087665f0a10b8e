"""Processes that run_experiment.py starts: they end with it, however it ends."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def start(
    command: Sequence[str], environment: Mapping[str, str], cwd: str | None = None, stdout: int | IO[Any] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process whose output is piped, in a session of its own: Ctrl-C in the terminal reaches it through us.

    On Linux the kernel sends it SIGTERM should this process die without a word. `stdout` is a pipe unless given.
    """
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE if stdout is None else stdout,
        start_new_session=True,
        preexec_fn=_end_with_parent if _prctl is not None else None,
    )


def _end_with_parent() -> None:
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end(process: subprocess.Popen[bytes], patience: float) -> None:
    """SIGTERM and, `patience` seconds later, SIGKILL, to the process and what it started."""
    for signum, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
        if process.poll() is None:
            send(process, signum)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                continue


def send(process: subprocess.Popen[bytes], signum: int) -> None:
    """Send a signal to a process and what it started, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


class Signals:
    """SIGINT and SIGTERM as a flag, while the context is open.

    Attributes:
      signum: the last one that came.
      process: is sent each of them as well.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self.process is not None and self.process.returncode is None:
            send(self.process, signum)
