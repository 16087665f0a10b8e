"""What every command says when its user can put the matter right."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol


class UserError(ValueError):
    """A mistake the user can correct.

    `str(error)` is one sentence (or one line per mistake) that names the key, file or flag, its value, and what would
    work. Commands print it and exit with code 2; anything else that escapes is a defect and keeps its traceback.
    """


class Command(Protocol):
    """The main function of a command: runs the command line `argv` (None: the process's own), returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exits_cleanly(main: Callable[[Sequence[str] | None], int | None]) -> Command:
    """Make `main(argv)` return an exit code.

    Its own (None means 0); 2 after a UserError; 130 after Ctrl-C; 141 when whoever reads its output stops reading, as
    `| head` does.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed on leaving
            return 141

    return wrapped
