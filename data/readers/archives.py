"""Files of files: each member is read as its own name says, or else as one document."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from data.files import is_whole_file
from data.readers.common import Reader, ReadOptions, read_part, reason
from data.readers.plain import read_text

ReaderOf = Callable[[str], Reader | None]


def read_tar(reader_of: ReaderOf, stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """The members of a tar archive; read front to back, without seeking."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or it remembers every member it has passed
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                reader = reader_of(member.name) or read_text
                yield from read_part(reader, content, f"{where}:{member.name}", options)


def read_zip(reader_of: ReaderOf, stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """The members of a zip archive. Its table of contents is at its end: inside another archive it's read whole."""
    with zipfile.ZipFile(stream if is_whole_file(stream) else io.BytesIO(stream.read())) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            part = f"{where}:{member.filename}"
            try:
                content = archive.open(member)
            except (RuntimeError, ValueError) as error:  # encrypted, compressed in an unknown way, or damaged
                options.on_problem(part, reason(error))
                continue
            with content:
                yield from read_part(reader_of(member.filename) or read_text, content, part, options)


def read_xz_content(reader_of: ReaderOf, stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """A tar archive (OpenWebText's subsets are called *_data.xz), or else one document."""
    header = stream.peek(512)  # type: ignore[attr-defined]
    if header[257:262] == b"ustar":
        yield from read_tar(reader_of, stream, where, options)
    else:
        yield from read_text(stream, where, options)
