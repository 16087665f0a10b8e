"""Supervision of a process: which failures are tried again, how often and how, and what ends it for good."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tracking.experiment import resuming, undisturbed
from tracking.processes import Signals
from tracking.supervisor import Interrupted, Limits, MainFailed, Supervisor
from tracking.transcript import Transcript

LIMITS = Limits(initial_heartbeat=30, heartbeat=30, stop=5, retries=2, retry_wait=0.01)
# Each try appends its arguments to the file `tries` and does what the line of the file `script` for that try says.
CHILD = """
import os, signal, sys, time
open("tries", "a").write(" ".join(sys.argv[1:]) + "\\n")
print("try", flush=True)
exec(open("script").read().splitlines()[len(open("tries").readlines()) - 1])
"""


class Run:
    """A child with a script, a line for each try, and what supervision made of it."""

    def __init__(self, folder: Path, *script: str):
        self.tries = folder / "tries"
        (folder / "script").write_text("\n".join(script))
        self.transcript = Transcript()
        self.signals = Signals()
        self.progress: Callable[[], bool] = lambda: False
        self.supervisor: Supervisor | None = None

    def __call__(self, limits: Limits = LIMITS, may_resume: Callable[[], bool] = lambda: True, **options: Any) -> None:
        command = [sys.executable, "-c", CHILD, "--new", "--yes"]
        watch = lambda: self.progress()  # noqa: E731
        self.supervisor = Supervisor(limits, self.signals, self.transcript, watch, **options)
        with self.signals:
            self.supervisor.run(command, resuming(command), may_resume)

    def commands(self) -> list[str]:
        return self.tries.read_text().splitlines()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_crash_is_followed_by_another_try_without_new(folder: Path) -> None:
    run = Run(folder, "sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "print('done')")
    began = time.monotonic()
    run(Limits(30, 30, 5, retries=2, retry_wait=0.3), recreate="echo again >> recreated; exit 3")
    assert run.commands() == ["--new --yes", "--yes", "--yes"]
    assert (folder / "recreated").read_text() == "again\nagain\n"
    assert time.monotonic() - began > 0.3 + 0.6  # growing waits
    assert run.transcript.text() == "try\n" * 3 + "done\n"
    assert run.supervisor is not None
    assert run.supervisor.restarts == ["main.py failed with exit code 1", "main.py was killed by SIGKILL"]


def test_tries_are_bounded(folder: Path) -> None:
    run = Run(folder, *["sys.exit('no such luck')"] * 9)
    with pytest.raises(MainFailed, match="exit code 1, 3 times in a row without a new step.*\nno such luck") as failed:
        run()
    assert len(run.commands()) == 3
    assert failed.value.code == 1


def test_a_try_that_makes_progress_is_no_failure_in_a_row(folder: Path) -> None:
    run = Run(folder, *["sys.exit(1)"] * 3, "pass")
    run.progress = lambda: run.tries.exists() and len(run.commands()) == 2
    run()
    assert len(run.commands()) == 4


@pytest.mark.parametrize(("code", "final_codes"), [(2, (2,)), (1, (2, 1))])
def test_what_only_the_user_can_put_right_is_not_tried_again(
    code: int, final_codes: tuple[int, ...], folder: Path
) -> None:
    run = Run(folder, f"print('error: lr', file=sys.stderr); sys.exit({code})")
    with pytest.raises(MainFailed, match=f"exit code {code}.*\nerror: lr") as failed:
        run(final_codes=final_codes)
    assert failed.value.code == code and len(run.commands()) == 1


def test_an_earlier_model_that_new_did_not_come_to_delete_is_not_trained_further(folder: Path) -> None:
    run = Run(folder, "sys.exit(1)")
    with pytest.raises(MainFailed, match="before --new had deleted the earlier model"):
        run(may_resume=lambda: False)


def test_a_stalled_process_is_ended_and_tried_again(folder: Path) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    run = Run(folder, stubborn, "time.sleep(60)", "[print(i, flush=True) or time.sleep(0.2) for i in range(8)]")
    began = time.monotonic()
    run(Limits(initial_heartbeat=2.5, heartbeat=30, stop=0.5, retries=2, retry_wait=0.01))
    assert time.monotonic() - began < 30
    assert run.supervisor is not None
    assert run.supervisor.restarts == ["main.py gave no sign of life for 2.5 seconds and was ended"] * 2
    assert run.transcript.text().endswith("6\n7\n")  # output is a sign of life


def test_after_the_first_metrics_the_other_timeout_holds(folder: Path) -> None:
    run = Run(folder, "time.sleep(60)", "pass")
    seen = iter([True])
    run.progress = lambda: next(seen, False)
    run(Limits(initial_heartbeat=60, heartbeat=1.0, stop=5, retries=2, retry_wait=0.01))
    assert len(run.commands()) == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_and_there_is_no_other_try(signum: int, folder: Path) -> None:
    polite = (
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(143)));"
        "signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), os._exit(130)));"
        "open('ready', 'w'); time.sleep(60)"
    )
    run = Run(folder, polite)

    def interrupt() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted) as stopped:
        run()
    assert stopped.value.signum == signum
    assert run.transcript.text() == "try\nsaved\n"
    assert len(run.commands()) == 1


def test_someone_elses_signal_to_the_process_stops_the_run_too(folder: Path) -> None:
    with pytest.raises(Interrupted):
        Run(folder, "sys.exit(143)")()


def test_a_transcript_keeps_the_beginning_and_the_end() -> None:
    transcript = Transcript()
    transcript.write("start;")
    transcript.limit(100)
    for number in range(100):
        transcript.write(f"{number:03};")
    text = transcript.text()
    assert text.startswith("start;000;001;") and text.endswith("097;098;099;")
    assert "[... " in text and len(text) < 200
    assert Transcript().text() == ""


def test_what_cannot_be_read_is_no_reason_to_end(caplog: pytest.LogCaptureFixture) -> None:
    def watch() -> bool:
        raise OSError("the bucket is away")

    careful = undisturbed(watch)
    assert not careful() and not careful()
    assert caplog.text.count("the bucket is away") == 1
