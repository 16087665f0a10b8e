"""Operations of our own: a function on each slice, all-reduced where a split dimension was summed over.

Mesh-TensorFlow's `gather` multiplies by a one-hot matrix over the whole vocabulary. The lookup and the cache update
here touch only the rows they need. On a TPU, where a dense product is the fast form, the lookup keeps that product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow.compat.v1 as tf
from mesh_tensorflow.ops import WhileLoopOperation
from mesh_tensorflow.simd_mesh_impl import SimdMeshImpl

from mesh import mtf

# (operation, gradients of its outputs) -> gradients of its inputs, None where an input has none
GradientFn = Callable[[mtf.Operation, Sequence[mtf.Tensor | None]], Sequence[mtf.Tensor | None]]


def rename(x: mtf.Tensor, old: str, new: str) -> mtf.Tensor:
    """`x` with its dimension `old` called `new`, whatever a layout does to either name.

    Mesh-TensorFlow's own renaming permutes the entries, without any error, where the two names are split over
    different mesh axes; a name that no layout splits stands between them here.
    """
    between = f"renamed_{new}"
    return mtf.rename_dimension(mtf.rename_dimension(x, old, between), between, new)


def one_at_a_time(
    gradients: list[mtf.Tensor], outputs: dict[str, mtf.Tensor]
) -> tuple[list[mtf.Tensor], dict[str, mtf.Tensor]]:
    """What `mtf.serialize_training_step` returned, with a loop that ends one microbatch before it begins the next.

    Left to itself TensorFlow begins ten at once, as none waits for another, and they save no memory.
    """
    loop = gradients[0].operation
    assert isinstance(loop, WhileLoopOperation), loop
    loop._tf_kwargs["parallel_iterations"] = 1
    return gradients, outputs


def slice_start(mesh_impl: mtf.MeshImpl, dim: mtf.Dimension) -> Any:
    """Index along `dim` at which each slice begins: the plain integer 0 where `dim` is not split, else laid out."""
    axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)
    if axis is None:
        return 0
    rows = dim.size // mesh_impl.shape[axis].size
    return mesh_impl.slicewise(lambda coordinate: coordinate * rows, mesh_impl.laid_out_pcoord(axis))


def split_axes(mesh_impl: mtf.MeshImpl, dims: Sequence[mtf.Dimension]) -> list[int]:
    """The mesh axes over which any of `dims` is split, ascending."""
    axes = (mesh_impl.tensor_dimension_to_mesh_axis(dim) for dim in dims)
    return sorted({axis for axis in axes if axis is not None})


def allreduce(mesh_impl: mtf.MeshImpl, value: Any, dims: Sequence[mtf.Dimension], reduction: str = "SUM") -> Any:
    """Complete a reduction over `dims` that each slice has done for its own part."""
    axes = split_axes(mesh_impl, dims)
    return mesh_impl.allreduce(value, axes, reduction) if axes else value


class SlicedOperation(mtf.Operation):
    """An operation with `outputs` (shape, dtype), of which any dimension may be split over the mesh.

    One that has no `gradient` of its own lets none through.
    """

    def __init__(self, inputs: Sequence[mtf.Tensor], outputs: Sequence[tuple[mtf.Shape, tf.DType]], name: str):
        super().__init__(list(inputs), name=name)
        self._outputs = [
            mtf.Tensor(self, mtf.convert_to_shape(shape), dtype, index=i) for i, (shape, dtype) in enumerate(outputs)
        ]
        self._splittable_dims, self._unsplittable_dims = self._initialize_all_dimensions_as_splittable()

    @property
    def has_gradient(self) -> bool:
        return type(self).gradient is not mtf.Operation.gradient and bool(super().has_gradient)


class SlicewiseOperation(SlicedOperation):
    """`fn(*input slices, *slice starts)` on every slice, summed over the mesh axes that split `reduced_dims`.

    Args:
      fn: tf.Tensors -> tf.Tensor, or a tuple of them where there are several outputs.
      inputs: mtf.Tensors.
      outputs: (shape, dtype) of each output.
      reduced_dims: dimensions that `fn` sums over within its slice.
      starts_of: dimensions whose slice start (int32 scalar) `fn` wants after the input slices.
      gradient: makes the input gradients; None for an operation through which none flows.
      tpu_fn: stands in for `fn` on a TPU mesh.
    """

    def __init__(
        self,
        fn: Callable,
        inputs: Sequence[mtf.Tensor],
        outputs: Sequence[tuple[mtf.Shape, tf.DType]],
        *,
        reduced_dims: Sequence[mtf.Dimension] = (),
        starts_of: Sequence[mtf.Dimension] = (),
        gradient: GradientFn | None = None,
        tpu_fn: Callable | None = None,
        name: str,
    ):
        super().__init__(inputs, outputs, name)
        self._fn = fn
        self._tpu_fn = tpu_fn or fn
        self._reduced_dims = tuple(reduced_dims)
        self._starts_of = tuple(starts_of)
        self._gradient = gradient

    @property
    def has_gradient(self) -> bool:
        return self._gradient is not None and bool(super().has_gradient)

    def gradient(self, grad_ys: Sequence[mtf.Tensor | None]) -> Sequence[mtf.Tensor | None]:
        assert self._gradient is not None
        return self._gradient(self, grad_ys)

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        fn = self._tpu_fn if isinstance(mesh_impl, SimdMeshImpl) else self._fn
        starts = [slice_start(mesh_impl, dim) for dim in self._starts_of]
        values = mesh_impl.slicewise(fn, *[lowering.tensors[x] for x in self.inputs], *starts)
        axes = split_axes(mesh_impl, self._reduced_dims)
        for output, value in zip(self.outputs, values if len(self.outputs) > 1 else (values,), strict=True):
            if axes:
                value = lazy_allreduce_sum(lowering, output, value, axes)
            lowering.set_tensor_lowering(output, value)


def lazy_allreduce_sum(lowering: mtf.Lowering, output: mtf.Tensor, value: Any, axes: list[int]) -> Any:
    """Sum `value` over mesh `axes` when it is first used, so that sums of partial sums travel once; counted."""
    counter = f"allreduce/{axes}/{type(output.operation).__name__}"
    return mtf.LazyAllreduceSum(
        lowering.mesh_impl(output),
        value,
        axes,
        add_counter_fn=lambda: lowering.add_counter(counter, lowering.laid_out_size(output)),
    )


class _CastVariable(SlicedOperation):
    def __init__(self, x: mtf.Tensor, dtype: tf.DType):
        super().__init__([x], [(x.shape, dtype)], "cast_variable")

    def gradient(self, grad_ys: Sequence[mtf.Tensor]) -> list[mtf.Tensor]:
        return [cast_variable(grad_ys[0], self.inputs[0].dtype)]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        value, dtype = lowering.tensors[self.inputs[0]], self.outputs[0].dtype
        lazy = isinstance(value, mtf.LazyAllreduceSum)
        slices = mesh_impl.slicewise(lambda x: tf.cast(x, dtype), value.laid_out_input if lazy else value)
        if lazy:
            slices = mtf.LazyAllreduceSum(mesh_impl, slices, value.mesh_axes, value.add_counter_fn)
        lowering.set_tensor_lowering(self.outputs[0], slices)


def cast_variable(x: mtf.Tensor, dtype: tf.DType) -> mtf.Tensor:
    """The variable `x` as `dtype`; its gradient has the type of `x`.

    Unlike that of `mtf.cast`, the gradient is summed over the mesh after it is cast: the gradients of all uses and of
    all microbatches are added up in the variable's type, and travel once.
    """
    return x if x.dtype == dtype else _CastVariable(x, dtype).outputs[0]


def rows_inside(ids: tf.Tensor, start: tf.Tensor | int, rows: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Ids counted from a slice's first row, and which of them lie in its `rows` rows. Both have the shape of `ids`."""
    local = ids - start
    return local, tf.logical_and(local >= 0, local < rows)


