"""Metrics of a training on a TPU, which come as TensorBoard's events instead of metrics.jsonl."""

import os
import struct
from collections.abc import Iterator
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util

from tracking.files import escaped, matching, read_from
from tracking.metrics_tail import Point

_LENGTH, _CHECKSUM = 8, 4  # bytes: a record is its length, the length's checksum, the data and the data's checksum


class EventsTail:
    """The scalars of one run, each step once; `tokens_per_second` from the times of two steps."""

    def __init__(self, model_path: str, since: float, tokens_per_batch: int, stride: int):
        """`since`, in seconds since 1970, is when the run began; of every `stride` steps one is reported."""
        self._pattern = os.path.join(escaped(model_path), "events.out.tfevents.*")
        self._since = since
        self._tokens = tokens_per_batch
        self._stride = stride
        self._offsets: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._timed: tuple[int, float] | None = None  # the last step with a loss, and when it was made

    def read(self) -> list[Point]:
        """What is new."""
        points = []
        for path in matching(self._pattern):
            for event in self._new_events(path):
                if event.wall_time >= self._since:
                    points += self._points(event)
        return sorted(points, key=lambda point: point.step)

    def _new_events(self, path: str) -> Iterator[Any]:
        offset = self._offsets.get(path, 0)
        data = read_from(path, offset)
        start = 0
        while start + _LENGTH <= len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            begin = start + _LENGTH + _CHECKSUM
            if begin + length + _CHECKSUM > len(data):  # still being written
                break
            yield event_pb2.Event.FromString(data[begin : begin + length])
            start = begin + length + _CHECKSUM
        self._offsets[path] = offset + start

    def _points(self, event: Any) -> list[Point]:
        points = []
        for value in event.summary.value:
            number = _scalar(value)
            if number is None or event.step <= self._last.get(value.tag, 0):  # made again after a crash
                continue
            self._last[value.tag] = event.step
            kept = event.step % self._stride == 0
            if value.tag == "loss":
                speed = self._speed(event)
                points += [Point(event.step, "tokens_per_second", speed)] if kept and speed else []
            points += [Point(event.step, value.tag, number)] if kept else []
        return points

    def _speed(self, event: Any) -> float | None:
        before, self._timed = self._timed, (event.step, event.wall_time)
        if before is None or event.wall_time <= before[1]:
            return None
        return self._tokens * (event.step - before[0]) / (event.wall_time - before[1])


def _scalar(value: Any) -> float | None:
    """The number of a summary, of TensorBoard's first form or its second."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        array = tensor_util.make_ndarray(value.tensor)
        return float(array) if array.shape == () and array.dtype.kind in "fi" else None
    return None
