"""Ctrl-C, SIGTERM and kill -9: what is saved, what the exit code says, and that the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

from tests.test_user_errors import make_workspace
from tests.workspace import Workspace
from training.checkpoints import verify_checkpoint
from training.hooks import BatchBar, open_metrics

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path, {"train_steps": 2}, {}, (1, "chunks"))


def interrupting(function: Any, at_call: int, signum: int) -> Any:
    """`function`, which sends this process a signal when it is called for the `at_call`-th time."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), signum)
        return function(*arguments, **named)

    return wrapped


def test_evaluation_and_prediction_end_at_once(
    run: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main() == 0
    before = set(run.model_path.iterdir())
    capsys.readouterr()
    for signum in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(BatchBar, "after_run", interrupting(BatchBar.after_run, 2, signum))
            assert run.main("--eval", "--set", "eval_batch_size=1") == 128 + signum
        with monkeypatch.context() as patch:
            patch.setattr("prediction._block", interrupting(lambda number, *_: f"text {number}", 2, signum))
            (tmp_path / "prompts").write_text("w3\nw4\nw5\n")
            flags = ("--predict", "--prompt", str(tmp_path / "prompts"), "--prompt_per_line")
            assert run.main(*flags) == 128 + signum
        output = capsys.readouterr()
        assert output.out == "text 0\n"
        assert output.err.endswith("interrupted\n") and "Traceback" not in output.err
    names = {path.name for path in set(run.model_path.iterdir()) - before}
    assert names <= {"eval"}  # TensorFlow's events; neither a result nor a prediction


def test_before_the_first_step_there_is_nothing_to_save(
    run: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:  # it is called while the graph is built
        patch.setattr("model_fns.verify_checkpoint", interrupting(verify_checkpoint, 1, signal.SIGTERM))
        assert run.main() == 143
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert list(run.model_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run.main() == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(run: Workspace) -> None:
    flags = ["--steps_per_checkpoint", "5", "--set", "train_steps=100000"]
    command = [sys.executable, "main.py", "--model", str(run.config_path), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 120
    while not (run.model_path / "model.ckpt-10.index").exists():
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    with (run.model_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999, "loss": 1.0}\n{"step": 1000')  # made after the checkpoint, and half a line
    assert (checkpoint := tf.train.latest_checkpoint(str(run.model_path))) is not None
    step = int(checkpoint.rpartition("-")[2])
    assert step >= 5
    assert run.main("--set", f"train_steps={step + 2}") == 0
    assert [line["step"] for line in run.metrics()] == list(range(1, step + 3))
    assert run.weights()["global_step"] == step + 2


def test_metrics_of_steps_that_are_made_again_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)) + '{"st')
    with open_metrics(str(path), 5) as file:
        file.write('{"step": 6, "again": true}\n')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [*({"step": step} for step in range(1, 6)), {"step": 6, "again": True}]
    with open_metrics(str(tmp_path / "new.jsonl"), 0) as file:
        file.write("{}\n")
    assert (tmp_path / "new.jsonl").read_text() == "{}\n"


# The main thread is where no signal handler of Python's runs: inside a C function that does not return.
DEADLOCK = """
import ctypes, sys, threading
from training.hooks import StopOnSignal
StopOnSignal._PATIENCE = 0.5
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
with StopOnSignal() as stop:
    if sys.argv[1] == "training":
        stop.after_create_session(None, None)
    libc.pthread_mutex_lock(mutex)
    threading.Timer(1.0, print, ("locked",), {"flush": True}).start()  # when the main thread waits for the lock
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "signals"), [("evaluation", 1), ("training", 2)])
def test_a_process_that_tensorflow_holds_ends_all_the_same(phase: str, signals: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEADLOCK, phase], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    for _ in range(signals):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.endswith("interrupted\n") and "Traceback" not in errors
