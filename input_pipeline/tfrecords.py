"""Record files: finding them, counting their records, reading their tokens.

A file is a series of records in TFRecord framing, each one a tf.train.Example whose int64 feature `text` holds token
ids. Paths may be anything tf.io.gfile reads, so gs:// works as local files do.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import tensorflow.compat.v1 as tf
from google.protobuf.message import DecodeError

from errors import UserError

FEATURE = "text"
EXPECTED = f"records must hold token ids in an int64 feature `{FEATURE}`, as data/create_tfrecords.py writes them"
# Buffer of a sequential reader: large enough that an object store is asked seldom.
READ_BUFFER_BYTES = 4 << 20

_HEADER = struct.Struct("<QI")  # length of the data; masked CRC-32C of these eight bytes
HEADER_BYTES = _HEADER.size
FRAMING_BYTES = HEADER_BYTES + 4  # ... and the data's own checksum after it
_CHUNK_BYTES = 4 << 20
_HEAD_BYTES = 256 << 10  # what is read of a file before the count in its name is believed
_COUNT_IN_NAME = re.compile(r"_\d+_(\d+)\.tfrecords?$")  # NAME_<i>[_<process>]_<n_records>.tfrecords
_RECORDS_PER_BATCH = 256


def find_files(pattern: str, key: str, dataset_id: str) -> list[str]:
    """The files that a glob matches, numbers within names in numeric order (x_2 before x_10).

    Raises:
        UserError: naming `key`, the glob and the dataset, where it matches nothing or can't be listed.
    """
    try:
        files = tf.io.gfile.glob(pattern)
    except tf.errors.OpError as error:
        raise UserError(f'{key} "{pattern}" of dataset "{dataset_id}" can\'t be listed: {error.message}') from error
    if not files:
        raise UserError(
            f'{key} "{pattern}" of dataset "{dataset_id}" matches no file; give the path or glob of its tfrecords'
        )
    if len(files) == 1 and tf.io.gfile.isdir(files[0]):
        raise UserError(
            f'{key} "{pattern}" of dataset "{dataset_id}" is a folder; give the glob of its files, for example '
            f'"{pattern.rstrip("/")}/*.tfrecords"'
        )
    return sorted(files, key=_numeric_order)


def count_records(files: Sequence[str]) -> list[int]:
    """The number of records in each file.

    The count in a name NAME_<i>[_<process>]_<n_records>.tfrecords is believed where it agrees with the file's size
    and the length of its first records; every other file is counted by following its record headers.

    Raises:
        UserError: naming a file that is not a tfrecords file, is cut short or can't be read.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:  # an object store answers many requests at once
        return list(pool.map(_count_file, files))


def count_in_name(path: str) -> int | None:
    """The count that a name NAME_<i>[_<process>]_<n_records>.tfrecords seems to carry; a date looks like one too."""
    match = _COUNT_IN_NAME.search(path)
    return int(match[1]) if match else None


