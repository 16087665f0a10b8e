"""A real training step on CPU devices, watched: what its variables take, what it communicates and what it allocates."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf
from mesh_tensorflow.placement_mesh_impl import PlacementMeshImpl

from benchmarks.measuring import device_peaks, traced_devices
from config import ModelConfig
from mesh import mtf
from mesh.layout import parse
from model_fns import Run, train_spec
from sample import Sampling
from tests.tiny import cpu_devices, tiny_config, training_features
from training.hooks import StopOnSignal

STEPS = 9


@dataclass(frozen=True)
class Step:
    """One step's account.

    Attributes:
      parameters, slots: bytes of the first device's slices.
      traffic: {(kind, axes): bytes of what arrives on each device}.
      peaks: for each device, the most bytes that were allocated at once: the median of several steps, since it is
        partly chance what TensorFlow's threads do first.
    """

    parameters: int
    slots: int
    traffic: dict[tuple[str, tuple[int, ...]], int]
    peaks: list[float]


def run_step(config: ModelConfig, mesh_shape: str, layout: str) -> Step:
    """Run training steps of `config` on CPU devices."""
    parsed = parse(mesh_shape, layout, 1)
    devices = cpu_devices(parsed.size)
    run = Run(config, parsed, devices, 1, 0, Sampling(), StopOnSignal())
    with tf.Graph().as_default() as graph:
        with recorded_collectives() as traffic:
            spec = train_spec(run, training_features(config), {"batch_size": config.train_batch_size})
        restore = next(hook for hook in spec.training_hooks if isinstance(hook, mtf.MtfRestoreHook))
        restore.begin()
        with tf.Session(config=devices.session_config()) as session:
            session.run(tf.global_variables_initializer())
            restore.after_create_session(session, None)
            found = []
            for _ in range(STEPS):
                found.append(device_peaks(traced_devices(partial(session.run, [spec.loss, spec.train_op]))))
        parameters, slots = variable_bytes(graph, "_slice_0" if parsed.size > 1 else "")
    return Step(parameters, slots, dict(traffic), [statistics.median(peaks) for peaks in zip(*found, strict=True)])


def variable_bytes(graph: tf.Graph, suffix: str) -> tuple[int, int]:
    """Bytes of the model's variables whose names end in `suffix`: (parameters, optimizer slots)."""
    sizes = [0, 0]
    for operation in graph.get_operations():
        name = operation.name
        if operation.type == "VarHandleOp" and name.startswith("gpt2/") and name.endswith(suffix):
            shape, dtype = tf.TensorShape(operation.get_attr("shape")), operation.get_attr("dtype")
            sizes["/adam_" in name or "_slot_" in name] += shape.num_elements() * dtype.size
    return sizes[0], sizes[1]


@contextlib.contextmanager
def recorded_collectives() -> Iterator[Counter[tuple[str, tuple[int, ...]]]]:
    """Note what is asked of the mesh while graphs are lowered inside."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    kinds = {"allreduce": "all-reduce", "allconcat": "all-gather", "alltoall": "all-to-all", "receive": "shift"}

    def watched(kind: str, method: Any) -> Any:
        def call(self: PlacementMeshImpl, x: Any, axes: Any, *others: Any, **named: Any) -> Any:
            result = method(self, x, axes, *others, **named)
            axes = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
            arrived = result.to_laid_out_tensor().tensor_list[0]
            if any(self.shape[axis].size > 1 for axis in axes):
                found[kind, axes] += arrived.shape.num_elements() * arrived.dtype.size
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, kind in kinds.items():
            patch.setattr(PlacementMeshImpl, name, watched(kind, getattr(PlacementMeshImpl, name)))
        yield found


def plan_config(folder: Path, **changes: Any) -> ModelConfig:
    """A config whose activations are larger than what TensorFlow allocates beside them."""
    values = {"n_embd": 32, "n_ctx": 64, "n_vocab": 256, "train_batch_size": 8, "model_path": str(folder / "model")}
    return tiny_config(folder, **(values | changes))
