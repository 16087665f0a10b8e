"""Tokenise text into tfrecords.

    python data/create_tfrecords.py --mode documents --input_dir texts --name train --output_dir tfrecords
        --encoder_path tokenizer/byte-level-bpe.tokenizer.json --minimum_size 100

Reads every file below --input_dir whose format it knows (data/readers/), in the order of their names, and writes
NAME_<i>_<records>.tfrecords and NAME.manifest.json. What it writes does not depend on --processes, nor on how often it
was interrupted and started again.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# `python data/create_tfrecords.py` puts data/ on the path, but the modules are imported from the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.command_line import add_reading_flags, command, integer
from data.dataset_config import DEFAULT_CONFIG, plan_dataset_config
from data.files import join, write_text
from data.make_records import make_records
from data.record_set import being_made, find_set, manifest_path
from data.tfrecords_job import Job, make_job


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
        type=integer(1),
        default=2048,
        help="chunks: n_ctx; records have one token more (default: %(default)s)",
    )
    _add_tokenizer_flags(parser)
    add("--separator", nargs="+", metavar="ID", help='chunks: ids between documents, "[0]" or 0 (default: end of text)')
    add(
        "--append_eod",
        "--append-eod",
        action="store_true",
        help="write the separator after every document, the last one and those of single records included",
    )
    add("--minimum_size", type=integer(0), default=0, help="discard documents of fewer tokens (default: %(default)s)")
    add("--split", metavar="949:50:1", help="weights of the documents for training, validation and test")
    add("--seed", type=int, help="shuffle the input files by this seed; with --split, choose documents by it")
    add("--files_per", type=integer(1), default=100_000, help="records per file (default: %(default)s)")
    add(
        "--processes",
        type=integer(1),
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
    add_reading_flags(parser)
    add(
        "--write_dataset_config",
        nargs="?",
        const=DEFAULT_CONFIG,
        metavar="PATH",
        help="write a dataset config for the result (without PATH: configs/dataset_configs/NAME.json)",
    )
    add("--eval_path", metavar="GLOB", help="the eval_path of that config (default: what --split is for validation)")
    return parser


def _add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--encoder_path", help="a tokenizers JSON file, a folder with a pretrained tokenizer, or a name on the hub")
    add("--use_gpt2_tokenizer", action="store_true", help="GPT-2's pretrained tokenizer, from the model hub")
    add("--tokenizer", metavar="NAME", help="a Hugging Face tokenizer: a local folder or a name on the model hub")
    add("--vocab_file", help="a byte-level BPE vocabulary (vocab.json or encoder.json), with --merges_file")
    add("--merges_file", help="its merges (merges.txt or vocab.bpe)")
    add(
        "--allow_special",
        action="store_true",
        help='make special tokens of their spellings in the text ("<|endoftext|>") instead of encoding them as text',
    )


def _summary(manifest: dict[str, Any]) -> str:
    account = manifest["account"]
    lines = (
        "{documents:,} documents, {megabytes:,.1f} MB of text, {per_token:.2f} bytes per token",
        "documents: {documents:,} read = {written_documents:,} written + {discarded_documents:,} discarded"
        " + {tail_documents:,} tail",
        "tokens: {tokens:,} read + {separators:,} separators = {written:,} written + {discarded_tokens:,} discarded"
        " + {tail:,} tail",
        "{records:,} records in {file_count:,} files, token ids {min_id} to {max_id}, {problem_count:,} left out",
        *(
            f"  {name}: {{parts[{name}][records]:,}} records, {{parts[{name}][account][written]:,}} tokens"
            for name in manifest.get("parts", {})
        ),
    )
    return "\n".join(lines).format(
        **manifest,
        **account,
        megabytes=account["text_bytes"] / 1e6,
        per_token=account["text_bytes"] / account["tokens"],
        file_count=len(manifest["files"]),
    )


def _report_unknown(job: Job) -> None:
    if job.others:
        shown = ", ".join(job.others[:3]) + (", ..." if len(job.others) > 3 else "")
        print(f"not read, as their names tell no known format: {len(job.others)} files ({shown})", file=sys.stderr)


@command(_parser)
def main(args: argparse.Namespace) -> int:
    """Run the command; UserError for what its user can put right."""
    # One thread a process, so that --processes says how many cores are used; TensorFlow only when something is wrong.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    job = make_job(args)
    records, *held_out = [join(job.output_dir, f"{name}_*.tfrecords") for name in job.part_names]
    eval_records = args.eval_path or (held_out[0] if held_out else "")
    config = plan_dataset_config(args.write_dataset_config, job.name, records, eval_records, job.plan["tokenizer"])
    with being_made(job.output_dir, job.name):
        manifest, progress = find_set(job.output_dir, job.name, job.plan)
        if manifest is not None:
            print(f"{manifest_path(job.output_dir, job.name)} is complete and made by the same options: nothing to do")
        else:
            if job.new_tokenizer:
                write_text(job.plan["tokenizer"]["path"], job.encoder.tokenizer_json)
            manifest = make_records(job, progress)
            _report_unknown(job)
    print(_summary(manifest))
    if config is not None:
        print(config.write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
