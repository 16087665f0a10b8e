"""Layer normalization as one operation, which keeps its input, a mean and a deviation for each row, and nothing else.

With x^ = (x - mean) / deviation, y = g x^ + b and an upstream gradient d over n entries of a row:
dx = (d g - sum(d g) / n - x^ sum(d g x^) / n) / deviation,  dg = sum of d x^ over rows,  db = sum of d over rows.
"""

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.dense import column_sums, rows_of
from mesh.operations import SlicedOperation, allreduce, lazy_allreduce_sum, split_axes


def standardize(x: mtf.Tensor, gain: mtf.Tensor, bias: mtf.Tensor | None, epsilon: float) -> mtf.Tensor:
    """`x` [..., width] with mean 0 and variance 1 over width, times `gain` [width] or [], plus `bias` [width].

    `epsilon` is added to the variance. Calculated in float32, though the result has the type of `x`: variances of
    bfloat16 values would be good to two digits. Any dimension may be split over the mesh. (arXiv:1607.06450)
    """
    return _LayerNorm(x, gain, bias, epsilon).outputs[0]


class _LayerNorm(SlicedOperation):
    """Outputs: y [..., width]; mean and 1 / deviation of each row, [...] float32."""

    def __init__(self, x: mtf.Tensor, gain: mtf.Tensor, bias: mtf.Tensor | None, epsilon: float):
        rows = mtf.Shape(x.shape.dims[:-1])
        outputs = [(x.shape, x.dtype), (rows, tf.float32), (rows, tf.float32)]
        super().__init__([x, gain] if bias is None else [x, gain, bias], outputs, "layer_norm")
        self._epsilon = epsilon

    def gradient(self, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor]:
        x, gain, *bias = self.inputs
        _, mean, inverse = self.outputs
        return list(_LayerNormGradient(x, gain, mean, inverse, grad_ys[0], bool(bias)).outputs)

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl, epsilon = lowering.mesh_impl(self), self._epsilon
        x, gain, *bias = (lowering.tensors[tensor].to_laid_out_tensor() for tensor in self.inputs)
        width = self.inputs[0].shape.dims[-1]

        def sums(x_: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(tf.cast(x_, tf.float32), axis=-1) / width.size

        def squares(x_: tf.Tensor, mean_: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(tf.square(_centred(x_, mean_)), axis=-1) / width.size

        def scaled(
            x_: tf.Tensor, mean_: tf.Tensor, inverse_: tf.Tensor, gain_: tf.Tensor, *bias_: tf.Tensor
        ) -> tf.Tensor:
            y = _centred(x_, mean_) * inverse_[..., tf.newaxis] * gain_
            return tf.cast(y + bias_[0] if bias_ else y, x_.dtype)

        mean = allreduce(mesh_impl, mesh_impl.slicewise(sums, x), [width])
        variance = allreduce(mesh_impl, mesh_impl.slicewise(squares, x, mean), [width])
        inverse = mesh_impl.slicewise(lambda v: tf.rsqrt(v + epsilon), variance)
        y = mesh_impl.slicewise(scaled, x, mean, inverse, gain, *bias)
        for output, value in zip(self.outputs, (y, mean, inverse), strict=True):
            lowering.set_tensor_lowering(output, value)


class _LayerNormGradient(SlicedOperation):
    """Inputs: x, gain, mean, 1 / deviation, d. Outputs: the gradients of x, of the gain, and of the bias if any."""

    def __init__(
        self,
        x: mtf.Tensor,
        gain: mtf.Tensor,
        mean: mtf.Tensor,
        inverse: mtf.Tensor,
        gradient: mtf.Tensor,
        with_bias: bool,
    ):
        outputs = [(of.shape, of.dtype) for of in (x, gain, *([gain] if with_bias else []))]
        super().__init__([x, gain, mean, inverse, gradient], outputs, "layer_norm_gradient")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        x, gain, mean, inverse, d = (lowering.tensors[tensor].to_laid_out_tensor() for tensor in self.inputs)
        *rows, width = self.inputs[0].shape.dims
        per_width = bool(self.inputs[1].shape.dims)

        def standardized(x_: tf.Tensor, mean_: tf.Tensor, inverse_: tf.Tensor, d_: tf.Tensor) -> tuple[tf.Tensor, ...]:
            x_hat = _centred(x_, mean_) * inverse_[..., tf.newaxis]
            d_ = tf.cast(d_, tf.float32)
            return x_hat, d_, x_hat * d_

        def row_sums(d_: tf.Tensor, dx_hat: tf.Tensor, gain_: tf.Tensor) -> tf.Tensor:
            return tf.stack([_of_rows(d_, gain_), _of_rows(dx_hat, gain_)])

        def back_to_x(
            x_: tf.Tensor, x_hat: tf.Tensor, d_: tf.Tensor, sums: tf.Tensor, inverse_: tf.Tensor, gain_: tf.Tensor
        ) -> tf.Tensor:
            of_d, of_dx_hat = tf.unstack(sums[..., tf.newaxis] / width.size)
            return tf.cast((d_ * gain_ - of_d - x_hat * of_dx_hat) * inverse_[..., tf.newaxis], x_.dtype)

        x_hat, d, dx_hat = mesh_impl.slicewise(standardized, x, mean, inverse, d)
        sums = allreduce(mesh_impl, mesh_impl.slicewise(row_sums, d, dx_hat, gain), [width])
        dx = mesh_impl.slicewise(back_to_x, x, x_hat, d, sums, inverse, gain)
        lowering.set_tensor_lowering(self.outputs[0], dx)
        axes = split_axes(mesh_impl, rows if per_width else [*rows, width])
        for output, values in zip(self.outputs[1:], (dx_hat, d), strict=False):
            value = mesh_impl.slicewise(column_sums if per_width else tf.reduce_sum, values)
            lowering.set_tensor_lowering(output, lazy_allreduce_sum(lowering, output, value, axes) if axes else value)


def _centred(x: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) - mean[..., tf.newaxis]


def _of_rows(x: tf.Tensor, gain: tf.Tensor) -> tf.Tensor:
    """Sums of x gain over the last dimension: [..., width] -> [...]"""
    if gain.shape.ndims == 0:
        return gain * tf.reduce_sum(x, axis=-1)
    return tf.reshape(tf.matmul(rows_of(x), gain[:, tf.newaxis]), x.shape[:-1])
