"""Seconds per training step, here and in PyTorch: python -m benchmarks.train_step (--small for a quick look).

One run measures three things in turn, step by step, so that whatever else the machine does meets all of them alike:
this project's step, in the graph that its Estimator runs; transformers' GPTNeoForCausalLM with torch.optim.AdamW, of
the same sizes and on the same tokens; and a plain float32 matrix product, the machine's own speed. Each has a process
of its own, so that thread pools and memory do not mix. docs/performance.md says what the numbers mean.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measuring import busy_seconds, describe_machine, num_cores
from config import ModelConfig, make_model_config

LR, BETAS, EPSILON, WEIGHT_DECAY, CLIPPING = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SGEMM_SIZE, SGEMM_REPEATS = 2048, 4

StepFn = Callable[..., float]  # int32 tokens [batch, context + 1] -> the loss of the step taken on them


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.context

    @property
    def flops(self) -> int:
        """Floating-point operations of a step's matrix products: the forward pass, and twice that for the backward."""
        weights = 12 * self.layers * self.width**2 + self.vocabulary * self.width
        scores = 2 * self.layers * self.context * self.width  # q k^T and weights v, the masked half included
        return 3 * 2 * self.tokens * (weights + scores)


def mtf_config(sizes: Sizes, **settings: Any) -> ModelConfig:
    """The config of the model that is measured; `settings` are further keys."""
    values = {
        "n_layer": sizes.layers,
        "n_embd": sizes.width,
        "n_head": sizes.heads,
        "n_ctx": sizes.context,
        "n_vocab": sizes.vocabulary,
        "train_batch_size": sizes.batch,
        "train_steps": 1_000_000,
        "lr": LR,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "epsilon": EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "gradient_clipping": CLIPPING,
        "model_path": "nothing-is-written",
        "no_dataset": True,
        **settings,
    }
    return make_model_config(values, "benchmark")


def mtf_step(sizes: Sizes, **settings: Any) -> StepFn:
    """A step of this project's model, on one CPU device or as many as the mesh_shape of `settings` has.

    What the step gets besides the tokens goes to Session.run.
    """
    from main import prepare_tensorflow

    prepare_tensorflow()
    import tensorflow.compat.v1 as tf

    from mesh import mtf
    from mesh.devices import local_devices
    from mesh.layout import parse
    from model_fns import Run, train_spec
    from sample import Sampling
    from training.hooks import StopOnSignal

    config = mtf_config(sizes, **settings)
    layout = parse(config.mesh_shape, config.layout, 1)
    devices = local_devices([f"cpu:{i}" for i in range(layout.size)])
    run = Run(config, layout, devices, 1, 0, Sampling(), StopOnSignal())
    shape = [sizes.batch, sizes.context]
    with tf.Graph().as_default() as graph:
        features = {name: tf.placeholder(tf.int32, shape, name) for name in ("inputs", "labels")}
        spec = train_spec(run, features, {"batch_size": sizes.batch})
        restore = next(hook for hook in spec.training_hooks if isinstance(hook, mtf.MtfRestoreHook))
        restore.begin()
        initialize = tf.global_variables_initializer()
    session = tf.Session(graph=graph, config=devices.session_config())
    session.run(initialize)
    restore.after_create_session(session, None)

    def step(tokens: np.ndarray, **how: Any) -> float:
        feed = {features["inputs"]: tokens[:, :-1], features["labels"]: tokens[:, 1:]}
        return float(session.run([spec.loss, spec.train_op], feed, **how)[0])

    return step


def prepare_torch() -> None:
    """All cores for PyTorch, on terms that suit a shared machine."""
    # By default its threads spin at every barrier. Where another process holds a core, they spin through whole time
    # slices, and a step of a small model takes fifty times as long; waiting costs nothing that shows where none does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(num_cores())


def torch_step(sizes: Sizes) -> StepFn:
    """A step of transformers' GPT-Neo: eager PyTorch, the fused AdamW."""
    prepare_torch()
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(1)
    config = GPTNeoConfig(
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.context,
        hidden_size=sizes.width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        attention_types=[[["global"], sizes.layers]],
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    model = GPTNeoForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        return float(loss.item())

    return step


def sgemm_step(sizes: Sizes) -> StepFn:
    """SGEMM_REPEATS products of square float32 matrices, whatever the sizes."""
    prepare_torch()
    import torch

    left, right = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(2))
    out = torch.empty_like(left)

    def step(tokens: np.ndarray) -> float:
        for _ in range(SGEMM_REPEATS):
            torch.mm(left, right, out=out)
        return 0.0

    return step


SIDES: dict[str, Callable[[Sizes], StepFn]] = {"mesh-tensorflow": mtf_step, "pytorch": torch_step, "sgemm": sgemm_step}


