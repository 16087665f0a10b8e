"""What training minimises."""

from dataclasses import dataclass

from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from models.context import Context


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every position, [batch, sequence] float32, in nats."""

    cross_entropy: mtf.Tensor
    objective: mtf.Tensor  # cross entropy + z_loss * log(z)^2


def token_losses(ctx: Context, hidden: mtf.Tensor, table: mtf.Tensor, labels: mtf.Tensor) -> TokenLosses:
    """Losses of the head `table` [vocab, embd] on `hidden` [batch, sequence, embd] against `labels` [batch, sequence].

    The z-loss keeps the softmax's normalizer near 1 (Mesh-TensorFlow; arXiv:2204.02311).
    """
    cross_entropy, log_z = head_cross_entropy(hidden, table, labels)
    return TokenLosses(cross_entropy, cross_entropy + ctx.config.z_loss * mtf.square(log_z))
