"""alpha-entmax (arXiv:1905.05702): probabilities of which most are zero, and the loss that they are learned by.

p_i = [(alpha - 1) a_i - tau]_+^(1 / (alpha - 1)) of logits a, with the threshold tau at which they sum to 1. The loss
for a label y is the Fenchel-Young loss p . a - a_y + (1 - sum p^alpha) / (alpha (alpha - 1)); its gradient is
p - one_hot(y). Both stay finite however far the logits lie apart, since only their distance from the highest counts.

tau is found by bisection, which no gradient flows through.
"""

from collections.abc import Callable, Sequence

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.elementwise import elementwise
from mesh.operations import GradientFn, SlicewiseOperation, rows_inside

ALPHA = 1.3  # GPT-Neo's; 1 is softmax, 2 is sparsemax
BISECTIONS = 50  # GPT-Neo's

_LEAST = -1.0  # tau of (alpha - 1) (a - max a): the highest logit alone makes 1


def _interval(vocab_size: int) -> float:
    """From _LEAST to the tau at which logits that are all equal make 1."""
    return -((1.0 / vocab_size) ** (ALPHA - 1)) - _LEAST


def _excess(logits: tf.Tensor, peak: tf.Tensor, tau: tf.Tensor) -> tf.Tensor:
    """How far each logit [..., vocab] lies above the threshold; `peak`, the highest one, and `tau` are [...]."""
    return tf.maximum((ALPHA - 1) * (logits - peak[..., tf.newaxis]) - tau[..., tf.newaxis], 0.0)


def _power(excess: tf.Tensor) -> tf.Tensor:
    """Probabilities [..., vocab] that do not sum to 1 yet."""
    return tf.pow(excess, 1 / (ALPHA - 1))


