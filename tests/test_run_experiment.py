"""run_experiment.py on a real server: one run that is killed and cut off on its way, and what its record holds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from config import config_to_json, load_model_config
from tests.mongo_server import MongoServer, free_port
from tests.test_user_errors import make_workspace
from tests.tracked_run import (
    Tracked,
    ask_tensorboard,
    children,
    command,
    main_of,
    output,
    read,
    read_metrics,
    start,
    wait_for_step,
)

ROOT = Path(__file__).resolve().parent.parent
STEPS, CHECKPOINT = 600, 300
OUTAGE = 20.0  # seconds
OMNIBOARD = ROOT / "tracking" / "omniboard"
SCREENSHOTS = ROOT / "runs" / "screenshots"  # kept, and not in git

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    server = MongoServer(tmp_path_factory.mktemp("mongodb"))
    yield server
    server.stop()


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
    board = ask_tensorboard(process, run, CHECKPOINT)
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
    ending = f"trained to step {STEPS}; checkpoints in {run.model_path}\n"
    assert document["captured_out"].count(ending) == 1  # what tells of the server may follow it
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


@pytest.fixture
def browser() -> str:
    """The node that drives Chromium; the test is skipped where something is missing, or fails with REQUIRE_BROWSER."""
    node = shutil.which("node")
    missing = "Node.js" if node is None else None
    if not (OMNIBOARD / "node_modules" / "playwright-core").is_dir():
        missing = "what `make browser-env` installs"
    if not os.environ.get("CHROMIUM") and not Path("/usr/bin/chromium").exists():
        missing = "/usr/bin/chromium (or another one that CHROMIUM names)"
    if missing:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(f"{missing} is not there")
    assert node is not None
    return node


@pytest.mark.browser
def test_omniboard_shows_the_run(tracked: Tracked, server: MongoServer, browser: str, tmp_path: Path) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    port, login = free_port(), {"OMNIBOARD_USER": "visitor", "OMNIBOARD_PASSWORD": "pass word"}
    settings = {**os.environ, **login, "SACRED_MONGO_URI": server.uri, "PORT": str(port)}
    with (tmp_path / "omniboard.log").open("w") as log:
        show = [sys.executable, "-m", "tracking.show", "--port", str(port)]  # as make omniboard does
        omniboard = subprocess.Popen(show, cwd=ROOT, stdout=log, stderr=log, env=settings)
    try:
        give_up = time.monotonic() + 120
        while subprocess.run([browser, OMNIBOARD / "healthcheck.js"], env=settings).returncode:
            log_text = (tmp_path / "omniboard.log").read_text()
            assert omniboard.poll() is None and time.monotonic() < give_up, log_text
            time.sleep(0.5)
        assert f"Omniboard: http://127.0.0.1:{port}/\n" in (tmp_path / "omniboard.log").read_text()
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/sacred/api/v1/Runs")
        assert not [name for name in refused.value.headers if name.lower().startswith("access-control")]
        url, *visitor = f"http://127.0.0.1:{port}/", *login.values()
        script, profile = ROOT / "tests" / "omniboard_visit.js", tmp_path / "chromium"
        words = [browser, str(script), url, "tiny", str(SCREENSHOTS), str(profile), *visitor]
        visit = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert visit.returncode == 0, visit.stderr
        seen = json.loads(visit.stdout)
    finally:
        omniboard.terminate()
        omniboard.wait(30)
    assert {str(tracked.document["_id"]), "tiny", "COMPLETED"} <= set(seen["row"])
    for name, metric in tracked.metrics.items():  # the lines are drawn from these
        curve = seen["curves"].get(name) or seen["curves"][f"{name}.unsmoothed"]
        assert curve == {"x": metric["steps"], "y": metric["values"]}
    assert len(seen["lines"]) >= len(tracked.metrics) and min(seen["lines"]) > 50  # pixels
    assert '"lr":0.005\n' in seen["config"] and f'"train_steps":{STEPS}\n' in seen["config"]
    assert all(artifact["name"] in seen["artifacts"] for artifact in tracked.document["artifacts"])
    for name in ("metrics", "config", "artifacts"):
        assert (SCREENSHOTS / f"{name}.png").stat().st_size > 10_000


def test_a_signal_stops_the_run_with_a_checkpoint_and_no_orphan(server: MongoServer, tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {"train_steps": 90_000}, {}, (1, "chunks"))
    process = start(run, "--experiment_name", "stopped", "--no_tensorboard", SACRED_MONGO_URI=server.uri)
    wait_for_step(run, 5, process)
    started = children(process.pid)
    assert any("/main.py " in line for line in started.values())
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM, output(run)
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
    assert process.wait(300) == 2, output(run)
    document = read(server, run, **{"experiment.name": "mistaken"}).document
    assert document["status"] == "FAILED"
    assert "nothing_*" in "".join(document["fail_trace"]) and "nothing_*" in document["captured_out"]
    assert output(run).count("error: ") == 1 and "Traceback" not in output(run)


def test_where_nothing_can_be_recorded_nothing_is_started(server: MongoServer, tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {}, {}, (1, "chunks"))
    wrong = server.uri.replace("word@", "@")
    finished = subprocess.run(command(run, "--mongo_uri", wrong), cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        "error: MongoDB refuses the user or password of --mongo_uri 'mongodb://sacred:***@"
    )
    assert len(finished.stderr.splitlines()) == 1
    flags = ("--mongo_uri", "", "--record_dir", str(run.config_path), "--no_tensorboard")
    finished = subprocess.run(command(run, *flags), cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "error: the record of this run cannot be begun" in finished.stderr and "Traceback" not in finished.stderr
    assert not run.model_path.exists()
