"""Reading text: each format gives its documents, damage is named, text is mended as ftfy mends it."""

import gzip
import io
import json
import lzma
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import lm_dataformat
import pyarrow
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data.input_files import find_files, read_documents
from data.readers import FORMATS, ReadOptions
from data.text_cleaning import detokenize_wikitext, mend
from errors import UserError

DOCUMENTS = ["one\ntwo", "İstanbul 🙂 \u2028 \x00", "three\r\nlines\r\n", " "]


def read(root: Path, file_type: str | None = None, json_key: str = "text") -> tuple[list[str], list[str]]:
    """(documents, problems) of everything below root."""
    problems: list[str] = []
    files, _ = find_files(str(root), file_type)
    consumed: list[int] = []
    options = ReadOptions(lambda where, why: problems.append(f"{where}: {why}"), json_key)
    documents = list(read_documents(files, options, consumed.append))
    assert sum(consumed) == sum(file.size for file in files) and min(consumed) >= 0  # the progress bar ends at 100%
    return documents, problems


def json_lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "meta": {}}).encode() + b"\n" for text in documents)


def tar(documents: list[str], mode: str, name: str = "document{}") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for index, text in enumerate(documents):
            # A long name outside ASCII, so that the archive holds headers of the newer kind.
            member = tarfile.TarInfo("çok " + "long" * 40 + "/" + name.format(index))
            content = text.encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(documents: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("folder")
        for index, text in enumerate(documents):
            archive.writestr(f"folder/{index}.txt", text.encode())
    return buffer.getvalue()


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def dat(documents: list[str]) -> bytes:
    return b"".join(b"%016d" % len(text.encode()) + text.encode() for text in documents)


def parquet_table(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer, row_group_size=3)
    return buffer.getvalue()


ENCODED: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": json_lines,
    ".jsonl.gz": lambda documents: gzip.compress(json_lines(documents)),
    ".jsonl.xz": lambda documents: lzma.compress(json_lines(documents)),
    ".jsonl.zst": lambda documents: zst(json_lines(documents)),
    ".json.gz": lambda documents: gzip.compress(b"".join(json.dumps(text).encode() + b"\n" for text in documents)),
    ".json.zst": lambda documents: zst(json.dumps(documents).encode()),
    ".dat.zst": lambda documents: zst(dat(documents)),
    ".tar": lambda documents: tar(documents, "w"),
    ".tar.gz": lambda documents: tar(documents, "w:gz"),
    ".tgz": lambda documents: tar(documents, "w:gz"),
    ".tar.xz": lambda documents: tar(documents, "w:xz"),
    ".tar.zst": lambda documents: zst(tar(documents, "w")),
    ".xz": lambda documents: tar(documents, "w:xz"),
    ".zip": zipped,
    ".parquet": lambda documents: parquet_table(text=documents),
}


@pytest.mark.parametrize("suffix", sorted(ENCODED))
def test_every_format_gives_its_documents(tmp_path: Path, suffix: str):
    (tmp_path / f"data{suffix}").write_bytes(ENCODED[suffix](DOCUMENTS))
    assert read(tmp_path) == (DOCUMENTS, [])


def test_formats_of_one_document_or_of_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + DOCUMENTS[2].encode())  # the mark is no text
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"line\nlast"))
    (tmp_path / "c.xz").write_bytes(lzma.compress(b"one document\n"))
    assert read(tmp_path) == ([DOCUMENTS[2], "line\n", "last", "one document\n"], [])
    assert {*ENCODED, ".txt", ".gz"} == set(FORMATS)  # every format is tested


