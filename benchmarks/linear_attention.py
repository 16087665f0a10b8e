"""Time and memory of causal attention as the context grows: python -m benchmarks.linear_attention (--quick for a look).

One layer's mixing of queries, keys and values, forward and backward, by linear and by global attention, at lengths that
double. All are built first and then run in turn, round by round, so that whatever else the machine does meets all of
them alike. Memory is the most that one run holds at a time of what it allocates itself, by TensorFlow's own account.
docs/performance.md says what the numbers mean.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from benchmarks.measuring import Measured, describe_machine, in_turn, peak_bytes, traced_devices

KINDS = ("linear", "global")
LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096), (64, 128)
BATCH, HEADS, FEATURES = 2, 8, 32


@dataclass
class Variant(Measured):
    """One kind of attention at one length; a step is one forward and backward pass."""

    kind: str
    length: int


def make_variant(kind: str, length: int) -> Variant:
    """Build the graph on one CPU device, run it once to plan its memory, and once more to take account of it."""
    import numpy as np
    import tensorflow.compat.v1 as tf

    from config import make_model_config
    from mesh import mtf
    from mesh.devices import local_devices, local_mesh
    from mesh.layout import parse
    from models.attention import ATTENTION
    from models.context import Context
    from models.dims import make_dims

    sizes = {"n_ctx": length, "n_embd": HEADS * FEATURES, "n_head": HEADS, "n_vocab": 16, "n_layer": 1}
    values = {"lr": 1e-3, "train_batch_size": BATCH, "train_steps": 1, "model_path": "nothing-is-written"}
    config = make_model_config(sizes | values | {"no_dataset": True}, "benchmark")
    devices, random = local_devices(["cpu:0"]), np.random.default_rng(0)
    with tf.Graph().as_default() as tf_graph:
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, parse("x:1", "", 1), devices)
        dims = make_dims(config, BATCH)
        shape = mtf.Shape([dims.batch, dims.sequence, dims.heads, dims.features_per_head])
        fed = {name: tf.placeholder(tf.float32, shape.to_integer_list, name) for name in ("q", "k", "v", "weights")}
        q, k, v, weights = (mtf.import_tf_tensor(mesh, tensor, shape) for tensor in fed.values())
        ctx = Context(config, mesh, dims, mtf.VariableDType(tf.float32))
        total = mtf.reduce_sum(ATTENTION[kind](ctx, q, k, v) * weights)
        gradients = mtf.gradients([total], [q, k, v])
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        # summed, so that no large array is copied out of the session
        fetches = [tf.reduce_sum(lowering.export_to_tf_tensor(gradient)) for gradient in gradients]
    session = tf.Session(graph=tf_graph, config=devices.session_config())
    feed = {tensor: random.normal(size=tensor.shape).astype(np.float32) for tensor in fed.values()}
    session.run(fetches, feed)
    run = partial(session.run, fetches, feed)
    return Variant(run, peak_bytes(traced_devices(run)), kind, length)


def report(variants: Sequence[Variant]) -> str:
    """The table, in Markdown, and how time and memory grow from the shortest to the longest."""
    found = {(variant.kind, variant.length): variant for variant in variants}
    lengths = sorted({variant.length for variant in variants})
    heads = [f"{kind}, {what}" for what in ("ms", "CPU ms", "MB") for kind in KINDS]
    lines = [f"| tokens | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for length in lengths:
        row = [found[kind, length] for kind in KINDS]
        cells = [f"{1e3 * statistics.median(variant.wall):.1f}" for variant in row]
        cells += [f"{1e3 * statistics.median(variant.cpu):.1f}" for variant in row]
        cells += [f"{variant.peak_bytes / 1e6:.1f}" for variant in row]
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    lines.append("")
    doublings = math.log2(lengths[-1] / lengths[0])
    for kind in KINDS:
        first, last = found[kind, lengths[0]], found[kind, lengths[-1]]
        time_ratio = statistics.median(b / a for a, b in zip(first.cpu, last.cpu, strict=True))
        memory_ratio = last.peak_bytes / first.peak_bytes
        lines.append(
            f"{kind}: {lengths[-1] // lengths[0]} times the tokens take {time_ratio:.1f} times the CPU time (the power "
            f"{math.log2(time_ratio) / doublings:.2f}) and {memory_ratio:.1f} times the memory (the power "
            f"{math.log2(memory_ratio) / doublings:.2f})"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_attention",
        description="Measure linear and global attention as contexts grow.",
    )
    parser.add_argument("--quick", action="store_true", help="short contexts and few rounds, for a quick look")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 9, with --quick 3")
    args = parser.parse_args(argv)
    from main import prepare_tensorflow

    prepare_tensorflow()
    rounds = args.rounds or (3 if args.quick else 9)
    lengths = QUICK_LENGTHS if args.quick else LENGTHS
    variants = [
        make_variant(kind, length) for length in tqdm(lengths, desc="building", unit="length") for kind in KINDS
    ]
    others = in_turn(variants, rounds)
    print(f"batch {BATCH}, {HEADS} heads of {FEATURES} features, float32, forward and backward; {rounds} rounds")
    print(describe_machine(others), end="\n\n")
    print(report(variants))


if __name__ == "__main__":
    main()
