"""What feeding a model costs: python -m benchmarks.input_pipeline (--small for a quick look).

On one core, in one process: tokens per second out of each sampling mode, seconds until the first batch at step 0 and at
step 100,000, and the tokens per second that the quickstart's training step consumes, as the yardstick. The datasets are
made of random documents, in a temporary folder. docs/performance.md says what the numbers mean.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

N_CTX, VOCABULARY, BATCH = 128, 4096, 16  # the quickstart's
MODES = {
    "chunks": ("chunks", 1),
    "chunks, short ones left out": ("chunks", 1),
    "documents_fixed": ("documents_fixed", 3),
    "documents_random": ("documents_random", 3),
}
LATE_STEP = 100_000


def write_files(folder: Path, lengths: Iterator[int], tokens: int, files: int) -> str:
    """tfrecords of about so many tokens in records of the next of `lengths`; their glob."""
    from tests.record_files import write_records

    random = np.random.default_rng(0)
    for number in range(files):
        records, left = [], tokens // files
        while left > 0:
            length = next(lengths)
            records.append(random.integers(1, VOCABULARY, length).tolist())
            left -= length
        write_records(folder / f"{folder.name}_{number}_{len(records)}.tfrecords", records)
    return str(folder / "*.tfrecords")


def make_input_fn(pattern: str, mode: str, model_path: Path) -> Callable[[dict[str, int]], Any]:
    """The training input of a dataset; counts its windows where that is needed."""
    from config import make_model_config
    from data.encoders import SpecialIds
    from inputs import train_input_fn

    sampling_mode, stitch = MODES[mode]
    values = {
        "n_layer": 1, "n_embd": 1, "n_head": 1, "n_ctx": N_CTX, "n_vocab": VOCABULARY, "lr": 1, "train_steps": 1,
        "train_batch_size": BATCH, "model_path": str(model_path), "eos_id": 0, "padding_id": 0,
        "remove_partial_sequences": "left out" in mode, "datasets": [[pattern, "", stitch, sampling_mode, 1.0]],
    }  # fmt: skip
    return train_input_fn(make_model_config(values, "benchmark"), SpecialIds(0, 0))


def measure(input_fn: Callable[[dict[str, int]], Any], batches: int) -> tuple[float, float, float]:
    """(tokens per second, seconds to the first batch at step 0, the same at LATE_STEP)."""
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        step = tf.train.create_global_step()
        iterator = tf.data.make_initializable_iterator(input_fn({"batch_size": BATCH}))
        features, _ = iterator.get_next()
        waits = []
        for start in (LATE_STEP, 0):
            session.run(step.assign(start))
            begin = time.perf_counter()
            session.run(iterator.initializer)
            session.run(features["inputs"].op)
            waits.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for _ in range(batches):
            session.run(features["inputs"].op)
        rate = batches * BATCH * N_CTX / (time.perf_counter() - begin)
    return rate, waits[1], waits[0]


def training_rate(steps: int) -> float:
    """Tokens per second of the quickstart's training step."""
    from benchmarks.train_step import Sizes, mtf_step

    step = mtf_step(Sizes(layers=4, width=192, heads=6, context=N_CTX, batch=BATCH, vocabulary=VOCABULARY))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, [BATCH, N_CTX + 1]).astype(np.int32)
    step(tokens)
    begin = time.perf_counter()
    for _ in tqdm(range(steps), desc="training step"):
        step(tokens)
    return steps * BATCH * N_CTX / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little data and few steps: to see that it runs")
    args = parser.parse_args(argv)
    tokens, batches, steps = (200_000, 20, 1) if args.small else (20_000_000, 2000, 10)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before TensorFlow makes its threads

    from main import prepare_tensorflow

    prepare_tensorflow()
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("chunks", "documents"):
            (folder / kind).mkdir()
        chunks = write_files(folder / "chunks", iter(lambda: N_CTX + 1, None), tokens, files=4)
        documents = write_files(
            folder / "documents", iter(lambda: 50 + int(random.exponential(150)), None), tokens, files=4
        )
        rows = []
        for mode in tqdm(MODES, desc="sampling modes"):
            pattern = chunks if "chunks" in mode else documents
            rows.append((mode, *measure(make_input_fn(pattern, mode, folder / mode), batches)))
    training = training_rate(steps)

    print(f"one core; {tokens:,} tokens in records; n_ctx {N_CTX}, batch {BATCH}")
    print(f"the quickstart's training step: {training:,.0f} tokens/s\n")
    print("| sampling mode | tokens/s | of training's | first batch, step 0 | first batch, step 100,000 |")
    print("| --- | --- | --- | --- | --- |")
    for mode, rate, early, late in rows:
        print(f"| `{mode}` | {rate:,.0f} | {rate / training:,.0f} x | {early:.2f} s | {late:.2f} s |")


if __name__ == "__main__":
    main()
