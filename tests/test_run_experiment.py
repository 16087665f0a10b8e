"""run_experiment.py on a real server: one run that is killed and cut off on its way, and what its record holds."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gridfs
import pytest
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from config import config_to_json, load_model_config
from tests.mongo_server import MongoServer
from tests.test_user_errors import make_workspace
from tests.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
STEPS, CHECKPOINT = 600, 300
OUTAGE = 20.0  # seconds

pytestmark = pytest.mark.slow


def command(run: Workspace, *flags: str) -> list[str]:
    return [sys.executable, "run_experiment.py", "--model", str(run.config_path), "--gpu_ids", "cpu:0", *flags]


def start(run: Workspace, *flags: str, **environment: str) -> subprocess.Popen[str]:
    log = (run.directory / "output").open("w")
    return subprocess.Popen(
        command(run, *flags), cwd=ROOT, stdout=log, stderr=log, text=True, env={**os.environ, **environment}
    )


def output(run: Workspace) -> str:
    return (run.directory / "output").read_text()


def children(pid: int) -> dict[int, str]:
    """{process id: command line} of what a process started."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def main_of(process: subprocess.Popen[str]) -> int:
    return next(pid for pid, line in children(process.pid).items() if "/main.py " in line)


def wait_for_step(run: Workspace, step: int, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 180
    while True:
        assert process.poll() is None and time.monotonic() < give_up, output(run)
        try:
            if any(f'{{"step": {number}, ' in read_metrics(run) for number in range(step, step + 50)):
                return
        except FileNotFoundError:
            pass
        time.sleep(0.01)


def read_metrics(run: Workspace) -> str:
    return (run.model_path / "metrics.jsonl").read_text()


def ask_tensorboard(process: subprocess.Popen[str], run: Workspace) -> dict[str, Any]:
    """What the TensorBoard of a run says of the losses it knows, where it listens, and its process."""
    give_up = time.monotonic() + 120
    while not (found := re.search(r"TensorBoard: http://127\.0\.0\.1:(\d+)/", output(run))):
        assert process.poll() is None and time.monotonic() < give_up, output(run)
        time.sleep(0.1)
    url = f"http://127.0.0.1:{found[1]}/data/plugin/scalars/scalars?tag=loss&run=."
    scalars: list[list[float]] = []
    while len(scalars) < CHECKPOINT:  # it reads what is new every few seconds
        assert process.poll() is None and time.monotonic() < give_up, output(run)
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(url, timeout=30) as answer:
            scalars = json.load(answer)
        time.sleep(0.5)
    (pid,) = (pid for pid, line in children(process.pid).items() if "tensorboard.main" in line)
    return {"scalars": scalars, "listens": listening_addresses(int(found[1])), "pid": pid}


def listening_addresses(port: int) -> list[str]:
    """The local addresses on which something listens at a port, as /proc/net writes them."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [words[1].partition(":")[0] for words in lines if words[1].endswith(f":{port:04X}") and words[3] == "0A"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    server = MongoServer(tmp_path_factory.mktemp("mongodb"))
    yield server
    server.stop()


@dataclass
class Tracked:
    """A finished run: its folder, its document, its metrics {name: document}, its files."""

    run: Workspace
    document: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    files: gridfs.GridFS
    first_try: list[dict[str, float]]
    tensorboard: dict[str, Any]


def read(server: MongoServer, run: Workspace, **query: Any) -> Tracked:
    database = server.client().sacred
    (document,) = database.runs.find(query)
    metrics = {metric["name"]: metric for metric in database.metrics.find({"run_id": document["_id"]})}
    return Tracked(run, document, metrics, gridfs.GridFS(database), [], {})


@pytest.fixture(scope="module")
def tracked(server: MongoServer, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """A run with evaluations, predictions, TensorBoard and W&B, whose main.py was killed between two checkpoints, when
    the server went away for a while."""
    changes = {"train_steps": STEPS, "eval_steps": 2, "eval_batch_size": 2, "predict_steps": 1, "predict_max_steps": 3}
    run = make_workspace(tmp_path_factory.mktemp("run"), changes, {}, (1, "chunks"))
    flags = ["--steps_per_checkpoint", str(CHECKPOINT), "--set", "lr=0.005", "--experiment_name", "tiny"]
    flags += ["--retry_wait", "0.1", "--wandb", "tiny-project", "--record_dir", str(run.directory / "records")]
    process = start(run, *flags, SACRED_MONGO_URI=server.uri, WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
    wait_for_step(run, CHECKPOINT + 1, process)
    os.kill(main_of(process), signal.SIGKILL)
    time.sleep(3.0)  # what was written before is read, and on its way to the server
    first_try = [json.loads(line) for line in read_metrics(run).splitlines() if line.endswith("}")]
    server.stop()
    away = time.monotonic()
    board = ask_tensorboard(process, run)
    time.sleep(max(0.0, OUTAGE - (time.monotonic() - away)))
    server.start()
    assert process.wait(300) == 0, output(run)
    result = read(server, run, **{"experiment.name": "tiny"})
    result.first_try, result.tensorboard = first_try, board
    return result


def test_every_step_is_recorded_once(tracked: Tracked) -> None:
    written = {line["step"]: line for line in tracked.run.metrics()}
    assert list(written) == list(range(1, STEPS + 1))
    assert tracked.first_try[-1]["step"] > CHECKPOINT  # some steps were made twice
    for name in ("loss", "cross_entropy", "lr", "grad_norm", "tokens_per_second"):
        metric = tracked.metrics[name]
        assert metric["steps"] == list(range(1, STEPS + 1)), name
        assert len(metric["timestamps"]) == STEPS
        if name != "tokens_per_second":
            assert metric["values"] == [written[step][name] for step in metric["steps"]]
    lines = [json.loads(line) for line in (tracked.run.model_path / "eval_1.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [CHECKPOINT, STEPS]
    for name in ("loss", "perplexity", "bits_per_token", "tokens"):
        metric = tracked.metrics[f"validation/{name}"]
        assert metric["steps"] == [CHECKPOINT, STEPS]
        assert metric["values"] == [line[name] for line in lines]
    shown = {entry["name"]: entry["id"] for entry in tracked.document["info"]["metrics"]}
    assert shown == {name: str(metric["_id"]) for name, metric in tracked.metrics.items()}


def test_the_record_says_what_was_run(tracked: Tracked) -> None:
    document, run = tracked.document, tracked.run
    assert document["status"] == "COMPLETED"
    assert document["stop_time"] > document["start_time"]
    config = load_model_config(str(run.config_path), {"lr": 0.005})
    assert document["config"] == json.loads(config_to_json(config))
    assert document["meta"]["command_line"].startswith("python run_experiment.py --model ")
    assert document["meta"]["arguments"]["settings"] == ["lr=0.005"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if commit:
        assert document["experiment"]["repositories"][0]["commit"] == document["meta"]["git"]["commit"] == commit
    assert document["host"]["hostname"] and document["host"]["devices"] == {"gpu_ids": ["cpu:0"]}
    assert document["info"]["devices"]["devices"] == "/device:CPU:0"
    assert document["info"]["restarts"] == ["main.py was killed by SIGKILL"]
    assert document["result"]["validation/loss"] == tracked.metrics["validation/loss"]["values"][-1]
    assert document["captured_out"].count("resuming from step 300") == 1
    assert document["captured_out"].rstrip().endswith(f"trained to step {STEPS}; checkpoints in {run.model_path}")
    assert "cred" not in json.dumps(document, default=str).replace("sacred", "")  # the password


def test_the_files_are_recorded(tracked: Tracked) -> None:
    stored = {artifact["name"]: artifact["file_id"] for artifact in tracked.document["artifacts"]}
    predictions = [f"predictions_1_{step}.txt" for step in (CHECKPOINT, STEPS)]
    assert sorted(stored) == sorted(["final_config.json", *predictions])
    assert len(stored) == len(tracked.document["artifacts"])
    for name, identity in stored.items():
        file = tracked.run.model_path / name.replace("final_", "")
        assert tracked.files.get(identity).read() == file.read_bytes()
    sources = dict(tracked.document["experiment"]["sources"])
    for name in ("main.py", "run_experiment.py", "models/gpt.py"):
        assert tracked.files.get(sources[name]).read() == (ROOT / name).read_bytes()


def test_tensorboard_has_the_curves_and_ends_with_the_run(tracked: Tracked) -> None:
    board = tracked.tensorboard
    assert board["listens"] == ["0100007F"]  # 127.0.0.1
    points = {int(step): value for _, step, value in board["scalars"]}
    losses = dict(zip(tracked.metrics["loss"]["steps"], tracked.metrics["loss"]["values"], strict=True))
    assert set(range(1, CHECKPOINT + 1)) <= set(points)
    assert all(value == pytest.approx(losses[step], rel=1e-6) for step, value in points.items())
    assert not Path(f"/proc/{board['pid']}").exists()


def test_wandb_has_the_same_metrics(tracked: Tracked) -> None:
    (path,) = (tracked.run.directory / "records" / "wandb").glob("offline-run-*/*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    history: dict[str, dict[int, float]] = {}
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("tiny-project", "tiny")
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert config["lr"] == 0.005
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name in set(row) - {"_step", "_runtime", "_timestamp", "global_step"}:
            history.setdefault(name, {})[row["global_step"]] = row[name]
    expected = {name: dict(zip(m["steps"], m["values"], strict=True)) for name, m in tracked.metrics.items()}
    assert history == expected


def test_a_signal_stops_the_run_with_a_checkpoint_and_no_orphan(server: MongoServer, tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {"train_steps": 90_000}, {}, (1, "chunks"))
    process = start(run, "--experiment_name", "stopped", "--no_tensorboard", SACRED_MONGO_URI=server.uri)
    wait_for_step(run, 5, process)
    started = children(process.pid)
    assert any("/main.py " in line for line in started.values())
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM, output(run)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    tracked = read(server, run, **{"experiment.name": "stopped"})
    assert tracked.document["status"] == "INTERRUPTED"
    steps = [line["step"] for line in run.metrics()]
    assert tracked.metrics["loss"]["steps"] == steps == list(range(1, len(steps) + 1))
    assert (run.model_path / f"model.ckpt-{len(steps)}.index").exists()
    assert "checkpoint saved" in tracked.document["captured_out"]


def test_a_mistake_is_a_failed_run_with_its_sentence_and_no_second_try(server: MongoServer, tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {}, {"path": str(tmp_path / "nothing_*")}, (1, "chunks"))
    process = start(
        run,
        "--experiment_name",
        "mistaken",
        "--no_tensorboard",
        "--mongo_uri",
        server.uri,
        SACRED_MONGO_URI="mongodb://wrong",
    )
    assert process.wait(120) == 2, output(run)
    document = read(server, run, **{"experiment.name": "mistaken"}).document
    assert document["status"] == "FAILED"
    assert "nothing_*" in "".join(document["fail_trace"]) and "nothing_*" in document["captured_out"]
    assert output(run).count("error: ") == 1 and "Traceback" not in output(run)


def test_a_wrong_password_is_a_sentence_at_once(server: MongoServer, tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {}, {}, (1, "chunks"))
    wrong = server.uri.replace("word@", "@")
    finished = subprocess.run(command(run, "--mongo_uri", wrong), cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        "error: MongoDB refuses the user or password of --mongo_uri 'mongodb://sacred:***@"
    )
    assert len(finished.stderr.splitlines()) == 1
    assert not run.model_path.exists()


def test_without_a_server_the_record_is_in_files(tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {"train_steps": 3}, {}, (1, "chunks"))
    flags = (
        "--mongo_uri",
        "",
        "--record_dir",
        str(tmp_path / "records"),
        "--experiment_name",
        "bare",
        "--no_tensorboard",
    )
    process = start(run, *flags)
    assert process.wait(120) == 0, output(run)
    assert f"recording in files under {tmp_path}/records" in output(run)
    record = tmp_path / "records" / "1"
    assert json.loads((record / "run.json").read_text())["status"] == "COMPLETED"
    assert json.loads((record / "config.json").read_text())["train_steps"] == 3
    metrics = json.loads((record / "metrics.json").read_text())
    assert metrics["loss"]["steps"] == [1, 2, 3] and metrics["loss"]["values"] == run.losses()
    assert (record / "final_config.json").read_bytes() == (run.model_path / "config.json").read_bytes()
    assert "trained to step 3" in (record / "cout.txt").read_text()
