"""The TensorFlow operations of one processor in a step, and the memory they hold while they run.

TensorFlow's executor starts an operation as soon as its inputs are there, so that what needs the weights alone is
computed at the start and waits. A tensor is freed once all its readers are done; a reader of the same size that is the
last one takes its place. Both are followed here, operation by operation.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import tensorflow.compat.v1 as tf
from mesh_tensorflow import ops as mtf_ops

from mesh import mtf
from mesh.one_slice import SliceLowering
from mesh.parts import CONSTANT, FEATURE, RANGE, VARIABLE, Collective, Part, Source

Value = tuple[int, int]  # number of a node, and of its output

# TensorFlow folds what depends on constants alone when it builds the graph, unless the result is larger (bytes).
_LARGEST_FOLDED = 10 * 1024**2
# Operations whose outputs are their first inputs' memory, one by one.
_ALIASES = {"Identity", "IdentityN", "Reshape", "ExpandDims", "Squeeze", "StopGradient", "PreventGradient"}
# Operations that write over an input of the same shape which nobody else will read.
_IN_PLACE = {
    *("Add", "AddV2", "AddN", "Sub", "Mul", "Div", "RealDiv", "Maximum", "Minimum", "FloorMod", "FloorDiv"),
    *("Neg", "Abs", "Sign", "Exp", "Log", "Log1p", "Pow", "Sqrt", "Rsqrt", "Square", "Reciprocal", "Inv", "Sin", "Cos"),
    *("Tanh", "Sigmoid", "Softplus", "Relu", "LeakyRelu", "Elu", "Selu", "Softmax", "Cast", "SelectV2", "Snapshot"),
    *("TanhGrad", "SigmoidGrad", "RsqrtGrad", "SqrtGrad", "ReluGrad", "ReciprocalGrad", "SoftplusGrad"),
    *("LogicalAnd", "LogicalOr", "LogicalNot", "SparseSoftmaxCrossEntropyWithLogits"),
}


@dataclass(frozen=True)
class Node:
    """A part in its place: `name` is the operation's, `inputs` are nodes' outputs, a step runs it `runs` times."""

    name: str
    part: Part
    inputs: tuple[Value, ...]
    runs: int
    constant: bool

    @property
    def resident(self) -> bool:
        """Whether it stands for what is there before the step."""
        return self.constant or self.part.kind in (VARIABLE, FEATURE)


@dataclass(frozen=True)
class Peak:
    """The largest number of `bytes` that tensors hold at once, and what `holds` them then: {node: bytes}."""

    bytes: int
    holds: dict[int, int]


@dataclass
class Dataflow:
    """Built from a Mesh-TensorFlow graph by `add_all`; `keep` then says what a step is run for."""

    lowering: SliceLowering
    nodes: list[Node] = field(default_factory=list)
    targets: set[int] = field(default_factory=set)
    _values: dict[mtf.Tensor, Value] = field(default_factory=dict)
    _to_sum: dict[mtf.Tensor, tuple[int, ...]] = field(default_factory=dict)
    _summed: dict[mtf.Tensor, Value] = field(default_factory=dict)
    _alike: dict[object, int] = field(default_factory=dict)
    _accumulators: set[mtf.Tensor] = field(default_factory=set)
    _runs: int = 1

    def add_all(self, operations: Iterable[mtf.Operation]) -> None:
        """Add operations in their order; those of a loop once, with the number of its iterations."""
        for operation in operations:
            if isinstance(operation, mtf_ops.WhileLoopOperation):
                self._add_loop(operation)
            else:
                self._add(operation)

    def keep(self, tensors: Iterable[mtf.Tensor]) -> None:
        """Make the step compute `tensors`, beside what it assigns to variables."""
        self.targets |= {self.whole(tensor)[0] for tensor in tensors}

    def whole(self, tensor: mtf.Tensor) -> Value:
        """Where `tensor` stands, summed over the mesh if it was still to be."""
        axes = self._to_sum.get(tensor, ())
        if not axes:
            return self._values[tensor]
        if tensor not in self._summed:
            value = self._values[tensor]
            shape = self.nodes[value[0]].part.shapes[value[1]]
            travels_as = self.lowering.mesh_impl.summed_as(tensor.dtype, axes)
            if travels_as != tensor.dtype:
                value = self._add_simple("Cast", tensor, shape, travels_as, value)
            value = self._add_simple("AllReduce", tensor, shape, travels_as, value, Collective("all-reduce", axes))
            if travels_as != tensor.dtype:
                value = self._add_simple("Cast", tensor, shape, tensor.dtype, value)
            self._summed[tensor] = value
        return self._summed[tensor]

    def _add_simple(
        self,
        kind: str,
        tensor: mtf.Tensor,
        shape: tuple[int, ...],
        dtype: tf.DType,
        value: Value,
        collective: Collective | None = None,
    ) -> Value:
        """A part with one input and an output of the same shape."""
        part = Part(kind, None, (), (shape,), (math.prod(shape) * dtype.size,), (shape,), 0, collective)
        return self._add_node(tensor.name, part, (value,)), 0

    def holders(self, tensor: mtf.Tensor) -> set[int]:
        """The nodes whose memory is `tensor`, or what it is summed up in."""
        node, _ = self._values[tensor]
        sums = {number for number, _ in self.nodes[node].inputs} if tensor in self._accumulators else set()
        return {node, self.whole(tensor)[0], *sums}

    def _add(self, operation: mtf.Operation) -> None:
        lowered = self.lowering.lower(operation, [self._to_sum.get(x, ()) for x in operation.inputs])
        added: list[int] = []

        def value(source: Source) -> Value:
            if source.of == "part":
                return added[source.index], source.output
            tensor = operation.inputs[source.index]
            node, output = self.whole(tensor) if source.of == "summed" else self._values[tensor]
            return node, -1 if source.output < 0 else output

        for part in lowered.parts:
            added.append(self._add_node(operation.name, part, tuple(value(source) for source in part.inputs)))
        for tensor, (source, axes) in zip(operation.outputs, lowered.outputs, strict=True):
            self._values[tensor] = value(source)
            if axes:
                self._to_sum[tensor] = axes
        self.targets |= {value(source)[0] for source in lowered.effects}

    def _add_node(self, name: str, part: Part, inputs: tuple[Value, ...]) -> int:
        """The number of the node; TensorFlow computes what is alike only once."""
        key = (part.kind, part.like, part.collective, self._runs, inputs)
        if part.like is not None and key in self._alike:
            return self._alike[key]
        constant = part.kind in (CONSTANT, RANGE, "Const") or (
            bool(inputs)
            and part.collective is None
            and all(self.nodes[node].constant for node, _ in inputs)
            and sum(part.sizes) <= _LARGEST_FOLDED
        )
        self.nodes.append(Node(name, part, inputs, self._runs, constant))
        self._alike[key] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _add_loop(self, loop: mtf_ops.WhileLoopOperation) -> None:
        """One iteration of `loop`; sums over the iterations stand beside it, all of them from its start."""
        for inside, outside in zip(loop._body_inputs, loop.inputs, strict=True):
            self._values[inside] = self.whole(outside)
        outer, self._runs = self._runs, self._runs * _iterations(loop)
        self.add_all(loop._body_ops)
        self._runs = outer
        for index, (output, inside) in enumerate(zip(loop.outputs, loop._body_outputs, strict=True)):
            if index < len(loop.inputs):
                self._values[output] = self.whole(inside)
                continue
            # what is summed up over the iterations still travels once, after the last
            self._values[output] = self._accumulated(inside.name, self._values[inside])
            self._accumulators.add(output)
            if inside in self._to_sum:
                self._to_sum[output] = self._to_sum[inside]

    def _accumulated(self, name: str, value: Value) -> Value:
        part = self.nodes[value[0]].part
        shapes, sizes = (part.shapes[value[1]],), (part.sizes[value[1]],)
        zeros = self._add_node(name, Part("Fill", None, (), shapes, sizes, (), 0), ())
        add = Part("AddV2", None, (), shapes, sizes, (shapes[0], shapes[0]), 0)
        return self._add_node(name, add, ((zeros, 0), value)), 0

    def needed(self) -> Iterator[tuple[int, Node]]:
        """(number, node) of all that a step runs, in order."""
        wanted, stack = set(), list(self.targets)
        while stack:
            node = stack.pop()
            if node not in wanted:
                wanted.add(node)
                stack += [number for number, _ in self.nodes[node].inputs]
        return ((number, self.nodes[number]) for number in sorted(wanted))


def _iterations(loop: mtf_ops.WhileLoopOperation) -> int:
    """How often a loop that counts up to a constant runs."""
    limits = [op for op in loop._cond_ops if isinstance(op, mtf_ops.ImportOperation)]
    assert len(limits) == 1, f"{loop.name} does not count up to a constant"
    return int(tf.get_static_value(limits[0]._tf_tensor))


class _Memory:
    """Buffers, their sizes and how many reads each still awaits."""

    def __init__(self, nodes: dict[int, Node]):
        self.nodes = nodes
        self.buffers: dict[Value, int] = {}  # what stands in which buffer; resident tensors in none
        self.sizes: list[int] = []
        self.owners: list[int] = []
        self.reads: list[int] = []
        self.live = 0
        self.peak = 0
        self._readers = Counter(value for node in nodes.values() if not node.resident for value in node.inputs)

    def begin(self, number: int) -> None:
        """Make room for the outputs of a node."""
        node = self.nodes[number]
        inputs = self._inputs(number)
        for output, size in enumerate(node.part.sizes):
            buffer = self._place(number, node, output, size, inputs)
            if buffer is not None:
                self.buffers[number, output] = buffer
                self.reads[buffer] += self._readers[number, output]
        self.peak = max(self.peak, self.live + self._sent(number))

    def end(self, number: int) -> None:
        """Give back what the node was the last to read, and those of its outputs that nobody reads."""
        for buffer in self._inputs(number):
            self.reads[buffer] -= 1
            self._free(buffer)
        for output in range(len(self.nodes[number].part.sizes)):
            if (number, output) in self.buffers:
                self._free(self.buffers[number, output])

    def _inputs(self, number: int) -> list[int]:
        return [buffer for value in self.nodes[number].inputs if (buffer := self.buffers.get(value)) is not None]

    def _sent(self, number: int) -> int:
        """Bytes: a processor that communicates holds what it sends and what it receives beside the result."""
        part = self.nodes[number].part
        return part.sizes[0] if part.collective else 0

    def _place(self, number: int, node: Node, output: int, size: int, inputs: list[int]) -> int | None:
        part = node.part
        if part.kind in _ALIASES and part.collective is None:
            return self.buffers.get(node.inputs[output])
        if not size:
            return None
        if part.kind in _IN_PLACE and part.collective is None:
            for value, shape in zip(node.inputs, part.input_shapes, strict=False):
                buffer = self.buffers.get(value)
                last = buffer is not None and self.reads[buffer] == inputs.count(buffer)
                if buffer is not None and last and shape == part.shapes[output] and self.sizes[buffer] == size:
                    self.owners[buffer] = number
                    return buffer
        self.sizes.append(size)
        self.owners.append(number)
        self.reads.append(0)
        self.live += size
        return len(self.sizes) - 1

    def _free(self, buffer: int) -> None:
        if self.reads[buffer] == 0:
            self.live -= self.sizes[buffer]
            self.reads[buffer] = -1

    def holds(self, running: int) -> dict[int, int]:
        """{node: bytes} of what is live while a node runs."""
        held: dict[int, int] = defaultdict(int)
        for owner, size, reads in zip(self.owners, self.sizes, self.reads, strict=True):
            if reads >= 0:
                held[owner] += size
        held[running] += self._sent(running)
        return dict(held)


def peak_memory(nodes: dict[int, Node], eager: bool = True) -> Peak:
    """Memory of a step that runs `nodes`: the moment at which its tensors hold most.

    Where `eager`, a node runs as soon as its inputs are there, as in TensorFlow's executor; else in the order of the
    graph, as a compiler may arrange it.
    """
    order = list(_as_inputs_arrive(nodes) if eager else (n for n, node in nodes.items() if not node.resident))
    memory, moment = _Memory(nodes), 0
    for index, number in enumerate(order):
        before = memory.peak
        memory.begin(number)
        memory.end(number)
        if memory.peak > before:
            moment = index
    peak, memory = memory.peak, _Memory(nodes)
    for number in order[:moment]:
        memory.begin(number)
        memory.end(number)
    memory.begin(order[moment])
    return Peak(peak, memory.holds(order[moment]))


def _as_inputs_arrive(nodes: dict[int, Node]) -> Iterator[int]:
    readers: dict[int, list[int]] = defaultdict(list)
    missing: dict[int, int] = {}
    for number, node in nodes.items():
        if not node.resident:
            sources = {source for source, _ in node.inputs if not nodes[source].resident}
            missing[number] = len(sources)
            for source in sources:
                readers[source].append(number)
    ready = deque(number for number, count in missing.items() if count == 0)
    while ready:
        number = ready.popleft()
        yield number
        for reader in readers[number]:
            missing[reader] -= 1
            if missing[reader] == 0:
                ready.append(reader)


def total_flops(nodes: Sequence[Node]) -> int:
    """Additions and multiplications of a step."""
    return sum(node.part.flops * node.runs for node in nodes if not node.constant)


def traffic(nodes: Sequence[Node]) -> dict[Collective, int]:
    """{collective: bytes of the tensors that a processor gets by it in a step}."""
    found: dict[Collective, int] = defaultdict(int)
    for node in nodes:
        if node.part.collective is not None:
            found[node.part.collective] += sum(node.part.sizes) * node.runs
    return dict(found)
