"""What data/create_tfrecords.py is asked to do: its flags checked, its input found, its tokenizer loaded."""

import argparse
import hashlib
import json
import os
import random
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

from data.command_line import Problems
from data.encoders import Encoder, load_encoder_from, load_vocabulary
from data.files import join
from data.input_files import InputFile, find_files
from data.parallel_tokenizer import TextOptions
from data.readers import ReadOptions
from data.record_set import part_names
from data.records import RecordOptions
from data.splitting import Split, parse_split
from errors import UserError

_MAX_DEFAULT_PROCESSES = 32  # beyond these, the one process that reads and writes is what the others wait for
_BYTES_PER_PROCESS = 8_000_000  # two seconds of ftfy and tiktoken; a process takes one to start

# The flags of which one says which tokenizer is meant.
_TOKENIZERS = "--encoder_path, --use_gpt2_tokenizer, --tokenizer, and --vocab_file with --merges_file"


@dataclass(frozen=True)
class Job:
    """Everything that decides what is written, checked."""

    name: str
    output_dir: str
    files: list[InputFile]
    others: list[str]  # names of files whose format is not known
    encoder: Encoder
    text: TextOptions
    record: RecordOptions
    split: Split | None
    files_per: int
    problems: Problems
    read: ReadOptions
    processes: int
    plan: dict[str, Any]  # the part of the manifest that is known beforehand
    new_tokenizer: bool  # made of a vocabulary and its merges, and to be written where plan says

    @property
    def part_names(self) -> tuple[str, ...]:
        """How the names of the files of each part of the set begin."""
        return part_names(self.name, self.split is not None)[: len(self.split.parts) if self.split else 1]


def make_job(args: argparse.Namespace) -> Job:
    """The job that the flags describe; UserError for what is wrong with them."""
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise UserError(f"--name {args.name}: use letters, digits, '.', '-' and '_' only, it begins the files' names")
    split = parse_split(args.split, args.seed) if args.split else None
    path, encoder = _load_tokenizer(args)
    record = _record_options(args, path, encoder)
    files, others = find_files(args.input_dir)
    text = TextOptions(args.ftfy, args.wikitext_detokenize, args.allow_special)
    options = {"mode": args.mode, "files_per": args.files_per, "json_key": args.json_key, "seed": args.seed}
    options |= {"split": list(split.weights) if split else None}
    plan = {
        "options": options | asdict(text) | asdict(record) | {"separator": list(record.separator)},
        "input": _describe_input(args.input_dir, files),
        "tokenizer": {
            "path": path,
            "sha256": encoder.sha256,
            "vocab_size": encoder.vocab_size,
            "eos_id": encoder.eos_id,
            "padding_id": encoder.padding_id,
        },
    }
    if args.seed is not None:
        random.Random(args.seed).shuffle(files)
    problems = Problems(args.strict)
    return Job(
        name=args.name,
        output_dir=args.output_dir,
        files=files,
        others=others,
        encoder=encoder,
        text=text,
        record=record,
        split=split,
        files_per=args.files_per,
        problems=problems,
        read=problems.read_options(args),
        processes=args.processes or _default_processes(plan["input"]["bytes"]),
        plan=plan,
        new_tokenizer=args.vocab_file is not None,
    )


def _describe_input(path: str, files: list[InputFile]) -> dict[str, Any]:
    listing = json.dumps([(file.name, file.size) for file in files])
    return {
        "path": path,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "sha256_of_names_and_sizes": hashlib.sha256(listing.encode()).hexdigest(),
    }


def _default_processes(input_bytes: int) -> int:
    useful = 1 + input_bytes // _BYTES_PER_PROCESS
    # The cores that this process may use, where the system tells; else all.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, useful, _MAX_DEFAULT_PROCESSES)


def _load_tokenizer(args: argparse.Namespace) -> tuple[str, Encoder]:
    """(its path or name, the tokenizer)."""
    by_files = args.vocab_file is not None or args.merges_file is not None
    given = [bool(args.encoder_path), args.use_gpt2_tokenizer, bool(args.tokenizer), by_files]
    if sum(given) != 1:
        how_many = f"{sum(given)} are" if any(given) else "none is"
        raise UserError(f"give one of {_TOKENIZERS} ({how_many} given)")
    if by_files:
        if args.vocab_file is None or args.merges_file is None:
            raise UserError("--vocab_file and --merges_file belong together: give both or neither")
        return join(args.output_dir, f"{args.name}.tokenizer.json"), load_vocabulary(args.vocab_file, args.merges_file)
    path = args.encoder_path or args.tokenizer or "gpt2"
    return path, load_encoder_from(path, is_pretrained=not path.endswith(".json"))


def _record_options(args: argparse.Namespace, path: str, encoder: Encoder) -> RecordOptions:
    is_chunks = args.mode == "chunks"
    separates = is_chunks or args.append_eod
    if args.separator and not separates:
        print(
            "--separator has no effect: a record is one document, and whoever reads it joins documents by the "
            "end-of-text token; --append_eod writes the separator into the records",
            file=sys.stderr,
        )
    return RecordOptions(
        chunk_size=args.chunk_size if is_chunks else None,
        separator=_separator(args.separator, path, encoder) if separates else (),
        append_eod=args.append_eod,
        minimum_size=args.minimum_size,
    )


def _separator(given: list[str] | None, path: str, encoder: Encoder) -> tuple[int, ...]:
    """What --separator says ("[0]", "0", "[0, 1]" or 0 1), else the end-of-text token."""
    if given is None:
        if encoder.eos_id is None:
            raise UserError(f'the tokenizer {path} has no end-of-text token; give --separator, such as "[0]"')
        return (encoder.eos_id,)
    text = " ".join(given)
    if not re.fullmatch(r"\s*(\[\s*(\d+(\s*,\s*\d+)*)?\s*\]|\d+([\s,]+\d+)*)\s*", text):
        raise UserError(f'--separator "{text}" must be token ids in list form, such as "[0]"')
    ids = tuple(map(int, re.findall(r"\d+", text)))
    if beyond := [index for index in ids if index >= encoder.vocab_size]:
        raise UserError(f"--separator {list(ids)}: {beyond[0]} is no id below {encoder.vocab_size}")
    return ids
