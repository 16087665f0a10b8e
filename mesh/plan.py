"""What a training step costs each device, read off its Mesh-TensorFlow graph: memory, communication and arithmetic.

Nothing is computed and no memory is taken for it. This module knows graphs and layouts, not the model.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dataflow import Dataflow, Node, Peak, peak_memory, total_flops, traffic
from mesh.layout import MeshLayout
from mesh.one_slice import OneCore, OneSlice, SliceLowering
from mesh.parts import Collective


@dataclass(frozen=True)
class TrainingGraph:
    """A Mesh-TensorFlow graph of a training step.

    Attributes:
      graph: with the updates of the variables in it.
      gradients: one for each trainable variable, before they are clipped.
      reported: what a step returns, such as losses.
    """

    graph: mtf.Graph
    gradients: Sequence[mtf.Tensor]
    reported: Sequence[mtf.Tensor]


@dataclass(frozen=True)
class Traffic:
    """What a device gets by one kind of collective in a step.

    Attributes:
      kind: "all-reduce", "all-gather", "all-to-all" or "shift".
      axes: names of the mesh axes along which the processors differ.
      ways: how many these are.
      bytes: of the tensors that arrive.
    """

    kind: str
    axes: tuple[str, ...]
    ways: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, if the processors stand in a ring: an all-reduce goes around twice."""
        rounds = {"all-reduce": 2.0, "shift": self.ways / (self.ways - 1)}.get(self.kind, 1.0)
        return rounds * self.bytes * (self.ways - 1) / self.ways


@dataclass(frozen=True)
class Weight:
    """A trainable variable as it lies on the mesh.

    Attributes:
      name, shape: of the whole variable, `shape` as {dimension: size}.
      bytes: of the slice on each device.
      copies: how many devices hold the same slice.
    """

    name: str
    shape: Mapping[str, int]
    bytes: int
    copies: int


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one device, and all devices are alike.

    Attributes:
      weights: every trainable variable.
      slots: bytes of the optimizer's variables.
      gradients: bytes of the gradients of all weights.
      peak: bytes of everything that a step makes, at the moment when it is most.
      gradients_at_peak: how much of that are gradients of weights.
      largest: what is largest at that moment: (operation, how many, bytes of all of them).
      flops: additions and multiplications of a step.
      traffic: what is communicated in a step.
    """

    weights: tuple[Weight, ...]
    slots: int
    gradients: int
    peak: int
    gradients_at_peak: int
    largest: tuple[tuple[str, int, int], ...]
    flops: int
    traffic: tuple[Traffic, ...]

    @property
    def parameters(self) -> int:
        """Bytes of the weights."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def activations(self) -> int:
        """Bytes at the peak of what is neither kept from step to step nor a gradient of a weight."""
        return self.peak - self.gradients_at_peak

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(traffic.sent for traffic in self.traffic)

    @property
    def total(self) -> int:
        """Bytes at the peak with what is kept from step to step."""
        return self.parameters + self.slots + self.peak


@contextmanager
def variables_described() -> Iterator[None]:
    """Graphs that are built inside make no TensorFlow variables: they can be looked at, but not run."""

    def stand_in(getter: Any, name: str, **settings: Any) -> Any:
        return SimpleNamespace(name=f"{name}:0", device="")

    with tf.Graph().as_default(), tf.variable_scope("", custom_getter=stand_in):
        yield


def make_plan(step: TrainingGraph, layout: MeshLayout, on_tpu: bool = False) -> Plan:
    """The costs of `step` under `layout`. On a TPU some operations are others, and a compiler arranges their order.

    Raises UserError where the layout does not allow an operation.
    """
    mesh_impl = (OneCore if on_tpu else OneSlice)(layout.mesh_shape, layout.layout)
    dataflow = Dataflow(SliceLowering(mesh_impl))
    dataflow.add_all(step.graph.operations)
    dataflow.keep(step.reported)
    nodes = dict(dataflow.needed())
    peak = peak_memory(nodes, eager=not on_tpu)
    gradients = {node for gradient in step.gradients for node in dataflow.holders(gradient)}
    slots = [variable for variable in step.graph.all_variables if not variable.trainable]
    return Plan(
        weights=tuple(_weight(variable, mesh_impl, layout) for variable in step.graph.trainable_variables),
        slots=sum(_slice_bytes(variable, mesh_impl) for variable in slots),
        gradients=sum(mesh_impl.slice_size(gradient.shape) * gradient.dtype.size for gradient in step.gradients),
        peak=peak.bytes,
        gradients_at_peak=sum(size for node, size in peak.holds.items() if node in gradients),
        largest=tuple(_grouped(peak, nodes)),
        flops=total_flops(list(nodes.values())),
        traffic=tuple(_named(traffic(list(nodes.values())), layout)),
    )


def _slice_bytes(variable: mtf.Variable, mesh_impl: OneSlice) -> int:
    return int(mesh_impl.slice_size(variable.shape) * variable.slice_dtype.size)


def _weight(variable: mtf.Variable, mesh_impl: OneSlice, layout: MeshLayout) -> Weight:
    split = {layout.rules[dim.name] for dim in variable.shape.dims if dim.name in layout.rules}
    copies = layout.size // math.prod(layout.axes[axis] for axis in split)
    shape = {dim.name: dim.size for dim in variable.shape.dims}
    return Weight(variable.name, shape, _slice_bytes(variable, mesh_impl), copies)


def _grouped(peak: Peak, nodes: Mapping[int, Node]) -> list[tuple[str, int, int]]:
    """What holds the memory at the peak, the operations of all layers together, the largest first."""
    groups: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for number, size in peak.holds.items():
        name = re.sub(r"(?<!norm)(?<!rezero)_\d+(?=/|$|:)", "", re.sub(r"\bh\d+/", "h*/", nodes[number].name))
        count, total = groups[name]
        groups[name] = count + 1, total + size
    return sorted(((name, *found) for name, found in groups.items()), key=lambda group: -group[2])


def _named(sizes: Mapping[Collective, int], layout: MeshLayout) -> list[Traffic]:
    """Collectives of `sizes` {collective: bytes}, with the names of their axes."""
    names = list(layout.axes)
    found = []
    for collective, size in sizes.items():
        axes = tuple(names[axis] for axis in collective.axes)
        found.append(Traffic(collective.kind, axes, math.prod(layout.axes[axis] for axis in axes), size))
    return sorted(found, key=lambda t: (t.axes, t.kind))
