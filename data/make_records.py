"""The work of data/create_tfrecords.py: documents read, told apart, tokenised, cut into records and written."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict
from itertools import chain
from typing import Any

from tqdm import tqdm

from data.fast_bpe import make_fast_encoder
from data.input_files import read_documents
from data.parallel_tokenizer import TextBatch, TextTokenizer, TokenBatch, TokenizerPool, batches_of
from data.record_set import write_manifest
from data.records import Account, RecordCutter
from data.tfrecord_writer import RecordSetWriter, WrittenFile
from data.tfrecords_job import Job
from errors import UserError

_SAMPLE_CHARACTERS = 1 << 18  # of the input, by which tiktoken is compared: a quarter of a second
_NAMES_KEPT = 1000  # in the manifest, of files of unknown format


class _Part:
    """A part of a set being made (all of it, or what is for training, say): tokens in, files out."""

    def __init__(self, job: Job, name: str, progress: dict[str, Any] | None) -> None:
        """`progress`: what an interrupted run left, to go on from there."""
        self.progress = progress or {"documents": 0, "records": 0, "state": None, "files": []}
        self.start: int = self.progress["documents"]  # documents of the input before this one are done with
        self.cutter = RecordCutter(job.record, self.progress["state"])
        files = [WrittenFile(**entry) for entry in self.progress["files"]]
        written = sum(file.records for file in files)
        self._end = self.start
        self._made: int = self.progress["records"]
        self.writer = RecordSetWriter(job.output_dir, name, job.files_per, files, written - self._made)

    def add(self, batch: TextBatch, tokens: TokenBatch) -> bool:
        """Write the records that are complete with this batch; whether that finished a file.

        Progress is kept from before the batch: whoever goes on from there makes its records again, and leaves out as
        many as the finished files hold.
        """
        before, end, made = copy(self.cutter), self._end, self._made
        records = self.cutter.cut(tokens)
        self._made += len(records.lengths)
        self._end = batch.end
        finished = self.writer.write(records)
        if finished:
            files = [file._asdict() for file in self.writer.files]
            self.progress = {"documents": end, "records": made, "state": before.state(), "files": files}
        return finished


def make_records(job: Job, progress: dict[str, Any]) -> dict[str, Any]:
    """Tokenise and write everything that an interrupted run did not.

    Args:
        job: what to do.
        progress: of the interrupted run; empty if there was none.

    Returns:
        the manifest of the finished set, which is written too.

    Raises:
        UserError: nothing came of the input, or a file can't be written, or with --strict not be read.
    """
    parts = [_Part(job, name, progress.get(name)) for name in job.part_names]

    def save() -> None:
        of_parts = {name: part.progress for name, part in zip(job.part_names, parts, strict=True)}
        write_manifest(job.output_dir, job.name, {"complete": False} | job.plan | {"progress": of_parts})

    save()
    with tqdm(total=job.plan["input"]["bytes"], unit="B", unit_scale=True, desc=job.name) as bar:
        documents = _told_apart(job, [part.start for part in parts], bar.update)
        tokenizer, batches = _with_engine(job, batches_of(documents))
        bar.set_postfix_str("tokenizers" if tokenizer.fast is None else "tiktoken")
        with ExitStack() as stack:
            pool = stack.enter_context(TokenizerPool(tokenizer, job.processes))
            for part in parts:
                stack.enter_context(part.writer)
            for batch, tokens in pool.run(batches):
                if parts[batch.part].add(batch, tokens):
                    save()
    job.problems.report()
    manifest = _results(job, parts)
    write_manifest(job.output_dir, job.name, manifest)
    return manifest


def _told_apart(job: Job, starts: list[int], progress: Callable[[int], Any]) -> Iterator[tuple[int, int, str]]:
    """(part, number, text) of the input's documents, without those that are done with."""
    for number, text in enumerate(read_documents(job.files, job.read, progress)):
        part = 0 if job.split is None else job.split.part_of(text)
        if number >= starts[part]:
            yield part, number, text


def _with_engine(job: Job, batches: Iterator[TextBatch]) -> tuple[TextTokenizer, Iterator[TextBatch]]:
    """How to tokenise: by tiktoken if it can do that and gives the first texts the right ids; and all the batches."""
    tokenizer = TextTokenizer(job.encoder, job.text)
    first = next(batches, None)
    if first is None:
        return tokenizer, iter(())
    fast = make_fast_encoder(job.encoder, job.text.allow_special)
    sample, left = [], _SAMPLE_CHARACTERS
    for text in first.texts:
        sample.append(tokenizer.clean(text[:left]))
        left -= len(text)
        if left <= 0:
            break
    if fast is not None and fast.agrees(sample):
        tokenizer = TextTokenizer(job.encoder, job.text, fast)
    return tokenizer, chain([first], batches)


def _results(job: Job, parts: list[_Part]) -> dict[str, Any]:
    """The finished manifest; UserError if there is nothing to write in it."""
    account = sum((part.cutter.account for part in parts), Account())
    files = [file for part in parts for file in part.writer.files]
    assert account.balances()
    assert account.written == sum(file.tokens for file in files)
    if not files:
        raise UserError(_nothing_written(job, account))
    by_part = {
        name: {"records": part.writer.records, "account": asdict(part.cutter.account)}
        for name, part in zip(job.part_names, parts, strict=True)
    }
    return (
        {"complete": True}
        | job.plan
        | {
            "records": sum(file.records for file in files),
            "min_id": min(file.min_id for file in files),
            "max_id": max(file.max_id for file in files),
            "account": asdict(account),
        }
        | ({"parts": by_part} if job.split else {})
        | {
            "files": [file._asdict() for file in files],
            "problem_count": job.problems.count,
            "problems": job.problems.first,
            "files_of_unknown_format": job.others[:_NAMES_KEPT],
        }
    )


def _nothing_written(job: Job, account: Account) -> str:
    read = f"the input {job.plan['input']['path']} gave {account.documents} documents with {account.tokens} tokens"
    if not account.tokens:
        return f"{read}; give files that hold text"
    if job.record.chunk_size is None or account.tail == 0:
        return f"{read}, each shorter than --minimum_size {job.record.minimum_size}; give a smaller one"
    return (
        f"{read}, fewer than one record of --chunk_size {job.record.chunk_size} + 1; give a smaller one, or more text"
    )
