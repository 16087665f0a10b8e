"""Compressed bytes to plain ones, as they stream by."""

import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

from data.readers.common import Reader, ReadOptions


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of all the frames of a zstandard stream; EOFError where the last one is cut off."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._frame.unused_data if self._frame and self._frame.eof else b""
            compressed = compressed or self._stream.read(1 << 16)
            if not compressed:
                if self._frame and not self._frame.eof:
                    raise EOFError("the compressed data is cut off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # zstd --long=31
            self._ready = self._frame.decompress(compressed)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def zst(stream: BinaryIO) -> BinaryIO:
    """The decompressed bytes of a zstandard file."""
    return io.BufferedReader(_ZstdStream(stream), 1 << 17)


def gz(stream: BinaryIO) -> BinaryIO:
    """The decompressed bytes of a gzip file."""
    return io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 17)


def xz(stream: BinaryIO) -> BinaryIO:
    """The decompressed bytes of an xz file."""
    return io.BufferedReader(lzma.LZMAFile(stream), 1 << 17)


def within(decompressed: Callable[[BinaryIO], BinaryIO], reader: Reader) -> Reader:
    """The reader of what is inside a compressed file."""

    def read(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
        yield from reader(decompressed(stream), where, options)

    return read
