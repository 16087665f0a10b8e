"""What the commands of this folder share: how they begin and end, and how they name what they leave out."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

from data.readers import ReadOptions
from errors import Command, UserError, exits_cleanly

_SHOWN = 10
_KEPT = 1000


def command(make_parser: Callable[[], argparse.ArgumentParser]) -> Callable[[Callable[..., int]], Command]:
    """Make `main(argv)` of `main(args)`: without arguments it shows the help, and it ends as `exits_cleanly` says."""

    def decorate(main: Callable[[argparse.Namespace], int]) -> Command:
        @functools.wraps(main)
        def parsed(argv: Sequence[str] | None = None) -> int:
            argv = sys.argv[1:] if argv is None else argv
            parser = make_parser()
            if not argv:
                parser.print_help()
                return 0
            return main(parser.parse_args(argv))

        return exits_cleanly(parsed)

    return decorate


def integer(low: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'"{text}" must be a whole number') from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} must be at least {low}")
        return value

    return parse


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how text is read."""
    parser.add_argument(
        "--json_key",
        "--json-key",
        default="text",
        help="the key of a JSON document's text, the column of a Parquet file's (default: %(default)s)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at a file, member or line that can't be read (default: leave it out)",
    )


class Problems:
    """What could not be read: kept to be told at the end, or with `strict` an error at once.

    Attributes:
        count: how many files, members and lines were left out.
        first: the first of them with the reasons.
    """

    def __init__(self, strict: bool) -> None:
        self.count = 0
        self.first: list[str] = []
        self._strict = strict

    def add(self, where: str, why: str) -> None:
        """Note a file, member or line that is left out; UserError if nothing may be."""
        if self._strict:
            raise UserError(f"{where}: {why}; mend or remove it, or leave out --strict to go on without it")
        self.count += 1
        if self.count <= _KEPT:
            self.first.append(f"{where}: {why}")

    def read_options(self, args: argparse.Namespace) -> ReadOptions:
        """Reading as the flags of `add_reading_flags` say."""
        return ReadOptions(self.add, args.json_key)

    def report(self) -> None:
        """Name the first ones, and count the others, on standard error."""
        for problem in self.first[:_SHOWN]:
            print(f"left out: {problem}", file=sys.stderr)
        if self.count > _SHOWN:
            print(f"left out: {self.count - _SHOWN} more", file=sys.stderr)
