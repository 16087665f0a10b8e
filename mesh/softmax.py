"""The softmax of attention scores as one operation.

It keeps its result for the gradient and nothing else, where logarithms, exponentials and their gradients would keep
several tensors of the scores' size. With p = softmax(a) and an upstream gradient d:  da = p (d - sum(p d)).
"""

from collections.abc import Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import SlicedOperation, allreduce, split_axes

HIDDEN = -1e9  # added to the scores of what may not be seen; exp() of it is 0


def masked_softmax(scores: mtf.Tensor, visible: mtf.Tensor | None) -> mtf.Tensor:
    """Softmax of `scores` [..., keys] over keys, where `visible` bool, [the last dimensions, ..., keys]; else 0.

    None stands for all visible. At least one key of each row must be. Any dimension may be split over the mesh.
    """
    return _MaskedSoftmax(scores, visible).outputs[0]


class _MaskedSoftmax(SlicedOperation):
    def __init__(self, scores: mtf.Tensor, visible: mtf.Tensor | None):
        assert visible is None or scores.shape.dims[-visible.shape.ndims :] == visible.shape.dims, visible
        inputs = [scores] if visible is None else [scores, visible]
        super().__init__(inputs, [(scores.shape, scores.dtype)], "masked_softmax")

    def gradient(self, grad_ys: Sequence[mtf.Tensor]) -> list[mtf.Tensor | None]:
        return [_SoftmaxGradient(self.outputs[0], grad_ys[0]).outputs[0], *[None] * (len(self.inputs) - 1)]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        keys = self.outputs[0].shape.dims[-1:]

        def hide(scores: tf.Tensor, visible: tf.Tensor) -> tf.Tensor:
            return scores + tf.where_v2(visible, tf.cast(0, scores.dtype), tf.cast(HIDDEN, scores.dtype))

        scores, *visible = (lowering.tensors[x] for x in self.inputs)
        if visible:
            scores = mesh_impl.slicewise(hide, scores, *visible)
        if not split_axes(mesh_impl, keys):
            lowering.set_tensor_lowering(self.outputs[0], mesh_impl.slicewise(tf.nn.softmax, scores))
            return
        highest = mesh_impl.slicewise(lambda a: tf.reduce_max(a, axis=-1, keepdims=True), scores)
        highest = allreduce(mesh_impl, highest, keys, "MAX")
        weights = mesh_impl.slicewise(lambda a, m: tf.exp(a - m), scores, highest)
        total = allreduce(mesh_impl, mesh_impl.slicewise(_sum_of_keys, weights), keys)
        lowering.set_tensor_lowering(self.outputs[0], mesh_impl.slicewise(tf.divide, weights, total))


class _SoftmaxGradient(SlicedOperation):
    """Inputs: the softmax p and the gradient d of it."""

    def __init__(self, softmax: mtf.Tensor, gradient: mtf.Tensor):
        super().__init__([softmax, gradient], [(softmax.shape, softmax.dtype)], "masked_softmax_gradient")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        p, d = (lowering.tensors[x].to_laid_out_tensor() for x in self.inputs)
        total: Any = mesh_impl.slicewise(lambda p_, d_: _sum_of_keys(p_ * d_), p, d)
        total = allreduce(mesh_impl, total, self.outputs[0].shape.dims[-1:])
        gradient = mesh_impl.slicewise(lambda p_, d_, total_: p_ * (d_ - total_), p, d, total)
        lowering.set_tensor_lowering(self.outputs[0], gradient)


def _sum_of_keys(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(x, axis=-1, keepdims=True)
