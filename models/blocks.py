"""The residual block."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from models.attention import attention
from models.context import Context
from models.feedforward import mlp
from models.mixture_of_experts import mixture
from models.normalization import gate, normalize


def block(ctx: Context, x: mtf.Tensor, layer: int) -> tuple[mtf.Tensor, ...]:
    """[..., embd] -> ([..., embd], then its auxiliary loss, if any): GPT-2's pre-norm block and its variants.

    A layer whose attention is `none` is feed-forward alone (PAR Transformer, arXiv:2009.04534). Under macaron a half
    step of another MLP on the raw stream comes first, and the last MLP makes a half step too (arXiv:1906.02762). In a
    layer of `moe_layers`, experts stand in for the last MLP.
    """
    config, kind = ctx.config, ctx.config.layer_attention[layer]
    ctx = ctx.in_layer(layer)
    step = 0.5 if config.macaron else 1.0
    with tf.variable_scope("" if config.share_parameters else f"h{layer}", reuse=tf.AUTO_REUSE):
        if config.macaron:
            x += step * mlp(ctx, x, "mlp_macaron")
        if kind != "none":
            x += gate(ctx, attention(ctx, normalize(ctx, x, "norm_1"), kind), "norm_rezero_1")
        normed = normalize(ctx, x, "norm_2")
        out, *auxiliary = mixture(ctx, normed) if layer in config.moe_layers else (mlp(ctx, normed, "mlp"),)
        x += gate(ctx, step * out, "norm_rezero_2")
    return x, *auxiliary
