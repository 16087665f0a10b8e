"""Run main.py under supervision and record it in Sacred: `python run_experiment.py --model NAME ...`."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sacred.observers import RunObserver

import main as main_command
from errors import exits_cleanly
from tracking.addresses import connect, find_address
from tracking.experiment import Experiment
from tracking.observers import LocalObserver, PatientMongoObserver
from tracking.processes import Signals
from tracking.recording import ROOT
from tracking.supervisor import Interrupted, MainFailed
from tracking.transcript import Transcript

logger = logging.getLogger(__name__)

_OUTPUT_IN_MONGODB = 500_000  # characters of output that a record holds; it is sent whole at every heartbeat
_PATIENCE, _PATIENCE_WHEN_STOPPED = 600.0, 8.0  # seconds for a MongoDB that is away when the run ends


def own_options() -> argparse.ArgumentParser:
    """The options that main.py does not have."""
    parser = argparse.ArgumentParser(add_help=False)
    tracking = parser.add_argument_group("tracking")
    tracking.add_argument("--experiment_name", metavar="NAME", help="default: the model's name")
    tracking.add_argument(
        "--mongo_uri", metavar="URI", help="MongoDB to record in; default: SACRED_MONGO_URI, then .env; '': none"
    )
    tracking.add_argument(
        "--record_dir", default="runs/sacred", metavar="DIR", help="records without a MongoDB; default runs/sacred"
    )
    tracking.add_argument("--no_tensorboard", action="store_true", help="start no TensorBoard beside the training")
    tracking.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too (needs its package)")
    care = parser.add_argument_group("supervision")
    seconds: dict[str, Any] = {"type": _seconds, "metavar": "SECONDS"}
    care.add_argument(
        "--initial_heartbeat_timeout", default=7200.0, help="no sign of life before the first metrics", **seconds
    )
    care.add_argument("--heartbeat_timeout", default=1800.0, help="no sign of life after them", **seconds)
    care.add_argument("--stop_timeout", default=300.0, help="from SIGTERM to SIGKILL; default 300", **seconds)
    care.add_argument("--max_retries", type=_count, default=5, metavar="N", help="tries without a step; default 5")
    care.add_argument("--retry_wait", default=10.0, help="before the first new try, then doubled", **seconds)
    care.add_argument("--recreate_command", metavar="COMMAND", help="run by the shell between tries, e.g. for a TPU")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(all arguments, those that main.py gets)."""
    own = own_options()
    args = main_command.make_parser(
        "run_experiment.py", "Run main.py under supervision and record it in Sacred.", parents=[own]
    ).parse_args(argv)
    return args, own.parse_known_args(argv)[1]


def choose_observer(args: argparse.Namespace, signals: Signals) -> RunObserver:
    """MongoDB where an address is given, else files; says which. UserError where the server does not answer."""
    address = find_address(args.mongo_uri, os.environ, ROOT / ".env")
    if address is None:
        logger.info("recording in files under %s", args.record_dir)
        return LocalObserver(Path(args.record_dir))
    client, database = connect(address)
    logger.info("recording in MongoDB, database %r of %s", database, address)
    return PatientMongoObserver(
        client, database, lambda: _PATIENCE if signals.signum is None else _PATIENCE_WHEN_STOPPED
    )


def outcome(record: Callable[[], None]) -> int:
    """Run and record; the exit code, as main.py's."""
    try:
        record()
    except Interrupted as stopped:
        logger.warning("INTERRUPTED: %s", stopped)
        return 128 + stopped.signum
    except MainFailed as error:
        logger.error("FAILED: %s", error.sentence)
        return error.code
    logger.info("COMPLETED")
    return 0


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args, forwarded = parse_arguments(argv)
    main_command.check_arguments(args)
    config = main_command.read_config(args)
    transcript = Transcript()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(sys.stderr), logging.StreamHandler(transcript)],
        force=True,
    )
    with Signals() as signals:
        observer = choose_observer(args, signals)
        if isinstance(observer, PatientMongoObserver):
            transcript.limit(_OUTPUT_IN_MONGODB)
        experiment = Experiment(args, config, forwarded, signals, transcript)
        code = outcome(lambda: experiment.record(observer, list(argv)))
    if isinstance(observer, PatientMongoObserver) and observer.gave_up:
        logger.error("MongoDB did not come back, and the record lacks the end; it is in %s", config.model_path)
    return code


if __name__ == "__main__":
    sys.exit(main())
