"""The residual block."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from models.attention import attention
from models.context import Context
from models.feedforward import mlp
from models.normalization import layer_norm


def block(ctx: Context, x: mtf.Tensor, layer: int) -> mtf.Tensor:
    """[..., embd] -> [..., embd]: the pre-norm transformer block of GPT-2."""
    with tf.variable_scope(f"h{layer}"):
        x += attention(ctx, layer_norm(ctx, x, "norm_1"), ctx.config.layer_attention[layer])
        x += mlp(ctx, layer_norm(ctx, x, "norm_2"))
    return x
