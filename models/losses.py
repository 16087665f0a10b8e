"""What training minimises."""

from dataclasses import dataclass

from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from models.context import Context


@dataclass(frozen=True)
class Head:
    """What turns final states into logits: states x `table` [vocab, embd] + `bias` [vocab], where there is one."""

    table: mtf.Tensor
    bias: mtf.Tensor | None = None


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every position, [batch, sequence] float32, in nats."""

    cross_entropy: mtf.Tensor
    objective: mtf.Tensor  # cross entropy + z_loss * log(z)^2


def token_losses(ctx: Context, hidden: mtf.Tensor, head: Head, labels: mtf.Tensor) -> TokenLosses:
    """Losses of `head` on `hidden` [batch, sequence, embd] against int32 `labels` [batch, sequence].

    The z-loss keeps the softmax's normalizer near 1 (Mesh-TensorFlow; arXiv:2204.02311).
    """
    cross_entropy, log_z = head_cross_entropy(hidden, head.table, labels, head.bias)
    return TokenLosses(cross_entropy, cross_entropy + ctx.config.z_loss * mtf.square(log_z))
