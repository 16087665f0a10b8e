"""The entries of `datasets` with their files found, and what can be checked of them before a graph is built."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from config import DatasetSource, ModelConfig
from data.encoders import SpecialIds
from errors import UserError
from input_pipeline.masking import mask_problem
from input_pipeline.segments import segment_starts
from input_pipeline.tfrecords import TokenReader, count_records, find_files, first_tokens
from input_pipeline.window_counts import count_windows, group_windows, whole_windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One entry of `datasets`, for training or for evaluation: all that reading its records needs."""

    index: int  # its place in `datasets`
    name: str
    key: str  # "path" or "eval_path"
    files: tuple[str, ...]
    sampling_mode: str
    stitch: int
    weight: float
    n_ctx: int
    n_vocab: int
    eos_id: int
    padding_id: int
    seed: int
    shuffle: bool
    drop_short: bool  # remove_partial_sequences
    model_path: str  # where counts are remembered

    @property
    def title(self) -> str:
        """What messages call it."""
        return f'dataset "{self.name}"'

    def _no_record(self) -> UserError:
        return UserError(
            f"{self.key} of {self.title} matches {self.files[0]} and so on, {len(self.files)} in all, without one "
            "record; make these files again"
        )

    @cached_property
    def counts(self) -> list[int]:
        """Records in each file; UserError where there is none at all."""
        counts = count_records(self.files)
        if not sum(counts):
            raise self._no_record()
        return counts

    @cached_property
    def segment_starts(self) -> list[list[int]]:
        """Where the parts of each file begin that are read in any order; a file is one where nothing is shuffled."""
        return segment_starts(self.files, self.counts) if self.shuffle else [[0] for _ in self.files]

    @cached_property
    def first_record(self) -> tuple[str, list[int]]:
        """The first record: its file and its token ids; UserError where there is none or it can't be read."""
        for path in self.files:
            tokens = first_tokens(path)
            if tokens is not None:
                return path, tokens
        raise self._no_record()

    @cached_property
    def windows_per_record(self) -> int:
        """How many windows of n_ctx + 1 tokens, each beginning with the last token of the one before, a chunk holds.

        Chunks are of one length, so the first record tells. UserError where it is too short for one window.
        """
        path, tokens = self.first_record
        if len(tokens) < self.n_ctx + 1:
            raise UserError(
                f"{path}: the first record holds {len(tokens)} tokens, and sampling mode chunks needs n_ctx + 1 = "
                f"{self.n_ctx + 1}; set n_ctx to at most {len(tokens) - 1}, or sample it with documents_random"
            )
        return (len(tokens) - 1) // self.n_ctx

    @cached_property
    def window_counts(self) -> list[int]:
        """Windows in each file where only its records' lengths tell: chunks of any length, groups of documents.

        UserError where there is no window at all, or a group of documents does not fill one.
        """
        counts = count_windows(self, whole_windows if self.sampling_mode == "chunks" else group_windows)
        if not sum(counts):
            raise self.no_window() if self.sampling_mode == "chunks" else self._no_record()
        return counts

    def no_window(self) -> UserError:
        """The sentence for records that are all too short."""
        return UserError(
            f"{self.key} of {self.title}: no record holds n_ctx + 1 = {self.n_ctx + 1} tokens, so "
            "remove_partial_sequences removes all of them; lower n_ctx or sample it with documents_random"
        )


def resolve_sources(config: ModelConfig, special_ids: SpecialIds, evaluate: bool) -> list[Source]:
    """The datasets' files: those of `eval_path` to evaluate, else of `path`.

    Raises:
        UserError: a line for each glob that is empty or matches nothing, and where there is no dataset.
    """
    if not config.datasets:
        what = "evaluation" if evaluate else "training"
        raise UserError(f"datasets is empty; {what} needs at least one [dataset id, stitch, sampling mode, weight]")
    return _each(lambda item: _resolve(config, special_ids, evaluate, *item), enumerate(config.datasets))


def verify_inputs(config: ModelConfig, special_ids: SpecialIds, evaluate: bool) -> None:
    """Look at the first record of every dataset (its evaluation files with `evaluate`, else its training files).

    Raises:
        UserError: a line for each dataset whose files are missing or unreadable, whose records are too short for
            n_ctx, or whose first record holds a token id that the vocabulary does not; and where the mask of a masked
            language model is another special token.
    """
    problem = mask_problem(config, special_ids)
    if problem:
        raise UserError(problem)
    _each(_verify, resolve_sources(config, special_ids, evaluate))


def _resolve(config: ModelConfig, special_ids: SpecialIds, evaluate: bool, index: int, entry: DatasetSource) -> Source:
    key = "eval_path" if evaluate else "path"
    pattern = getattr(entry.dataset, key)
    if not pattern:
        raise UserError(f'{key} of dataset "{entry.dataset.id}" is empty; evaluation needs the glob of its tfrecords')
    return Source(
        index=index,
        name=entry.dataset.id,
        key=key,
        files=tuple(find_files(pattern, key, entry.dataset.id)),
        sampling_mode=entry.sampling_mode,
        stitch=entry.stitch,
        weight=entry.weight,
        n_ctx=config.n_ctx,
        n_vocab=config.n_vocab,
        eos_id=special_ids.eos_id,
        padding_id=special_ids.padding_id,
        seed=config.seed,
        shuffle=config.shuffle_input_filenames,
        drop_short=config.remove_partial_sequences,
        model_path=config.model_path,
    )


def _verify(source: Source) -> None:
    path, tokens = source.first_record
    strange = [token for token in tokens if not 0 <= token < source.n_vocab and token != source.padding_id]
    if strange:
        worst = min(strange) if min(strange) < 0 else max(strange)
        raise UserError(
            f"{path}: the first record holds token id {worst}, outside the vocabulary of {source.title} "
            f"(n_vocab {source.n_vocab}); set n_vocab to at least {max(tokens) + 1} or use the tokenizer's own files"
        )
    if source.sampling_mode != "chunks":
        return
    if source.drop_short:
        _require_a_whole_record(source)
        return
    unread = len(tokens) - 1 - source.windows_per_record * source.n_ctx
    if unread:
        logger.warning(
            "%s: records of %d tokens give %d windows of n_ctx + 1 = %d; the last %d tokens of each are never read",
            source.title, len(tokens), source.windows_per_record, source.n_ctx + 1, unread,
        )  # fmt: skip


def _require_a_whole_record(source: Source) -> None:
    if len(source.first_record[1]) > source.n_ctx:
        return
    with TokenReader() as reader:
        if any((records.lengths > source.n_ctx).any() for path in source.files for records in reader.read(path)):
            return
    raise source.no_window()


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _each(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """[function(item), ...], or one UserError with the mistakes of all items."""
    results, mistakes = [], []
    for item in items:
        try:
            results.append(function(item))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return results
