"""Files, local or behind a scheme that tf.io.gfile knows (gs://...). TensorFlow is imported only for the latter."""

import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from errors import UserError

_BUFFER_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether the path has a scheme, so that only tf.io.gfile can open it."""
    return "://" in path


def gfile() -> Any:
    """tf.io.gfile; a function, because importing TensorFlow takes seconds and local reading does not need it."""
    import tensorflow as tf

    return tf.io.gfile


class _RemoteFile(io.RawIOBase):
    """A GFile as the raw stream that decompressors and BufferedReader expect."""

    def __init__(self, path: str) -> None:
        self._file = gfile().GFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._file.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


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
    if is_remote(path):
        gfile().makedirs(path)
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} can't be made ({error.strerror}); give one that you may write") from error


def remove(path: str) -> None:
    """Remove one file."""
    gfile().remove(path) if is_remote(path) else os.remove(path)


def rename(source: str, target: str) -> None:
    """Give a finished file its name, in place of what may be there."""
    gfile().rename(source, target, overwrite=True) if is_remote(source) else os.replace(source, target)


def write_text(path: str, text: str) -> None:
    """Write UTF-8 text aside and rename it: whoever reads `path` finds the old file or the new one, never a part.

    The folder is made if need be; UserError where that or the writing can't be done.
    """
    aside = f"{path}.partial"
    if is_remote(path):
        import tensorflow as tf

        try:
            gfile().makedirs(path.rpartition("/")[0])
            with gfile().GFile(aside, "w") as remote:
                remote.write(text)
            rename(aside, path)
        except tf.errors.OpError as error:
            raise UserError(f"{path} can't be written ({error.message}); give a path that you may write") from error
        return
    make_folder(os.path.dirname(path) or ".")
    try:
        with open(aside, "w", encoding="utf-8", newline="") as local:
            local.write(text)
        rename(aside, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); give a path that you may write") from error
