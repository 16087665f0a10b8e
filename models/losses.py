"""What training minimises."""

from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from mesh.entmax import entmax_loss, softmax_terms
from models.context import Context


@dataclass(frozen=True)
class Head:
    """What turns final states into logits: states x `table` [vocab, embd] + `bias` [vocab], where there is one."""

    table: mtf.Tensor
    bias: mtf.Tensor | None = None

    def logits(self, states: mtf.Tensor) -> mtf.Tensor:
        """[..., embd] -> float32 [..., vocab]"""
        vocab, embd = self.table.shape.dims
        factors = [mtf.cast(x, tf.float32) for x in (states, self.table)]
        product = mtf.einsum(factors, states.shape - embd + vocab)
        return product if self.bias is None else product + mtf.cast(self.bias, tf.float32)


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every position, [batch, sequence] float32, in nats; and the mean loss that layers add in training."""

    cross_entropy: mtf.Tensor
    objective: mtf.Tensor  # cross entropy, or entmax loss, + z_loss * log(z)^2
    auxiliary: mtf.Tensor | None = None  # float32 scalar, where there is any


def token_losses(ctx: Context, hidden: mtf.Tensor, head: Head, labels: mtf.Tensor) -> TokenLosses:
    """Losses of `head` on `hidden` [batch, sequence, embd] against int32 `labels` [batch, sequence].

    The z-loss keeps the softmax's normalizer near 1 (Mesh-TensorFlow; arXiv:2204.02311). It does so under entmax_loss
    too, where all else would be the same if every logit were higher.
    """
    if ctx.config.entmax_loss:
        logits = head.logits(hidden)
        cross_entropy, log_z = softmax_terms(logits, labels)
        loss = entmax_loss(logits, labels)
    else:
        cross_entropy, log_z = head_cross_entropy(hidden, head.table, labels, head.bias)
        loss = cross_entropy
    return TokenLosses(cross_entropy, loss + ctx.config.z_loss * mtf.square(log_z))
