"""--check_dataset: read every record of the datasets and say what is in them and whether the model can train on it."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import tensorflow.compat.v1 as tf
from tqdm import tqdm

from config import DatasetSource, ModelConfig
from data.encoders import SpecialIds, load_encoder, special_ids
from errors import UserError
from input_pipeline.masking import OWN_MASK, mask_problem, text_tokens
from input_pipeline.tfrecords import Records, TokenReader, count_in_name, count_records, find_files

_SAMPLE_IDS, _SAMPLE_CHARACTERS = 200, 200
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Tally:
    """What the files of one glob hold."""

    files: int = 0
    records: int = 0
    tokens: int = 0
    min_id: int | None = None
    max_id: int | None = None
    outside: int = 0  # tokens that are neither in the vocabulary nor padding
    masks: int = 0  # tokens that a masked language model would take for its mask
    lengths: Counter[int] = field(default_factory=Counter)  # tokens in a record -> number of such records
    shortest_joined: int | None = None  # tokens of the shortest document with its eos
    first_length: int = 0
    sample: list[int] = field(default_factory=list)  # the first tokens of the first record
    problems: list[str] = field(default_factory=list)

    def add(self, records: Records, config: ModelConfig, special: SpecialIds | None) -> None:
        """Take in some records; `special` is None where nobody knows the special tokens."""
        ids = records.tokens
        if not self.records:
            self.first_length = int(records.lengths[0])
            self.sample = ids[: self.first_length][:_SAMPLE_IDS].tolist()
        self.records += len(records.lengths)
        self.tokens += len(ids)
        values, counts = np.unique(records.lengths, return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if special is not None:
            joined = records.lengths + ~records.ends_in(special.eos_id)
            self.shortest_joined = min(int(joined.min()), self.shortest_joined or int(joined.min()))
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            self.min_id = low if self.min_id is None else min(low, self.min_id)
            self.max_id = high if self.max_id is None else max(high, self.max_id)
            if low < 0 or high >= config.n_vocab:
                outside = (ids < 0) | (ids >= config.n_vocab)
                self.outside += int((outside & (ids != special.padding_id) if special else outside).sum())
            if config.mlm_training:
                self.masks += int((ids == config.mlm_mask_id).sum())

    def shorter_than(self, tokens: int) -> int:
        """Number of records with fewer tokens."""
        return sum(count for length, count in self.lengths.items() if length < tokens)

    def quantiles(self) -> list[int]:
        """Lengths of the records at _QUANTILES."""
        lengths = sorted(self.lengths)
        ends = np.cumsum([self.lengths[length] for length in lengths])
        return [lengths[int(np.searchsorted(ends, max(1, np.ceil(part * ends[-1]))))] for part in _QUANTILES]


@dataclass(frozen=True)
class SplitReport:
    """One dataset's training or evaluation files."""

    title: str
    tally: Tally
    lines: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DatasetReport:
    """What --check_dataset found."""

    splits: tuple[SplitReport, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the model can train and evaluate on what was found."""
        return bool(self.splits) and not any(split.problems for split in self.splits)

    def text(self) -> str:
        """The report for people, several lines for each dataset and split."""
        lines: list[str] = []
        for split in self.splits:
            lines += [split.title, *(f"  {line}" for line in split.lines)]
            lines += [f"  PROBLEM: {problem}" for problem in split.problems]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("verdict: " + ("the datasets fit the model" if self.ok else "the datasets do NOT fit the model"))
        return "\n".join(lines)


def check_dataset(config: ModelConfig) -> DatasetReport:
    """Read every record of every dataset, training and evaluation files, with a progress bar in bytes.

    Mistakes in the data are problems of the report, not exceptions.
    """
    notes = []
    special: SpecialIds | None = None
    try:
        special = special_ids(config)
    except UserError as error:
        notes.append(f"the ids of eos and padding are not known, so no id past n_vocab is taken for padding: {error}")
    splits = [
        (source, key, pattern)
        for source in config.datasets
        for key, pattern in (("path", source.dataset.path), ("eval_path", source.dataset.eval_path))
        if pattern
    ]
    missing = [f'"{source.dataset.id}"' for source in config.datasets if not source.dataset.eval_path]
    if missing:
        notes.append(f"no eval_path, so nothing to evaluate on: {', '.join(missing)}")
    if not splits:
        notes.append("datasets is empty")
    tallies = _read_all(config, special, splits)
    training_tokens = sum(tallies[pattern].tokens for _, key, pattern in splits if key == "path")
    reports = [
        _report(config, source, key, pattern, tallies[pattern], special, training_tokens)
        for source, key, pattern in splits
    ]
    return DatasetReport(tuple(reports), tuple(notes))


def _read_all(
    config: ModelConfig, special: SpecialIds | None, splits: list[tuple[DatasetSource, str, str]]
) -> dict[str, Tally]:
    """glob -> what its files hold; a glob that several splits name is read once."""
    tallies: dict[str, Tally] = {}
    files: dict[str, list[str]] = {}
    for source, key, pattern in splits:
        tallies.setdefault(pattern, Tally())
        try:
            files.setdefault(pattern, find_files(pattern, key, source.dataset.id))
        except UserError as error:
            tallies[pattern].problems = [str(error)]
    total = sum(tf.io.gfile.stat(path).length for paths in files.values() for path in paths)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"check {config.name}")
    with bar, TokenReader() as reader:
        for pattern, paths in files.items():
            for path in paths:
                _read_file(reader, path, tallies[pattern], config, special, bar)
    return tallies


def _read_file(
    reader: TokenReader, path: str, tally: Tally, config: ModelConfig, special: SpecialIds | None, bar: tqdm
) -> None:
    tally.files += 1
    before = tally.records
    try:
        for records in reader.read(path):
            tally.add(records, config, special)
            bar.update(records.file_bytes)
        held = tally.records - before
        # The count in a name need not be one. But where training would believe it, it must be right.
        if count_in_name(path) not in (None, held) and count_records([path]) != [held]:
            tally.problems.append(
                f"{path} holds {held} records and its name says {count_in_name(path)}; rename it to what it holds"
            )
    except UserError as error:
        tally.problems.append(str(error))


def _report(
    config: ModelConfig,
    source: DatasetSource,
    key: str,
    pattern: str,
    tally: Tally,
    special: SpecialIds | None,
    training_tokens: int,
) -> SplitReport:
    purpose = "training" if key == "path" else "evaluation"
    share = source.weight / sum(other.weight for other in config.datasets)
    title = f'dataset "{source.dataset.id}", {purpose} files {pattern} ({source.sampling_mode}'
    title += f", stitch {source.stitch}" if source.sampling_mode != "chunks" else ""
    title += f", {share:.1%} of the samples)" if key == "path" else ")"
    if not tally.records:
        problems = tally.problems or [f"there is no record in these files ({tally.files} in all)"]
        return SplitReport(title, tally, (), tuple(problems))
    of_all = f", {tally.tokens / max(1, training_tokens):.1%} of all training tokens" if key == "path" else ""
    lengths = ", ".join(f"{part:.0%} {n}" for part, n in zip(_QUANTILES, tally.quantiles(), strict=True))
    padding = special.padding_id if special else "unknown"
    lines = [
        f"files {tally.files}, records {tally.records:,}, tokens {tally.tokens:,}{of_all}",
        f"token ids {tally.min_id} ... {tally.max_id} (n_vocab {config.n_vocab}, padding_id {padding})",
        f"tokens in a record: {lengths}",
        f"{tally.shorter_than(config.n_ctx + 1):,} records are shorter than n_ctx + 1 = {config.n_ctx + 1}",
        f"begins: {_sample(source, tally, config.n_vocab)}",
    ]
    verdict = _chunk_verdict if source.sampling_mode == "chunks" else _document_verdict
    line, problems = verdict(config, source, tally)
    return SplitReport(
        title, tally, (*lines, line), (*tally.problems, *_id_problems(config, tally, special), *problems)
    )


def _id_problems(config: ModelConfig, tally: Tally, special: SpecialIds | None) -> Iterator[str]:
    if tally.outside:
        yield (
            f"{tally.outside:,} tokens are outside the vocabulary: ids go from {tally.min_id} to {tally.max_id}, and "
            f"n_vocab is {config.n_vocab}; make it at least {(tally.max_id or 0) + 1} or use the tokenizer's files"
        )
    if tally.lengths[0]:
        yield f"{tally.lengths[0]:,} records have no int64 feature `text`, or an empty one; make these files again"
    mask_is_special = mask_problem(config, special) if special else None
    if mask_is_special:
        yield mask_is_special
    elif tally.masks:
        yield f"mlm_mask_id {config.mlm_mask_id} is a token of the text, {tally.masks:,} times; {OWN_MASK}"


def _chunk_verdict(config: ModelConfig, source: DatasetSource, tally: Tally) -> tuple[str, list[str]]:
    """How much of the chunks is read, and what is wrong with them."""
    windows = max(1, (tally.first_length - 1) // config.n_ctx)
    needed = windows * config.n_ctx + 1
    drops = config.remove_partial_sequences
    if drops:
        kept = {length: max(0, (length - 1) // config.n_ctx) for length in tally.lengths}
    else:
        kept = {length: windows if length >= needed else 0 for length in tally.lengths}
    samples = sum(count * kept[length] for length, count in tally.lengths.items())
    if config.mlm_training:
        of, read = f"{text_tokens(config)}", samples * text_tokens(config)
    else:  # windows begin with the last token of the one before
        of, read = "n_ctx + 1", sum(count for length, count in tally.lengths.items() if kept[length])
        read += samples * config.n_ctx
    unread = tally.tokens - read
    line = f"{samples:,} samples of {of} tokens; {unread:,} tokens ({unread / max(1, tally.tokens):.1%}) unread"
    short = tally.shorter_than(needed)
    if not samples:
        return line, [
            f"no record holds n_ctx + 1 = {config.n_ctx + 1} tokens; lower n_ctx to {max(tally.lengths) - 1} or sample "
            "with documents_random"
        ]
    if short and not drops:
        return line, [
            f"{short:,} records hold fewer than the {needed} tokens that the first record's length promises; set "
            "remove_partial_sequences to true to leave them out, or sample with documents_random"
        ]
    return line, []


def _document_verdict(config: ModelConfig, source: DatasetSource, tally: Tally) -> tuple[str, list[str]]:
    """Whether `stitch` documents always fill a window, and what is wrong where they do not."""
    if tally.shortest_joined is None:
        return "stitch is not judged, since eos_id is not known", []
    reached, needed = source.stitch * tally.shortest_joined, config.n_ctx + 1
    line = f"stitch {source.stitch} x {tally.shortest_joined} tokens (shortest document with its eos) = {reached}"
    if reached >= needed:
        return f"{line}, enough for n_ctx + 1 = {needed}", []
    return line, [
        f"stitch is {source.stitch}, and so many of the shortest documents hold {reached} tokens, fewer than n_ctx + 1 "
        f"= {needed}; stitch {-(-needed // max(1, tally.shortest_joined))} is enough"
    ]


def _sample(source: DatasetSource, tally: Tally, n_vocab: int) -> str:
    """The first record's beginning, decoded where a tokenizer is known."""
    ids = ", ".join(map(str, tally.sample[:20]))
    if source.dataset.tokenizer_path is None:
        return f"ids {ids}"
    try:
        text = load_encoder(source.dataset).decode([token for token in tally.sample if 0 <= token < n_vocab])
    except UserError as error:
        return f"ids {ids} (not decoded: {error})"
    return json.dumps(text[:_SAMPLE_CHARACTERS], ensure_ascii=False)
