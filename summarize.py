"""Sum up a trained and evaluated model: `python summarize.py --model NAME`."""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from config import ModelConfig, load_model_config, parse_overrides, read_text
from errors import UserError, exits_cleanly

_LAST_STEPS = 50  # the training loss is the mean of so many steps


def unigram_losses(config: ModelConfig) -> float:
    """Cross entropy, in nats per token, of the evaluation's labels under the training tokens' frequencies.

    Add-one smoothed. What a model scores that knows how common each token is and nothing of the context.
    """
    train, held_out = (_label_counts(config, key) for key in ("path", "eval_path"))
    log_frequencies = np.log((train + 1) / (train + 1).sum())
    return float(-(held_out * log_frequencies).sum() / held_out.sum())


def _label_counts(config: ModelConfig, key: str) -> np.ndarray:
    """How often each id is a label in the files that `path` or `eval_path` names: float64 [n_vocab]."""
    from input_pipeline.tfrecords import TokenReader, find_files

    counts = np.zeros(config.n_vocab)
    with TokenReader() as reader:
        for source in config.datasets:
            for path in find_files(getattr(source.dataset, key), key, source.dataset.id):
                for records in reader.read(path):
                    starts = np.cumsum(records.lengths) - records.lengths
                    labels = np.delete(records.tokens, starts[records.lengths > 0])
                    counts += np.bincount(labels[labels < config.n_vocab], minlength=config.n_vocab)
    return counts


def _json_lines(path: str, what_to_do: str) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in read_text(path).splitlines()]
    except (UserError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read; {what_to_do}") from error
    if not lines:
        raise UserError(f"{path} is empty; {what_to_do}")
    return lines


def summary(config: ModelConfig, sacred_id: str) -> list[tuple[str, str]]:
    """(what, value) lines about the run in `model_path`; UserError where it was not trained or not evaluated."""
    name = config.name
    metrics = _json_lines(os.path.join(config.model_path, "metrics.jsonl"), f"run main.py --model {name} first")
    evaluations = _json_lines(
        os.path.join(config.model_path, f"eval_{sacred_id}.jsonl"), f"run main.py --model {name} --eval first"
    )
    validations = [result for result in evaluations if result["task"] == "validation"]
    if not validations:
        raise UserError(f"eval_{sacred_id}.jsonl holds no validation; run main.py --model {name} --eval first")
    result = validations[-1]
    steps = int(metrics[-1]["step"])
    train_loss = statistics.mean(line["cross_entropy"] for line in metrics[-_LAST_STEPS:])
    speed = statistics.median(line["tokens_per_second"] for line in metrics)
    unigram = unigram_losses(config)
    bits_per_byte = result["bits_per_byte"]
    masked = config.mlm_training
    unknown = "not defined for a masked model" if masked else "unknown to this tokenizer"
    of_unigrams = "on all tokens of the same files" if masked else "on the same tokens"
    lines = [
        ("trained", f"{steps:,} steps, {steps * config.tokens_per_batch:,} tokens, {speed:,.0f} tokens/s"),
        ("training loss", f"{train_loss:.3f} nats per token (mean of the last {min(_LAST_STEPS, steps)} steps)"),
        ("held-out loss", f"{result['cross_entropy']:.3f} nats per token, over {result['tokens']:,} tokens"),
        ("unigram model", f"{unigram:.3f} nats per token, {of_unigrams}; perplexity {math.exp(unigram):,.1f}"),
        ("perplexity", f"{result['perplexity']:,.1f}"),
        ("bits per byte", unknown if bits_per_byte is None else f"{bits_per_byte:.3f}"),
        ("checkpoints", config.model_path),
        ("curves", f"{_tensorboard()} --logdir {config.model_path}"),
    ]
    return lines


def _tensorboard() -> str:
    """How to call the TensorBoard of this environment from here."""
    beside_python = os.path.join(os.path.dirname(sys.executable), "tensorboard")
    inside = os.path.relpath(beside_python)
    return beside_python if inside.startswith(os.pardir) else inside


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of the model that `argv` names."""
    parser = argparse.ArgumentParser(prog="summarize.py", description="Sum up a trained and evaluated model.")
    parser.add_argument("--model", required=True, help="name of a config in configs/, or the path of a .json file")
    parser.add_argument("--sacred_id", default="", help="whose evaluation to read")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="as given to main.py"
    )
    args = parser.parse_args(argv)
    config = load_model_config(args.model, parse_overrides(args.settings))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for what, value in summary(config, args.sacred_id):
        print(f"{what:>14}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
