"""Metrics as main.py writes them: the new lines of `metrics.jsonl` and `eval_<sacred_id>.jsonl`, each step once."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from tracking.files import read_from

# What one metric of a run may hold: a document of MongoDB is 16 MB at most, and a point takes some 50 bytes.
MOST_POINTS = 100_000
_NO_METRIC = ("step", "time", "task", "global_step")


@dataclass(frozen=True)
class Point:
    """A metric's value at a step; `name` is "loss" for training's and "validation/loss" for an evaluation's."""

    step: int
    name: str
    value: float


class JsonLines:
    """The objects that are appended to a file of JSON lines, whatever happens to the file on the way.

    A run that goes on from a checkpoint drops the lines past it and writes the file anew. So the last line that was
    read is looked for where it was; if it is no longer there, the file is read from its beginning.
    """

    def __init__(self, path: str):
        self._path = path
        self._start = 0  # of the last line read
        self._line = b""

    def read(self) -> list[dict[str, Any]]:
        """The objects of all lines completed since the last call; of all lines after the file was written anew."""
        data = read_from(self._path, self._start)
        if not data.startswith(self._line):
            self._start, self._line = 0, b""
            data = read_from(self._path, 0)
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            self._start += sum(map(len, lines[:-1]))
            self._line, known = lines[-1], len(self._line) > 0
            lines = lines[1:] if known else lines
        return [value for line in lines if (value := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # a line that a killed run left unfinished
        return None
    return value if isinstance(value, dict) else None


class MetricsTail:
    """The points of one run. Those of earlier runs in the same folder, and steps that are made again, are left out."""

    def __init__(self, model_path: str, sacred_id: str, since: float, train_steps: int):
        """`since`, in seconds since 1970, is when the run began; of every `stride` steps one is reported."""
        self._training = JsonLines(os.path.join(model_path, "metrics.jsonl"))
        self._evaluations = JsonLines(os.path.join(model_path, f"eval_{sacred_id}.jsonl"))
        self._since = since
        self._evaluated: set[tuple[str, int]] = set()
        self.stride = -(-train_steps // MOST_POINTS)
        self.step = 0  # the last one seen

    def read(self) -> list[Point]:
        """What is new, in the order of steps."""
        # Evaluations first: the steps before one are all written by then, so that no older point can follow later.
        evaluations = [line for line in self._evaluations.read() if self._is_ours(line, "global_step")]
        training = [line for line in self._training.read() if self._is_ours(line, "step")]
        points = []
        for line in training:
            if line["step"] > self.step:
                self.step = line["step"]
                if self.step % self.stride == 0:
                    points += _points(line, self.step, "")
        for line in evaluations:
            task, step = str(line.get("task", "eval")), line["global_step"]
            if (task, step) not in self._evaluated:
                self._evaluated.add((task, step))
                points += _points(line, step, f"{task}/")
        return sorted(points, key=lambda point: point.step)  # stable: training's come before an evaluation's

    def _is_ours(self, line: dict[str, Any], step: str) -> bool:
        return isinstance(line.get(step), int) and _number(line.get("time"), -math.inf) >= self._since


def _points(line: dict[str, Any], step: int, prefix: str) -> list[Point]:
    values = {name: _number(value, None) for name, value in line.items() if name not in _NO_METRIC}
    return [Point(step, prefix + name, value) for name, value in values.items() if value is not None]


def _number(value: Any, otherwise: Any) -> Any:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise
