"""Mesh-TensorFlow's own search for the layout of least memory (auto_mtf), held to layouts that run here.

The search is an integer program over the tensors that are live while each operation runs. A deep model has tens of
thousands of such moments, nearly all of them alike or of less than others: those are left out first.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from mesh_tensorflow.auto_mtf.layout_optimizer import LayoutOptimizer, _local_var_name
from mesh_tensorflow.auto_mtf.memory_estimator import MemoryEstimator

from mesh import mtf
from mesh.layout import MeshLayout
from mesh.plan import TrainingGraph

_HARDLY_MORE = 1.01  # a moment counts if it holds a hundredth more of something than any other


def least_memory(
    step: TrainingGraph,
    axes: Mapping[str, int],
    sizes: Mapping[str, Mapping[str, int]],
    tensors: Sequence[Sequence[str]],
) -> MeshLayout:
    """The layout on a mesh of `axes` {axis: size} under which `step` needs least memory.

    `sizes` and `tensors` say what a layout may be, as in mesh.layout.misfits.
    """
    optimizer = _Optimizer(_Estimator(step, axes, sizes), tensors)
    rules = dict(rule.split(":") for rule in optimizer.solve().split(";") if rule)
    return MeshLayout(axes, {dim: rules[dim] for dim in sizes if dim in rules})


class _Estimator(MemoryEstimator):
    """What the integer program is made of: the graph, and which of its dimensions an axis may split."""

    def __init__(self, step: TrainingGraph, axes: Mapping[str, int], sizes: Mapping[str, Mapping[str, int]]):
        _give_own_names(step.graph)
        self.variables = {variable.outputs[0].name for variable in step.graph.all_variables}
        self._sizes = sizes
        mesh_shape = mtf.Shape([mtf.Dimension(axis, size) for axis, size in axes.items()])
        super().__init__(step.graph, mesh_shape, step.reported)

    def _compute_layout_validator(self) -> None:
        super()._compute_layout_validator()
        validator = self._layout_validator
        validator._splittable_mtf_dimension_names &= self._sizes.keys()
        for dim, sources in self._sizes.items():
            known = validator._mtf_dimension_name_to_size_gcd.get(dim, 0)
            validator._mtf_dimension_name_to_size_gcd[dim] = math.gcd(known, *sources.values())


def _give_own_names(graph: mtf.Graph) -> None:
    """Rename what recomputing copied: the copies bear the names of what they copy, and the estimator, which knows
    tensors by their names, would take both for one tensor that lives from the first to the last."""
    known: Counter[str] = Counter()
    for operation in graph.operations:
        known[operation.name] += 1
        if known[operation.name] > 1:
            operation._name += f"/again_{known[operation.name]}"
            for index, tensor in enumerate(operation.outputs):
                tensor._name = f"{operation.name}:{index}"


def _decisive_moments(graph: Any, always: set[str], splittable: Collection[str]) -> list[dict[frozenset[str], int]]:
    """Bytes of the tensors that are live, by their splittable dimensions, without moments that hold hardly more of
    anything than another.

    Tensors that have the same splittable dimensions shrink alike under every layout, so their bytes can be summed.
    """
    columns: dict[frozenset[str], int] = {}
    place: dict[str, tuple[int, int]] = {}  # tensor -> its column and its bytes
    for name in graph.get_all_tensor_names():
        dims = frozenset(splittable).intersection(graph.get_tensor_mtf_dimension_names(name))
        place[name] = columns.setdefault(dims, len(columns)), graph.get_tensor_size(name)
    operations = list(graph.get_all_operation_names())
    inputs = {name: list(graph.get_operation_input_names(name)) for name in operations}
    readers = Counter(itertools.chain.from_iterable(inputs.values()))
    live: set[str] = set()
    held = np.zeros(len(columns), np.int64)

    def put(name: str, sign: int) -> None:
        column, size = place[name]
        held[column] += sign * size
        (live.add if sign > 0 else live.remove)(name)

    for name in always:
        put(name, 1)
    kept = np.zeros([0, len(columns)], np.int64)
    for operation in operations:
        outputs = [name for name in graph.get_operation_output_names(operation) if name not in live]
        for name in outputs:
            put(name, 1)
        if not (held <= kept * _HARDLY_MORE).all(axis=1).any():
            kept = np.vstack([kept[~(kept <= held).all(axis=1)], held])
        for name in inputs[operation]:
            readers[name] -= 1
        for name in {*inputs[operation], *outputs}:
            if readers[name] == 0 and name in live and name not in always:
                put(name, -1)
    return [dict(zip(columns, map(int, moment), strict=True)) for moment in kept]


class _Optimizer(LayoutOptimizer):
    """The integer program, with the model's own rule of what may not share an axis.

    Its constraints of memory have a term for all tensors of the same dimensions, where Mesh-TensorFlow's have one for
    each tensor and take minutes to write down for a deep model.
    """

    def __init__(self, estimator: _Estimator, tensors: Sequence[Sequence[str]]):
        self._tensors = tensors
        super().__init__(estimator)

    def _get_memory_contents(self) -> list[frozenset[str]]:
        return []

    def _add_constraints(self) -> None:
        super()._add_constraints()
        axes = self._layout_validator.mesh_dimension_name_to_size
        for axis, tensor in itertools.product(axes, self._tensors):
            there = [self._global_vars[dim, axis] for dim in tensor if (dim, axis) in self._global_vars]
            self._model.Add(sum(there) <= 1)
        splittable = self._layout_validator.splittable_mtf_dimension_names
        for moment in _decisive_moments(self._graph, self._estimator.variables, splittable):
            terms = [
                size
                // math.prod(axes[axis] for axis in assignment.values())
                * self._local_vars[dims][_local_var_name(dims, assignment)]
                for dims, size in moment.items()
                for assignment in self._assignments[dims]
            ]
            self._model.Add(sum(terms) <= self._memory_var)