def _sum_of_powers(logits: tf.Tensor, peak: tf.Tensor, tau: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(_power(_excess(logits, peak, tau)), axis=-1)


def entmax(logits: tf.Tensor) -> tf.Tensor:
    """Probabilities [..., vocab] of float32 logits [..., vocab]. No gradient flows."""
    peak = tf.reduce_max(logits, axis=-1)

    def halve(low: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        width = width / 2
        enough = _sum_of_powers(logits, peak, low + width) >= 1
        return low + width * tf.cast(enough, tf.float32), width

    start = (tf.fill(tf.shape(peak), _LEAST), tf.constant(_interval(logits.shape.as_list()[-1])))
    tau, _ = tf.while_loop(lambda *_: True, halve, start, maximum_iterations=BISECTIONS, back_prop=False)
    powers = _power(_excess(logits, peak, tau))
    return powers / tf.reduce_sum(powers, axis=-1, keepdims=True)


def entmax_loss(logits: mtf.Tensor, labels: mtf.Tensor) -> mtf.Tensor:
    """The loss [...] of float32 logits [..., vocab] against int32 `labels` [...].

    A label outside [0, vocab) is taken as the nearest id: give such positions no weight. Any dimension may be split.
    """
    vocab = logits.shape.dims[-1]
    peak = _highest(logits)
    tau = _threshold(logits, peak)
    total = _over_vocab(_sum_of_powers, [logits, peak, tau])
    # without the part that is the same everywhere, so that slices of the vocabulary can be summed
    inputs = [logits, _clipped(labels, vocab), peak, tau, total]
    return _over_vocab(_loss_of_slice, inputs, _loss_gradient, starts_of=[vocab]) + 1 / (ALPHA * (ALPHA - 1))


def _threshold(logits: mtf.Tensor, peak: mtf.Tensor) -> mtf.Tensor:
    """tau [...] of logits [..., vocab] whose highest are `peak` [...]."""
    mesh = logits.mesh

    def unfinished(step: mtf.Tensor, *_: mtf.Tensor) -> mtf.Tensor:
        return mtf.less(step, BISECTIONS)

    def halve(step: mtf.Tensor, low: mtf.Tensor, width: mtf.Tensor) -> list[mtf.Tensor]:
        width *= 0.5
        enough = mtf.greater_equal(_over_vocab(_sum_of_powers, [logits, peak, low + width]), 1.0)
        return [step + 1, low + width * mtf.cast(enough, tf.float32), width]

    width = mtf.constant(mesh, _interval(logits.shape.dims[-1].size), dtype=tf.float32)
    start = [mtf.constant(mesh, 0, dtype=tf.int32), mtf.zeros_like(peak) + _LEAST, width]
    # one at a time: left to itself TensorFlow begins ten, and each holds something of the size of the logits
    return mtf.while_loop(unfinished, halve, start, parallel_iterations=1)[1]


def _loss_of_slice(
    logits: tf.Tensor, labels: tf.Tensor, peak: tf.Tensor, tau: tf.Tensor, total: tf.Tensor, start: tf.Tensor | int
) -> tf.Tensor:
    """p . (a - peak) - (a_y - peak) - sum p^alpha / (alpha (alpha - 1)) over a slice of the vocabulary: [...]."""
    excess, shifted = _excess(logits, peak, tau), logits - peak[..., tf.newaxis]
    total = total[..., tf.newaxis]
    p = _power(excess) / total
    p_to_alpha = p * excess / total ** (ALPHA - 1)
    summed = tf.reduce_sum(p * shifted - p_to_alpha / (ALPHA * (ALPHA - 1)), axis=-1)
    return summed - _target_of_slice(shifted, labels, start)


def _loss_gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
    logits = op.inputs[0]

    def backward(
        dy: tf.Tensor,
        logits_slice: tf.Tensor,
        labels: tf.Tensor,
        peak: tf.Tensor,
        tau: tf.Tensor,
        total: tf.Tensor,
        start: tf.Tensor | int,
    ) -> tf.Tensor:
        p = _power(_excess(logits_slice, peak, tau)) / total[..., tf.newaxis]
        return dy[..., tf.newaxis] * (p - tf.one_hot(labels - start, logits_slice.shape[-1]))

    gradient = SlicewiseOperation(
        backward,
        [grad_ys[0], *op.inputs],
        [(logits.shape, logits.dtype)],
        starts_of=[logits.shape.dims[-1]],
        name="entmax_loss_gradient",
    )
    return [gradient.outputs[0], None, None, None, None]


def softmax_terms(logits: mtf.Tensor, labels: mtf.Tensor) -> tuple[mtf.Tensor, mtf.Tensor]:
    """(cross entropy, log of the softmax's normalizer), each [...], of the logits and labels of `entmax_loss`, in nats.

    No gradient flows through the cross entropy, which is there to be reported.
    """
    vocab = logits.shape.dims[-1]
    peak = _highest(logits)

    def sum_of_exponentials(logits_slice: tf.Tensor, peak_slice: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.exp(logits_slice - peak_slice[..., tf.newaxis]), axis=-1)

    total = _over_vocab(sum_of_exponentials, [logits, peak], _exponentials_gradient)
    log_z = peak + elementwise(tf.log, total, "log")
    targets = _over_vocab(_target_of_slice, [logits, _clipped(labels, vocab)], starts_of=[vocab])
    return mtf.stop_gradient(log_z - targets), log_z


def _exponentials_gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
    logits, peak = op.inputs

    def backward(dy: tf.Tensor, logits_slice: tf.Tensor, peak_slice: tf.Tensor) -> tf.Tensor:
        return dy[..., tf.newaxis] * tf.exp(logits_slice - peak_slice[..., tf.newaxis])

    gradient = SlicewiseOperation(
        backward, [grad_ys[0], logits, peak], [(logits.shape, logits.dtype)], name="softmax_normalizer_gradient"
    )
    return [gradient.outputs[0], None]


def _target_of_slice(logits: tf.Tensor, labels: tf.Tensor, start: tf.Tensor | int) -> tf.Tensor:
    """The labels' logits [...] where they lie in this slice [..., vocab], else 0."""
    local, inside = rows_inside(labels, start, logits.shape[-1])
    found = tf.gather(logits, tf.where_v2(inside, local, tf.zeros_like(local)), batch_dims=labels.shape.ndims)
    return tf.where_v2(inside, found, tf.zeros_like(found))


def _over_vocab(
    fn: Callable[..., tf.Tensor],
    inputs: Sequence[mtf.Tensor],
    gradient: GradientFn | None = None,
    starts_of: Sequence[mtf.Dimension] = (),
) -> mtf.Tensor:
    """`fn` [...] of logits [..., vocab] and others [...], summed over the slices of the vocabulary."""
    logits, rows = inputs[0], inputs[1].shape
    operation = SlicewiseOperation(
        fn,
        inputs,
        [(rows, tf.float32)],
        reduced_dims=[logits.shape.dims[-1]],
        starts_of=starts_of,
        gradient=gradient,
        name="over_vocab",
    )
    return operation.outputs[0]


def _clipped(labels: mtf.Tensor, vocab: mtf.Dimension) -> mtf.Tensor:
    return mtf.maximum(mtf.minimum(labels, vocab.size - 1), 0)


def _highest(logits: mtf.Tensor) -> mtf.Tensor:
    """[..., vocab] -> [...]"""
    return mtf.reduce_max(mtf.stop_gradient(logits), reduced_dim=logits.shape.dims[-1])