@dataclass
class Side:
    """One process and what was measured of it: seconds by the clock and of all its threads, one entry a step."""

    process: SpawnProcess
    pipe: Connection
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def serve(pipe: Connection, name: str, sizes: Sizes) -> None:
    """Take a step for every batch of tokens that comes through the pipe, until None comes; in a process of its own."""
    step = SIDES[name](sizes)
    pipe.send("ready")
    while (tokens := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(tokens)
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, loss))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(sizes: Sizes, steps: int, warmup: int) -> tuple[dict[str, Side], float]:
    """Run all sides in turn, `warmup` rounds unrecorded and then `steps`; the order turns round with every round.

    Also returns how many cores, on average, were busy meanwhile with something else.
    """
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Side] = {}
    for name in SIDES:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, sizes), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies ends the wait for it
        sides[name] = Side(process, ours)
    for side in sides.values():
        side.pipe.recv()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, sizes.vocabulary, [sizes.batch, sizes.context + 1], dtype=np.int32)
    bar = tqdm(range(-warmup, steps), desc="rounds", unit="round", dynamic_ncols=True)
    for number in bar:
        if number == 0:
            start, busy = time.perf_counter(), busy_seconds()
        for side in list(sides.values())[:: 1 if number % 2 else -1]:
            side.pipe.send(tokens)
            wall, cpu, loss = side.pipe.recv()
            side.losses.append(loss)
            if number >= 0:
                side.wall.append(wall)
                side.cpu.append(cpu)
        bar.set_postfix_str(", ".join(f"{name} {side.wall[-1]:.3f} s" for name, side in sides.items() if side.wall))
    elsewhere = busy_seconds() - busy - sum(sum(side.cpu) for side in sides.values())
    others = max(0.0, elsewhere / (time.perf_counter() - start))
    for side in sides.values():
        side.pipe.send(None)
        side.peak_bytes = side.pipe.recv()
        side.process.join()
    return sides, others


def report(sizes: Sizes, sides: dict[str, Side]) -> str:
    """The tables, in Markdown."""
    ours, theirs, sgemm = (sides[name] for name in SIDES)
    rates = [SGEMM_REPEATS * 2 * SGEMM_SIZE**3 / wall / 1e9 for wall in sgemm.wall]
    rate = statistics.median(rates)
    floor = sizes.flops / rate / 1e9
    rows = [
        ["s/step, median", *(f"{statistics.median(side.wall):.3f}" for side in (ours, theirs))],
        ["s/step, least", *(f"{min(side.wall):.3f}" for side in (ours, theirs))],
        ["CPU s/step, median", *(f"{statistics.median(side.cpu):.3f}" for side in (ours, theirs))],
        ["tokens/s", *(f"{sizes.tokens / statistics.median(side.wall):,.0f}" for side in (ours, theirs))],
        ["times the floor", *(f"{statistics.median(side.wall) / floor:.2f}" for side in (ours, theirs))],
        ["peak memory, GB", *(f"{side.peak_bytes / 1e9:.2f}" for side in (ours, theirs))],
        ["loss, first -> last step", *(f"{side.losses[0]:.3f} -> {side.losses[-1]:.3f}" for side in (ours, theirs))],
    ]
    lines = ["| | mesh-tensorflow | pytorch |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows), ""]
    for what, pairs in (("time", (ours.wall, theirs.wall)), ("CPU time", (ours.cpu, theirs.cpu))):
        ratios = [mine / other for mine, other in zip(*pairs, strict=True)]
        lines.append(
            f"{what}, mesh-tensorflow / pytorch: median of {len(ratios)} pairs {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    lines.append(f"sgemm: median {rate:.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f})")
    lines.append(f"floor: {sizes.flops / 1e9:,.0f} GFLOP in matrix products a step, {floor:.3f} s at that rate")
    return "\n".join(lines)


def describe(sizes: Sizes, others: float) -> str:
    """What was measured and where."""
    packages = ("tensorflow-cpu", "mesh-tensorflow", "torch", "transformers")
    return "\n".join(
        [
            f"{sizes}: {sizes.tokens:,} tokens a step, float32",
            f"{describe_machine(others)}; " + ", ".join(f"{package} {version(package)}" for package in packages),
        ]
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description="Measure a training step here and in PyTorch, in turn."
    )
    parser.add_argument("--small", action="store_true", help="sizes and steps for a quick look, unless given")
    for name, (default, small) in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"default {default}, with --small {small}")
    args = parser.parse_args(argv)
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.small])
    return args


# flag -> (default, default with --small)
DEFAULTS = {
    "layers": (8, 2),
    "width": (512, 64),
    "heads": (8, 4),
    "context": (256, 64),
    "batch": (8, 4),
    "vocabulary": (50304, 1024),
    "steps": (12, 5),
    "warmup": (3, 2),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    args = parse_arguments(argv)
    sizes = Sizes(args.layers, args.width, args.heads, args.context, args.batch, args.vocabulary)
    sides, others = measure(sizes, args.steps, args.warmup)
    print(describe(sizes, others), report(sizes, sides), sep="\n\n")


if __name__ == "__main__":
    main()
