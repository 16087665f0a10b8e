"""A real run of run_experiment.py for tests: how it is started and looked into, and its record."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gridfs

from tests.mongo_server import MongoServer
from tests.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent


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
    give_up = time.monotonic() + 300
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


def ask_tensorboard(process: subprocess.Popen[str], run: Workspace, steps: int) -> dict[str, Any]:
    """What the TensorBoard of a run says of the first `steps` losses, where it listens, and its process."""
    give_up = time.monotonic() + 300
    while not (found := re.search(r"TensorBoard: http://127\.0\.0\.1:(\d+)/", output(run))):
        assert process.poll() is None and time.monotonic() < give_up, output(run)
        time.sleep(0.1)
    url = f"http://127.0.0.1:{found[1]}/data/plugin/scalars/scalars?tag=loss&run=."
    scalars: list[list[float]] = []
    while len(scalars) < steps:  # it reads what is new every few seconds
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
