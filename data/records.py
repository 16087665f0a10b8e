"""Token batches into records, with an account of where every token went."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.parallel_tokenizer import TokenBatch


@dataclass(frozen=True)
class RecordOptions:
    """What a record is.

    Attributes:
        chunk_size: None: a record is a document. Otherwise documents are joined and cut into records of chunk_size + 1
            tokens (a sequence of n_ctx tokens and the one that follows it).
        separator: the ids between two documents; only with chunk_size.
        minimum_size: documents of fewer tokens are discarded.
    """

    chunk_size: int | None
    separator: tuple[int, ...]
    minimum_size: int


@dataclass
class Account:
    """Numbers of documents and tokens: tokens + separators = written + discarded_tokens + tail."""

    documents: int = 0
    empty_documents: int = 0  # without a single token; part of discarded_documents
    discarded_documents: int = 0  # empty, or shorter than minimum_size
    text_bytes: int = 0
    tokens: int = 0
    separators: int = 0
    discarded_tokens: int = 0
    tail: int = 0  # after the last whole chunk
    written: int = 0


def records(batches: Iterable[TokenBatch], options: RecordOptions, account: Account) -> Iterator[np.ndarray]:
    """The records, int32 [tokens] each; `account` is complete when they are exhausted."""
    made = _documents(batches, options.minimum_size, account)
    if options.chunk_size is not None:
        made = _chunks(made, options.chunk_size + 1, np.array(options.separator, np.int32), account)
    for record in made:
        account.written += len(record)
        yield record


def _documents(batches: Iterable[TokenBatch], minimum_size: int, account: Account) -> Iterator[np.ndarray]:
    for batch in batches:
        account.text_bytes += batch.text_bytes
        account.documents += len(batch.lengths)
        account.tokens += len(batch.ids)
        for document in batch.documents():
            if len(document) >= max(minimum_size, 1):  # a record without tokens would say nothing
                yield document
                continue
            account.empty_documents += len(document) == 0
            account.discarded_documents += 1
            account.discarded_tokens += len(document)


def _chunks(
    documents: Iterable[np.ndarray], length: int, separator: np.ndarray, account: Account
) -> Iterator[np.ndarray]:
    pending: list[np.ndarray] = []
    size = 0
    is_first = True
    for document in documents:
        if not is_first:
            account.separators += len(separator)
        pieces = [document] if is_first else [separator, document]
        is_first = False
        pending += pieces
        size += sum(map(len, pieces))
        if size >= length:
            stream = np.concatenate(pending)
            whole = size - size % length
            yield from stream[:whole].reshape(-1, length)
            pending, size = [stream[whole:]], size - whole
    account.tail += size