def test_archives_in_archives(tmp_path: Path):
    """OpenWebText is a tar of xz tars, lm_dataformat's .jsonl.zst.tar a tar of compressed lines."""
    for name, inner in {
        "a.tar": {"x.jsonl.zst": zst(json_lines(["1"])), "y.jsonl.zst": zst(json_lines(["2", "3"]))},
        "openwebtext.tar.xz": {
            "urlsf_subset00_data.xz": tar(["4"], "w:xz"),
            "urlsf_subset01_data.xz": tar(["5"], "w:xz"),
        },
    }.items():
        with tarfile.open(tmp_path / name, "w:xz" if name.endswith("xz") else "w") as archive:
            for member_name, content in inner.items():
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert read(tmp_path) == (["1", "2", "3", "4", "5"], [])


def test_archives_that_lm_dataformat_writes_read_as_it_reads_them(tmp_path: Path):
    for kind, archive_type in (
        ("jsonl", lm_dataformat.Archive),
        ("dat", lm_dataformat.DatArchive),
        ("json", lm_dataformat.JSONArchive),
    ):
        folder = tmp_path / kind
        archive = archive_type(str(folder))
        for text in DOCUMENTS:
            archive.add_data(text)
        archive.commit()
        assert list(lm_dataformat.Reader(str(folder)).stream_data()) == DOCUMENTS
        assert read(folder) == (DOCUMENTS, [])


def test_json_documents(tmp_path: Path):
    lines = [
        {"text": ["a", "b"]},  # paragraphs
        "bare",
        {"text": "half a pair \ud83d"},
        {"text": None},
        {"content": "no text"},
        [1],
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    documents, problems = read(tmp_path)
    assert documents == ["a\n\nb", "bare", "half a pair \ufffd"]
    assert problems == [
        "a.jsonl, line 7: its text is null, not a string",
        'a.jsonl, line 9: no key "text" (it has content)',
        "a.jsonl, line 11: its text is list, not a string",
    ]
    assert read(tmp_path, json_key="content")[0] == ["bare", "no text"]


@pytest.mark.parametrize("suffix", sorted(set(ENCODED) - {".jsonl", ".tar"}))
def test_a_file_that_is_cut_off_is_named_and_its_beginning_kept(tmp_path: Path, suffix: str):
    documents = [f"document {number}" for number in range(3)]
    content = ENCODED[suffix](documents)
    (tmp_path / f"data{suffix}").write_bytes(content[:-12])
    found, problems = read(tmp_path)
    assert found == documents[: len(found)]
    assert problems and all(problem.startswith(f"data{suffix}") for problem in problems)


@pytest.mark.parametrize("suffix", sorted(ENCODED))
def test_whatever_is_damaged_the_other_files_are_read(tmp_path: Path, suffix: str):
    """Bytes changed, put in or taken out, at random, or those of another format altogether."""
    draw = random.Random(suffix)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "z.txt").write_text("last")
    whole = ENCODED[suffix](DOCUMENTS)
    for _ in range(12):
        content = bytearray(whole)
        start = draw.randrange(len(content))
        content[start : start + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        (tmp_path / f"damaged{suffix}").write_bytes(content)
        documents, problems = read(tmp_path)
        assert documents[0] == "first" and documents[-1] == "last"
        assert all("\n" not in problem and problem.startswith(f"damaged{suffix}") for problem in problems)
    for foreign in (ENCODED[other](DOCUMENTS) for other in sorted(ENCODED) if "json" not in other):
        if foreign[:4] != whole[:4]:
            (tmp_path / f"damaged{suffix}").write_bytes(foreign)
            documents, problems = read(tmp_path)
            assert documents[0] == "first" and documents[-1] == "last" and problems


def test_a_size_beyond_any_memory_is_damage(tmp_path: Path):
    (tmp_path / "a.dat.zst").write_bytes(zst(b"9" * 16 + b"text"))
    assert read(tmp_path) == ([], ["a.dat.zst: document 1 is cut off"])


def test_parquet_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    columns: dict[str, list[Any]] = {
        "text": ["a", None, "b"],
        "bytes": [b"c", b"\xff", b"d"],
        "parts": [["e", "f"], [], ["g"]],
    }
    (tmp_path / "a.parquet").write_bytes(parquet_table(**columns))
    assert read(tmp_path) == (["a", "b"], ["a.parquet, row 2: its text is null, not a string"])
    assert read(tmp_path, json_key="bytes") == (["c", "d"], ["a.parquet, row 2: not UTF-8 text (byte 0)"])
    assert read(tmp_path, json_key="parts") == (["e\n\nf", "", "g"], [])
    assert read(tmp_path, json_key="x") == ([], ['a.parquet: no column "x" (it has bytes, parts, text)'])
    (tmp_path / "b.zip").write_bytes(b"")  # in an archive, too
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("inner.parquet", parquet_table(text=["h"]))
    assert read(tmp_path / "b.zip") == (["h"], [])
    remote, _ = find_files(f"file://{tmp_path}/a.parquet")  # opened by tf.io.gfile, as gs:// is
    assert list(read_documents(remote, ReadOptions(lambda *_: None))) == ["a", "b"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet is a Parquet file, .* `pip install \"pyarrow<26\"`"):
        read(tmp_path)


def test_all_frames_of_a_zstandard_file_are_read(tmp_path: Path):
    (tmp_path / "a.jsonl.zst").write_bytes(zst(json_lines(["1"])) + zst(json_lines(["2"])) + zst(b""))
    assert read(tmp_path) == (["1", "2"], [])
    # A frame whose end falls on the end of a read, and one larger than any buffer.
    large = ["x" * 300_000, "y" * 300_000]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zst(json_lines([text])) for text in large * 3))
    assert read(tmp_path) == (large * 3, [])


