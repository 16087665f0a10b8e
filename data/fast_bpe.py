"""Byte-level BPE by tiktoken: the ids that `tokenizers` gives, several times as fast (docs/performance.md).

tiktoken knows one rule: of all neighbours in a word, join first the two that make the token of the lowest rank. In a
vocabulary of GPT-2's kind the ranks are the order of the merges, and the rule gives what the merges give if

- no two merges make the same token, and every merge joins bytes or what earlier merges made, and
- every token, spelled out and encoded by the merges, is that token.

For then the merges before a token's own leave of its spelling just the two parts that its own merge joins, wherever it
occurs; there are no two other neighbours that spell it, which tiktoken would join and the merges would not. All three
are looked at before tiktoken is used; so are the words, which must be cut as GPT-2 cuts them.
"""

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models

from data.encoders import Encoder

# What `tokenizers` cuts text by where the pre-tokenizer is ByteLevel: contractions, letters, digits, signs, blanks.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken looks for special tokens between any two characters if it is given none; these no text holds.
_ABSENT = "\U0010ffff\U0010fffe\U0010ffff"
# Its pattern for blanks looks back, for which it has room for a million characters: longer runs make it panic.
_BLANKS = 100_000
_MANY_BLANKS = re.compile(rf"(?<!\s)\s{{{_BLANKS}}}")
_MOST_SPELLINGS = 50  # a search of the text for each; past these, `tokenizers` does it all


class FastEncoder:
    """An Encoder's ids by tiktoken. It can be pickled."""

    def __init__(
        self, encoder: Encoder, ranks: dict[bytes, int], ids: Sequence[int], spellings: Sequence[str], special: bool
    ) -> None:
        self._encoder = encoder
        self._bpe = tiktoken.Encoding(
            "merges", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={_ABSENT: len(ranks)}
        )
        self._ids = np.array(ids, np.int32)  # of each rank
        self._spellings = tuple(spellings)
        self._allow_special = special

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]: what `Encoder.encode` gives."""
        if any(spelling in text for spelling in self._spellings) or (
            len(text) >= _BLANKS and _MANY_BLANKS.search(text)
        ):
            return np.array(self._encoder.encode(text, allow_special=self._allow_special), np.int32)
        return self._ids[self._bpe.encode_to_numpy(text, disallowed_special=())]

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether the ids are the encoder's for these texts."""
        expected = self._encoder.encode_batch(texts, allow_special=self._allow_special)
        return all(self.encode(text).tolist() == ids for text, ids in zip(texts, expected, strict=True))


def make_fast_encoder(encoder: Encoder, allow_special: bool) -> FastEncoder | None:
    """tiktoken for this tokenizer; None if it is none that tiktoken can stand in for.

    Args:
        encoder: the tokenizer.
        allow_special: whether spellings of special tokens in a text become these tokens.
    """
    settings = encoder.settings
    words, model = settings.get("pre_tokenizer") or {}, settings["model"]
    if settings.get("normalizer") is not None or (words.get("type"), words.get("use_regex", True)) != (
        "ByteLevel",
        True,
    ):
        return None
    unlike = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if words.get("add_prefix_space") or model["type"] != "BPE" or any(model.get(key) for key in unlike):
        return None
    spellings = [token["content"] for token in settings["added_tokens"] if allow_special or not token["special"]]
    ranks = _ranks(model)
    if ranks is None or len(spellings) > _MOST_SPELLINGS or not _are_reached(model, ranks):
        return None
    alphabet = byte_alphabet()
    by_bytes = {bytes(alphabet[character] for character in token): rank for token, rank in ranks.items()}
    ids = [model["vocab"][token] for token in ranks]
    return FastEncoder(encoder, by_bytes, ids, spellings, allow_special)


def byte_alphabet() -> dict[str, int]:
    """{character: the byte it stands for}: GPT-2's, printable Latin-1 as it is and the other bytes from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return {chr(byte) if byte in printable else chr(next(others)): byte for byte in range(256)}


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files write the two tokens with a space between."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _ranks(model: dict[str, Any]) -> dict[str, int] | None:
    """{token: its rank} for bytes and merges in order; None if a merge makes a token again or joins unknown ones."""
    ranks = {character: rank for rank, character in enumerate(byte_alphabet())}
    for left, right in _pairs(model):
        if left + right in ranks or left not in ranks or right not in ranks:
            return None
        ranks[left + right] = len(ranks)
    return ranks if ranks.keys() <= model["vocab"].keys() else None


def _are_reached(model: dict[str, Any], ranks: dict[str, int]) -> bool:
    """Whether the merges make every token of its own spelling."""
    merges = Tokenizer(models.BPE(model["vocab"], _pairs(model)))
    encodings = merges.encode_batch_fast(list(ranks), add_special_tokens=False)
    return all(encoding.ids == [model["vocab"][token]] for token, encoding in zip(ranks, encodings, strict=True))
