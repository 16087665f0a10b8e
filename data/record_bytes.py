"""Token ids to the bytes of a tfrecords file: what tf.train.Example and tf.io.TFRecordWriter give, without them.

Building an Example takes TensorFlow 0.2 microseconds a token, and its import seconds; this needs NumPy.
"""

import functools
import struct

import google_crc32c
import numpy as np

_LARGEST = 1 << 28  # ids from here on take a fifth byte; no vocabulary comes near
_USUAL = 1 << 18  # ids below this are looked up in a table
_DELIMITED = 2  # the wire type of what is preceded by its length


def frame_records(ids: np.ndarray, lengths: np.ndarray) -> bytes:
    """Records as a tfrecords file holds them, each an Example with one int64 feature `text`.

    Args:
        ids: int32 [tokens], the records one after another.
        lengths: int64 [records], tokens of each, at least one.
    """
    payload, sizes = _varints(ids, lengths)
    framed = []
    start = 0
    for size in sizes.tolist():
        head, header = _heads(size)
        message = header + payload[start : start + size]
        start += size
        framed += [head, message, _masked_crc(message)]
    return b"".join(framed)


def _varints(ids: np.ndarray, lengths: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The ids as protobuf's varints; int64 [records], the bytes of each record."""
    if not len(ids):
        return b"", np.zeros(0, np.int64)
    largest = int(ids.max())
    assert largest < _LARGEST
    is_usual = largest < _USUAL
    spread, used, sizes = (table[ids] for table in _usual_varints()) if is_usual else _spread_varints(ids)
    packed = spread.view(np.uint8)[used.view(bool)].tobytes()
    return packed, np.add.reduceat(sizes, np.cumsum(lengths) - lengths, dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _usual_varints() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _spread_varints(np.arange(_USUAL))


def _spread_varints(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seven bits a byte, the lowest first, the top bit set where another byte follows.

    Returns:
        uint32 [ids], four bytes each; uint32 [ids], four booleans each: which bytes are used; uint8 [ids], how many.
    """
    values = ids.astype("<u4")
    spread = values & 0x7F
    used = np.ones([len(ids), 4], bool)
    for byte in (1, 2, 3):
        used[:, byte] = values >= 1 << 7 * byte
        spread |= (values & (0x7F << 7 * byte)) << byte
        spread |= used[:, byte].astype("<u4") << (8 * byte - 1)
    return spread, used.view("<u4").ravel(), used.sum(1, dtype=np.uint8)


@functools.lru_cache(maxsize=1 << 16)
def _heads(payload: int) -> tuple[bytes, bytes]:
    """For packed ids of so many bytes: a record's length with its checksum, and the Example up to the ids.

    Example {1: Features {1: map entry {1: "text", 2: Feature {3: Int64List {1: packed ids}}}}}
    """
    header = _field(1, payload)
    header = _field(3, len(header) + payload) + header
    header = bytes([1 << 3 | _DELIMITED, 4]) + b"text" + _field(2, len(header) + payload) + header
    header = _field(1, len(header) + payload) + header
    header = _field(1, len(header) + payload) + header
    length = struct.pack("<Q", len(header) + payload)
    return length + _masked_crc(length), header


def _field(number: int, size: int) -> bytes:
    """The tag and the length of a field."""
    encoded = [number << 3 | _DELIMITED]
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*encoded, size])


def _masked_crc(data: bytes) -> bytes:
    """A checksum as tfrecords have it: CRC-32C, rotated by 15 bits and shifted, for it may cover other checksums."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
