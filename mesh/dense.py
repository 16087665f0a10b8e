"""Matrix products with a kernel, as two-dimensional products on every slice.

`tf.einsum` transposes and reshapes what is already in order; a plain product of [tokens, in] with [in, out] is the same
sum at half the time on a CPU.
"""

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import SlicewiseOperation


def rows_of(slice_: tf.Tensor) -> tf.Tensor:
    """[..., width] -> [rows, width]"""
    return tf.reshape(slice_, [-1, slice_.shape[-1]])


def linear(x: mtf.Tensor, kernel: mtf.Tensor, name: str = "linear") -> mtf.Tensor:
    """`x` [..., in] times `kernel` [in, out]: [..., out]. Any dimension may be split over the mesh."""
    in_dim, out_dim = kernel.shape.dims
    assert x.shape.dims[-1] == in_dim, (x.shape, kernel.shape)
    tokens = x.shape.dims[:-1]

    def product(x_slice: tf.Tensor, kernel_slice: tf.Tensor) -> tf.Tensor:
        y = tf.matmul(rows_of(x_slice), kernel_slice)
        return tf.reshape(y, [*x_slice.shape[:-1], kernel_slice.shape[1]])

    return SlicewiseOperation(
        product,
        [x, kernel],
        [(mtf.Shape([*tokens, out_dim]), x.dtype)],
        reduced_dims=[in_dim],
        gradient=_linear_gradient,
        name=name,
    ).outputs[0]


def _linear_gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
    x, kernel = op.inputs
    _, out_dim = kernel.shape.dims
    tokens = x.shape.dims[:-1]

    def back_to_x(dy: tf.Tensor, kernel_slice: tf.Tensor) -> tf.Tensor:
        dx = tf.matmul(rows_of(dy), kernel_slice, transpose_b=True)
        return tf.reshape(dx, [*dy.shape[:-1], kernel_slice.shape[0]])

    def back_to_kernel(x_slice: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        return tf.matmul(rows_of(x_slice), rows_of(dy), transpose_a=True)

    dx = SlicewiseOperation(
        back_to_x, [grad_ys[0], kernel], [(x.shape, x.dtype)], reduced_dims=[out_dim], name="linear_back_to_x"
    )
    d_kernel = SlicewiseOperation(
        back_to_kernel,
        [x, grad_ys[0]],
        [(kernel.shape, kernel.dtype)],
        reduced_dims=tokens,
        name="linear_back_to_kernel",
    )
    return [dx.outputs[0], d_kernel.outputs[0]]


def add_bias(x: mtf.Tensor, bias: mtf.Tensor) -> mtf.Tensor:
    """`x` [..., width] + `bias` [width], whose gradient is summed in float32 in one pass over the rows."""

    def add(x_slice: tf.Tensor, bias_slice: tf.Tensor) -> tf.Tensor:
        return x_slice + bias_slice

    return SlicewiseOperation(add, [x, bias], [(x.shape, x.dtype)], gradient=_bias_gradient, name="add_bias").outputs[0]


def column_sums(slice_: tf.Tensor) -> tf.Tensor:
    """[..., width] -> [width] float32: sums over all rows, in half the time of tf.reduce_sum."""
    return tf.raw_ops.BiasAddGrad(out_backprop=tf.cast(rows_of(slice_), tf.float32))


def _bias_gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
    x, bias = op.inputs

    def back_to_bias(dy: tf.Tensor) -> tf.Tensor:
        return tf.cast(column_sums(dy), bias.dtype)

    d_bias = SlicewiseOperation(
        back_to_bias,
        [grad_ys[0]],
        [(bias.shape, bias.dtype)],
        reduced_dims=x.shape.dims[:-1],
        name="bias_gradient",
    )
    return [grad_ys[0], d_bias.outputs[0]]
