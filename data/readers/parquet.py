"""Parquet files: one column of a table holds the documents."""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from data.files import is_whole_file
from data.readers.common import Damaged, ReadOptions, as_text, reason
from errors import UserError

_ROWS = 256  # decoded at a time; a row group, which is what is read at a time, may have thousands


def read_parquet(stream: BinaryIO, where: str, options: ReadOptions) -> Iterator[str]:
    """The rows of the column that --json_key names."""
    try:
        import pyarrow  # an extra: 55 MB that few need
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{where} is a Parquet file, which pyarrow reads, and that can't be imported ({reason(error)}); "
            'run `pip install "pyarrow<26"` (26 needs NumPy 2), or take the file away'
        ) from error
    try:
        table = parquet.ParquetFile(stream if is_whole_file(stream) else io.BytesIO(stream.read()))
        if options.json_key not in table.schema_arrow.names:
            raise Damaged(f'no column "{options.json_key}" (it has {", ".join(sorted(table.schema_arrow.names))})')
        number = 0
        for batch in table.iter_batches(_ROWS, columns=[options.json_key]):
            for value in batch.column(0).to_pylist():
                number += 1
                try:
                    text = _text_of(value)
                except ValueError as error:
                    options.on_problem(f"{where}, row {number}", reason(error))
                else:
                    yield text
    except pyarrow.ArrowException as error:
        raise Damaged(reason(error)) from error


def _text_of(value: Any) -> str:
    # Older writers leave it open whether bytes are text.
    return as_text(value.decode() if isinstance(value, bytes) else value)
