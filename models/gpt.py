"""GPT: embeddings, residual blocks, final norm, tied head."""

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import embedding_lookup
from models.blocks import block
from models.context import Context
from models.losses import TokenLosses, token_losses
from models.normalization import layer_norm
from models.positions import learned_positions

EMBEDDING_STDDEV = 0.02  # GPT-2


def hidden_states(ctx: Context, tokens: mtf.Tensor) -> tuple[mtf.Tensor, mtf.Tensor]:
    """int32 tokens [batch, sequence] -> (normed final states [batch, sequence, embd], head [vocab, embd]).

    In a decoding step tokens are [batch] and the states [batch, embd].
    """
    config, dims = ctx.config, ctx.dims
    with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
        wte = ctx.normal("wte", [dims.vocab, dims.embd], EMBEDDING_STDDEV)
        x = embedding_lookup(wte, tokens) + learned_positions(ctx)
        x = ctx.dropout(x, config.embed_dropout, "embed_dropout")
        for layer in range(config.n_layer):
            if config.recompute_grad and ctx.dropout_key is not None:
                x = mtf.recompute_grad(lambda x, layer=layer: block(ctx, x, layer), [x])
            else:
                x = block(ctx, x, layer)
        return layer_norm(ctx, x, "ln_f"), wte


def logits(ctx: Context, tokens: mtf.Tensor) -> mtf.Tensor:
    """int32 tokens [batch, sequence] -> float32 [batch, sequence, vocab]; without `sequence` in a decoding step."""
    hidden, head = hidden_states(ctx, tokens)
    return mtf.cast(mtf.einsum([hidden, head], mtf.Shape([*ctx.activation_dims, ctx.dims.vocab])), tf.float32)


def losses(ctx: Context, tokens: mtf.Tensor, labels: mtf.Tensor) -> TokenLosses:
    """Losses [batch, sequence] of predicting int32 `labels` from int32 `tokens`, both [batch, sequence]."""
    hidden, head = hidden_states(ctx, tokens)
    return token_losses(ctx, hidden, head, labels)
