"""A TPU's cores on the CPU: one graph for each core, as SimdMeshImpl builds it, with the collectives emulated.

Mesh-TensorFlow's own SIMD code runs; only the four operations that need a TPU are replaced, by TensorFlow's collectives
between logical CPU devices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mesh_tensorflow.simd_mesh_impl as simd
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.ops import collective_ops, control_flow_util

from mesh import mtf
from mesh.layout import MeshLayout
from tests.training_steps import Step, load, without_rewriting


class Collectives:
    """What SimdMeshImpl asks of tpu_ops, for one core."""

    def __init__(self, core: int, size: int, group_keys: dict[tuple[int, ...], int]) -> None:
        self._core, self._size, self._group_keys = core, size, group_keys
        self._calls = 0  # every core makes the same calls in the same order

    def _rendezvous(self, groups: Sequence[Sequence[int]]) -> tuple[list[int], dict[str, int]]:
        group = next(list(group) for group in groups if self._core in group)
        self._calls += 1
        key = self._group_keys.setdefault(tuple(group), len(self._group_keys) + 1)
        # an instance belongs to one group: calls of several groups at the same place differ in it
        instance = self._calls * self._size + min(group)
        return group, {"group_size": len(group), "group_key": key, "instance_key": instance}

    def _gather(self, x: tf.Tensor, groups: Sequence[Sequence[int]]) -> tuple[list[int], tf.Tensor]:
        """(group, [group's size, *x]), in the group's order."""
        group, where = self._rendezvous(groups)
        # a sum of slots, each filled by its owner: gathering itself orders by device, not by group
        slots = tf.one_hot(group.index(self._core), len(group), dtype=tf.float32)
        shape = [len(group)] + [1] * x.shape.ndims
        filled = tf.reshape(slots, shape) * tf.cast(x, tf.float32)[tf.newaxis]
        summed = collective_ops.all_reduce(filled, merge_op="Add", final_op="Id", **where)
        return group, tf.ensure_shape(tf.cast(summed, x.dtype), [len(group), *x.shape])

    def cross_replica_sum(self, x: tf.Tensor, group_assignment: list[list[int]]) -> tf.Tensor:
        _, where = self._rendezvous(group_assignment)
        total = collective_ops.all_reduce(tf.cast(x, tf.float32), merge_op="Add", final_op="Id", **where)
        return tf.ensure_shape(tf.cast(total, x.dtype), x.shape)

    def all_to_all(
        self, x: tf.Tensor, concat_dimension: int, split_dimension: int, split_count: int, group_assignment: Any
    ) -> tf.Tensor:
        group, gathered = self._gather(x, group_assignment)
        mine = group.index(self._core)
        parts = [tf.split(gathered[i], split_count, axis=split_dimension)[mine] for i in range(len(group))]
        return tf.concat(parts, axis=concat_dimension)

    def collective_permute(self, x: tf.Tensor, source_target_pairs: list[list[int]]) -> tf.Tensor:
        _, gathered = self._gather(x, [list(range(self._size))])
        sources = [source for source, target in source_target_pairs if target == self._core]
        # a core without a source takes part in the gathering all the same: the others wait for it
        return gathered[sources[0]] if sources else tf.zeros_like(x) * gathered[0]


class EmulatedCore(simd.SimdMeshImpl):
    """SimdMeshImpl as one core sees it."""

    def __init__(self, layout: MeshLayout, core: int) -> None:
        super().__init__(mtf.convert_to_shape(layout.mesh_shape), mtf.convert_to_layout_rules(layout.layout))
        self._pnum_tensor = tf.constant(core)
        self.core = core

    class LaidOutVariable:
        """This core's slice of a variable, in a variable of its own."""

        def __init__(self, variable: mtf.Variable, mesh_impl: "EmulatedCore") -> None:
            shape = variable.outputs[0].shape
            size = mesh_impl.slice_shape(shape)
            begin = mesh_impl.slice_begin(shape, mesh_impl.core)
            self._variable = variable
            self._slice = tf.Variable(tf.zeros(size, variable.slice_dtype), trainable=False, collections=["slices"])
            part = tf.slice(variable.get_master(), begin, size)
            self.copy_master_to_slices = self._slice.assign(tf.cast(part, variable.slice_dtype))
            self.laid_out_tensor = mesh_impl.LaidOutTensor([tf.identity(self._slice)])

        def assign_to_slices(self, assign_fn: Callable, values: list[tf.Tensor]) -> tf.Operation:
            return assign_fn(self._variable, self._slice, values[0])


@contextmanager
def _emulated(monkeypatch: pytest.MonkeyPatch, core: int, size: int, group_keys: dict) -> Iterator[None]:
    with monkeypatch.context() as patch, tf.device(f"/device:CPU:{core}"):
        patch.setattr(simd, "tpu_ops", Collectives(core, size, group_keys))
        # TensorFlow's first form of a loop makes its name, which no other loop of the graph may have, a part of what
        # collectives inside it meet by: those of several cores would never meet. Its second form calls functions.
        patch.setattr(control_flow_util, "ENABLE_CONTROL_FLOW_V2", True)
        yield


def lower_on_cores(
    monkeypatch: pytest.MonkeyPatch, layout: MeshLayout, mesh: mtf.Mesh, pick: Callable[[mtf.Lowering], Any]
) -> tuple[list[tf.Operation], list[Any]]:
    """Lower the graph of `mesh` for every core: what copies the masters to its slices, and what `pick` takes of it."""
    group_keys: dict[tuple[int, ...], int] = {}
    copies, picked = [], []
    for core in range(layout.size):
        with _emulated(monkeypatch, core, layout.size, group_keys):
            lowering = mtf.Lowering(mesh.graph, {mesh: EmulatedCore(layout, core)}, autostack=False)
            copies.append(lowering.copy_masters_to_slices())
            picked.append(pick(lowering))
    for loop in loops():  # the session would turn them into the first form again
        loop._set_attr("_lower_using_switch_merge", attr_value_pb2.AttrValue(b=False))
    return copies, picked


def loops() -> list[tf.Operation]:
    """The cores' loops in the default graph."""
    return [operation for operation in tf.get_default_graph().get_operations() if operation.type == "While"]


def collectives_in(loop: tf.Operation) -> int:
    """How many collectives one turn of a core's loop runs."""
    body = loop.graph._get_function(loop.get_attr("body").name)
    return sum(node.op == "CollectiveReduce" for node in body.cached_definition.node_def)


def session_on_cores(layout: MeshLayout) -> tf.Session:
    """A session in which no core's waiting for another keeps that one from running."""
    config = tf.ConfigProto(device_count={"CPU": layout.size}, inter_op_parallelism_threads=4 * layout.size)
    return tf.Session(config=without_rewriting(config))


def start(session: tf.Session, weights: dict[str, np.ndarray], copies: list[tf.Operation]) -> None:
    """Load `weights` and give every core its slices."""
    load(weights, session)
    session.run(tf.variables_initializer(tf.get_collection("slices")))
    session.run(copies)


def emulated_losses(
    monkeypatch: pytest.MonkeyPatch,
    layout: MeshLayout,
    build: Callable[[mtf.Mesh], Step],
    weights: dict[str, np.ndarray],
    steps: int,
) -> list[float]:
    """The losses of `steps` steps that `build(mesh)` describes, on emulated cores."""
    with tf.Graph().as_default():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        step = build(mesh)

        def lowered(lowering: mtf.Lowering) -> tuple[tf.Tensor, list[tf.Operation]]:
            return lowering.export_to_tf_tensor(step.loss), [lowering.lowered_operation(op) for op in step.updates]

        copies, runs = lower_on_cores(monkeypatch, layout, mesh, lowered)
        with session_on_cores(layout) as session:
            start(session, weights, copies)
            found = [[loss for loss, _ in session.run(runs)] for _ in range(steps)]
    for on_cores in found:
        np.testing.assert_array_equal(on_cores, on_cores[0])  # every core knows the same loss
    return [float(on_cores[0]) for on_cores in found]
