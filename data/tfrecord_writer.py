"""Token ids into tfrecords: one int64 feature `text` a record, NAME_<i>_<records>.tfrecords, each whole or absent."""

import contextlib
import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from data.files import join, list_folder, make_folder, remove, rename
from errors import UserError


class WrittenFile(NamedTuple):
    """A finished file: its name, how many records it holds, how many tokens these hold."""

    file: str
    records: int
    tokens: int


def files_of(output_dir: str, name: str) -> list[str]:
    """The names in output_dir of the tfrecords that a RecordSetWriter of that name wrote, and of its unfinished one."""
    pattern = re.compile(rf"{re.escape(name)}_\d+(_\d+\.tfrecords|\.partial)")
    return [file for file in list_folder(output_dir) if pattern.fullmatch(file)]


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """UserError where TensorFlow can't write the file: no room, no right."""
    import tensorflow as tf  # as in `write`

    try:
        yield
    except tf.errors.OpError as error:
        reason = error.message.rpartition("; ")[2]
        raise UserError(f"{path} can't be written ({reason}); put that right and run the same command again") from error


class RecordSetWriter:
    """Writes records to numbered files of at most `files_per` records.

    A file is written aside (NAME_<i>.partial) and takes its name, which tells its number of records, when it is
    complete. Leaving the `with` block by an exception removes the unfinished one.
    """

    def __init__(self, output_dir: str, name: str, files_per: int) -> None:
        self.files: list[WrittenFile] = []
        self.records = 0
        self.tokens = 0
        self.min_id: int | None = None
        self.max_id: int | None = None
        self._output_dir = output_dir
        self._name = name
        self._files_per = files_per
        self._writer: Any = None
        self._file_records = 0
        self._file_tokens = 0

    def __enter__(self) -> "RecordSetWriter":
        make_folder(self._output_dir)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is None:
            return
        if kind is None:
            self._finish_file()
        else:
            with contextlib.suppress(UserError):  # the error that ends the block is the one to tell
                self._close()
            remove(self._aside())

    def _aside(self) -> str:
        return join(self._output_dir, f"{self._name}_{len(self.files)}.partial")

    def write(self, ids: np.ndarray) -> None:
        """Write one record; int [tokens], at least one."""
        import tensorflow as tf  # here, because it takes seconds that the workers meanwhile use

        if self._writer is None:
            with _explained(self._aside()):
                self._writer = tf.io.TFRecordWriter(self._aside())
        int64_list = tf.train.Int64List(value=ids.tolist())
        features = tf.train.Features(feature={"text": tf.train.Feature(int64_list=int64_list)})
        with _explained(self._aside()):
            self._writer.write(tf.train.Example(features=features).SerializeToString())
        self._file_records += 1
        self._file_tokens += len(ids)
        low, high = int(ids.min()), int(ids.max())
        self.min_id = low if self.min_id is None else min(self.min_id, low)
        self.max_id = high if self.max_id is None else max(self.max_id, high)
        if self._file_records == self._files_per:
            self._finish_file()

    def _close(self) -> None:
        with _explained(self._aside()):
            self._writer.close()

    def _finish_file(self) -> None:
        self._close()
        name = f"{self._name}_{len(self.files)}_{self._file_records}.tfrecords"
        rename(self._aside(), join(self._output_dir, name))
        self.files.append(WrittenFile(name, self._file_records, self._file_tokens))
        self.records += self._file_records
        self.tokens += self._file_tokens
        self._writer, self._file_records, self._file_tokens = None, 0, 0
