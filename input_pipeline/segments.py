"""Where a record file can be entered, so that its parts can be read in any order.

A part is what begins between two places of the file: the first record is found behind each place by its checksum, as
nothing in a record file says where records begin. Which record belongs to which part therefore depends on the file
alone, and no index of records is needed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow.compat.v1 as tf

from input_pipeline.order import BLOCK_ELEMENTS
from input_pipeline.tfrecords import FRAMING_BYTES, HEADER_BYTES, masked_crc32c, unreadable

SEGMENT_BYTES = 1 << 20  # at least: an object store is asked anew for each
_CHUNK_BYTES = 64 << 10


def segment_starts(files: Sequence[str], counts: Sequence[int]) -> list[list[int]]:
    """For each file of so many records, the byte at which each of its parts begins; the first one is 0.

    A part is about as long as the blocks that elements are shuffled in, and at least SEGMENT_BYTES.

    Raises:
        UserError: naming a file that can't be read.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:  # an object store answers many requests at once
        return list(pool.map(_starts, files, counts))


def _starts(path: str, count: int) -> list[int]:
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            size = file.size()
            number = max(1, min(-(-count // BLOCK_ELEMENTS), size // SEGMENT_BYTES))
            found = (_record_from(file, size, size * part // number) for part in range(1, number))
            return [0, *sorted({start for start in found if start < size})]
    except tf.errors.OpError as error:
        raise unreadable(path, error.message) from error


def _record_from(file: tf.io.gfile.GFile, size: int, place: int) -> int:
    """The first byte from `place` on at which a record begins, or `size`."""
    while place < size:
        file.seek(place)
        chunk = file.read(_CHUNK_BYTES)
        for offset in _headers(chunk):
            start = place + int(offset)
            following = start + int.from_bytes(chunk[offset : offset + 8], "little") + FRAMING_BYTES
            if following == size or (following < size and _is_header(file, following)):
                return start
        place += max(1, len(chunk) - HEADER_BYTES + 1)
    return size


def _is_header(file: tf.io.gfile.GFile, place: int) -> bool:
    file.seek(place)
    return _headers(file.read(HEADER_BYTES)).size > 0


def _headers(chunk: bytes) -> np.ndarray:
    """The offsets in `chunk` of all that could be a record's header: a length below 4 GB and its checksum."""
    if len(chunk) < HEADER_BYTES:
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(chunk, np.uint8), HEADER_BYTES)
    likely = np.flatnonzero(~windows[:, 4:8].any(axis=1))
    windows = windows[likely]
    checksums = windows[:, 8:].copy().view("<u4")[:, 0]
    return likely[masked_crc32c(windows[:, :8]) == checksums]
