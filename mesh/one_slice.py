"""What an operation of a Mesh-TensorFlow graph does on one processor, found out by lowering it onto a single slice.

The lowering is the one that runs: `Operation.lower`, on a mesh implementation that keeps one slice, communicates with
nobody and notes what it was asked to communicate. So nothing here has to be told of a new operation. Layers repeat, and
an operation that is like an earlier one is not lowered again: a model of a hundred layers takes little more than one of
two. No variable is made and nothing is computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any

import tensorflow.compat.v1 as tf
from mesh_tensorflow import ops as mtf_ops
from mesh_tensorflow.simd_mesh_impl import SimdMeshImpl

from errors import UserError
from mesh import mtf
from mesh.adam import AdamUpdate
from mesh.parts import CONSTANT, FEATURE, RANGE, VARIABLE, Collective, Part, Source, parts_of, source_of, stand_in

# What tells one operation from another and yet not what it costs.
_IRRELEVANT = {"_name", "_mesh", "_inputs", "_outputs", "_splittable_dims", "_unsplittable_dims", "_variables"}
_IRRELEVANT |= {"_salt", "_scalar", "_forward_operations"}
_LARGEST_BFLOAT16_SUM = 8  # processors: SimdMeshImpl's allreduce_in_bfloat16_max_group_size


@dataclass(frozen=True)
class Lowered:
    """An operation on one slice: its parts in order, and for each output its source and the axes it is still to be
    summed over; `effects` are parts that no output needs, such as what is assigned to variables."""

    parts: tuple[Part, ...]
    outputs: tuple[tuple[Source, tuple[int, ...]], ...]
    effects: tuple[Source, ...]


class _Slice:
    """A laid-out tensor: the one slice, where Mesh-TensorFlow keeps a list of all."""

    def __init__(self, tensor: tf.Tensor):
        self.tensor_list = [tensor]

    @property
    def all_slices(self) -> list[tf.Tensor]:
        return self.tensor_list

    @property
    def slice_shape(self) -> list[int]:
        return list(self.tensor_list[0].shape.as_list())

    def to_laid_out_tensor(self) -> "_Slice":
        return self

    @classmethod
    def from_tensor_list(cls, tensors: list[tf.Tensor]) -> "_Slice":
        return cls(tensors[0])


class OneSlice(mtf.MeshImpl):
    """A mesh of which one processor is looked at; `noted` holds the collectives, by the names of their outputs."""

    LaidOutTensor = staticmethod(_Slice.from_tensor_list)

    def __init__(self, mesh_shape: str, layout: str):
        mtf.MeshImpl.__init__(self, mtf.convert_to_shape(mesh_shape), mtf.convert_to_layout_rules(layout))
        self.noted: dict[str, Collective] = {}
        self.layout = layout

    def slicewise(self, fn: Callable, *inputs: Any) -> Any:
        values = mtf_ops.convert_args_to_laid_out_tensors(inputs)
        result = fn(*[x.tensor_list[0] if isinstance(x, _Slice) else x for x in values])
        if isinstance(result, tuple):
            return tuple(_Slice(tf.convert_to_tensor(x)) for x in result)
        return _Slice(tf.convert_to_tensor(result))

    def ways(self, axes: Sequence[int]) -> int:
        """How many processors differ along `axes`."""
        return int(mtf_ops.list_product([self.shape[axis].size for axis in axes]))

    def _note(self, kind: str, axes: Sequence[int], received: tf.Tensor) -> Any:
        received = tf.raw_ops.Snapshot(input=received)  # a tensor of its own
        self.noted[received.op.name] = Collective(kind, tuple(axes))
        return _Slice(received)

    def allreduce(self, x: Any, mesh_axes: Sequence[int], reduction_fn_string: str) -> Any:
        del reduction_fn_string
        x = x.to_laid_out_tensor()
        return x if self.ways(mesh_axes) == 1 else self._note("all-reduce", mesh_axes, x.tensor_list[0])

    def summed_as(self, dtype: tf.DType, axes: Sequence[int]) -> tf.DType:
        """The type in which numbers of `dtype` travel to be summed over `axes`."""
        del axes
        return dtype

    def pieces(self, x: Any, mesh_axis: int, concat_axis: int, stack: bool) -> _Slice:
        """As many of `x` as there are processors along the axis, put together."""
        pieces = x.to_laid_out_tensor().tensor_list * self.ways([mesh_axis])
        return _Slice(tf.stack(pieces, concat_axis) if stack else tf.concat(pieces, concat_axis))

    def allconcat(self, x: Any, mesh_axis: int, concat_axis: int, stack: bool = False) -> Any:
        gathered = self.pieces(x, mesh_axis, concat_axis, stack)
        if self.ways([mesh_axis]) == 1:
            return gathered
        return self._note("all-gather", [mesh_axis], gathered.tensor_list[0])

    def alltoall(self, x: Any, mesh_axis: int, split_axis: int, concat_axis: int) -> Any:
        x = x.to_laid_out_tensor()
        shape, ways = x.slice_shape, self.ways([mesh_axis])
        shape[split_axis] //= ways
        shape[concat_axis] *= ways
        return x if ways == 1 else self._note("all-to-all", [mesh_axis], tf.reshape(x.tensor_list[0], shape))

    def receive(self, x: Any, mesh_axis: int, source_pcoord: Any) -> Any:
        del source_pcoord
        x = x.to_laid_out_tensor()
        return x if self.ways([mesh_axis]) == 1 else self._note("shift", [mesh_axis], x.tensor_list[0])

    def laid_out_pnum(self) -> Any:
        return _Slice(tf.constant(0))

    def import_tf_tensor(self, x: mtf.Tensor, tf_x: tf.Tensor) -> Any:
        kind = RANGE if isinstance(x.operation, mtf_ops.RangeOperation) else CONSTANT
        return _Slice(stand_in(kind, tf_x.dtype, self.slice_shape(x.shape)))


class OneCore(OneSlice, SimdMeshImpl):
    """The same of a TPU, where operations may be lowered otherwise, and SimdMeshImpl communicates in its own ways."""

    def __init__(self, mesh_shape: str, layout: str):
        OneSlice.__init__(self, mesh_shape, layout)

    def summed_as(self, dtype: tf.DType, axes: Sequence[int]) -> tf.DType:
        """Sums of many bfloat16 numbers travel as float32."""
        return tf.float32 if dtype == tf.bfloat16 and self.ways(axes) > _LARGEST_BFLOAT16_SUM else dtype

    def allreduce(self, x: Any, mesh_axes: Sequence[int], reduction_fn_string: str) -> Any:
        x = x.to_laid_out_tensor()
        if reduction_fn_string == "SUM":
            (tensor,) = x.tensor_list
            summed = super().allreduce(
                _Slice(tf.cast(tensor, self.summed_as(tensor.dtype, mesh_axes))), mesh_axes, "SUM"
            )
            return _Slice(tf.cast(summed.tensor_list[0], tensor.dtype))
        for axis in mesh_axes:
            x = self.allconcat(x, axis, 0, stack=True)
            x = _Slice(mtf_ops.reduction_fn(reduction_fn_string)(x.tensor_list[0], 0))
        return x

    def allconcat(self, x: Any, mesh_axis: int, concat_axis: int, stack: bool = False) -> Any:
        """A sum of what is mostly zeros."""
        return self.allreduce(self.pieces(x, mesh_axis, concat_axis, stack), [mesh_axis], "SUM")

    def alltoall(self, x: Any, mesh_axis: int, split_axis: int, concat_axis: int) -> Any:
        (tensor,) = x.to_laid_out_tensor().tensor_list
        sent = _Slice(tf.cast(tensor, tf.bfloat16 if tensor.dtype == tf.float32 else tensor.dtype))
        (received,) = super().alltoall(sent, mesh_axis, split_axis, concat_axis).tensor_list
        return _Slice(tf.cast(received, tensor.dtype))


class _OneLowering(mtf.Lowering):
    """The lowering of single operations; its mesh has one slice."""

    def __init__(self, mesh_impl: OneSlice):
        self._impl = mesh_impl
        self.tensors: dict[mtf.Tensor, Any] = {}
        self.variables: dict[mtf.Variable, Any] = {}
        self.operations: dict[mtf.Operation, Any] = {}

    def mesh_impl(self, m: Any) -> OneSlice:
        return self._impl

    def add_counter(self, key: str, value: int) -> None:
        pass


class _StillToSum(mtf_ops.LazyAllreduceSum):
    """An input that is to be summed over the mesh before it is used, unless its sum can wait once more."""

    def __init__(self, mesh_impl: OneSlice, axes: tuple[int, ...], raw: tf.Tensor, summed: tf.Tensor):
        super().__init__(mesh_impl, _Slice(raw), list(axes))
        self._summed = _Slice(summed)

    def to_laid_out_tensor(self) -> _Slice:
        return self._summed


class SliceLowering:
    """Lowers operations onto one slice of the mesh, each kind of them once."""

    def __init__(self, mesh_impl: OneSlice):
        self.mesh_impl = mesh_impl
        self._known: dict[Any, Lowered] = {}

    def lower(self, operation: mtf.Operation, to_sum: Sequence[tuple[int, ...]]) -> Lowered:
        """`operation` on one slice, where `to_sum` tells for each input the mesh axes that it is to be summed over.

        Raises UserError where the layout does not allow the operation.
        """
        stored = tuple(variable.slice_dtype for variable in getattr(operation, "variables", ()))
        key = (
            type(operation),
            _shapes(operation),
            stored,
            tuple(to_sum),
            _settings(operation),
            _is_constant(operation),
        )
        if key not in self._known:
            try:
                self._known[key] = self._lower(operation, to_sum)
            except (ValueError, NotImplementedError) as error:
                raise UserError(
                    f"layout {self.mesh_impl.layout!r} cannot be used: Mesh-TensorFlow cannot lower "
                    f"{operation.name} ({' '.join(str(error).split())}); split other dimensions"
                ) from error
        return self._known[key]

    def _lower(self, operation: mtf.Operation, to_sum: Sequence[tuple[int, ...]]) -> Lowered:
        impl = self.mesh_impl
        impl.noted = {}
        with tf.Graph().as_default() as graph:
            lowering = _OneLowering(impl)
            given = self._give_inputs(lowering, operation, to_sum)
            effects = self._apply(lowering, operation)
            outputs = []
            for tensor in operation.outputs:
                value = lowering.tensors[tensor]
                lazy = isinstance(value, mtf_ops.LazyAllreduceSum)
                laid_out = value.laid_out_input if lazy else value.to_laid_out_tensor()
                axes = tuple(value.mesh_axes) if lazy and impl.ways(value.mesh_axes) > 1 else ()
                outputs.append((laid_out.tensor_list[0], axes))
            parts, sources = parts_of(graph, [tensor for tensor, _ in outputs] + effects, given, impl.noted)
            return Lowered(
                tuple(parts),
                tuple((source_of(sources, tensor), axes) for tensor, axes in outputs),
                tuple(source_of(sources, tensor) for tensor in effects),
            )

    def _give_inputs(
        self, lowering: _OneLowering, operation: mtf.Operation, to_sum: Sequence[tuple[int, ...]]
    ) -> dict[str, Source]:
        """Put stand-ins for the inputs into `lowering`; {name: what each stands for}."""
        given: dict[str, Source] = {}
        for index, (tensor, axes) in enumerate(zip(operation.inputs, to_sum, strict=True)):
            if tensor in lowering.tensors:
                continue
            shape = self.mesh_impl.slice_shape(tensor.shape)
            raw = stand_in("input", tensor.dtype, shape)
            given[raw.op.name] = Source("raw", index)
            lowering.tensors[tensor] = _Slice(raw)
            if axes:
                summed = stand_in("input", tensor.dtype, shape)
                given[summed.op.name] = Source("summed", index)
                lowering.tensors[tensor] = _StillToSum(self.mesh_impl, axes, raw, summed)
        return given

    def _apply(self, lowering: _OneLowering, operation: mtf.Operation) -> list[tf.Tensor]:
        """Lower `operation`; what it does besides making its outputs."""
        impl = self.mesh_impl
        if isinstance(operation, mtf_ops.Variable):
            slice_ = stand_in(VARIABLE, operation.slice_dtype, impl.slice_shape(operation.shape))
            lowering.tensors[operation.outputs[0]] = _Slice(tf.cast(slice_, operation.activation_dtype))
        elif isinstance(operation, mtf_ops.ImportOperation):
            output = operation.outputs[0]
            kind = CONSTANT if _is_constant(operation) else FEATURE
            lowering.tensors[output] = _Slice(stand_in(kind, output.dtype, impl.slice_shape(output.shape)))
        elif isinstance(operation, mtf_ops.Assign):
            pairs = zip(operation.variables, operation.inputs, strict=True)
            return [_assigned(lowering, variable, value, operation.assign_fn) for variable, value in pairs]
        elif isinstance(operation, AdamUpdate):
            return _adam(lowering, operation)
        else:
            if isinstance(operation, mtf_ops.GenericGradOperation):
                operation._forward_op.lower(lowering)  # the gradient is TensorFlow's, of what this makes
            operation.lower(lowering)
        return []


def _assigned(lowering: _OneLowering, variable: mtf.Variable, value: mtf.Tensor, assign_fn: Callable) -> tf.Tensor:
    """What the slice of `variable` becomes."""
    new = tf.cast(lowering.tensors[value].to_laid_out_tensor().tensor_list[0], variable.slice_dtype)
    if assign_fn is mtf_ops.assign_slice:
        return tf.identity(new)
    return stand_in(VARIABLE, variable.slice_dtype, new.shape.as_list()) - new


def _adam(lowering: _OneLowering, operation: AdamUpdate) -> list[tf.Tensor]:
    """What the weight and its slots become, or what else is made where the fused kernel updates them in place."""
    w, m, v, gradient, rate = (lowering.tensors[x].to_laid_out_tensor().tensor_list[0] for x in operation.inputs)
    if isinstance(lowering.mesh_impl(operation), SimdMeshImpl):
        return list(operation.settings.new_values(w, m, v, gradient, rate))
    with tf.control_dependencies([gradient]):
        decay = [tf.nn.l2_loss(rate * w)] if operation.settings.decay else []
    return [tf.nn.l2_loss(gradient), *decay]


def _is_constant(operation: mtf.Operation) -> bool:
    return isinstance(operation, mtf_ops.ImportOperation) and tf.get_static_value(operation._tf_tensor) is not None


def _shapes(operation: mtf.Operation) -> tuple[Any, ...]:
    """Dimensions and types of all inputs and outputs."""
    return tuple((_value(tensor.shape), tensor.dtype) for tensor in [*operation.inputs, *operation.outputs])


def _settings(operation: mtf.Operation) -> tuple[Any, ...]:
    """What else decides how an operation is lowered: its attributes, and of functions the code and what it uses."""
    attributes: Mapping[str, Any] = vars(operation)
    return tuple((name, _value(attributes[name])) for name in sorted(attributes.keys() - _IRRELEVANT))


def _value(value: Any, depth: int = 0) -> Any:
    """Something hashable that is equal for what lowers alike."""
    if value is None or isinstance(value, bool | int | float | str | tf.DType):
        return value
    if isinstance(value, mtf.Dimension):
        return value.name, value.size
    if isinstance(value, mtf.Shape):
        return tuple((dim.name, dim.size) for dim in value.dims)
    if depth < 8:
        deeper = partial(_value, depth=depth + 1)
        if isinstance(value, list | tuple):
            return tuple(map(deeper, value))
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return value.__code__, deeper(cells), deeper(value.__defaults__)
        if is_dataclass(value):
            return deeper(sorted(vars(value).items()))
        if isinstance(value, partial):
            return deeper(value.func), deeper(value.args), deeper(list(value.keywords.values()))
    return getattr(value, "__qualname__", type(value).__name__)
