"""Documents as they are: a file, a line, or bytes after their count."""

import io
from collections.abc import Iterator
from typing import BinaryIO

from data.readers.common import Damaged, ReadOptions, read_part


def read_text(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """The whole file is one document; line ends stay as they are, a byte order mark is no text."""
    text = stream.read().decode("utf-8-sig")
    if text:
        yield text


def read_lines(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """Every line is a document and keeps its line end (lm_dataformat's .gz)."""
    for number, line in enumerate(stream, start=1):
        yield from read_part(read_text, io.BytesIO(line), f"{where}, line {number}", options)


def read_dat(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """lm_dataformat's DatArchive: each document's UTF-8 bytes after their count in 16 decimal digits."""
    number = 0
    while header := stream.read(16):
        number += 1
        if len(header) < 16 or not header.isdigit():
            raise Damaged(f"document {number} does not begin with its size in 16 digits")
        content = _read_exactly(stream, int(header))
        if content is None:
            raise EOFError(f"document {number} is cut off")
        yield from read_part(read_text, io.BytesIO(content), f"{where}, document {number}", options)


def _read_exactly(stream: BinaryIO, size: int) -> bytes | None:
    """So many bytes; None if there are fewer. Read in pieces, for a damaged size may be beyond any memory."""
    pieces = []
    while size and (piece := stream.read(min(size, 1 << 20))):
        pieces.append(piece)
        size -= len(piece)
    return None if size else b"".join(pieces)
