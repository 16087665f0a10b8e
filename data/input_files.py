"""The files of an input folder, and the documents in them."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data.files import exists, is_folder, join, open_binary, size_of, walk
from data.readers import DAMAGE, FORMATS, ReadOptions, read_text, reader_of, reason
from errors import UserError


@dataclass(frozen=True)
class InputFile:
    """A file to read: its path, its name below the input folder (with "/"), its size in bytes."""

    path: str
    name: str
    size: int


def find_files(root: str, file_type: str | None = None) -> tuple[list[InputFile], list[str]]:
    """The files to read below a folder (or the one file that `root` is), and the names of the others.

    Args:
        root: a folder, searched with all its subfolders, or a file; local or gs://.
        file_type: only files whose names end in this ("txt", ".jsonl.zst") or match this glob ("part_*.jsonl"). Files
            of a kind that is not known, "py" for instance, are then plain text. By default, every known format.

    Returns:
        (files sorted by name, names of the files left out, sorted)

    Raises:
        UserError: root does not exist, or holds nothing to read.
    """
    if not exists(root):
        raise UserError(f"the input {root} does not exist; give a folder or a file of text")
    in_folder = is_folder(root)
    found = sorted(walk(root)) if in_folder else [(root.rsplit("/", 1)[-1], size_of(root))]
    files, others = [], []
    for name, size in found:
        wanted = reader_of(name) is not None if file_type is None else _is_of_type(name, file_type)
        if wanted:
            files.append(InputFile(join(root, name) if in_folder else root, name, size))
        else:
            others.append(name)
    if not files:
        holds = f"it holds {_shortened(others)}" if others else "it is empty"
        wanted_names = f"match --file_type {file_type}" if file_type else f"end in one of {', '.join(FORMATS)}"
        raise UserError(
            f"the input {root} has no file to read ({holds}); give one with files whose names {wanted_names}"
        )
    return files, others


def _is_of_type(name: str, file_type: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    if any(sign in file_type for sign in "*?["):
        return fnmatch.fnmatchcase(base, file_type)
    return base.lower().endswith("." + file_type.lower().lstrip("."))


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def read_documents(
    files: Iterable[InputFile], options: ReadOptions, progress: Callable[[int], Any] = lambda _: None
) -> Iterator[str]:
    """The documents of the files, in order.

    Args:
        files: what to read; a name that tells no known format is plain text.
        options: what to do with what can't be read.
        progress: called with numbers of input bytes as they are used up; they add up to the files' sizes.
    """
    for file in files:
        yield from _read_file(file, options, progress)


def _read_file(file: InputFile, options: ReadOptions, progress: Callable[[int], Any]) -> Iterator[str]:
    done = documents = problems = 0

    def on_problem(where: str, why: str) -> None:
        nonlocal problems
        problems += 1
        options.on_problem(where, why)

    reader = reader_of(file.name) or read_text
    try:
        with open_binary(file.path) as stream:
            for text in reader(stream, file.name, ReadOptions(on_problem, options.json_key)):
                documents += 1
                yield text
                position = max(done, min(stream.tell(), file.size))
                progress(position - done)
                done = position
    except DAMAGE as error:
        kept = f" (the {documents} documents before that are kept)" if documents else ""
        on_problem(file.name, reason(error) + kept)
    if not documents and not problems:
        on_problem(file.name, "it holds no document" if file.size else "it is empty")
    progress(file.size - done)
