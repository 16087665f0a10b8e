"""A process of its own: data/create_tfrecords.py killed at random moments and started again, over and over.

    python -m tests.killed_runs KILLS SEED OUTPUT_DIR FLAGS...

Makes OUTPUT_DIR/whole in an undisturbed run and OUTPUT_DIR/killed in many. Prints, a line of JSON each, at what part of
the undisturbed run's time a run was killed and what it left; at the end whether TensorFlow was imported and, for each
time that a run came to its end, whether it left the undisturbed one's files. Runs are forks, which have the modules.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from data import create_tfrecords, parallel_tokenizer


def start(output: Path, flags: list[str]) -> int:
    """The id of a process that runs the command."""
    process = os.fork()
    if process == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(create_tfrecords.main([*flags, "--name", "set", "--output_dir", str(output)]))
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def main(kills: int, seed: int, folder: Path, flags: list[str]) -> None:
    parallel_tokenizer._BATCH_CHARACTERS = 20_000  # so that a file is finished every now and then
    began = time.monotonic()
    assert os.waitpid(start(folder / "whole", flags), 0)[1] == 0
    duration = time.monotonic() - began
    whole = contents(folder / "whole")
    draw = random.Random(seed)
    same = []
    while True:
        process = start(folder / "killed", flags)
        if kills:
            fraction = draw.uniform(0, 0.9)
            time.sleep(fraction * duration)
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status):
            kills -= 1
            print(json.dumps({"at": round(fraction, 3), "left": sorted(contents(folder / "killed"))}), flush=True)
            continue
        same.append(status == 0 and contents(folder / "killed") == whole)
        if not kills:
            break
        shutil.rmtree(folder / "killed")
    print(json.dumps({"tensorflow": "tensorflow" in sys.modules, "same": same}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
