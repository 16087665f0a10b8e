"""The decode loop: from a function that gives the next token's logits to sampled continuations. Knows no model."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.entmax import entmax
from mesh.operations import SlicewiseOperation, cache_update
from mesh.randomness import fold_in, uniform

States = list[mtf.Tensor]
# (token [batch] int32, position [] int32, states) -> (logits [batch, vocab] float32, states)
StepFn = Callable[[mtf.Tensor, mtf.Tensor, States], tuple[mtf.Tensor, States]]

_NEVER = -1e30  # logit of a token that may not be drawn


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the k likeliest tokens may be drawn; 0 means all.
      top_p: only the likeliest tokens that together hold this probability may be drawn (arXiv:1904.09751); 1 means all.
      max_new_tokens: tokens added to each prompt at most; None means up to the end of the context.
      seed: the same seed draws the same continuations.
      entmax: draw from the probabilities of alpha-entmax, most of which are 0, instead of those of softmax.
    """

    temperature: float = 0.9
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0
    entmax: bool = False


def filter_logits(logits: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """[rows, vocab] logits after temperature, top-k, entmax and top-p, in this order.

    Their softmax are the probabilities to draw with. Tokens that may not be drawn get a logit of -1e30.
    """
    # the highest logit becomes 0 first, so that no temperature, however small, makes it infinite
    logits = (logits - tf.reduce_max(logits, axis=-1, keepdims=True)) / sampling.temperature
    never = tf.fill(tf.shape(logits), _NEVER)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = tf.math.top_k(logits, sampling.top_k).values[:, -1:]
        logits = tf.where_v2(logits >= least, logits, never)
    if sampling.entmax:
        probabilities = entmax(logits)
        logits = tf.where_v2(probabilities > 0, tf.log(probabilities), never)
    if sampling.top_p < 1.0:
        descending = tf.sort(logits, axis=-1, direction="DESCENDING")
        likelier = tf.cumsum(tf.nn.softmax(descending), axis=-1, exclusive=True)
        # a token stays while the likelier ones hold less than top_p, so the likeliest always does
        least = tf.reduce_min(tf.where_v2(likelier < sampling.top_p, descending, -never), axis=-1, keepdims=True)
        logits = tf.where_v2(logits >= least, logits, never)
    return logits


def draw(logits: mtf.Tensor, key: mtf.Tensor, sampling: Sampling) -> mtf.Tensor:
    """Next tokens [batch] int32 from logits [batch, vocab] float32."""
    batch, vocab = logits.shape.dims
    whole = mtf.Dimension("sampled_vocab", vocab.size)  # a name that no layout splits
    logits = mtf.rename_dimension(logits, vocab.name, whole.name)
    result = [(mtf.Shape([batch]), tf.int32)]
    if sampling.temperature == 0:
        likeliest = SlicewiseOperation(_argmax, [logits], result, name="greedy")
        return likeliest.outputs[0]
    noise = uniform(key, logits.shape, "sample")

    def gumbel_max(logits_slice: tf.Tensor, noise_slice: tf.Tensor) -> tf.Tensor:
        gumbel = -tf.log(-tf.log(tf.maximum(noise_slice, 1e-20)))  # uniform draws include 0
        return _argmax(filter_logits(logits_slice, sampling) + gumbel)

    return SlicewiseOperation(gumbel_max, [logits, noise], result, name="sample").outputs[0]


def _argmax(logits: tf.Tensor) -> tf.Tensor:
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def decode(
    prompts: mtf.Tensor,
    prompt_lengths: mtf.Tensor,
    states: States,
    step: StepFn,
    key: mtf.Tensor,
    sampling: Sampling,
    eos_id: int,
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """Continue every prompt until it draws `eos_id`, has `max_new_tokens`, or is as long as the sequence.

    Args:
      prompts: [batch, sequence] int32; what lies past a prompt's length is ignored.
      prompt_lengths: [batch] int32, at least 1.
      states: what `step` remembers of the positions before the last one of the shortest prompt.
      step: see StepFn.
      key: random key of this decoding.
      sampling: how to draw.
      eos_id: the token that ends a text.

    Returns:
      tokens [batch, sequence] int32, the prompt untouched at the front and `eos_id` past the end of each text, and
      lengths [batch] int32 of prompt and continuation together, without the `eos_id` that ended it.
    """
    batch, sequence = prompts.shape.dims
    mesh = prompts.mesh
    by_position = mtf.Shape([mtf.Dimension("position", sequence.size), batch])  # a name that no layout splits
    tokens = mtf.transpose(mtf.rename_dimension(prompts, sequence.name, "position"), by_position)
    limit = mtf.constant(mesh, sequence.size, dtype=tf.int32)
    if sampling.max_new_tokens is not None:
        limit = mtf.minimum(prompt_lengths + sampling.max_new_tokens, sequence.size)
    limits = mtf.broadcast(limit, prompt_lengths.shape)
    start = mtf.reduce_min(prompt_lengths) - 1
    open_rows = mtf.cast(mtf.less(prompt_lengths, limits), tf.int32)

    def unfinished(
        position: mtf.Tensor, tokens: mtf.Tensor, lengths: mtf.Tensor, open_: mtf.Tensor, *_: mtf.Tensor
    ) -> mtf.Tensor:
        room = mtf.less(position, sequence.size - 1)
        return mtf.logical_and(room, mtf.greater(mtf.reduce_max(open_), 0))

    def advance(
        position: mtf.Tensor, tokens: mtf.Tensor, lengths: mtf.Tensor, open_: mtf.Tensor, *states: mtf.Tensor
    ) -> list[mtf.Tensor]:
        logits, new_states = step(_row(tokens, position), position, list(states))
        drawn = draw(logits, fold_in(key, position), sampling)
        position += 1
        in_prompt = mtf.cast(mtf.less(position, prompt_lengths), tf.int32)
        is_open = open_ * (1 - in_prompt)  # rows that take what was drawn
        goes_on = is_open * mtf.cast(mtf.not_equal(drawn, eos_id), tf.int32)
        closed = (1 - is_open) * (1 - in_prompt)
        token = in_prompt * _row(tokens, position) + is_open * drawn + closed * eos_id
        lengths += goes_on
        open_ = open_ * in_prompt + goes_on * mtf.cast(mtf.less(position + 1, limits), tf.int32)
        return [position, cache_update(tokens, token, position), lengths, open_, *new_states]

    loop = mtf.while_loop(unfinished, advance, [start, tokens, prompt_lengths, open_rows, *states])
    tokens, lengths = loop[1], loop[2]
    tokens = mtf.rename_dimension(mtf.transpose(tokens, mtf.Shape(by_position.dims[::-1])), "position", sequence.name)
    inside = mtf.less(mtf.range(mesh, sequence, tf.int32), lengths, output_shape=prompts.shape)
    inside = mtf.cast(inside, tf.int32)
    return inside * tokens + (1 - inside) * eos_id, lengths


def _row(tokens: mtf.Tensor, position: mtf.Tensor) -> mtf.Tensor:
    """Tokens [position, batch] -> those at `position` [batch]."""
    batch = tokens.shape.dims[1]
    return SlicewiseOperation(
        tf.gather, [tokens, position], [(mtf.Shape([batch]), tokens.dtype)], name="token_row"
    ).outputs[0]
