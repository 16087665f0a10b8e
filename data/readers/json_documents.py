"""Documents as JSON values."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from data.readers.common import Damaged, ReadOptions, as_text, reason


def read_json_lines(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """One JSON value a line: the text itself, or an object that holds it."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            text = _text_of(json.loads(line), options.json_key)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, not a document, or nested without end
            options.on_problem(f"{where}, line {number}", reason(error))
        else:
            yield text


def read_json_array(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """One JSON list of documents (lm_dataformat's JSONArchive)."""
    try:
        values = json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        raise Damaged(reason(error)) from error
    if not isinstance(values, list):
        raise Damaged("its JSON is not a list of documents")
    for number, value in enumerate(values, start=1):
        try:
            text = _text_of(value, options.json_key)
        except ValueError as error:
            options.on_problem(f"{where}, document {number}", reason(error))
        else:
            yield text


def _text_of(value: Any, key: str) -> str:
    if isinstance(value, dict):
        if key not in value:
            raise ValueError(f'no key "{key}" (it has {", ".join(sorted(value)) or "none"})')
        value = value[key]
    return as_text(value)
