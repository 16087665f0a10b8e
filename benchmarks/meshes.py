"""Plans of one model on several meshes beside real steps of it: python -m benchmarks.meshes (--quick for a look).

Every mesh is made of logical CPU devices of this machine. A step is planned as --plan does, and then some steps are
watched: what a device holds at most, of what the step allocates, is TensorFlow's own account, and the median of all
devices and steps is taken, as it is partly chance what threads do first. docs/meshes.md has the table.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np
from tqdm import tqdm

from benchmarks.measuring import device_peaks, traced_devices
from benchmarks.train_step import Sizes, mtf_config, mtf_step

SIZES = Sizes(layers=4, width=256, heads=8, context=256, batch=16, vocabulary=8192)
QUICK_SIZES = Sizes(layers=1, width=64, heads=4, context=64, batch=8, vocabulary=256)
STEPS = 3  # that are watched
BY_HEADS = "heads:{0},intermediate_expanded:{0},vocab:{0}"
MESHES = (
    ("x:1", ""),
    ("x:4", "batch:x"),
    ("x:4", BY_HEADS.format("x")),
    ("x:2,y:2", f"batch:x,{BY_HEADS.format('y')}"),
    ("x:2,y:2", "batch:x,embd:y,memory_length:y"),
)
HEAD = (
    "| mesh | layout | weights and slots, MB | peak planned, MB | peak of the real step, MB | to send, MB | loss |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def row(sizes: Sizes, mesh_shape: str, layout: str) -> str:
    """Plan a step and take it."""
    keys = {"mesh_shape": mesh_shape, "layout": layout}
    step = mtf_step(sizes, **keys)
    from mesh.layout import parse
    from planning.training_plan import plan_training

    plan = plan_training(mtf_config(sizes, **keys), parse(mesh_shape, layout, 1))
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, [sizes.batch, sizes.context + 1], dtype=np.int32)
    loss, peaks = step(tokens), []
    for _ in range(STEPS):
        peaks += device_peaks(traced_devices(partial(step, tokens)))
    real = statistics.median(peaks)
    numbers = (plan.parameters + plan.slots, plan.peak, real, plan.sent)
    cells = [mesh_shape, layout or "nothing split", *(f"{number / 1e6:.1f}" for number in numbers), f"{loss:.5f}"]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.meshes", description="Plan a training step on several meshes, and take it."
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a quick look")
    sizes = QUICK_SIZES if parser.parse_args(argv).quick else SIZES
    rows = [row(sizes, *mesh) for mesh in tqdm(MESHES, desc="meshes", unit="mesh")]
    print(f"{sizes}: {sizes.tokens:,} tokens a step, float32, AdamW; for each device", end="\n\n")
    print("\n".join([HEAD, *rows]))


if __name__ == "__main__":
    main()
