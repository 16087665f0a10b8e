"""GPT: embeddings, residual blocks, final norm, head."""

from dataclasses import replace

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import embedding_lookup
from models.blocks import block
from models.context import Context
from models.feedforward import kernel_stddev
from models.losses import Head, TokenLosses, token_losses
from models.normalization import layer_norm
from models.positions import position_embeddings

EMBEDDING_STDDEV = 0.02  # GPT-2


def hidden_states(ctx: Context, tokens: mtf.Tensor) -> tuple[mtf.Tensor, Head]:
    """int32 tokens [batch, sequence] -> (normed final states [batch, sequence, embd], the head that reads them).

    In a decoding step tokens are [batch] and the states [batch, embd].
    """
    config, dims = ctx.config, ctx.dims
    with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
        wte = ctx.normal("wte", [dims.vocab, dims.embd], EMBEDDING_STDDEV)
        x = embedding_lookup(wte, tokens)
        positions = position_embeddings(ctx)
        if positions is not None:
            x += positions
        x = ctx.dropout(x, config.embed_dropout, "embed_dropout")
        for layer in range(config.n_layer):
            if config.recompute_grad and ctx.dropout_key is not None:
                x, *auxiliary = mtf.recompute_grad(lambda x, layer=layer: block(ctx, x, layer), [x])
            else:
                x, *auxiliary = block(ctx, x, layer)
            ctx.auxiliary.extend(auxiliary)
        if ctx.final_norm:
            x = layer_norm(ctx, x, "ln_f")
        return x, _untied_head(ctx) if config.no_weight_tie else Head(wte)


def _untied_head(ctx: Context) -> Head:
    """A head of its own, variables wte_final_linear/conv1d_main/linear_out/{kernel [embd, vocab], bias [vocab]}."""
    vocab, embd = ctx.dims.vocab, ctx.dims.embd
    with tf.variable_scope("wte_final_linear/conv1d_main/linear_out"):
        kernel = ctx.normal("kernel", [embd, vocab], kernel_stddev(ctx, embd))
        bias = ctx.constant("bias", [vocab], 0.0)
    return Head(mtf.transpose(kernel, mtf.Shape([vocab, embd])), bias)


def logits(ctx: Context, tokens: mtf.Tensor) -> mtf.Tensor:
    """int32 tokens [batch, sequence] -> float32 [batch, sequence, vocab]; without `sequence` in a decoding step."""
    hidden, head = hidden_states(ctx, tokens)
    return head.logits(hidden)


def losses(ctx: Context, tokens: mtf.Tensor, labels: mtf.Tensor) -> TokenLosses:
    """Losses [batch, sequence] of predicting int32 `labels` from int32 `tokens`, both [batch, sequence]."""
    hidden, head = hidden_states(ctx, tokens)
    auxiliary = mtf.add_n(ctx.auxiliary) if ctx.auxiliary else None
    return replace(token_losses(ctx, hidden, head, labels), auxiliary=auxiliary)
