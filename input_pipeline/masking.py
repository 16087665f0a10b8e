"""Masked language modelling (BERT, arXiv:1810.04805): hide some tokens of a window and score the model on those.

Which tokens are hidden, and behind what, is a pure function of a key and the number of the sample. So a resumed run and
any mesh see the same masks, and an evaluation sees the same ones every time.
"""

from collections.abc import Callable

import tensorflow.compat.v1 as tf

from config import ModelConfig
from data.encoders import SpecialIds
from input_pipeline.order import stream_key

NOT_SCORED = -1  # the label of a position that is not scored: no token has this id
OWN_MASK = (
    "give the mask an id that no text has: the one that data/train_tokenizer.py --mask_token reserves, or the first "
    "past the tokenizer's vocabulary, with an n_vocab that holds it"
)


def text_tokens(config: ModelConfig) -> int:
    """How many tokens of a window a masked model sees: n_ctx, less one where a CLS token stands in front of them."""
    return config.n_ctx - (config.mlm_cls_token_id is not None)


def masked(
    windows: tf.data.Dataset, config: ModelConfig, special_ids: SpecialIds, first: tf.Tensor, evaluate: bool
) -> tf.data.Dataset:
    """Windows int64 [n_ctx + 1] as (inputs, labels), both int64 [n_ctx]: some tokens hidden, and what stood there.

    Each token is chosen with probability mlm_mask_prob. A chosen token stays with mlm_same_token_prob, becomes any
    token of the vocabulary with mlm_random_token_prob, and the mask otherwise. Its position is scored in all three
    cases and no other is: their labels are NOT_SCORED. Padding, the mask, CLS and mlm_mask_ignore_ids are never chosen.

    Args:
        windows: their elements may be tuples that begin with the window; the rest is passed on.
        first: int64 [], the number of the first window since the beginning of training or evaluation.
        evaluate: whether to draw as evaluation does, for every model alike, and not by the config's seed.
    """
    mask = _masking(config, special_ids, evaluate)

    def example(number: tf.Tensor, sample: tf.Tensor | tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        window, *rest = sample if isinstance(sample, tuple) else (sample,)
        return (*mask(number, window), *rest)

    return windows.enumerate(first).map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _masking(
    config: ModelConfig, special_ids: SpecialIds, evaluate: bool
) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """(number of the sample [], window [n_ctx + 1]) -> (inputs, labels) [n_ctx]"""
    purpose = (0, "evaluation") if evaluate else (config.seed,)
    key, replacement_key = (stream_key(*purpose, name) for name in ("mask", "replacement"))
    length, cls = config.n_ctx, config.mlm_cls_token_id
    front = [] if cls is None else [cls]
    never = [special_ids.padding_id, config.mlm_mask_id, *front, *config.mlm_mask_ignore_ids]
    same, same_or_random = config.mlm_same_token_prob, config.mlm_same_token_prob + config.mlm_random_token_prob

    def mask(number: tf.Tensor, window: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tokens = tf.concat([tf.constant(front, tf.int64), window[: text_tokens(config)]], axis=0)
        choice, kind = tf.unstack(tf.random.stateless_uniform([2, length], [key, number], alg="philox"))
        others = tf.random.stateless_uniform(
            [length], [replacement_key, number], 0, config.n_vocab, tf.int64, alg="philox"
        )
        may_be_chosen = tf.reduce_all(tf.not_equal(tokens[:, None], tf.constant(never, tf.int64)), axis=1)
        chosen = may_be_chosen & (choice < config.mlm_mask_prob)
        hidden = tf.where(kind < same_or_random, others, tf.fill([length], tf.constant(config.mlm_mask_id, tf.int64)))
        inputs = tf.where(chosen & (kind >= same), hidden, tokens)
        labels = tf.where(chosen, tokens, tf.fill([length], tf.constant(NOT_SCORED, tf.int64)))
        return tf.ensure_shape(inputs, [length]), tf.ensure_shape(labels, [length])

    return mask


def mask_problem(config: ModelConfig, special_ids: SpecialIds) -> str | None:
    """What is wrong where mlm_mask_id is the token that ends or fills up a text, which the model must tell from it."""
    for name in ("eos_id", "padding_id"):
        if config.mlm_training and getattr(special_ids, name) == config.mlm_mask_id:
            return f"mlm_mask_id is {config.mlm_mask_id}, which is the {name} as well; {OWN_MASK}"
    return None
