"""TensorFlow operations as what they cost: bytes, additions and multiplications, communication."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import tensorflow.compat.v1 as tf

# Kinds of parts that stand for what comes from outside the step, beside TensorFlow's own types of operations.
FEATURE, VARIABLE, CONSTANT, RANGE = "Feature", "Variable", "Constant", "Range"


@dataclass(frozen=True)
class Collective:
    """A communication of the processors that differ along `axes`: "all-reduce", "all-gather", "all-to-all", "shift"."""

    kind: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where an input of a part comes from.

    Attributes:
      of: "part" for an earlier part of the same operation, else the operation's input: "raw", as it stands in the
        slice, or "summed" over the mesh where it is a sum that still has to travel.
      index: number of the part or of the input.
      output: which output of the part; -1 for an order without data.
    """

    of: Literal["part", "raw", "summed"]
    index: int
    output: int = 0


@dataclass(frozen=True)
class Part:
    """One TensorFlow operation on one slice.

    Attributes:
      kind: TensorFlow's type of the operation, or FEATURE, VARIABLE, CONSTANT or RANGE.
      like: two parts of one kind that are `like` each other give the same outputs for the same inputs; None is like no
        other.
      inputs: where its inputs come from.
      shapes: of the outputs, without splits.
      sizes: of the outputs, in bytes.
      input_shapes: shapes of the inputs.
      flops: additions and multiplications.
      collective: what is communicated, if anything; it moves the output's bytes.
    """

    kind: str
    like: str | None
    inputs: tuple[Source, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    flops: int
    collective: Collective | None = None


def stand_in(kind: str, dtype: tf.DType, shape: Sequence[int]) -> tf.Tensor:
    return tf.placeholder(dtype, shape, name=kind)


def source_of(sources: Mapping[str, Source], tensor: tf.Tensor) -> Source:
    source = sources[tensor.op.name]
    return Source("part", source.index, tensor.value_index) if source.of == "part" else source


def parts_of(
    graph: tf.Graph, wanted: Sequence[tf.Tensor], given: Mapping[str, Source], noted: Mapping[str, Collective]
) -> tuple[list[Part], dict[str, Source]]:
    """The operations of `graph` that `wanted` needs, in order, and {name of each: its source}."""
    needed: set[str] = set()
    stack = [tensor.op for tensor in wanted]
    while stack:
        operation = stack.pop()
        if operation.name not in needed:
            needed.add(operation.name)
            stack += [x.op for x in operation.inputs] + list(operation.control_inputs)
    parts: list[Part] = []
    sources: dict[str, Source] = {}
    for operation in graph.get_operations():
        if operation.name in given:
            sources[operation.name] = given[operation.name]
        elif operation.name in needed:
            inputs = [source_of(sources, x) for x in operation.inputs]
            inputs += [Source(s.of, s.index, -1) for x in operation.control_inputs for s in [sources[x.name]]]
            sources[operation.name] = Source("part", len(parts))
            parts.append(_part(operation, inputs, noted.get(operation.name)))
    return parts, sources


def _part(operation: tf.Operation, inputs: Sequence[Source], collective: Collective | None) -> Part:
    kind, like = operation.type, str(sorted((k, str(v)) for k, v in operation.node_def.attr.items()))
    if kind == "Placeholder":
        kind, shape = operation.name.rsplit("/", 1)[-1].split("_")[0], _shape(operation.outputs[0])
        return Part(kind, str(shape) if kind == RANGE else None, (), (shape,), (_size(operation.outputs[0]),), (), 0)
    return Part(
        kind,
        like,
        tuple(inputs),
        tuple(_shape(x) for x in operation.outputs),
        tuple(_size(x) for x in operation.outputs),
        tuple(_shape(x) for x in operation.inputs),
        0 if collective else _flops(operation),
        collective,
    )


def _shape(tensor: tf.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape.as_list()) if tensor.shape.is_fully_defined() else ()


def _size(tensor: tf.Tensor) -> int:
    """Bytes; 0 where only running tells, as with the indices that a condition picks."""
    return int(tensor.shape.num_elements() or 0) * tensor.dtype.size


def _flops(operation: tf.Operation) -> int:
    """Additions and multiplications of a TensorFlow operation: two for each term of a product, else one an entry."""
    entries = sum(int(x.shape.num_elements() or 0) for x in operation.outputs)
    if operation.type == "Einsum":
        equation = operation.get_attr("equation").decode().split("->")[0]
        sizes = {
            label: size
            for labels, x in zip(equation.split(","), operation.inputs, strict=True)
            for label, size in zip(labels, x.shape.as_list(), strict=True)
        }
        return 2 * int(math.prod(sizes.values()))
    if operation.type in _PRODUCTS:
        transposed = operation.get_attr(_PRODUCTS[operation.type])
        return 2 * entries * int(operation.inputs[0].shape[-2 if transposed else -1])
    return 0 if operation.type in _FREE else entries


_PRODUCTS = {"MatMul": "transpose_a", "BatchMatMul": "adj_x", "BatchMatMulV2": "adj_x"}
# Operations that move or rename and compute nothing.
_FREE = {
    *("Const", "Identity", "Reshape", "ExpandDims", "Squeeze", "StopGradient", "PreventGradient", "Snapshot", "Shape"),
    *("Transpose", "Fill", "ZerosLike", "Concat", "ConcatV2", "Split", "SplitV", "Slice", "StridedSlice", "Pack"),
    *("Unpack", "Pad", "Gather", "GatherV2", "NoOp"),
}
