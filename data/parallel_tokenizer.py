"""Documents to token ids on several processes, in the order of the documents.

`tokenizers` has threads of its own (GPT-2's vocabulary, source code: 1.05 MB/s on one core, 2.4 on two), but what
ftfy has to look at, at about 1 MB/s, is mended in Python, which threads can't share: processes speed up both.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from data.encoders import Encoder
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

    def documents(self) -> list[np.ndarray]:
        """The ids of each document."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


def tokenize_batch(encoder: Encoder, texts: list[str], options: TextOptions) -> TokenBatch:
    """Clean and encode one or more documents."""
    if options.wikitext_detokenize:
        texts = [detokenize_wikitext(text) for text in texts]
    if options.ftfy:
        texts = [mend(text) for text in texts]
    documents = encoder.encode_batch(texts, allow_special=options.allow_special)
    return TokenBatch(
        ids=np.concatenate([np.asarray(ids, np.int32) for ids in documents]),
        lengths=np.array([len(ids) for ids in documents], np.int64),
        text_bytes=sum(len(text.encode()) for text in texts),
    )


def tokenize(documents: Iterable[str], encoder: Encoder, options: TextOptions, processes: int) -> Iterator[TokenBatch]:
    """The tokens of all documents, in order: the same for any number of processes.

    With one process everything happens in this one. Documents are read only as far ahead as keeps the processes busy.
    """
    batches = _batches(documents)
    if processes == 1:
        for texts in batches:
            yield tokenize_batch(encoder, texts, options)
        return
    # Spawned rather than forked: a fork would copy TensorFlow's and tqdm's threads in whatever state they are.
    executor = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (encoder, options))
    in_flight: deque[Future[TokenBatch]] = deque()
    try:
        for texts in batches:
            in_flight.append(executor.submit(_tokenize_in_worker, texts))
            if len(in_flight) >= processes * _BATCHES_PER_PROCESS:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of the {processes} tokenising processes was killed, most likely for lack of memory; "
            "try a smaller --processes"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text) + 1  # so that empty documents make a batch too
        if characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


_worker: tuple[Encoder, TextOptions] | None = None  # a worker process's own, set once when it starts


def _start_worker(encoder: Encoder, options: TextOptions) -> None:
    global _worker
    _worker = encoder, options


def _tokenize_in_worker(texts: list[str]) -> TokenBatch:
    assert _worker is not None
    encoder, options = _worker
    return tokenize_batch(encoder, texts, options)