def first_tokens(path: str) -> list[int] | None:
    """Token ids of the file's first record, or None where it holds no record; UserError where it can't be read."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            size = file.size()
            if not size:
                return None
            length = _first_length(file.read(HEADER_BYTES), size, path)
            example = tf.train.Example.FromString(file.read(length))
    except tf.errors.OpError as error:
        raise unreadable(path, error.message) from error
    except DecodeError as error:
        raise UserError(f"{path}: its first record is not a tf.train.Example; {EXPECTED}") from error
    tokens = list(example.features.feature[FEATURE].int64_list.value)
    if not tokens:
        others = sorted(set(example.features.feature) - {FEATURE})
        raise UserError(f"{path}: its first record has no int64 feature `{FEATURE}` (it has {others}); {EXPECTED}")
    return tokens


def unreadable(path: str, reason: str) -> UserError:
    """The sentence for a file that is damaged, cut short or not ours to read."""
    return UserError(f"{path} can't be read: {reason}; make or copy this file again")


def parse_text(serialized: tf.Tensor) -> tf.RaggedTensor:
    """string [records] -> int64 [records, (tokens)]: token ids; a record without the feature gives none."""
    tokens = tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64)
    return tf.io.parse_example(serialized, {FEATURE: tokens})[FEATURE]


@dataclass(frozen=True)
class Records:
    """Some consecutive records of a file."""

    tokens: np.ndarray  # int64 [tokens]: the records' token ids, one record after another
    lengths: np.ndarray  # int64 [records]: tokens in each
    file_bytes: int  # what they occupy in the file

    def ends_in(self, token: int) -> np.ndarray:
        """bool [records]: whether the record's last token is `token`; an empty record's is not."""
        ends = np.cumsum(self.lengths) - 1
        padded = np.append(self.tokens, -1)  # so that an index exists where every record is empty
        return (self.lengths > 0) & (padded[ends] == token)


class TokenReader:
    """Reads record files from outside any graph: a context manager with a graph and a CPU session of its own."""

    def __init__(self) -> None:
        with tf.Graph().as_default() as graph:
            self._path = tf.placeholder(tf.string, [])
            batches = tf.data.TFRecordDataset(self._path, buffer_size=READ_BUFFER_BYTES).batch(_RECORDS_PER_BATCH)
            parsed = batches.map(self._parse, num_parallel_calls=2, deterministic=True).prefetch(2)
            self._iterator = tf.data.make_initializable_iterator(parsed)
            self._next = self._iterator.get_next()
        self._session = tf.Session(graph=graph, config=tf.ConfigProto(device_count={"GPU": 0}))

    @staticmethod
    def _parse(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        text = parse_text(serialized)
        file_bytes = tf.reduce_sum(tf.strings.length(serialized) + FRAMING_BYTES)
        return text.flat_values, text.row_lengths(), file_bytes

    def read(self, path: str) -> Iterator[Records]:
        """All records of a file, in batches; UserError naming a file that is damaged or holds something else."""
        try:
            self._session.run(self._iterator.initializer, {self._path: path})
            while True:
                yield Records(*self._session.run(self._next))
        except tf.errors.OutOfRangeError:
            return
        except tf.errors.InvalidArgumentError as error:
            raise UserError(f"{path}: a record is no tf.train.Example with an int64 `{FEATURE}`; {EXPECTED}") from error
        except tf.errors.OpError as error:
            # The reason stands between where the graph was built and the names of its nodes.
            raise unreadable(path, error.message.split("\n\t [[")[0].splitlines()[-1]) from error

    def __enter__(self) -> "TokenReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.close()


def _numeric_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _count_file(path: str) -> int:
    named = count_in_name(path)
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            size = file.size()
            if not size:
                return 0
            records, position = _follow_headers(file, size, path, 0, min(size, _HEAD_BYTES))
            if position == size:
                return records
            expected = size * records / position
            # x_0.tfrecords names no count and data_2019_12.tfrecords a wrong one.
            if named is not None and expected / 2 <= named <= expected * 2:
                return named
            return records + _follow_headers(file, size, path, position, size)[0]
    except tf.errors.OpError as error:
        raise unreadable(path, error.message) from error


def _follow_headers(file: tf.io.gfile.GFile, size: int, path: str, position: int, stop: int) -> tuple[int, int]:
    """Hop from header to header until `stop`: the number of records passed, and where the next one begins."""
    records, chunk, chunk_start = 0, b"", position
    while position < stop:
        offset = position - chunk_start
        if offset + HEADER_BYTES > len(chunk):
            file.seek(position)
            chunk, chunk_start, offset = file.read(min(_CHUNK_BYTES, size - position)), position, 0
            if position == 0:
                _first_length(chunk[:HEADER_BYTES], size, path)
            if len(chunk) < HEADER_BYTES:
                raise _cut_short(path, records)
        position += _HEADER.unpack_from(chunk, offset)[0] + FRAMING_BYTES
        if position > size:
            raise _cut_short(path, records)
        records += 1
    return records, position


def _cut_short(path: str, records: int) -> UserError:
    return unreadable(path, f"it is cut short or damaged after {records} whole records")


def _first_length(header: bytes, size: int, path: str) -> int:
    """The first record's length; its checksum tells a record file from any other."""
    length, checksum = _HEADER.unpack(header.ljust(HEADER_BYTES, b"\0"))
    if len(header) < HEADER_BYTES or checksum != masked_crc32c(np.frombuffer(header[:8], np.uint8)[None])[0]:
        raise UserError(f"{path} is not a tfrecords file (or is compressed, or damaged at its very start); {EXPECTED}")
    if length + FRAMING_BYTES > size:
        raise _cut_short(path, 0)
    return int(length)


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    return table


_CRC_TABLE = _crc_table()


def masked_crc32c(rows: np.ndarray) -> np.ndarray:
    """uint8 [rows, bytes] -> uint32 [rows]: the checksum of TFRecord framing: CRC-32C (Castagnoli), rotated and
    offset."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
