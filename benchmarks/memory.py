"""Memory of a training step, whole, cut and recomputed: python -m benchmarks.memory (--quick for a look).

The same step of the same model on the same tokens, taken in four ways: the whole batch at once; cut into microbatches
of one sequence (`tokens_per_mb_per_replica`); with activations computed again for the backward pass (`recompute_grad`);
and both. All are built first and then run in turn, round by round. Memory is the most that one step holds at a time of
what it allocates itself, by TensorFlow's own account: activations, gradients and what operations need on the way, but
not the weights and the optimizer's slots, which are the same for all four. docs/performance.md says what the numbers
mean.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measuring import Measured, describe_machine, held_bytes, in_turn, traced_devices
from benchmarks.train_step import Sizes, mtf_step

SIZES = Sizes(layers=8, width=256, heads=8, context=512, batch=8, vocabulary=8192)
QUICK_SIZES = Sizes(layers=2, width=64, heads=4, context=128, batch=4, vocabulary=256)


def ways(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """{what the table calls it: keys of the config}."""
    microbatches: dict[str, Any] = {"tokens_per_mb_per_replica": sizes.context}
    recompute: dict[str, Any] = {"recompute_grad": True}
    return {
        "the whole batch": {},
        "microbatches of 1 sequence": microbatches,
        "`recompute_grad`": recompute,
        "both": microbatches | recompute,
    }


@dataclass
class Way(Measured):
    """One way to take a step."""

    name: str
    loss: float  # of the first step
    held: list[tuple[int, int]]  # as held_bytes gives it


def make_way(name: str, sizes: Sizes, settings: dict[str, Any]) -> Way:
    """Build the graph on one CPU device, run it once to plan its memory, and once more to take account of it."""
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, [sizes.batch, sizes.context + 1], dtype=np.int32)
    step = mtf_step(sizes, **settings)
    loss = step(tokens)
    held = held_bytes(traced_devices(partial(step, tokens)))
    return Way(lambda: step(tokens), max(number for _, number in held), name, loss, held)


def report(measured: Sequence[Way]) -> str:
    """The table, in Markdown."""
    whole = measured[0]
    lines = [
        "| step | peak, MB | of the whole batch's | s | CPU s | CPU time, of the whole batch's | loss |",
        "| --- " * 7 + "|",
    ]
    for way in measured:
        ratio = statistics.median(mine / its for mine, its in zip(way.cpu, whole.cpu, strict=True))
        cells = [
            way.name,
            f"{way.peak_bytes / 1e6:.1f}",
            f"{way.peak_bytes / whole.peak_bytes:.3f}",
            f"{statistics.median(way.wall):.3f}",
            f"{statistics.median(way.cpu):.3f}",
            f"{ratio:.2f}",
            f"{way.loss:.5f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(measured: Sequence[Way], path: str) -> None:
    """A picture of what each way holds in the course of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for way in measured:
        moments, held = np.array(way.held).T
        axes.plot(100 * moments / moments[-1], held / 1e6, label=way.name.replace("`", ""), drawstyle="steps-post")
    axes.set(xlabel="course of the training step, %", ylabel="memory held, MB", ylim=(0, None), xlim=(0, 100))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Measure the memory of a training step taken in four ways."
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds, for a quick look")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 7, with --quick 3")
    parser.add_argument("--picture", metavar="FILE", help="draw what each way holds in the course of a step")
    args = parser.parse_args(argv)
    sizes = QUICK_SIZES if args.quick else SIZES
    rounds = args.rounds or (3 if args.quick else 7)
    measured = [make_way(name, sizes, keys) for name, keys in tqdm(ways(sizes).items(), desc="building", unit="graph")]
    others = in_turn(measured, rounds)
    print(f"{sizes}: {sizes.tokens:,} tokens a step, float32, AdamW; {rounds} rounds")
    print(describe_machine(others), end="\n\n")
    print(report(measured))
    if args.picture:
        draw(measured, args.picture)


if __name__ == "__main__":
    main()
