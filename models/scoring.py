"""How well the model predicts chosen tokens, without the logits of all the others."""

from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import SlicewiseOperation
from models import gpt
from models.context import Context


@dataclass(frozen=True)
class Scores:
    """Of each scored token, float32 [batch, scored]; 0 where there is none.

    Attributes:
      is_scored: 1 where there is a token.
      loss: its negative log probability, in nats.
      is_likeliest: 1 where no other token is likelier.
    """

    is_scored: mtf.Tensor
    loss: mtf.Tensor
    is_likeliest: mtf.Tensor


def score(ctx: Context, tokens: mtf.Tensor, positions: mtf.Tensor, labels: mtf.Tensor) -> Scores:
    """Scores of int32 `labels` [batch, scored] as the tokens after `positions` [batch, scored] of `tokens` [batch,
    sequence]; a label below 0 stands for none."""
    hidden, head = gpt.hidden_states(ctx, tokens)
    chosen = mtf.one_hot(positions, ctx.dims.sequence, dtype=hidden.dtype)
    hidden = mtf.einsum([hidden, chosen], mtf.Shape([*labels.shape.dims, ctx.dims.embd]))
    logits = head.logits(hidden)
    # a name that no layout splits, since the likeliest token is sought among all
    logits = mtf.rename_dimension(logits, ctx.dims.vocab.name, "scored_vocab")
    outputs = [(labels.shape, tf.float32)] * 3
    return Scores(*SlicewiseOperation(_score, [logits, labels], outputs, name="score").outputs)


def _score(logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    is_scored = tf.cast(labels >= 0, tf.float32)
    known = tf.maximum(labels, 0)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=known, logits=logits)
    is_likeliest = tf.cast(tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), known), tf.float32)
    return is_scored, is_scored * loss, is_scored * is_likeliest
