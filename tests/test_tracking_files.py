"""What run_experiment.py reads: metrics as they are written, predictions, addresses, its own command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf
import tensorflow.compat.v2 as tf2

import run_experiment
from errors import UserError
from tracking import provenance
from tracking.addresses import Address, connect, find_address
from tracking.artifacts import Artifacts
from tracking.events_tail import EventsTail
from tracking.experiment import resuming
from tracking.metrics_tail import MOST_POINTS, MetricsTail, Point

ROOT = Path(__file__).resolve().parent.parent


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def training(*steps: int, moment: float = 100.0, loss: float = 2.0) -> list[dict[str, Any]]:
    return [{"step": step, "time": moment, "loss": loss + step} for step in steps]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_metrics_are_read_as_they_come(tmp_path: Path, scheme: str) -> None:
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "eval_7.jsonl"
    append(metrics, *training(1, 2, moment=50.0))  # an earlier run's
    tail = MetricsTail(f"{scheme}{tmp_path}", "7", since=99.0, train_steps=1000)
    assert tail.read() == []
    append(metrics, *training(3))
    with metrics.open("a") as file:
        file.write('{"step": 4, "time": 100.0,')  # a line half written
    assert tail.read() == [Point(3, "loss", 5.0)]
    with metrics.open("a") as file:
        file.write(' "loss": 6.0, "note": "words", "flag": true, "nothing": null}\n')
    evaluation = {"task": "validation", "global_step": 4, "time": 100.0, "loss": 1.5, "bits_per_byte": None}
    append(evaluations, evaluation, evaluation | {"time": 50.0})
    assert tail.read() == [Point(4, "loss", 6.0), Point(4, "validation/loss", 1.5)]
    assert tail.read() == []


def test_steps_made_again_after_a_crash_come_once(tmp_path: Path) -> None:
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "eval_7.jsonl"
    tail = MetricsTail(str(tmp_path), "7", since=0.0, train_steps=1000)
    append(metrics, *training(*range(1, 9)))
    evaluation = {"task": "lambada", "global_step": 5, "time": 100.0, "accuracy": 0.5}
    append(evaluations, evaluation)
    read = tail.read()
    # as main.py does when it goes on from step 5: another file under the same name, at once as long as the old one
    (tmp_path / "new").write_text("".join(metrics.read_text().splitlines(keepends=True)[:5]))
    os.replace(tmp_path / "new", metrics)
    append(metrics, *training(6, 7, 8, 9, 10, moment=200.0, loss=2.125))
    append(evaluations, evaluation | {"time": 200.0})
    read += tail.read()
    metrics.unlink()  # --new
    assert tail.read() == []
    append(metrics, *training(11))
    read += tail.read()
    assert [point.step for point in read if point.name == "loss"] == list(range(1, 12))
    assert [point for point in read if point.name != "loss"] == [Point(5, "lambada/accuracy", 0.5)]


def test_a_run_of_many_steps_is_thinned_out(tmp_path: Path) -> None:
    tail = MetricsTail(str(tmp_path), "7", since=0.0, train_steps=3 * MOST_POINTS)
    append(tmp_path / "metrics.jsonl", *training(*range(1, 10)))
    assert [point.step for point in tail.read()] == [3, 6, 9]
    assert tail.step == 9


def test_metrics_of_a_tpu_are_read_from_events(tmp_path: Path) -> None:
    def write(first: int, last: int) -> None:
        with tf.Graph().as_default(), tf.Session() as session:  # as mtf's host call writes them
            step, loss = tf.placeholder(tf.int64, []), tf.placeholder(tf.float32, [])
            writer = tf2.summary.create_file_writer(str(tmp_path), filename_suffix=f".{first}")
            with writer.as_default():
                written = [tf2.summary.scalar(name, loss, step=step) for name in ("loss", "lr")]
            session.run(writer.init())
            for number in range(first, last + 1):
                session.run(written, {step: number, loss: number / 4})
            session.run(writer.flush())

    write(1, 3)
    tail = EventsTail(str(tmp_path), since=time.time(), tokens_per_batch=32, stride=1)
    assert tail.read() == []  # an earlier run's
    write(4, 6)
    points = tail.read()
    speeds = [point for point in points if point.name == "tokens_per_second"]
    assert {point for point in points if point not in speeds} == {
        Point(step, name, step / 4) for step in (4, 5, 6) for name in ("loss", "lr")
    }
    assert len(points) == 6 + len(speeds)
    assert [point.step for point in speeds] == [5, 6] and all(point.value > 0 for point in speeds)
    write(5, 7)  # two steps are made again
    names = sorted((point.step, point.name) for point in tail.read())
    assert names == [(7, "loss"), (7, "lr"), (7, "tokens_per_second")]
    assert tail.read() == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_of_predictions_are_recorded_once_each(tmp_path: Path, scheme: str) -> None:
    model, copies = tmp_path / "model", tmp_path / "copies"
    model.mkdir()
    copies.mkdir()
    (model / "predictions_3_10.txt").write_text("an earlier run's")
    (model / "config.json").write_text("{}")
    recorded: list[tuple[str, bytes, str]] = []

    def add(path: str, name: str, content_type: str) -> None:
        recorded.append((name, Path(path).read_bytes(), content_type))

    artifacts = Artifacts(add, str(copies), f"{scheme}{model}", "3", None)
    assert not artifacts.record_predictions()
    (model / "predictions_3_20.txt").write_text("twenty")
    (model / "predictions_4_20.txt").write_text("another run's")
    assert artifacts.record_predictions() and not artifacts.record_predictions()
    artifacts.record_config(is_ours=False)  # a failed run that did not come to write it
    assert len(recorded) == 1
    artifacts.record_config(is_ours=True)
    assert recorded.pop()[1] == b"{}"
    (model / "config.json").write_text('{"lr": 1}')
    artifacts.record_config(is_ours=False)
    assert recorded == [
        ("predictions_3_20.txt", b"twenty", "text/plain"),
        ("final_config.json", b'{"lr": 1}', "application/json"),
    ]


def test_where_the_address_comes_from(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    variable = {"SACRED_MONGO_URI": "mongodb://variable"}
    assert find_address(None, {}, env) is None
    env.write_text("# MongoDB\nSACRED_PASSWORD='p@ss' # quoted\nMONGO_PORT=27018\nBIND_ADDRESS=0.0.0.0\n")
    found = find_address(None, {}, env)
    assert found is not None
    assert found.uri == "mongodb://sacred:p%40ss@127.0.0.1:27018/sacred?authSource=admin"
    assert str(found) == "the address in .env 'mongodb://sacred:***@127.0.0.1:27018/sacred?authSource=admin'"
    assert find_address(None, variable, env) == Address("mongodb://variable", "SACRED_MONGO_URI")
    assert find_address("mongodb://flag", variable, env) == Address("mongodb://flag", "--mongo_uri")
    assert find_address("", variable, env) is None
    env.write_text("SACRED_PASSWORD=\n")
    assert find_address(None, {}, env) is None


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (
            "mongodb://u:secret@127.0.0.1:9/sacred",
            r"no MongoDB answers at --mongo_uri 'mongodb://u:\*\*\*@127.0.0.1:9/",
        ),
        ("mongodb://u:sec:ret@127.0.0.1/", "is no MongoDB address"),
        ("http://127.0.0.1", "is no MongoDB address|no MongoDB answers"),
    ],
)
def test_an_address_where_nobody_answers_is_one_sentence(uri: str, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=says) as error:
        connect(Address(uri, "--mongo_uri"))
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value) and "sec" not in str(error.value).replace("seconds", "")


def test_what_main_gets_of_the_command_line() -> None:
    argv = ["--max_r", "3", "--model", "quickstart", "--gpu_ids", "cpu:0", "cpu:1", "--heartbeat_timeout=60"]
    argv += ["--set", "lr=-1", "--sampling_seed", "-5", "--experiment_name", "--new"[2:], "--ne"]
    args, forwarded = run_experiment.parse_arguments(argv)
    assert args.max_retries == 3 and args.heartbeat_timeout == 60 and args.experiment_name == "new" and args.new
    assert forwarded == [
        *("--model", "quickstart", "--gpu_ids", "cpu:0", "cpu:1", "--set", "lr=-1", "--sampling_seed", "-5", "--ne")
    ]
    assert resuming(forwarded) == forwarded[:-1]


@pytest.mark.parametrize("flags", ["--heartbeat_timeout 0", "--max_retries -1", "--stop_timeout soon", "--nonsense"])
def test_a_wrong_option_is_one_sentence(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiment.main(["--model", "quickstart", *flags.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("run_experiment.py: error: ")


def test_what_a_run_was_made_from() -> None:
    assert provenance.command_line(["--model", "x", "--mongo_uri", "mongodb://u:p@h", "--mongo=m://u:p@h"]) == (
        "python run_experiment.py --model x --mongo_uri '***' '--mongo=***'"
    )
    said = "12:00:00 devices: /device:CPU:0, /device:CPU:1; mesh x:2, layout batch:x\nmore\n"
    assert provenance.used_devices(said) == {
        "devices": "/device:CPU:0, /device:CPU:1",
        "mesh_shape": "x:2",
        "layout": "batch:x",
    }
    names = {str(path.relative_to(ROOT)) for path in provenance.source_files(ROOT)}
    assert {"main.py", "run_experiment.py", "models/gpt.py", "tracking/supervisor.py"} <= names
    assert not [name for name in names if name.startswith((".", "tests/", "runs/")) or "node_modules" in name]


def test_a_checkout_tells_its_commit_and_no_password(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) == {}
    run = f"cd {tmp_path} && git init -q && git -c user.name=n -c user.email=e commit -q --allow-empty -m m"
    assert os.system(f"{run} && git remote add origin https://user:token@host/project.git") == 0
    state = provenance.git_state(tmp_path)
    assert state["url"] == "https://host/project.git" and len(state["commit"]) == 40 and state["dirty"] is False


def test_nothing_of_tracking_needs_tensorflow() -> None:
    modules = [f"tracking.{path.stem}" for path in (ROOT / "tracking").glob("[a-z]*.py")]
    program = f"import sys, run_experiment, {', '.join(modules)}; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
