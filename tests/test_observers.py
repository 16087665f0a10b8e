"""The observer for MongoDB when the server is away, or loses its answers: nothing is lost, nothing comes twice."""

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gridfs
import pytest
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect

from tests.mongo_server import MongoServer
from tracking.addresses import Address, connect
from tracking.observers import PatientMongoObserver

NOW = datetime.datetime(2026, 1, 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    server = MongoServer(tmp_path_factory.mktemp("mongodb"))
    yield server
    server.stop()


class Recorder:
    """An observer in the middle of a run, told what Sacred would tell it."""

    def __init__(self, server: MongoServer, monkeypatch: pytest.MonkeyPatch, patience: Callable[[], float]):
        monkeypatch.setattr("tracking.observers._INTERVAL", 0.05)
        monkeypatch.setattr("tracking.observers._RETRY_INTERVAL", 0.05)
        client, database = connect(Address(server.uri, "--mongo_uri"))
        self.database = client[database]
        self.observer = PatientMongoObserver(client, database, patience)
        self.info: dict[str, Any] = {}
        experiment = {"name": "observed", "base_dir": ".", "sources": []}
        arguments: dict[str, Any] = {"command": "main", "host_info": {}, "config": {}, "meta_info": {}, "_id": None}
        self.run_id = self.observer.started_event(ex_info=experiment, start_time=NOW, **arguments)

    def log(self, *steps: int) -> None:
        points = {"steps": list(steps), "values": [step / 2 for step in steps], "timestamps": [NOW for _ in steps]}
        self.observer.log_metrics({"loss": points}, self.info)

    def beat(self, output: str) -> None:
        self.observer.heartbeat_event(info=self.info, captured_out=output, beat_time=NOW, result=None)

    def check(self, steps: list[int], artifact: bytes, output: str) -> None:
        (run,) = self.database.runs.find({"_id": self.run_id})
        (metric,) = self.database.metrics.find({"run_id": self.run_id})
        assert (metric["steps"], metric["values"]) == (steps, [step / 2 for step in steps])
        assert len(metric["timestamps"]) == len(steps)
        assert run["info"]["metrics"] == [{"name": "loss", "id": str(metric["_id"])}]
        (stored,) = run["artifacts"]
        assert stored["name"] == "a.txt"
        assert gridfs.GridFS(self.database).get(stored["file_id"]).read() == artifact
        named = f"artifact://runs/{self.run_id}/a.txt"
        assert self.database["fs.files"].count_documents({"filename": named}) == 1
        assert (run["status"], run["captured_out"]) == ("COMPLETED", output)


def test_an_order_whose_answer_is_lost_is_carried_out_once(
    server: MongoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(server, monkeypatch, lambda: 60.0)
    orders = 0

    def losing(order: Callable[..., Any]) -> Callable[..., Any]:
        def carried_out(*arguments: Any, **named: Any) -> Any:
            nonlocal orders
            orders += 1
            answer = order(*arguments, **named)
            if orders % 2:
                raise AutoReconnect("the connection broke")
            return answer

        return carried_out

    with monkeypatch.context() as patch:
        patch.setattr(Collection, "update_one", losing(Collection.update_one))
        (tmp_path / "a.txt").write_text("first")
        recorder.log(1, 2)
        recorder.beat("one")
        recorder.observer.artifact_event("a.txt", str(tmp_path / "a.txt"))
        recorder.log(3)
        recorder.beat("two")
        recorder.observer.completed_event(stop_time=NOW, result=None)
    assert orders >= 10
    recorder.check([1, 2, 3], b"first", "two")


def test_what_comes_while_the_server_is_away_is_written_when_it_is_back(
    server: MongoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(server, monkeypatch, lambda: 60.0)
    (tmp_path / "a.txt").write_text("kept")
    recorder.log(1)
    server.stop()
    for step in range(2, 50):
        recorder.log(step)
        recorder.beat("output so far " * step)
        if step == 20:
            recorder.observer.artifact_event("a.txt", str(tmp_path / "a.txt"), content_type="text/plain")
    time.sleep(1.0)
    server.start()
    recorder.observer.completed_event(stop_time=NOW, result=None)
    recorder.check(list(range(1, 50)), b"kept", "output so far " * 49)


def test_a_server_that_does_not_come_back_is_given_up(server: MongoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(server, monkeypatch, lambda: 0.5)
    server.stop()
    try:
        recorder.log(1)
        began = time.monotonic()
        recorder.observer.completed_event(stop_time=NOW, result=None)
        recorder.observer.join()  # Sacred asks once more
        assert recorder.observer.gave_up >= 1
        assert time.monotonic() - began < 20
    finally:
        server.start()