def test_damaged_parts_leave_the_others(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.txt", "good")
        archive.writestr("latin.txt", "é".encode("latin-1"))
        archive.writestr("inner.jsonl", '{"text": "inner"}')
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"fine\n\xff\nfine too\n"))
    assert read(tmp_path) == (
        ["good", "inner", "fine\n", "fine too\n"],
        ["a.zip:latin.txt: not UTF-8 text (byte 0)", "b.gz, line 2: not UTF-8 text (byte 0)"],
    )


def test_files_are_found_in_the_order_of_their_names(tmp_path: Path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "c.md", "d.TXT"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    files, others = find_files(str(tmp_path))
    assert [file.name for file in files] == ["a/b/c.txt", "a/z.txt", "b.txt", "d.TXT"] and others == ["c.md"]
    assert read(tmp_path, "md") == (["c.md"], [])
    assert read(tmp_path, "[bz].txt")[0] == ["a/z.txt", "b.txt"]
    assert read(tmp_path / "b.txt") == (["b.txt"], [])
    with pytest.raises(UserError, match="match --file_type py"):
        find_files(str(tmp_path), "py")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="ab &<>;\n\r\té\x1b\x07'’ﬁâ€™", max_size=12)).map("\n".join))
@example("a &lt; b\n<p>\n&lt; c &amp;\n")
@example("&lt;p&gt;\nx &amp;amp; é\n<b> &amp; é\n&amp; é")
@example("L&AMP;AMP;ATILDE;&AMP;AMP;SUP3;PEZ\n\n\n&eacute")
@example("caf\u00c3\u00a9 & co\r\nnext")
def test_mending_is_what_ftfy_does(text: str):
    assert mend(text) == ftfy.fix_text(text, normalization="NFKC")


def test_plain_ascii_is_never_mended():
    plain = "".join(map(chr, range(32, 127))).replace("&", "") + "\t\n"
    assert mend(plain) == plain == ftfy.fix_text(plain, normalization="NFKC")


def test_wikitext_is_closed_up():
    spaced = ' = Title = \n 1 @,@ 000 people , half @-@ asleep ( it \'s " said " ) ; 2 @.@ 5 N is odd . \n'
    assert detokenize_wikitext(spaced) == ' = Title =\n1,000 people, half-asleep (it\'s "said"); 2.5 N is odd.\n'
