"""Token batches into records, with an account of where every token went."""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data.parallel_tokenizer import TokenBatch


@dataclass(frozen=True)
class RecordOptions:
    """What a record is.

    Attributes:
        chunk_size: None: a record is a document. Otherwise documents are joined and cut into records of chunk_size + 1
            tokens (a sequence of n_ctx tokens and the one that follows it).
        separator: the ids between two documents; with append_eod, those after each document.
        append_eod: whether the separator follows every document, the last one and those of single records included.
        minimum_size: documents of fewer tokens, the separator not counted, are discarded.
    """

    chunk_size: int | None
    separator: tuple[int, ...]
    append_eod: bool
    minimum_size: int


@dataclass(frozen=True)
class Account:
    """Numbers of documents and tokens, none of which gets lost.

    tokens + separators = written + discarded_tokens + tail
    documents = written_documents + discarded_documents + tail_documents
    """

    documents: int = 0
    written_documents: int = 0  # at least in part
    empty_documents: int = 0  # without a single token; part of discarded_documents
    discarded_documents: int = 0  # empty, or shorter than minimum_size
    tail_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    separators: int = 0
    written: int = 0
    discarded_tokens: int = 0
    tail: int = 0  # after the last whole chunk

    def __add__(self, other: "Account") -> "Account":
        return Account(**{key: value + getattr(other, key) for key, value in asdict(self).items()})

    def balances(self) -> bool:
        """Whether every document and every token is accounted for."""
        return (
            self.tokens + self.separators == self.written + self.discarded_tokens + self.tail
            and self.documents == self.written_documents + self.discarded_documents + self.tail_documents
        )


class Records(NamedTuple):
    """Some records: int32 [tokens], one after another, and int64 [records], the tokens of each."""

    ids: np.ndarray
    lengths: np.ndarray


class RecordCutter:
    """Documents in, records out. What is pending between two batches counts as tail.

    `copy.copy` of a cutter is independent of it: what it holds is replaced, never changed.
    """

    def __init__(self, options: RecordOptions, state: dict[str, Any] | None = None) -> None:
        """`state`: what an earlier cutter's `state` gave, to go on from there."""
        state = state or {"account": {}, "pending": [], "starts": []}
        self.account = Account(**state["account"])
        self._options = options
        self._separator = np.array(options.separator, np.int32)
        self._pending = np.array(state["pending"], np.int32)
        self._starts = np.array(state["starts"], np.int64)  # where documents begin in what is pending

    def state(self) -> dict[str, Any]:
        """Everything that decides what follows, fit for JSON."""
        return {
            "account": asdict(self.account),
            "pending": self._pending.tolist(),
            "starts": self._starts.tolist(),
        }

    def cut(self, batch: TokenBatch) -> Records:
        """The records that are complete with these documents."""
        kept = batch.lengths >= max(self._options.minimum_size, 1)  # a record without tokens would say nothing
        lengths = batch.lengths[kept]
        ids = batch.ids if kept.all() else batch.ids[np.repeat(kept, batch.lengths)]
        is_first = not self.account.written_documents + self.account.tail_documents
        self.account = replace(
            self.account,
            documents=self.account.documents + len(kept),
            empty_documents=self.account.empty_documents + int((batch.lengths == 0).sum()),
            discarded_documents=self.account.discarded_documents + int((~kept).sum()),
            text_bytes=self.account.text_bytes + batch.text_bytes,
            tokens=self.account.tokens + len(batch.ids),
            discarded_tokens=self.account.discarded_tokens + len(batch.ids) - len(ids),
        )
        ids, starts, lengths = self._separated(ids, lengths, is_first)
        return self._documents(ids, lengths) if self._options.chunk_size is None else self._chunks(ids, starts)

    def _separated(
        self, ids: np.ndarray, lengths: np.ndarray, is_first: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents with their separators: ids, where in them each begins, how long each is with what follows."""
        size = len(self._separator)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        passed = np.arange(len(lengths))  # separators in front of each document
        if self._options.append_eod:
            places, lengths = ends, lengths + size
        elif self._options.chunk_size is not None:
            places, passed = begins[is_first:], passed + (not is_first)
        else:
            return ids, begins, lengths
        ids = np.insert(ids, np.repeat(places, size), np.tile(self._separator, len(places)))
        self.account = replace(self.account, separators=self.account.separators + size * len(places))
        return ids, begins + size * passed, lengths

    def _documents(self, ids: np.ndarray, lengths: np.ndarray) -> Records:
        self.account = replace(
            self.account,
            written=self.account.written + len(ids),
            written_documents=self.account.written_documents + len(lengths),
        )
        return Records(ids, lengths)

    def _chunks(self, ids: np.ndarray, starts: np.ndarray) -> Records:
        assert self._options.chunk_size is not None
        length = self._options.chunk_size + 1
        stream = np.concatenate([self._pending, ids])
        starts = np.concatenate([self._starts, starts + len(self._pending)])
        whole = len(stream) - len(stream) % length
        begun = int(np.searchsorted(starts, whole))
        self._pending, self._starts = stream[whole:].copy(), starts[begun:] - whole
        self.account = replace(
            self.account,
            written=self.account.written + whole,
            written_documents=self.account.written_documents + begun,
            tail=len(self._pending),
            tail_documents=len(self._starts),
        )
        return Records(stream[:whole], np.full(whole // length, length))
