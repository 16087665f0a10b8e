"""What every reader is given, and what it may raise."""

import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import zstandard

# Everything that a damaged, cut off or wrongly named file makes the readers raise.
DAMAGE = (
    OSError,  # among them BadGzipFile and permissions
    EOFError,
    UnicodeDecodeError,
    NotImplementedError,  # zipfile, of a version it does not know
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
)


class Damaged(OSError):
    """A file whose content contradicts its format."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read.

    Attributes:
        on_problem: called with (where, why) for each file, member or line that is left out.
        json_key: the key that holds the text of a JSON document; the column of a Parquet file.
    """

    on_problem: Callable[[str, str], None]
    json_key: str = "text"


# (the file's bytes, its name for messages, options) -> its documents. The bytes are what open(), tarfile, zipfile or a
# decompressor gives, which share no type.
Reader = Callable[[Any, str, ReadOptions], Iterator[str]]


def read_part(reader: Reader, stream: IO[bytes], where: str, options: ReadOptions) -> Iterator[str]:
    """The documents of one part of a file; if that part is damaged, the rest of the file still counts."""
    try:
        yield from reader(stream, where, options)
    except DAMAGE as error:
        options.on_problem(where, reason(error))


def as_text(value: Any) -> str:
    """The text that a value is: a string, or paragraphs, joined by empty lines as lm_dataformat does.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"its text is {'null' if value is None else type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no UTF-8 text holds: U+FFFD, the sign for just that, stands in.
        value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def reason(error: BaseException) -> str:
    """Why something could not be read, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__
