"""Documents out of files: plain text and the formats of lm_dataformat, one reader a format.

The formats are lm_dataformat's and a few more; the code is not, because a part of a file that can't be read must be
named rather than passed over. Its zstandard readers end silently where a file is cut off and at the end of the first
frame, its tar reader fails on the headers that Python's own tarfile writes, and its text reader rewrites line ends and
reads in whatever encoding the machine is set to.

A file, an archive's member or a line that can't be read is reported by name to `ReadOptions.on_problem` and left out;
everything else is read.
"""

from functools import partial

from data.readers.archives import read_tar, read_xz_content, read_zip
from data.readers.common import DAMAGE, Reader, ReadOptions, reason
from data.readers.compression import gz, within, xz, zst
from data.readers.json_documents import read_json_array, read_json_lines
from data.readers.parquet import read_parquet
from data.readers.plain import read_dat, read_lines, read_text

__all__ = ["DAMAGE", "FORMATS", "ReadOptions", "Reader", "read_text", "reader_of", "reason"]


def reader_of(name: str) -> Reader | None:
    """The reader for a file of that name; None if the name tells no known format."""
    lowered = name.lower()
    suffix = max((suffix for suffix in FORMATS if lowered.endswith(suffix)), key=len, default=None)
    return FORMATS[suffix] if suffix else None


_read_tar = partial(read_tar, reader_of)

# The end of a file's name -> how it is read. Of several that match, the longest is meant.
FORMATS: dict[str, Reader] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": within(gz, read_json_lines),
    ".jsonl.xz": within(xz, read_json_lines),
    ".jsonl.zst": within(zst, read_json_lines),
    ".json.gz": within(gz, read_json_lines),  # lm_dataformat: one JSON value a line
    ".json.zst": within(zst, read_json_array),
    ".dat.zst": within(zst, read_dat),
    ".tar": _read_tar,  # lm_dataformat's .jsonl.zst.tar is a tar file of .jsonl.zst files
    ".tar.gz": within(gz, _read_tar),
    ".tgz": within(gz, _read_tar),
    ".tar.xz": within(xz, _read_tar),
    ".tar.zst": within(zst, _read_tar),
    ".xz": within(xz, partial(read_xz_content, reader_of)),
    ".gz": within(gz, read_lines),
    ".zip": partial(read_zip, reader_of),
    ".parquet": read_parquet,
}
