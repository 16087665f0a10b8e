"""Everything a run printed, kept for its record while it goes on to the terminal."""

import codecs
import io
import os
import threading
import time
from collections import deque
from typing import IO, TextIO

_LAST_LINES = 40  # of an error that are quoted


class Transcript(io.TextIOBase):
    """A text stream that keeps what is written to it: all of it or, up to a limit, the beginning and the end."""

    def __init__(self) -> None:
        self._head_room = 0
        self._tail_room: int | None = None
        self._lock = threading.Lock()
        self._head: list[str] = []
        self._tail: deque[str] = deque()
        self._tail_size = 0
        self._left_out = 0

    def write(self, text: str) -> int:
        with self._lock:
            begins, rest = text[: self._head_room], text[self._head_room :]
            if begins:
                self._head.append(begins)
                self._head_room -= len(begins)
            if rest:
                self._tail.append(rest)
                self._tail_size += len(rest)
            while self._tail_room is not None and self._tail_size > self._tail_room and len(self._tail) > 1:
                dropped = len(self._tail.popleft())
                self._tail_size -= dropped
                self._left_out += dropped
        return len(text)

    def limit(self, size: int) -> None:
        """Keep so many characters from now on."""
        with self._lock:
            self._head_room, self._tail_room = size // 5, size - size // 5
            self._head.extend(self._tail)
            self._tail.clear()
            self._tail_size = 0

    def text(self) -> str:
        """What was written, with a note where characters are left out."""
        with self._lock:
            note = f"\n[... {self._left_out} characters left out ...]\n" if self._left_out else ""
            return "".join([*self._head, note, *self._tail])


class Pump(threading.Thread):
    """Passes on what a process writes, as it comes, to a stream and a transcript; remembers its last lines.

    Attributes:
      last_write: when it wrote last, by time.monotonic().
    """

    def __init__(self, source: IO[bytes], stream: TextIO, transcript: Transcript):
        super().__init__(daemon=True)
        self._source = source
        self._stream = stream
        self._transcript = transcript
        self._lines: deque[str] = deque([""], maxlen=_LAST_LINES)
        self.last_write = time.monotonic()

    def run(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with self._source:
            while data := os.read(self._source.fileno(), 1 << 16):
                self._pass_on(decoder.decode(data))
            self._pass_on(decoder.decode(b"", final=True))

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        self.last_write = time.monotonic()
        self._transcript.write(text)
        first, *others = text.split("\n")
        self._lines[-1] += first
        self._lines.extend(others)
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more; the record does
            pass

    def last_lines(self) -> str:
        """The end of what was written."""
        return "\n".join(self._lines).strip()
