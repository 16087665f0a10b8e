"""Train a byte-level BPE tokenizer on text.

    python data/train_tokenizer.py --base_dir texts --output_dir tokenizer --vocab_size 32768

Reads every file below --base_dir whose format it knows (data/readers/) and writes byte-level-bpe.tokenizer.json.
Any text can be encoded with it and comes back exactly: its alphabet is the 256 bytes, and nothing is normalised.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# `python data/train_tokenizer.py` puts data/ on the path, but the modules are imported from the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data.command_line import Problems, add_reading_flags, command
from data.dataset_config import plan_dataset_config
from data.files import exists, is_folder, join, make_folder, write_text
from data.input_files import find_files, read_documents
from errors import UserError

OUTPUT_NAME = "byte-level-bpe.tokenizer.json"
EOS, PADDING, MASK = "<|endoftext|>", "<|padding|>", "[MASK]"  # ids 0, 1 and, if wanted, 2
_BYTES = 256


def train_tokenizer(documents: Iterable[str], vocab_size: int, mask_token: bool = False) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        documents: the text to learn from.
        vocab_size: the size wished for, special tokens and the 256 bytes included; fewer if the text does not hold so
            many pairs of neighbours.
        mask_token: whether to reserve id 2 for "[MASK]", after "<|endoftext|>" (0) and "<|padding|>" (1).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PADDING] + [MASK] * mask_token,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that a byte not met in training is encoded too
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on text.")
    add = parser.add_argument
    add("--base_dir", required=True, help="folder of text, searched with its subfolders, or one file; local or gs://")
    add("--output_dir", required=True, help=f"folder for {OUTPUT_NAME}; nothing else in it is touched")
    add("--file_type", help='only files whose names end in this ("txt") or match this glob (default: all formats)')
    add("--vocab_size", type=int, default=32768, help="special tokens included (default: %(default)s)")
    add("--mask_token", action="store_true", help=f"reserve id 2 for {MASK} (masked language modelling)")
    add_reading_flags(parser)
    add("--overwrite", action="store_true", help="replace a tokenizer that is there already")
    add("--write_dataset_config", metavar="PATH", help="write a dataset config with the tokenizer; needs --path")
    add("--path", metavar="GLOB", help="the path of that config: the tfrecords that the tokenizer is going to make")
    add("--eval_path", metavar="GLOB", default="", help="the eval_path of that config")
    return parser


def _check(args: argparse.Namespace, output: str) -> None:
    least = _BYTES + 2 + args.mask_token
    if args.vocab_size < least:
        raise UserError(
            f"--vocab_size {args.vocab_size} must be at least {least}: {_BYTES} bytes and the special tokens"
        )
    if is_folder(output):
        raise UserError(f"{output} is a folder; give another --output_dir")
    if exists(output) and not args.overwrite:
        raise UserError(f"{output} exists; give --overwrite to train it anew, or another --output_dir")
    if (args.write_dataset_config is None) != (args.path is None):
        raise UserError(
            "--write_dataset_config and --path belong together: the one says where to write the dataset config, the "
            "other names the tfrecords that are going to be made"
        )
    if args.write_dataset_config and exists(args.write_dataset_config) and not args.overwrite:
        raise UserError(f"--write_dataset_config {args.write_dataset_config} exists; give --overwrite or another path")


def _train(args: argparse.Namespace) -> Tokenizer:
    files, _ = find_files(args.base_dir, args.file_type)
    problems = Problems(args.strict)
    documents = 0
    with tqdm(total=sum(file.size for file in files), unit="B", unit_scale=True, desc="reading") as bar:

        def counted() -> Iterator[str]:
            nonlocal documents
            for text in read_documents(files, problems.read_options(args), bar.update):
                documents += 1
                yield text

        texts = counted()
        first = next(texts, None)
        if first is not None:
            make_folder(args.output_dir)  # before the work, which would be lost if it could not be written
            tokenizer = train_tokenizer(itertools.chain([first], texts), args.vocab_size, args.mask_token)
    problems.report()
    if first is None:
        raise UserError(f"the input {args.base_dir} gave no document; give files that hold text")
    print(f"learned from {documents:,} documents in {len(files):,} files, {problems.count:,} left out")
    return tokenizer


@command(_parser)
def main(args: argparse.Namespace) -> int:
    """Run the command; UserError for what its user can put right."""
    output = join(args.output_dir, OUTPUT_NAME)
    _check(args, output)
    tokenizer = _train(args)
    size = tokenizer.get_vocab_size()
    ids = {"eos_id": tokenizer.token_to_id(EOS), "padding_id": tokenizer.token_to_id(PADDING)}
    config = plan_dataset_config(
        args.write_dataset_config, "", args.path, args.eval_path, {"path": output, "vocab_size": size} | ids, True
    )
    write_text(output, tokenizer.to_str(pretty=True))
    if size < args.vocab_size:
        print(f"the text gives a vocabulary of {size:,} tokens only, fewer than --vocab_size {args.vocab_size:,}")
    settings = {"n_vocab": size, "tokenizer_path": output} | ids
    print(f"{output}: for the dataset config, {json.dumps(settings)}")
    if args.mask_token:
        print(f'for the model config, {{"mlm_mask_id": {tokenizer.token_to_id(MASK)}}}')
    if config is not None:
        print(config.write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
