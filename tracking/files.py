"""A run's files, local or behind a scheme that tf.io.gfile knows; what is local needs no TensorFlow."""

import contextlib
import glob as local_glob
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Version:
    """When a file was last changed, in seconds since 1970, and its size in bytes."""

    changed: float
    size: int


def is_remote(path: str) -> bool:
    """Whether the path has a scheme."""
    return "://" in path


def read_from(path: str, offset: int) -> bytes:
    """The bytes of a file from `offset` on; none where there is no such file. OSError if it can't be read."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not is_remote(path):
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read()
        with _gfile() as gfile, gfile.GFile(path, "rb") as remote:
            if remote.size() > offset:
                remote.seek(offset)
                return bytes(remote.read())
    return b""


def version(path: str) -> Version | None:
    """The state of a file; None where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not is_remote(path):
            status = os.stat(path)
            return Version(status.st_mtime, status.st_size)
        with _gfile() as gfile:
            found = gfile.stat(path)
            return Version(found.mtime_nsec / 1e9, int(found.length))
    return None


def matching(pattern: str) -> list[str]:
    """The files that a glob names, sorted."""
    if not is_remote(pattern):
        return sorted(local_glob.glob(pattern))
    with _gfile() as gfile:
        return sorted(gfile.glob(pattern))


def fetch(path: str, copy: str) -> None:
    """Copy a file to the local path `copy`."""
    if not is_remote(path):
        shutil.copyfile(path, copy)
        return
    with _gfile() as gfile:
        gfile.copy(path, copy, overwrite=True)


def escaped(path: str) -> str:
    """`path` as a glob that names it alone."""
    return path if is_remote(path) else local_glob.escape(path)


@contextlib.contextmanager
def _gfile() -> Iterator[Any]:
    """tf.io.gfile, whose errors become Python's."""
    import tensorflow as tf  # here, because it takes seconds and local files do not need it

    try:
        yield tf.io.gfile
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(error.message) from error
    except tf.errors.OpError as error:
        raise OSError(error.message) from error
