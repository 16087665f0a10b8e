"""Documents to token ids on several processes, in the order of the documents.

`tokenizers` has threads of its own (GPT-2's vocabulary, source code: 1.05 MB/s on one core, 2.4 on two), but what
ftfy has to look at, at about 1 MB/s, is mended in Python, which threads can't share: processes speed up both.
"""

import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np

from data.encoders import Encoder
from data.fast_bpe import FastEncoder
from data.text_cleaning import detokenize_wikitext, mend
from errors import UserError

# A batch is handed over when it holds this much: large enough that handing over costs nothing, small enough that a few
# batches for each process fit anywhere and the progress bar moves.
_BATCH_CHARACTERS = 1 << 18
_BATCHES_PER_PROCESS = 3  # in flight: one at work, one waiting, one finished


@dataclass(frozen=True)
class TextOptions:
    """What is done to a document's text: mended by ftfy, WikiText's spacing undone, special spellings recognised."""

    ftfy: bool = True
    wikitext_detokenize: bool = False
    allow_special: bool = False


class TextBatch(NamedTuple):
    """Some documents of one part of a set.

    Attributes:
        part: which part.
        end: how many documents of the input, of any part, are behind the last of these.
        texts: the documents.
    """

    part: int
    end: int
    texts: list[str]


class TokenBatch(NamedTuple):
    """Some consecutive documents' tokens.

    Attributes:
        ids: int32 [tokens], the documents one after another.
        lengths: int64 [documents], tokens of each.
        text_bytes: UTF-8 bytes of the texts as they were tokenised.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class TextTokenizer:
    """Cleaning and encoding, as any process can do it. With `fast`, which gives the same ids, that is used."""

    encoder: Encoder
    options: TextOptions
    fast: FastEncoder | None = None

    def clean(self, text: str) -> str:
        """The text as it is encoded."""
        if self.options.wikitext_detokenize:
            text = detokenize_wikitext(text)
        return mend(text) if self.options.ftfy else text

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """Clean and encode one or more documents."""
        texts = list(map(self.clean, texts))
        if self.fast is not None:
            documents = list(map(self.fast.encode, texts))
        else:
            encoded = self.encoder.encode_batch(texts, allow_special=self.options.allow_special)
            documents = [np.array(ids, np.int32) for ids in encoded]
        return TokenBatch(
            ids=np.concatenate(documents),
            lengths=np.array(list(map(len, documents)), np.int64),
            text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
        )


class TokenizerPool:
    """Processes that tokenise, to be used in a `with` block. With one process everything happens in this one."""

    def __init__(self, tokenizer: TextTokenizer, processes: int) -> None:
        self._tokenizer = tokenizer
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._resources = ExitStack()

    def __enter__(self) -> "TokenizerPool":
        if self._processes > 1:
            # The workers read the tokenizer from a file. Were it given to them as they start, this process would wait
            # for ever for one to take it all that dies before: it is more than a pipe holds.
            file = self._resources.enter_context(tempfile.NamedTemporaryFile())
            pickle.dump(self._tokenizer, file)
            file.flush()
            # Spawned rather than forked: a fork would copy TensorFlow's and tqdm's threads in whatever state they are.
            self._executor = ProcessPoolExecutor(self._processes, get_context("spawn"), _start_worker, (file.name,))
        return self

    def __exit__(self, *_: object) -> None:
        with self._resources:
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)

    def run(self, batches: Iterable[TextBatch]) -> Iterator[tuple[TextBatch, TokenBatch]]:
        """Each batch, its texts let go of, and its tokens, in order: the same for any number of processes.

        Batches are taken only as far ahead as keeps the processes busy.
        """
        if self._executor is None:
            for batch in batches:
                yield batch._replace(texts=[]), self._tokenizer.tokenize(batch.texts)
            return
        in_flight: deque[tuple[TextBatch, Future[TokenBatch]]] = deque()
        try:
            for batch in batches:
                in_flight.append((batch._replace(texts=[]), _submit(self._executor, batch.texts)))
                if len(in_flight) >= self._processes * _BATCHES_PER_PROCESS:
                    yield _finished(in_flight)
            while in_flight:
                yield _finished(in_flight)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {self._processes} tokenising processes was killed, most likely for lack of memory; "
                "try a smaller --processes"
            ) from error


def _submit(executor: ProcessPoolExecutor, texts: list[str]) -> "Future[TokenBatch]":
    """Ctrl-C reaches every process of a terminal, and this one ends the others: a worker that is started here inherits
    that the signal is blocked, from its first moment on. Here it is delivered a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_tokenize_in_worker, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _finished(in_flight: deque[tuple[TextBatch, "Future[TokenBatch]"]]) -> tuple[TextBatch, TokenBatch]:
    batch, tokens = in_flight.popleft()
    return batch, tokens.result()


def batches_of(documents: Iterable[tuple[int, int, str]]) -> Iterator[TextBatch]:
    """(part, number, text) of each document -> batches of some length; `number` counts the input's documents from 0."""
    texts: dict[int, list[str]] = {}
    characters: dict[int, int] = {}
    ends: dict[int, int] = {}
    for part, number, text in documents:
        texts.setdefault(part, []).append(text)
        # One more, so that empty documents make a batch too.
        characters[part] = characters.get(part, 0) + len(text) + 1
        ends[part] = number + 1
        if characters[part] >= _BATCH_CHARACTERS:
            yield TextBatch(part, ends[part], texts.pop(part))
            characters[part] = 0
    for part in sorted(texts):
        yield TextBatch(part, ends[part], texts[part])


_worker: TextTokenizer | None = None  # a worker process's own, set once when it starts


def _start_worker(path: str) -> None:
    global _worker
    with open(path, "rb") as file:
        _worker = pickle.load(file)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next batch for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(texts: list[str]) -> TokenBatch:
    assert _worker is not None
    return _worker.tokenize(texts)
