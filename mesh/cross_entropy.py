"""The output head and its cross entropy as one operation.

Logits [tokens, vocab] are by far the largest tensor of a small model. Here they exist once: the fused kernel turns them
into the loss and into `softmax - one_hot` in one pass, and both gradients are matrix products with that residual. No
one-hot matrix and no second [tokens, vocab] tensor is made.

With logits a = h w^T, log_z = logsumexp(a), p = softmax(a), y the label and upstream gradients dc (of the cross
entropy) and dz (of log_z):  da = dc (p - one_hot(y)) + dz p = (dc + dz) (p - one_hot(y)) + dz one_hot(y).
"""

from collections.abc import Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import (
    SlicedOperation,
    allreduce,
    gather_rows,
    lazy_allreduce_sum,
    rows_inside,
    scatter_rows,
    slice_start,
    split_axes,
)


def head_cross_entropy(
    hidden: mtf.Tensor, table: mtf.Tensor, labels: mtf.Tensor, bias: mtf.Tensor | None = None
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """Cross entropy of the logits `hidden` [..., embd] x `table` [vocab, embd] + `bias` [vocab] against `labels` [...].

    Returns (cross entropy, log of the softmax's normalizer), each [...] float32, in nats. A label outside [0, vocab) is
    taken as the nearest id: give such positions no weight. Any of the dimensions may be split over the mesh. Logits and
    losses are float32 whatever the type of `hidden` and `table`, and so are sums in the gradients.
    """
    cross_entropy, log_z, _ = _HeadCrossEntropy(hidden, table, labels, bias).outputs
    return cross_entropy, log_z


def _flat(slice_: tf.Tensor, trailing: int) -> tf.Tensor:
    """[..., trailing dims] -> [tokens, trailing dims]"""
    kept = slice_.shape.as_list()[slice_.shape.ndims - trailing :]
    return tf.reshape(slice_, [-1, *kept])


class _HeadCrossEntropy(SlicedOperation):
    """Outputs: cross entropy [...], log_z [...], residual [..., vocab].

    The residual is softmax - one_hot where the vocabulary is whole, and softmax alone where it is split over the mesh.
    """

    def __init__(self, hidden: mtf.Tensor, table: mtf.Tensor, labels: mtf.Tensor, bias: mtf.Tensor | None):
        self.vocab, self.embd = table.shape.dims
        outputs = [(labels.shape, tf.float32), (labels.shape, tf.float32), (labels.shape + self.vocab, hidden.dtype)]
        inputs = [hidden, table, labels] + ([] if bias is None else [bias])
        super().__init__(inputs, outputs, "head_cross_entropy")

    def gradient(self, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
        hidden, table, labels, *bias = self.inputs
        zeros = mtf.zeros(hidden.mesh, labels.shape, tf.float32)
        d_cross_entropy, d_log_z = (zeros if dy is None else dy for dy in grad_ys[:2])
        gradient = _HeadCrossEntropyGradient(hidden, table, labels, self.outputs[2], d_cross_entropy, d_log_z)
        d_hidden, d_table, d_bias = gradient.outputs
        return [d_hidden, d_table, None, *([d_bias] if bias else [])]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        hidden, table, labels, *bias = (lowering.tensors[x] for x in self.inputs)

        def product(hidden_slice: tf.Tensor, table_slice: tf.Tensor) -> tf.Tensor:
            # the sums over embd are not rounded to the type of their factors
            hidden_slice, table_slice = (tf.cast(x, tf.float32) for x in (hidden_slice, table_slice))
            return tf.matmul(_flat(hidden_slice, 1), table_slice, transpose_b=True)

        logits = allreduce(mesh_impl, mesh_impl.slicewise(product, hidden, table), [self.embd])
        if bias:
            logits = mesh_impl.slicewise(lambda a, b: a + tf.cast(b, tf.float32), logits, *bias)
        split = bool(split_axes(mesh_impl, [self.vocab]))
        losses = self._split_vocab if split else self._whole_vocab
        for output, value in zip(self.outputs, losses(mesh_impl, logits, labels), strict=True):
            shape = mesh_impl.slice_shape(output.shape)
            dtype = output.dtype
            value = mesh_impl.slicewise(lambda x, shape=shape, dtype=dtype: tf.cast(tf.reshape(x, shape), dtype), value)
            lowering.set_tensor_lowering(output, value)

    def _whole_vocab(self, mesh_impl: mtf.MeshImpl, logits: Any, labels: Any) -> tuple[Any, Any, Any]:
        vocab_size = self.vocab.size

        def fused(logits_slice: tf.Tensor, labels_slice: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            labels_flat = tf.clip_by_value(_flat(labels_slice, 0), 0, vocab_size - 1)
            target = tf.gather(logits_slice, labels_flat, batch_dims=1)
            with tf.control_dependencies([target]):  # the last reader of the logits writes its residual over them
                loss, residual = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
                    features=logits_slice, labels=labels_flat
                )
            return loss, loss + target, residual

        return mesh_impl.slicewise(fused, logits, labels)

    def _split_vocab(self, mesh_impl: mtf.MeshImpl, logits: Any, labels: Any) -> tuple[Any, Any, Any]:
        vocab_size = self.vocab.size

        def target(logits_slice: tf.Tensor, labels_slice: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
            labels_flat = tf.clip_by_value(_flat(labels_slice, 0), 0, vocab_size - 1)
            local, inside = rows_inside(labels_flat, start, logits_slice.shape[1])
            found = tf.gather(logits_slice, tf.where_v2(inside, local, tf.zeros_like(local)), batch_dims=1)
            return tf.where_v2(inside, found, tf.zeros_like(found))

        start = slice_start(mesh_impl, self.vocab)
        target_logits = allreduce(mesh_impl, mesh_impl.slicewise(target, logits, labels, start), [self.vocab])
        maximum = mesh_impl.slicewise(lambda a: tf.reduce_max(a, axis=1), logits)
        maximum = allreduce(mesh_impl, maximum, [self.vocab], "MAX")
        total = mesh_impl.slicewise(lambda a, m: tf.reduce_sum(tf.exp(a - m[:, tf.newaxis]), axis=1), logits, maximum)
        total = allreduce(mesh_impl, total, [self.vocab])
        log_z = mesh_impl.slicewise(lambda m, s: m + tf.log(s), maximum, total)
        cross_entropy = mesh_impl.slicewise(tf.subtract, log_z, target_logits)
        residual = mesh_impl.slicewise(lambda a, z: tf.exp(a - z[:, tf.newaxis]), logits, log_z)
        return cross_entropy, log_z, residual


class _HeadCrossEntropyGradient(SlicedOperation):
    """Inputs: hidden, table, labels, residual, dc, dz. Outputs: the gradients of hidden, of table and of a bias."""

    def __init__(self, hidden: mtf.Tensor, table: mtf.Tensor, *others: mtf.Tensor):
        self.vocab, self.embd = table.shape.dims
        bias = mtf.Shape([self.vocab])
        outputs = [(hidden.shape, hidden.dtype), (table.shape, table.dtype), (bias, table.dtype)]
        super().__init__([hidden, table, *others], outputs, "head_cross_entropy_gradient")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        vocab_size = self.vocab.size
        residual_holds_one_hot = not split_axes(mesh_impl, [self.vocab])

        def gradients(
            hidden: tf.Tensor,
            table: tf.Tensor,
            labels: tf.Tensor,
            residual: tf.Tensor,
            dc: tf.Tensor,
            dz: tf.Tensor,
            start: tf.Tensor | int,
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            flat_hidden, flat_residual = _flat(hidden, 1), _flat(residual, 1)
            flat_labels = tf.clip_by_value(_flat(labels, 0), 0, vocab_size - 1)
            dc, dz = (_flat(d, 0)[:, tf.newaxis] for d in (dc, dz))
            at_label = dz if residual_holds_one_hot else -dc
            d_logits, dtype = dc + dz, hidden.dtype  # of a residual of 1

            def product(*factors: tf.Tensor, transpose_a: bool = False) -> tf.Tensor:
                return tf.cast(tf.matmul(*(tf.cast(x, dtype) for x in factors), transpose_a=transpose_a), tf.float32)

            hidden_32 = tf.cast(flat_hidden, tf.float32)
            rows = tf.cast(gather_rows(table, flat_labels, start), tf.float32)
            d_hidden = d_logits * product(flat_residual, table) + at_label * rows
            d_table = product(flat_residual, d_logits * hidden_32, transpose_a=True)
            d_table += scatter_rows(at_label * hidden_32, flat_labels, start, table.shape[0])
            d_bias = product(flat_residual, d_logits, transpose_a=True)
            d_bias += scatter_rows(at_label, flat_labels, start, table.shape[0])
            d_hidden, d_table, d_bias = (tf.cast(d, dtype) for d in (d_hidden, d_table, d_bias))
            with tf.control_dependencies([d_table]):  # the residual is let go of before back-propagation fills memory
                d_hidden = tf.reshape(d_hidden, hidden.shape)
            return d_hidden, d_table, tf.squeeze(d_bias, 1)

        start = slice_start(mesh_impl, self.vocab)
        values = mesh_impl.slicewise(gradients, *[lowering.tensors[x] for x in self.inputs], start)
        tokens = self.inputs[2].shape.dims
        for output, value, summed in zip(self.outputs, values, ([self.vocab], tokens, tokens), strict=True):
            axes = split_axes(mesh_impl, summed)
            if axes:
                value = lazy_allreduce_sum(lowering, output, value, axes)
            lowering.set_tensor_lowering(output, value)
