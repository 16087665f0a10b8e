"""Sacred's observers, made to lose nothing and to repeat nothing when the server is away for a while."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import pymongo
from sacred.dependencies import get_digest
from sacred.observers import FileStorageObserver, QueuedMongoObserver
from sacred.observers.mongo import QueueCompatibleMongoObserver
from sacred.observers.queue import QueueObserver, WrappedEvent
from sacred.utils import IntervalTimer

logger = logging.getLogger(__name__)

_INTERVAL = 2.0  # seconds between rounds of the thread that writes to MongoDB
_RETRY_INTERVAL = 3.0  # seconds between tries while it is away


class RepeatableMongoObserver(QueueCompatibleMongoObserver):
    """Events that may be processed twice with the same result.

    When a connection breaks, nobody knows whether the server has carried out the last order, and it is given again.
    """

    def log_metrics(self, metric_name: str, metrics_values: dict[str, list], info: dict) -> None:
        """Append points to a metric; each of its steps comes once (tracking.metrics_tail sees to that)."""
        assert self.run_entry is not None
        key = {"run_id": self.run_entry["_id"], "name": metric_name}
        steps = metrics_values["steps"]
        metric = self.metrics.find_one(key, {"_id": 1})
        identity = metric["_id"] if metric else self.metrics.insert_one(dict(key)).inserted_id
        push = {name: {"$each": metrics_values[name]} for name in ("steps", "values", "timestamps")}
        self.metrics.update_one({"_id": identity, "steps": {"$ne": steps[-1]}}, {"$push": push})
        entry = {"name": metric_name, "id": str(identity)}
        if entry not in info.setdefault("metrics", []):  # how Omniboard finds them
            info["metrics"].append(entry)

    def artifact_event(self, name: str, filename: str, metadata: Any = None, content_type: str | None = None) -> None:
        """Store a file; one of the same name is replaced, and so is what an interrupted try left."""
        assert self.run_entry is not None
        stored = f"artifact://{self.runs.name}/{self.run_entry['_id']}/{name}"
        for earlier in list(self.fs.find({"filename": stored})):
            self.fs.delete(earlier._id)
        with open(filename, "rb") as file:
            identity = self.fs.put(file, filename=stored, metadata=metadata, content_type=content_type)
        others = [artifact for artifact in self.run_entry["artifacts"] if artifact["name"] != name]
        self.run_entry["artifacts"] = [*others, {"name": name, "file_id": identity}]
        self.save()

    def save_sources(self, ex_info: dict[str, Any]) -> list[list[Any]]:
        """[name, id] of every source file; contents that are stored already are not stored again."""
        stored = []
        for name, _ in ex_info["sources"]:
            path = os.path.join(ex_info["base_dir"], name)
            digest = get_digest(path)
            file = self.fs.find_one({"filename": path, "metadata.md5": digest})
            if file is None:
                with open(path, "rb") as source:
                    stored.append([name, self.fs.put(source, filename=path, metadata={"md5": digest})])
            else:
                stored.append([name, file._id])
        return stored


class PatientMongoObserver(QueuedMongoObserver):
    """Writes to MongoDB from a thread that tries again until the server takes it, and at the end waits only so long.

    Attributes:
      gave_up: how many events the server never took.
    """

    def __init__(self, client: pymongo.MongoClient, database: str, patience: Callable[[], float]):
        """`patience()` tells how many seconds to wait, at the end, for a server that is away."""
        QueueObserver.__init__(
            self, RepeatableMongoObserver(client=client, db_name=database), _INTERVAL, _RETRY_INTERVAL
        )
        self._patience = patience
        self._last_beat: tuple[int, dict[str, Any]] = (0, {})
        self._giving_up = threading.Event()
        self._is_away = False
        self.gave_up = 0

    def started_event(self, *args: Any, **kwargs: Any) -> Any:
        self._queue: Queue[WrappedEvent] = Queue()
        self._stop_worker_event, self._worker = IntervalTimer.create(self._run, interval=self._interval)
        self._worker.daemon = True  # a server that never comes back does not keep the process
        self._worker.start()
        return self._covered_observer.started_event(*args, **kwargs)  # gives the run its id: not from the thread

    def heartbeat_event(self, *args: Any, **kwargs: Any) -> None:
        """Of the heartbeats that wait for the server only the newest is kept: each holds the whole output so far."""
        self._last_beat = (self._last_beat[0] + 1, kwargs)
        self._queue.put(WrappedEvent("heartbeat_event", (), {"number": self._last_beat[0]}))

    def _run(self) -> None:
        while not self._queue.empty():
            event = self._queue.get()
            while not self._process(event):
                if self._giving_up.wait(self._retry_interval):
                    return
            self._queue.task_done()

    def _process(self, event: WrappedEvent) -> bool:
        kwargs = event.kwargs
        if event.name == "heartbeat_event":
            number, latest = self._last_beat
            if kwargs["number"] < number:
                return True
            kwargs = latest
        try:
            getattr(self._covered_observer, event.name)(*event.args, **kwargs)
        except Exception as error:  # of any kind: a record is worth another try, whatever went wrong
            if not self._is_away:
                logger.warning("MongoDB does not take the record (%s); trying again until it does", _short(error))
            self._is_away = True
            return False
        if self._is_away:
            logger.warning("MongoDB takes the record again")
        self._is_away = False
        return True

    def join(self) -> None:
        """Wait until everything is written; give up when the server has been away for `patience()` seconds."""
        if self._queue is None or self._stop_worker_event.is_set():
            return
        last, since = self._queue.unfinished_tasks, time.monotonic()
        while self._queue.unfinished_tasks:
            if self._queue.unfinished_tasks != last:
                last, since = self._queue.unfinished_tasks, time.monotonic()
            if time.monotonic() - since > self._patience():
                self.gave_up = self._queue.unfinished_tasks
                self._giving_up.set()
                break
            time.sleep(0.05)
        self._stop_worker_event.set()
        self._worker.join(timeout=10)


def _short(error: Exception) -> str:
    return str(error).partition(", Timeout:")[0].partition(" (configured timeouts")[0][:200] or type(error).__name__


class LocalObserver(FileStorageObserver):
    """Sacred's folders of files; metrics.json is rewritten seldom enough to stay cheap in a long run."""

    _SHARE = 0.02  # of the time, spent rewriting

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metrics: dict[str, dict[str, list]] = {}
        self._next_write = 0.0

    def log_metrics(self, metrics_by_name: dict[str, dict[str, list]], info: dict) -> None:
        for name, points in metrics_by_name.items():
            metric = self._metrics.setdefault(name, {"values": [], "steps": [], "timestamps": []})
            metric["values"] += points["values"]
            metric["steps"] += points["steps"]
            metric["timestamps"] += [moment.isoformat() for moment in points["timestamps"]]
        if metrics_by_name and time.monotonic() > self._next_write:
            began = time.monotonic()
            self._write_metrics()
            now = time.monotonic()
            self._next_write = now + (now - began) / self._SHARE

    def _write_metrics(self) -> None:
        path = os.path.join(self.dir, "metrics.json")
        with open(path + ".tmp", "w") as file:
            json.dump(self._metrics, file, sort_keys=True)
        os.replace(path + ".tmp", path)

    def completed_event(self, stop_time: Any, result: Any) -> None:
        self._write_metrics()
        super().completed_event(stop_time, result)

    def interrupted_event(self, interrupt_time: Any, status: str) -> None:
        self._write_metrics()
        super().interrupted_event(interrupt_time, status)

    def failed_event(self, fail_time: Any, fail_trace: list[str]) -> None:
        self._write_metrics()
        super().failed_event(fail_time, fail_trace)
