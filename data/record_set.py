"""The record of a set of tfrecords, NAME.manifest.json: what it was made from, with which options, what it holds.

It is written twice: before the first token with "complete": false, so that what an interrupted run leaves behind is
known for what it is, and at the end with the results.
"""

import json
from typing import Any

from config import read_text
from data.files import exists, join, remove, write_text
from data.tfrecord_writer import files_of
from errors import UserError

# What decides the content of the files. `input.path` and `tokenizer.path` may change: their content may not.
_DECISIVE = ("options", "input", "tokenizer")


def manifest_path(output_dir: str, name: str) -> str:
    """Where the manifest of a set is."""
    return join(output_dir, f"{name}.manifest.json")


def write_manifest(output_dir: str, name: str, manifest: dict[str, Any]) -> None:
    """Write the manifest, in place of the earlier one."""
    write_text(manifest_path(output_dir, name), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def find_complete(output_dir: str, name: str, planned: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a complete set made by the same options from the same input, None if there is nothing yet.

    What an interrupted run of the same plan left behind is removed. A plan that gave no file binds nobody.

    Raises:
        UserError: the folder holds a set of this name that was made otherwise, or files of this name that no
            manifest speaks of, or a set of which files are missing.
    """
    path = manifest_path(output_dir, name)
    found = files_of(output_dir, name)
    other = "choose another --name or --output_dir, or remove the set"
    if not exists(path):
        if found:
            raise UserError(f"{output_dir} already holds {found[0]}, which no {name}.manifest.json speaks of; {other}")
        return None
    try:
        manifest = json.loads(read_text(path))
        differences = _differences(manifest, planned)
        complete = bool(manifest["complete"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of data/create_tfrecords.py; {other}") from error
    if differences and (found or complete):
        raise UserError(f"{output_dir} already holds a set {name} made otherwise ({'; '.join(differences)}); {other}")
    if not complete:
        for file in found:
            remove(join(output_dir, file))
        return None
    listed = {entry["file"] for entry in manifest["files"]}
    if astray := sorted(listed ^ set(found)):
        what = "lists {}, which is not there" if astray[0] in listed else "does not list {}, which is there"
        raise UserError(f"{path} {what.format(astray[0])}; {other}")
    return dict(manifest)


def _differences(manifest: dict[str, Any], planned: dict[str, Any]) -> list[str]:
    differences = []
    for part in _DECISIVE:
        for key in sorted(manifest[part].keys() | planned[part].keys()):
            there, now = manifest[part].get(key), planned[part].get(key)
            if there != now and key != "path":
                label = key if part == "options" else f"{part} {key}"
                differences.append(f"{label} {json.dumps(there)} there, {json.dumps(now)} now")
    return differences
