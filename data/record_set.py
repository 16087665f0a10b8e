"""The record of a set of tfrecords, NAME.manifest.json: what it was made from, with which options, what it holds.

It is written before the first token, with "complete": false, so that what an interrupted run leaves behind is known for
what it is; again after each file, with all that is needed to go on behind it; and at the end with the results.
"""

import contextlib
import json
from typing import Any, NamedTuple

from config import read_text
from data.files import exists, is_remote, join, locked, make_folder, remove, size_of, write_text
from data.splitting import PARTS
from data.tfrecord_writer import files_of
from errors import UserError

# What decides the content of the files. `input.path` and `tokenizer.path` may change: their content may not.
_DECISIVE = ("options", "input", "tokenizer")


class Found(NamedTuple):
    """What an output folder holds of a set.

    Attributes:
        manifest: of the complete set; else None.
        progress: {part's name: its state behind its last file}, of an interrupted run; empty if there is none.
    """

    manifest: dict[str, Any] | None
    progress: dict[str, Any]


def manifest_path(output_dir: str, name: str) -> str:
    """Where the manifest of a set is."""
    return join(output_dir, f"{name}.manifest.json")


def write_manifest(output_dir: str, name: str, manifest: dict[str, Any]) -> None:
    """Write the manifest, in place of the earlier one."""
    write_text(manifest_path(output_dir, name), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def being_made(output_dir: str, name: str) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from making the same set; UserError if one does. Buckets know no such thing."""
    if is_remote(output_dir):
        return contextlib.nullcontext()
    make_folder(output_dir)
    return locked(join(output_dir, f"{name}.lock"), f"making the set {name} in {output_dir}")


def part_names(name: str, is_split: bool) -> tuple[str, ...]:
    """How the names of the files of each part begin."""
    return tuple(f"{name}_{part}" for part in PARTS) if is_split else (name,)


def find_set(output_dir: str, name: str, planned: dict[str, Any]) -> Found:
    """What there is of a set that is made by these options from this input.

    Of what an interrupted run left behind, the files that are listed are kept and the others removed. A plan that gave
    no file binds nobody.

    Raises:
        UserError: the folder holds a set of this name that was made otherwise, or files of this name that no
            manifest speaks of, or a set of which files are missing.
    """
    path = manifest_path(output_dir, name)
    other = "choose another --name or --output_dir, or remove the set"
    found = _files(output_dir, name, planned)
    if not exists(path):
        if found:
            raise UserError(f"{output_dir} already holds {found[0]}, which no {name}.manifest.json speaks of; {other}")
        return Found(None, {})
    try:
        manifest = json.loads(read_text(path))
        differences = _differences(manifest, planned)
        complete = bool(manifest["complete"])
        found = sorted({*found, *_files(output_dir, name, manifest)})
        listed = {entry["file"]: entry.get("bytes") for entry in _entries(manifest)}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of data/create_tfrecords.py; {other}") from error
    if differences and (found or complete):
        raise UserError(f"{output_dir} already holds a set {name} made otherwise ({'; '.join(differences)}); {other}")
    if not complete:
        return Found(None, _take_over(output_dir, manifest.get("progress", {}), listed, found))
    if astray := sorted(listed.keys() ^ set(found)):
        what = "lists {}, which is not there" if astray[0] in listed else "does not list {}, which is there"
        raise UserError(f"{path} {what.format(astray[0])}; {other}")
    return Found(manifest, {})


def _files(output_dir: str, name: str, plan: dict[str, Any]) -> list[str]:
    names = part_names(name, plan["options"].get("split") is not None)
    return [file for part in names for file in files_of(output_dir, part)]


def _entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that a manifest lists, of a complete set or of one that was interrupted."""
    lists = [manifest] if manifest["complete"] else manifest.get("progress", {}).values()
    return [entry for part in lists for entry in part["files"]]


def _take_over(
    output_dir: str, progress: dict[str, Any], listed: dict[str, int | None], found: list[str]
) -> dict[str, Any]:
    """The progress of an interrupted run, if its files are as it left them; all other files of the set are removed."""
    if any(file not in found or size_of(join(output_dir, file)) != size for file, size in listed.items()):
        progress, listed = {}, {}
    for file in found:
        if file not in listed:
            remove(join(output_dir, file))
    return progress


def _differences(manifest: dict[str, Any], planned: dict[str, Any]) -> list[str]:
    differences = []
    for part in _DECISIVE:
        for key in sorted(manifest[part].keys() | planned[part].keys()):
            there, now = manifest[part].get(key), planned[part].get(key)
            if there != now and key != "path":
                label = key if part == "options" else f"{part} {key}"
                differences.append(f"{label} {json.dumps(there)} there, {json.dumps(now)} now")
    return differences
