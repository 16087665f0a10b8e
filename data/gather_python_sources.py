"""Gather real text without a download: the source code of Python's own standard library.

    python data/gather_python_sources.py --output_dir texts

Writes OUTPUT_DIR/train and OUTPUT_DIR/heldout, a .txt file for each module; a module is held out as a whole. The same
Python and the same --limit_mb give the same files. The folder appears when it is complete, or not at all.
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# `python data/gather_python_sources.py` puts data/ on the path, but the modules are imported from the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from data.command_line import command
from errors import UserError

# Not the library's own text: installed packages, tests (much of it generated or broken on purpose), the bundled editor.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib"})
_ONE_HELD_OUT_OF = 20


def find_sources(root: Path) -> list[Path]:
    """The .py files below root that are UTF-8 text and hold any, relative to root, in an order that looks random.

    The order is that of the paths' hashes, so that any number of first files is a fair sample of the library.
    """
    found = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if path.is_file() and not _LEFT_OUT.intersection(path.relative_to(root).parts) and _is_text(path)
    ]
    return sorted(found, key=_digest)


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode().strip())
    except (UnicodeDecodeError, OSError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def _is_held_out(path: Path) -> bool:
    # Other digits than those that the order depends on first.
    return int(_digest(path)[-8:], 16) % _ONE_HELD_OUT_OF == 0


def choose(root: Path, limit_bytes: int) -> list[tuple[Path, Path]]:
    """(source below root, .txt file below the output folder) for as many files as the limit allows, at least two.

    About one file in twenty goes to heldout/, the others to train/; neither is ever empty.
    """
    chosen: list[Path] = []
    size = 0
    for path in find_sources(root):
        size += (root / path).stat().st_size
        if size > limit_bytes and len(chosen) >= 2:
            break
        chosen.append(path)
    held_out = {path for path in chosen if _is_held_out(path)} or set(chosen[:1])
    if not chosen[1:]:
        raise UserError(f"the standard library in {root} has no source files; use a Python that has them")
    return [(path, Path("heldout" if path in held_out else "train") / path.with_suffix(".txt")) for path in chosen]


def _text_files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def gather(output_dir: Path, limit_bytes: int) -> tuple[list[tuple[Path, Path]], bool]:
    """Copy the sources.

    Returns:
        (what `choose` chose, whether it was copied now: False if all of it was there already)

    Raises:
        UserError: output_dir holds something else or can't be written.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen = choose(root, limit_bytes)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        wanted = {target.as_posix(): (root / source).stat().st_size for source, target in chosen}
        if output_dir.is_dir() and dict(_text_files(output_dir)) == wanted:
            return chosen, False
        raise UserError(f"--output_dir {output_dir} holds something else already; remove it or give another folder")
    aside = output_dir.parent / f"{output_dir.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)  # what an interrupted run left
    try:
        for source, target in tqdm(chosen, desc="gathering", unit="file"):
            (aside / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / source, aside / target)
        os.replace(aside, output_dir)
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} can't be written ({error.strerror}); give another folder"
        ) from error
    return chosen, True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Gather the source code of Python's standard library as text to train on."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make, with train/ and heldout/ in it")
    parser.add_argument("--limit_mb", type=float, default=6.0, help="megabytes at most (default: %(default)s)")
    return parser


@command(_parser)
def main(args: argparse.Namespace) -> int:
    """Run the command; UserError for what its user can put right."""
    if not 0 < args.limit_mb < math.inf:
        raise UserError(f"--limit_mb {args.limit_mb} must be a number above 0")
    output_dir = Path(os.path.abspath(args.output_dir))
    chosen, is_new = gather(output_dir, int(args.limit_mb * 1e6))
    if not is_new:
        print(f"{args.output_dir} holds just these files already: nothing to do")
    for split in ("train", "heldout"):
        sizes = [(output_dir / target).stat().st_size for _, target in chosen if target.parts[0] == split]
        print(f"{args.output_dir / split}: {len(sizes):,} files, {sum(sizes) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
