"""Mistakes of a user: a command with what it must say, and how a workspace is spoilt beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.record_files import example, write_records, write_serialized


@dataclass
class Case:
    """A command with a mistake in it.

    Attributes:
      flags: of the command; {dir} is the workspace's folder.
      says: what standard error must hold.
      changes: to the config.
      dataset: changes to its dataset.
      sampling: stitch and sampling mode.
      before: prepares the workspace further.
      trained: whether there is a checkpoint, of step 2.
      code: exit code.
      prints: what standard output must hold all the same.
      main: the command; main.py where None.
    """

    flags: str
    says: str
    changes: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    sampling: tuple[int, str] = (1, "chunks")
    before: Callable[[Path], object] = lambda folder: None
    trained: bool = False
    code: int = 2
    prints: str = ""
    main: Callable[[Sequence[str]], int] | None = None


def train_records(folder: Path) -> Path:
    return folder / "train_0_64.tfrecords"


def cut(name: str, part: float) -> Callable[[Path], object]:
    """Leave only that part of a file."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])

    return apply


def text(name: str, content: str) -> Callable[[Path], object]:
    """Write a file."""

    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return apply


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def records(*rows: Sequence[int]) -> Callable[[Path], object]:
    return lambda folder: write_records(train_records(folder), rows)


def foreign(folder: Path) -> None:
    write_serialized(train_records(folder), [example(ids=range(9))])
