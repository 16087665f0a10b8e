"""Tokenise text into tfrecords.

    python data/create_tfrecords.py --mode documents --input_dir texts --name train --output_dir tfrecords
        --encoder_path tokenizer/byte-level-bpe.tokenizer.json --minimum_size 100

Reads every file below --input_dir whose format it knows (data/readers.py), in the order of their names, and writes
NAME_<i>_<records>.tfrecords and NAME.manifest.json. What it writes does not depend on --processes.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# `python data/create_tfrecords.py` puts data/ on the path, but the modules are imported from the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from data.dataset_config import DEFAULT_CONFIG, plan_dataset_config
from data.encoders import Encoder, load_encoder_from
from data.files import write_text
from data.input_files import InputFile, find_files, read_documents
from data.parallel_tokenizer import TextOptions, tokenize
from data.readers import ReadOptions
from data.record_set import find_complete, manifest_path, write_manifest
from data.records import Account, RecordOptions, records
from data.tfrecord_writer import RecordSetWriter
from errors import UserError, exits_cleanly

_MAX_DEFAULT_PROCESSES = 32  # beyond these, the one process that reads and writes is what the others wait for
_BYTES_PER_PROCESS = 2_000_000  # about two seconds of work, what a process takes to start
_PROBLEMS_SHOWN = 10
_PROBLEMS_KEPT = 1000  # in the manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokenise text into tfrecords.")
    add = parser.add_argument
    add("--input_dir", required=True, help="folder of text, searched with its subfolders, or one file; local or gs://")
    add("--name", required=True, help="files are called NAME_<i>_<records>.tfrecords")
    add("--output_dir", required=True, help="folder for the tfrecords, local or gs://")
    add(
        "--mode",
        choices=("documents", "chunks"),
        default="documents",
        help="a record is a document, or a chunk of documents that are joined by the separator (default: documents)",
    )
    add(
        "--chunk_size",
        type=_at_least(1),
        default=2048,
        help="chunks: n_ctx; records have one token more (default: %(default)s)",
    )
    add("--use_gpt2_tokenizer", action="store_true", help="GPT-2's pretrained tokenizer, from the model hub")
    add("--encoder_path", help="a tokenizers JSON file, a folder with a pretrained tokenizer, or a name on the hub")
    add("--separator", type=_token_ids, help='chunks: ids between documents, "[0]" or "0" (default: end of text)')
    add("--minimum_size", type=_at_least(0), default=0, help="discard documents of fewer tokens (default: %(default)s)")
    add("--files_per", type=_at_least(1), default=100_000, help="records per file (default: %(default)s)")
    add(
        "--processes",
        type=_at_least(1),
        help="processes that clean and tokenise text (default: one for each core, fewer for little text)",
    )
    add(
        "--ftfy", action=argparse.BooleanOptionalAction, default=True, help="mend text with ftfy and NFKC (default: on)"
    )
    add(
        "--wikitext_detokenize",
        "--wikitext-detokenize",
        action="store_true",
        help="close up the spaces that WikiText sets around signs",
    )
    add(
        "--allow_special",
        action="store_true",
        help='make special tokens of their spellings in the text ("<|endoftext|>") instead of encoding them as text',
    )
    add("--json_key", default="text", help="the key of a JSON document's text (default: %(default)s)")
    add("--seed", type=int, help="shuffle the input files by this seed (default: in the order of their names)")
    add(
        "--write_dataset_config",
        nargs="?",
        const=DEFAULT_CONFIG,
        metavar="PATH",
        help="write a dataset config for the result (without PATH: configs/dataset_configs/NAME.json)",
    )
    return parser


def _at_least(low: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} must be at least {low}")
        return value

    return integer


def _token_ids(text: str) -> tuple[int, ...]:
    """ "[0]", "0" or "[0, 1]" -> the ids."""
    if not re.fullmatch(r"\s*(\[\s*(\d+(\s*,\s*\d+)*)?\s*\]|\d+(\s*,\s*\d+)*)\s*", text):
        raise argparse.ArgumentTypeError(f'"{text}" must be token ids in list form, for example "[0]"')
    return tuple(map(int, re.findall(r"\d+", text)))


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
    plan: dict[str, Any]  # the part of the manifest that is known beforehand
    json_key: str
    files_per: int
    processes: int


def _make_job(args: argparse.Namespace) -> Job:
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise UserError(f"--name {args.name}: use letters, digits, '.', '-' and '_' only, it begins the files' names")
    path, encoder = _load_tokenizer(args)
    files, others = find_files(args.input_dir)
    listing = json.dumps([(file.name, file.size) for file in files])
    if args.seed is not None:
        random.Random(args.seed).shuffle(files)
    is_chunks = args.mode == "chunks"
    record = RecordOptions(
        chunk_size=args.chunk_size if is_chunks else None,
        separator=_separator(args, encoder) if is_chunks else (),
        minimum_size=args.minimum_size,
    )
    text = TextOptions(args.ftfy, args.wikitext_detokenize, args.allow_special)
    other_options = {"mode": args.mode, "files_per": args.files_per, "json_key": args.json_key, "seed": args.seed}
    plan = {
        "options": other_options | asdict(text) | asdict(record) | {"separator": list(record.separator)},
        "input": {
            "path": args.input_dir,
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "sha256_of_names_and_sizes": hashlib.sha256(listing.encode()).hexdigest(),
        },
        "tokenizer": {
            "path": path,
            "sha256": encoder.sha256,
            "vocab_size": encoder.vocab_size,
            "eos_id": encoder.eos_id,
            "padding_id": encoder.padding_id,
        },
    }
    processes = args.processes or _default_processes(plan["input"]["bytes"])
    return Job(
        args.name, args.output_dir, files, others, encoder, text, record, plan, args.json_key, args.files_per,
        processes,
    )  # fmt: skip


def _default_processes(input_bytes: int) -> int:
    useful = 1 + input_bytes // _BYTES_PER_PROCESS
    # The cores that this process may use, where the system tells; else all.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, useful, _MAX_DEFAULT_PROCESSES)


def _load_tokenizer(args: argparse.Namespace) -> tuple[str, Encoder]:
    """(its path or name, the tokenizer)."""
    if args.use_gpt2_tokenizer == bool(args.encoder_path):
        given = "both are" if args.encoder_path else "neither is"
        raise UserError(f"give one of --encoder_path and --use_gpt2_tokenizer ({given} given)")
    path = args.encoder_path or "gpt2"
    return path, load_encoder_from(path, is_pretrained=not path.endswith(".json"))


def _separator(args: argparse.Namespace, encoder: Encoder) -> tuple[int, ...]:
    if args.separator is None:
        if encoder.eos_id is None:
            raise UserError(f'the tokenizer {args.encoder_path} has no end-of-text token; give --separator, e.g. "[0]"')
        return (encoder.eos_id,)
    if beyond := [index for index in args.separator if index >= encoder.vocab_size]:
        raise UserError(f"--separator {list(args.separator)}: {beyond[0]} is no id below {encoder.vocab_size}")
    return tuple(args.separator)


def _run(job: Job) -> dict[str, Any]:
    """Tokenise and write everything; the finished manifest."""
    problems: list[tuple[str, str]] = []
    account = Account()
    write_manifest(job.output_dir, job.name, {"complete": False} | job.plan)
    total = job.plan["input"]["bytes"]
    with tqdm(total=total, unit="B", unit_scale=True, desc=job.name) as bar:
        options = ReadOptions(lambda where, why: problems.append((where, why)), job.json_key)
        documents = read_documents(job.files, options, bar.update)
        batches = tokenize(documents, job.encoder, job.text, job.processes)
        with RecordSetWriter(job.output_dir, job.name, job.files_per) as writer:
            for record in records(batches, job.record, account):
                writer.write(record)
    assert account.tokens + account.separators == account.written + account.discarded_tokens + account.tail
    assert writer.tokens == account.written
    _report_problems(job, problems)
    if not writer.records:
        raise UserError(_nothing_written(job, account))
    manifest = (
        {"complete": True}
        | job.plan
        | {
            "records": writer.records,
            "min_id": writer.min_id,
            "max_id": writer.max_id,
            "account": asdict(account),
            "files": [file._asdict() for file in writer.files],
            "problem_count": len(problems),
            "problems": [f"{where}: {why}" for where, why in problems[:_PROBLEMS_KEPT]],
            "files_of_unknown_format": job.others[:_PROBLEMS_KEPT],
        }
    )
    write_manifest(job.output_dir, job.name, manifest)
    return manifest


def _report_problems(job: Job, problems: Sequence[tuple[str, str]]) -> None:
    for where, why in problems[:_PROBLEMS_SHOWN]:
        print(f"left out: {where}: {why}", file=sys.stderr)
    if len(problems) > _PROBLEMS_SHOWN:
        print(f"left out: {len(problems) - _PROBLEMS_SHOWN} more", file=sys.stderr)
    if job.others:
        shown = ", ".join(job.others[:3]) + (", ..." if len(job.others) > 3 else "")
        print(f"not read, as their names tell no known format: {len(job.others)} files ({shown})", file=sys.stderr)


def _nothing_written(job: Job, account: Account) -> str:
    read = f"the input {job.plan['input']['path']} gave {account.documents} documents with {account.tokens} tokens"
    if not account.tokens:
        return f"{read}; give files that hold text"
    if job.record.chunk_size is None or account.tail == 0:
        return f"{read}, each shorter than --minimum_size {job.record.minimum_size}; give a smaller one"
    return (
        f"{read}, fewer than one record of --chunk_size {job.record.chunk_size} + 1; give a smaller one, or more text"
    )


def _summary(manifest: dict[str, Any]) -> str:
    account = manifest["account"]
    return (
        "{documents:,} documents, {megabytes:,.1f} MB of text, {per_token:.2f} bytes per token\n"
        "tokens: {tokens:,} read + {separators:,} separators = {written:,} written"
        " + {discarded_tokens:,} discarded ({discarded_documents:,} documents) + {tail:,} tail\n"
        "{records:,} records in {file_count:,} files, token ids {min_id} to {max_id}, {problem_count:,} left out"
    ).format(
        **manifest,
        **account,
        megabytes=account["text_bytes"] / 1e6,
        per_token=account["text_bytes"] / account["tokens"],
        file_count=len(manifest["files"]),
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; UserError for what its user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    # One thread a process, so that --processes says how many cores are used; TensorFlow only when something is wrong.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    job = _make_job(args)
    config = plan_dataset_config(args.write_dataset_config, job.name, job.output_dir, job.plan["tokenizer"])
    manifest = find_complete(job.output_dir, job.name, job.plan)
    if manifest is not None:
        print(f"{manifest_path(job.output_dir, job.name)} is complete and made by the same options: nothing to do")
    else:
        manifest = _run(job)
    print(_summary(manifest))
    if config is not None:
        write_text(config.path, config.text)
        print(f"dataset config: {config.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
