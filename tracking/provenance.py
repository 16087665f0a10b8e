"""What a run was made from: source files, the git commit, the command line, the devices."""

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sacred.dependencies import Source, get_digest

_OTHERS = ("runs", "logs", "datasets", "node_modules", "build", "tests", "benchmarks", "__pycache__")
# As commands.py logs it, when the devices are known and the mesh fits them.
_DEVICES = re.compile(r"devices: (?P<devices>.+); mesh (?P<mesh_shape>\S*), layout (?P<layout>.+)")


def source_files(root: Path) -> Iterator[Path]:
    """The Python files that a run may execute."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in _OTHERS:
            yield from source_files(path)
        elif path.suffix == ".py":
            yield path


def sources(root: Path, git: Mapping[str, Any]) -> set[Source]:
    """The same for Sacred; the first one carries the repository, which is that of all."""
    found = [Source(str(path), get_digest(str(path)), None, None, None) for path in source_files(root)]
    if git and found:
        found[0].repo, found[0].commit, found[0].is_dirty = git["url"], git["commit"], git["dirty"]
    return set(found)


def git_state(root: Path) -> dict[str, Any]:
    """{"url", "commit", "dirty"} of the checkout; empty where there is none, or no git."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit or _git(root, "rev-parse", "--show-toplevel") != str(root.resolve()):
        return {}
    url = re.sub(r"(?<=://)[^/@]+@", "", _git(root, "remote", "get-url", "origin") or f"file://{root}")
    return {"url": url, "commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def command_line(argv: Sequence[str]) -> str:
    """The command as it was given, without the password of --mongo_uri."""
    return shlex.join(["python", "run_experiment.py", *_hidden(argv)])


def _hidden(argv: Sequence[str]) -> Iterator[str]:
    before = ""
    for word in argv:
        flag, equals, _ = word.partition("=")
        if len(flag) > 3 and "--mongo_uri".startswith(flag) and equals:
            yield f"{flag}=***"
        else:
            yield "***" if len(before) > 3 and "--mongo_uri".startswith(before) else word
        before = word


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    return {key: value for key, value in sorted(vars(args).items()) if key != "mongo_uri"}


def requested_devices(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for."""
    if args.tpu:
        return {"tpu": args.tpu}
    return {"gpu_ids": args.gpu_ids} if args.gpu_ids else {"local": "all visible GPUs, else the CPU"}


def used_devices(output: str) -> dict[str, str] | None:
    """What main.py says it uses: {"devices", "mesh_shape", "layout"}."""
    found = _DEVICES.search(output)
    return found.groupdict() if found else None
