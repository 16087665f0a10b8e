"""Records into a set of tfrecords files, NAME_<i>_<records>.tfrecords, each whole or absent."""

import re
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np

from data.files import OutputFile, join, list_folder, make_folder
from data.record_bytes import frame_records
from data.records import Records


class WrittenFile(NamedTuple):
    """A finished file.

    Attributes:
        file: its name.
        records: how many it holds.
        tokens: how many all of these hold.
        min_tokens, max_tokens: how many the shortest and the longest of them hold.
        min_id, max_id: the smallest and the largest token id.
        bytes: its size.
    """

    file: str
    records: int
    tokens: int
    min_tokens: int
    max_tokens: int
    min_id: int
    max_id: int
    bytes: int

    def with_records(self, records: Records, size: int) -> "WrittenFile":
        """The same file with more records, which take up `size` bytes."""
        lengths, ids = records.lengths, records.ids
        return WrittenFile(
            file=self.file,
            records=self.records + len(lengths),
            tokens=self.tokens + len(ids),
            min_tokens=min(self.min_tokens, int(lengths.min())),
            max_tokens=max(self.max_tokens, int(lengths.max())),
            min_id=min(self.min_id, int(ids.min())),
            max_id=max(self.max_id, int(ids.max())),
            bytes=self.bytes + size,
        )


_NOTHING = WrittenFile("", 0, 0, np.iinfo(np.int64).max, 0, np.iinfo(np.int64).max, 0, 0)


def files_of(output_dir: str, name: str) -> list[str]:
    """The names in output_dir of the tfrecords that a RecordSetWriter of that name wrote, and of its unfinished one."""
    pattern = re.compile(rf"{re.escape(name)}_\d+(_\d+\.tfrecords|\.partial)")
    return [file for file in list_folder(output_dir) if pattern.fullmatch(file)]


class RecordSetWriter:
    """Writes records to numbered files of `files_per` records, the last one of fewer.

    A file is written aside (NAME_<i>.partial) and takes its name, which tells its number of records, when it is
    complete. Leaving the `with` block by an exception removes the unfinished one.
    """

    def __init__(
        self, output_dir: str, name: str, files_per: int, files: Sequence[WrittenFile] = (), skip: int = 0
    ) -> None:
        """`files`: those that an earlier writer finished; `skip`: how many of the next records these hold already."""
        self.files = list(files)
        self._output_dir = output_dir
        self._name = name
        self._files_per = files_per
        self._skip = skip
        self._output: OutputFile | None = None
        self._file = _NOTHING

    def __enter__(self) -> "RecordSetWriter":
        make_folder(self._output_dir)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._output is not None and kind is None:
                self._finish_file()
        finally:
            if self._output is not None:
                self._output.discard()

    @property
    def records(self) -> int:
        """How many records have been written, those of earlier writers included."""
        return self._file.records + sum(file.records for file in self.files)

    def write(self, records: Records) -> bool:
        """Write records in their order; whether that finished a file."""
        skipped = min(self._skip, len(records.lengths))
        self._skip -= skipped
        finished = len(self.files)
        first = skipped
        while first < len(records.lengths):
            last = min(len(records.lengths), first + self._files_per - self._file.records)
            self._write(_section(records, first, last))
            first = last
        return len(self.files) > finished

    def _write(self, records: Records) -> None:
        if self._output is None:
            self._output = OutputFile(join(self._output_dir, f"{self._name}_{len(self.files)}.partial"))
        data = frame_records(records.ids, records.lengths)
        self._output.write(data)
        self._file = self._file.with_records(records, len(data))
        if self._file.records == self._files_per:
            self._finish_file()

    def _finish_file(self) -> None:
        assert self._output is not None
        name = f"{self._name}_{len(self.files)}_{self._file.records}.tfrecords"
        self._output.finish(join(self._output_dir, name))
        self.files.append(self._file._replace(file=name))
        self._output, self._file = None, _NOTHING


def _section(records: Records, first: int, last: int) -> Records:
    """Some consecutive ones of the records."""
    start = int(records.lengths[:first].sum())
    lengths = records.lengths[first:last]
    return Records(records.ids[start : start + int(lengths.sum())], lengths)