def gather_rows(table: tf.Tensor, ids: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
    """Rows of a slice [rows, width] for global `ids` [...]: [..., width], zeros for ids of other slices."""
    local, inside = rows_inside(ids, start, table.shape[0])
    rows = tf.gather(table, tf.where_v2(inside, local, tf.zeros_like(local)))
    return tf.where_v2(inside[..., tf.newaxis], rows, tf.zeros_like(rows))


def scatter_rows(values: tf.Tensor, ids: tf.Tensor, start: tf.Tensor | int, rows: int) -> tf.Tensor:
    """Sum `values` [..., width] into a slice [rows, width] by global `ids` [...]; other slices' ids are left out.

    The sums are float32 whatever `values` are: in bfloat16 a sum of equal terms stops growing at 256 of them.
    """
    local, inside = rows_inside(ids, start, rows)
    values = tf.cast(values, tf.float32)
    return tf.math.unsorted_segment_sum(values, tf.where_v2(inside, local, -tf.ones_like(local)), rows)


def embedding_lookup(table: mtf.Tensor, ids: mtf.Tensor, name: str = "embedding_lookup") -> mtf.Tensor:
    """Rows of `table` [vocab, embd] for `ids` [...]: [..., embd].

    An id outside [0, vocab) gives zeros: a padding id that lies past the vocabulary has no embedding. Either dimension
    of the table may be split over the mesh.
    """
    vocab, embd = table.shape.dims

    def one_hot_rows(table_slice: tf.Tensor, ids_slice: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
        one_hot = tf.one_hot(ids_slice - start, table_slice.shape[0], dtype=table_slice.dtype)
        return tf.tensordot(one_hot, table_slice, axes=1)

    return SlicewiseOperation(
        gather_rows,
        [table, ids],
        [(ids.shape + embd, table.dtype)],
        reduced_dims=[vocab],
        starts_of=[vocab],
        gradient=_embedding_gradient,
        tpu_fn=one_hot_rows,
        name=name,
    ).outputs[0]


def _embedding_gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
    table, ids = op.inputs
    vocab = table.shape.dims[0]

    def segment_sum(dy: tf.Tensor, ids_slice: tf.Tensor, table_slice: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
        return tf.cast(scatter_rows(dy, ids_slice, start, table_slice.shape[0]), dy.dtype)

    def one_hot_sum(dy: tf.Tensor, ids_slice: tf.Tensor, table_slice: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
        one_hot = tf.one_hot(ids_slice - start, table_slice.shape[0], dtype=dy.dtype)
        axes = list(range(ids_slice.shape.ndims))
        return tf.tensordot(one_hot, dy, axes=[axes, axes])

    gradient = SlicewiseOperation(
        segment_sum,
        [grad_ys[0], ids, table],  # the table only tells the slice's number of rows
        [(table.shape, table.dtype)],
        reduced_dims=ids.shape.dims,
        starts_of=[vocab],
        tpu_fn=one_hot_sum,
        name="embedding_gradient",
    ).outputs[0]
    return [gradient, None]


def cache_update(cache: mtf.Tensor, value: mtf.Tensor, position: mtf.Tensor, name: str = "cache_update") -> mtf.Tensor:
    """`cache` [memory_length, ...] with `value` [...] written at `position` []. No gradient flows."""
    memory_length = cache.shape.dims[0]

    def write(
        cache_slice: tf.Tensor, value_slice: tf.Tensor, position_: tf.Tensor, start: tf.Tensor | int
    ) -> tf.Tensor:
        local, inside = rows_inside(position_, start, cache_slice.shape[0])
        row = tf.where_v2(inside, local, tf.zeros_like(local))
        kept = tf.where_v2(inside, value_slice, tf.gather(cache_slice, row))
        return tf.tensor_scatter_nd_update(cache_slice, [[row]], kept[tf.newaxis])

    return SlicewiseOperation(
        write, [cache, value, position], [(cache.shape, cache.dtype)], starts_of=[memory_length], name=name
    ).outputs[0]


def sum_of_squares(x: mtf.Tensor) -> mtf.Tensor:
    """Of all entries, a float32 scalar, in one pass. No gradient flows."""

    def of_slice(slice_: tf.Tensor) -> tf.Tensor:
        return 2 * tf.nn.l2_loss(tf.cast(slice_, tf.float32))

    scalar = [(mtf.Shape([]), tf.float32)]
    return SlicewiseOperation(of_slice, [x], scalar, reduced_dims=x.shape.dims, name="sum_of_squares").outputs[0]
