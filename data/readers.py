"""Documents out of files: plain text and the formats of lm_dataformat, one reader a format.

The formats are lm_dataformat's; the code is not, because a part of a file that can't be read must be named rather than
passed over. Its zstandard readers end silently where a file is cut off and at the end of the first frame, its tar
reader fails on the headers that Python's own tarfile writes, and its text reader rewrites line ends and reads in
whatever encoding the machine is set to.

A file, an archive's member or a line that can't be read is reported by name to `ReadOptions.on_problem` and left out;
everything else is read.
"""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import zstandard

# Everything that a damaged, cut off or wrongly named file makes the readers raise.
DAMAGE = (
    OSError,  # among them BadGzipFile and permissions
    EOFError,
    UnicodeDecodeError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
)


class _Damaged(OSError):
    """A file whose content contradicts its format."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read.

    Attributes:
        on_problem: called with (where, why) for each file, member or line that is left out.
        json_key: the key that holds the text of a JSON document.
    """

    on_problem: Callable[[str, str], None]
    json_key: str = "text"


# (the file's bytes, its name for messages, options) -> its documents. The bytes are what open(), tarfile, zipfile or a
# decompressor gives, which share no type.
Reader = Callable[[Any, str, ReadOptions], Iterator[str]]


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
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(compressed)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _plain(stream: BinaryIO) -> BinaryIO:
    return stream


def _zst(stream: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_ZstdStream(stream), 1 << 17)


def _gz(stream: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 17)


def _xz(stream: BinaryIO) -> BinaryIO:
    return io.BufferedReader(lzma.LZMAFile(stream), 1 << 17)


def read_text(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """The whole file is one document; line ends stay as they are, a byte order mark is no text."""
    text = stream.read().decode("utf-8-sig")
    if text:
        yield text


def _read_json_lines(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """One JSON value a line: the text itself, or an object that holds it."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield _text_of(json.loads(line), options.json_key)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, not a document, or nested without end
            options.on_problem(f"{where}, line {number}", reason(error))


def _read_json_array(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """One JSON list of documents (lm_dataformat's JSONArchive)."""
    try:
        values = json.loads(stream.read())
    except ValueError as error:
        raise _Damaged(reason(error)) from error
    if not isinstance(values, list):
        raise _Damaged("its JSON is not a list of documents")
    for number, value in enumerate(values, start=1):
        try:
            yield _text_of(value, options.json_key)
        except ValueError as error:
            options.on_problem(f"{where}, document {number}", reason(error))


def _text_of(value: Any, key: str) -> str:
    """The text of a JSON document; a list of paragraphs is joined by empty lines, as lm_dataformat does."""
    if isinstance(value, dict):
        if key not in value:
            raise ValueError(f'no key "{key}" (it has {", ".join(sorted(value)) or "none"})')
        value = value[key]
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


def _read_dat(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """lm_dataformat's DatArchive: each document's UTF-8 bytes after their count in 16 decimal digits."""
    number = 0
    while header := stream.read(16):
        number += 1
        if len(header) < 16 or not header.isdigit():
            raise _Damaged(f"document {number} does not begin with its size in 16 digits")
        size = int(header)
        content = stream.read(size)
        if len(content) < size:
            raise EOFError(f"document {number} is cut off")
        yield from _members(read_text, io.BytesIO(content), f"{where}, document {number}", options)


def _read_lines(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """Every line is a document and keeps its line end (lm_dataformat's .gz)."""
    for number, line in enumerate(stream, start=1):
        yield from _members(read_text, io.BytesIO(line), f"{where}, line {number}", options)


def _read_tar(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """Each member is a document, or a file of documents if its name says so; read front to back, without seeking."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or it remembers every member it has passed
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                reader = reader_of(member.name) or read_text
                yield from _members(reader, content, f"{where}:{member.name}", options)


def _read_zip(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """Like a tar file. A zip's table of contents is at its end: what can't be sought is read into memory first."""
    is_local_file = isinstance(getattr(stream, "raw", None), io.FileIO)
    with zipfile.ZipFile(stream if is_local_file else io.BytesIO(stream.read())) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            part = f"{where}:{member.filename}"
            try:
                content = archive.open(member)
            except RuntimeError as error:  # encrypted, or compressed in a way that zipfile does not know
                options.on_problem(part, reason(error))
                continue
            with content:
                yield from _members(reader_of(member.filename) or read_text, content, part, options)


def _read_xz_content(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """A tar archive (OpenWebText's subsets are called *_data.xz), or else one document."""
    header = stream.peek(512)  # type: ignore[attr-defined]
    yield from (_read_tar if header[257:262] == b"ustar" else read_text)(stream, where, options)


def _members(reader: Reader, stream: IO[bytes], where: str, options: ReadOptions) -> Iterator[str]:
    """The documents of one part of a file; if that part is damaged, the rest of the file still counts."""
    try:
        yield from reader(stream, where, options)
    except DAMAGE as error:
        options.on_problem(where, reason(error))


def _within(decompressed: Callable[[BinaryIO], BinaryIO], reader: Reader) -> Reader:
    def read(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
        yield from reader(decompressed(stream), where, options)

    return read


# The end of a file's name -> how it is read. Of several that match, the longest is meant.
FORMATS: dict[str, Reader] = {
    ".txt": read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _within(_gz, _read_json_lines),
    ".jsonl.xz": _within(_xz, _read_json_lines),
    ".jsonl.zst": _within(_zst, _read_json_lines),
    ".json.gz": _within(_gz, _read_json_lines),  # lm_dataformat: one JSON value a line
    ".json.zst": _within(_zst, _read_json_array),
    ".dat.zst": _within(_zst, _read_dat),
    ".tar": _read_tar,  # lm_dataformat's .jsonl.zst.tar is a tar file of .jsonl.zst files
    ".tar.gz": _within(_gz, _read_tar),
    ".tgz": _within(_gz, _read_tar),
    ".tar.xz": _within(_xz, _read_tar),
    ".tar.zst": _within(_zst, _read_tar),
    ".xz": _within(_xz, _read_xz_content),
    ".gz": _within(_gz, _read_lines),
    ".zip": _read_zip,
}


def reader_of(name: str) -> Reader | None:
    """The reader for a file of that name; None if the name tells no known format."""
    lowered = name.lower()
    suffix = max((suffix for suffix in FORMATS if lowered.endswith(suffix)), key=len, default=None)
    return FORMATS[suffix] if suffix else None


def reason(error: BaseException) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
