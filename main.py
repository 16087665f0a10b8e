"""Train, evaluate, sample from or audit a model: `python main.py --model NAME ...`."""

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from config import ModelConfig, load_model_config, parse_overrides
from errors import UserError, exits_cleanly

DEFAULT_STEPS_PER_CHECKPOINT = 5000  # GPT-Neo's


def make_parser(
    prog: str = "main.py",
    description: str = "Train, evaluate, sample from or audit a GPT built on Mesh-TensorFlow.",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """The parser of this command's options, and of those of `parents` besides."""
    parser = argparse.ArgumentParser(prog, description=description, parents=parents)
    parser.add_argument("--model", required=True, help="name of a config in configs/, or the path of a .json file")
    device = parser.add_argument_group("devices (default: every visible GPU, else the CPU)")
    device.add_argument("--tpu", help="name or grpc:// address of a TPU; 'colab' in a Colab notebook")
    device.add_argument(
        "--gpu_ids", nargs="+", metavar="DEVICE", help="local devices, e.g. device:GPU:0 gpu:1 or cpu:0"
    )
    device.add_argument("--mesh_shape", help="instead of the config's, e.g. x:2,y:4")
    device.add_argument("--layout", help="instead of the config's, e.g. batch:x,heads:y")

    action = parser.add_argument_group("what to do (default: train, resuming from the last checkpoint)")
    what = action.add_mutually_exclusive_group()
    what.add_argument("--eval", action="store_true", help="evaluate the last checkpoint")
    what.add_argument("--predict", action="store_true", help="continue the prompts of --prompt")
    what.add_argument("--check_dataset", action="store_true", help="audit the datasets; exit code 1 if they do not fit")
    what.add_argument("--export", action="store_true", help="write the last checkpoint as a SavedModel")
    action.add_argument(
        "--plan",
        action="store_true",
        help="print what training costs each device; exit code 1 if it cannot be trained so",
    )
    action.add_argument("--device", metavar="NAME", help="with --plan: compare with e.g. v3-8, a100-80")
    what.add_argument("--auto_layout", action="store_true", help="print a memory-efficient layout")
    what.add_argument("--auto_layout_and_mesh_shape", action="store_true", help="print a layout and a mesh shape")

    parser.add_argument(
        "--sample", type=_positive, metavar="N", help="with --check_dataset: write N training examples as text"
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps_per_checkpoint", type=_positive, default=DEFAULT_STEPS_PER_CHECKPOINT, metavar="N", help="default 5000"
    )
    training.add_argument("--new", action="store_true", help="delete model_path first; asks")
    training.add_argument("--yes", action="store_true", help="answer yes to what --new asks")
    training.add_argument("--sacred_id", default="", help="names this run's result files")
    training.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="override a key of the config"
    )

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--download_tasks", action="store_true", help="download what eval_tasks read, where it is not there"
    )

    _add_sampling(parser)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--prompt", metavar="FILE", help="text to continue; a line '---' separates several prompts")
    sampling.add_argument("--prompt_per_line", action="store_true", help="every line of the file is a prompt")
    sampling.add_argument("--temperature", type=float, default=0.9, help="0 takes the likeliest token; default 0.9")
    sampling.add_argument("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    sampling.add_argument("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest that hold P")
    sampling.add_argument("--max_new_tokens", type=_positive, metavar="N", help="default: up to n_ctx")
    sampling.add_argument("--sampling_seed", type=int, default=0, metavar="N", help="same seed, same text; default 0")
    sampling.add_argument("--output", metavar="FILE", help="default: a file in model_path")
    sampling.add_argument("--json", action="store_true", help="write JSON lines instead of text")
    sampling.add_argument(
        "--entmax_sampling", action="store_true", help="draw with entmax's probabilities instead of softmax's"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself ends the process with code 2 and one sentence for a flag it does not know."""
    return make_parser().parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def read_config(args: argparse.Namespace) -> ModelConfig:
    """The config that the arguments name, with what they override."""
    overrides = parse_overrides(args.settings)
    overrides |= {key: value for key in ("mesh_shape", "layout") if (value := getattr(args, key)) is not None}
    return load_model_config(args.model, overrides)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for values and combinations that argparse cannot judge."""
    if args.tpu and args.gpu_ids:
        raise UserError(
            f"--tpu {args.tpu!r} and --gpu_ids {' '.join(args.gpu_ids)!r} exclude each other; give one of them"
        )
    if args.tpu is not None and not args.tpu.strip():
        raise UserError("--tpu '' names no TPU; give its name or grpc:// address, or leave --tpu out for local devices")
    if args.sample and not args.check_dataset:
        raise UserError(f"--sample {args.sample} goes with --check_dataset; add it or leave --sample out")
    _check_looking(args)
    if not re.fullmatch(r"[\w.-]*", args.sacred_id):
        raise UserError(f"--sacred_id {args.sacred_id!r} names files; use letters, digits, '.', '-' and '_' only")
    for action in ("eval", "predict", "export", "check_dataset"):
        if args.new and getattr(args, action):
            raise UserError(f"--new deletes the model that --{action} needs; run without one of them")
    if not 0 <= args.temperature < math.inf:
        raise UserError(
            f"--temperature {args.temperature} is not a number from 0; use 0 for the likeliest token, 1 for the "
            "model's own probabilities"
        )
    if args.top_k < 0:
        raise UserError(f"--top_k {args.top_k} is negative; use 0 to draw from all tokens")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p} is not a probability above 0 and up to 1; use 1 to draw from all tokens")


def _check_looking(args: argparse.Namespace) -> None:
    """Raise UserError for what does not go with flags that only look at training."""
    if args.device is not None and not args.plan:
        raise UserError(f"--device {args.device!r} goes with --plan; add it or leave --device out")
    for looking in ("plan", "auto_layout", "auto_layout_and_mesh_shape"):
        for action in ("eval", "predict", "export", "check_dataset", "new"):
            if getattr(args, looking) and getattr(args, action):
                raise UserError(f"--{looking} only looks at what training would do; run it without --{action}")


def prepare_tensorflow() -> None:
    """Environment that TensorFlow reads when it is imported, and quiet for what a user need not see."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default in this build; half as much time a step
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("tensorflow").setLevel(logging.CRITICAL)  # what it logs as an error it raises as well
    from mesh.devices import use_graph_mode

    use_graph_mode()


def run(args: argparse.Namespace, config: ModelConfig) -> int:
    """Do what the arguments ask; TensorFlow is imported from here on. Returns the exit code."""
    prepare_tensorflow()
    import commands

    if args.check_dataset:
        return commands.check_dataset(args, config)
    if args.auto_layout or args.auto_layout_and_mesh_shape:
        return commands.auto_layout(args, config)
    if args.plan:
        return commands.plan(args, config)
    from training.hooks import Stopped

    actions = {"eval": commands.evaluate, "predict": commands.predict, "export": commands.export}
    command: Any = next((function for name, function in actions.items() if getattr(args, name)), commands.train)
    try:
        return command(args, config)
    except Stopped as stopped:
        print("interrupted", file=sys.stderr)
        return 128 + stopped.signum


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    args = parse_arguments(argv)
    check_arguments(args)
    return run(args, read_config(args))


if __name__ == "__main__":
    sys.exit(main())
