"""Files, local or behind a scheme that tf.io.gfile knows (gs://...). TensorFlow is imported only for the latter."""

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from errors import UserError

_BUFFER_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether the path has a scheme, so that only tf.io.gfile can open it."""
    return "://" in path


def gfile() -> Any:
    """tf.io.gfile; a function, because importing TensorFlow takes seconds and local reading does not need it."""
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """What tf.io.gfile raises as the OSError that a local file would have raised."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(None, error.message.rpartition("; ")[2]) from error


class _RemoteFile(io.RawIOBase):
    """A GFile as the raw stream that decompressors and BufferedReader expect."""

    def __init__(self, path: str) -> None:
        self._file = gfile().GFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_errors():
            chunk = self._file.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _as_os_errors():
            base = {io.SEEK_SET: 0, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self._file.size()}[whence]
            self._file.seek(base + offset)
        return base + offset

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def is_whole_file(stream: Any) -> bool:
    """Whether it comes from `open_binary`, so that it can be read at any place; a file in an archive often can't."""
    return isinstance(getattr(stream, "raw", None), io.FileIO | _RemoteFile)


def open_binary(path: str) -> BinaryIO:
    """The file's bytes, buffered; `tell()` counts them as they are consumed."""
    if is_remote(path):
        return io.BufferedReader(_RemoteFile(path), _BUFFER_BYTES)
    return open(path, "rb", buffering=_BUFFER_BYTES)


def walk(root: str) -> Iterator[tuple[str, int]]:
    """(path relative to root with "/", bytes) of every file below a folder, links followed once; in any order."""
    if is_remote(root):
        yield from _walk_remote(root)
        return
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:  # a link to a folder already visited would yield its files twice, or for ever
            subfolders.clear()
            continue
        seen.add(here)
        subfolders.sort()
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                yield os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path)


def _walk_remote(root: str) -> Iterator[tuple[str, int]]:
    files = gfile()
    prefix = root.rstrip("/") + "/"
    for folder, _, names in files.walk(root):
        for name in names:
            path = folder.rstrip("/") + "/" + name
            yield path.removeprefix(prefix), files.stat(path).length


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, local or remote."""
    return folder.rstrip("/") + "/" + name if is_remote(folder) else os.path.join(folder, name)


def exists(path: str) -> bool:
    """Whether a file or folder of that name is there."""
    return bool(gfile().exists(path)) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    """Whether it is a folder."""
    return bool(gfile().isdir(path)) if is_remote(path) else os.path.isdir(path)


def size_of(path: str) -> int:
    """The file's size in bytes."""
    return int(gfile().stat(path).length) if is_remote(path) else os.path.getsize(path)


def list_folder(path: str) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    if is_remote(path):
        return sorted(name.rstrip("/") for name in gfile().listdir(path)) if gfile().isdir(path) else []
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def make_folder(path: str) -> None:
    """Make the folder and its parents; UserError where that can't be done."""
    try:
        if is_remote(path):
            with _as_os_errors():
                gfile().makedirs(path)
        else:
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} can't be made ({error.strerror}); give one that you may write") from error


def remove(path: str) -> None:
    """Remove one file."""
    gfile().remove(path) if is_remote(path) else os.remove(path)


def rename(source: str, target: str) -> None:
    """Give a finished file its name, in place of what may be there."""
    gfile().rename(source, target, overwrite=True) if is_remote(source) else os.replace(source, target)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """UserError where a file can't be written: no room, no right."""
    try:
        with _as_os_errors() if is_remote(path) else contextlib.nullcontext():
            yield
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); put that right, or give another path") from error


@contextlib.contextmanager
def locked(path: str, what: str) -> Iterator[None]:
    """Hold a local file that only one process can hold; it is gone afterwards, or taken over if the process is killed.

    Raises:
        UserError: another process holds it and so does `what`, which the message says.
    """
    while True:
        with _explained(path):
            file = open(path, "wb")  # noqa: SIM115  # closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is {what}; wait until it has ended, or end it") from error
            if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                continue  # whoever held it removed it in the meantime
            try:
                yield
            finally:
                os.remove(path)
            return


class OutputFile:
    """Bytes into a file that is written aside (`aside`) and gets its name when it is whole.

    Its methods raise UserError where the file can't be written.
    """

    def __init__(self, aside: str) -> None:
        self._aside = aside
        with _explained(aside):
            opener = gfile().GFile if is_remote(aside) else open
            self._file: IO[bytes] = opener(aside, "wb")

    def write(self, data: bytes) -> None:
        """Append."""
        with _explained(self._aside):
            self._file.write(data)

    def finish(self, path: str) -> None:
        """Close the file and give it its name."""
        with _explained(self._aside):
            self._file.flush()
            if not is_remote(self._aside):
                os.fsync(self._file.fileno())  # or a machine that stops may keep the name and lose the content
            self._file.close()
            rename(self._aside, path)

    def discard(self) -> None:
        """Close and remove what there is of it."""
        with contextlib.suppress(UserError), _explained(self._aside):  # the error that led here is the one to tell
            try:
                self._file.close()
            finally:
                remove(self._aside)


def write_text(path: str, text: str) -> None:
    """Write UTF-8 text aside and rename it: whoever reads `path` finds the old file or the new one, never a part.

    The folder is made if need be; UserError where that or the writing can't be done.
    """
    make_folder(path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or ".")
    file = OutputFile(f"{path}.partial")
    try:
        file.write(text.encode())
        file.finish(path)
    except UserError:
        file.discard()
        raise
