"""Tokenizers: load one, encode, decode, and tell which ids end and pad a document.

Every tokenizer runs on the `tokenizers` library: its own JSON files, and the fast tokenizers of `transformers`, which
are the same thing under a wrapper that is left behind here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from config import read_text
from data.files import exists, is_folder, is_remote, join
from errors import UserError

if TYPE_CHECKING:
    from config import DatasetConfig, ModelConfig

# What tokenizers call the token that ends a document and the one that pads a batch; the first that exists is meant.
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>")
PADDING_NAMES = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")

# GPT-2's tokenizer on the model hub. Its ids are known, so telling them needs no download.
GPT2_NAMES = frozenset(
    owner + name for owner in ("", "openai-community/") for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
)
GPT2_VOCAB_SIZE = 50257
GPT2_EOS_ID = 50256
GPT2_PADDING_ID = 50257  # GPT-2 has no token for padding: the first id past its vocabulary, masked before the lookup

# A byte-level vocabulary as two files, in transformers' and in OpenAI's naming.
_VOCABULARY_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class SpecialIds:
    """The token that ends a document and the one that pads a batch (which may lie past the vocabulary)."""

    eos_id: int
    padding_id: int


class Encoder:
    """A tokenizer: text to ids and back. It can be pickled, and so sent to other processes.

    Args:
        tokenizer_json: the text of a `tokenizers` JSON file.
        eos_id: where the caller knows it; looked up by its usual names otherwise.
        padding_id: likewise.

    Attributes:
        tokenizer_json: what it was made from.
        settings: the same as an object, without what would lose, add or randomise tokens.
        vocab_size: one more than the largest id, the size that an embedding needs.
        eos_id: None where the tokenizer has no such token.
        padding_id: None where the tokenizer has no such token.
        sha256: of `tokenizer_json`, in hexadecimal.
    """

    def __init__(self, tokenizer_json: str, eos_id: int | None = None, padding_id: int | None = None) -> None:
        settings = _without_surprises(json.loads(tokenizer_json))
        self.settings = settings
        self.tokenizer_json = tokenizer_json
        self._decoder_type = _types(settings["decoder"])
        self._special_ids = {token["id"] for token in settings["added_tokens"] if token["special"]}
        self._tokenizer = Tokenizer.from_str(json.dumps(settings))
        # Special tokens are cut out of a text before the model sees it, unless this is set: then their spellings are
        # ordinary text. It is not part of the JSON, so it is set wherever a tokenizer is made from it.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.eos_id = eos_id if eos_id is not None else _first(vocabulary, EOS_NAMES)
        self.padding_id = padding_id if padding_id is not None else _first(vocabulary, PADDING_NAMES)
        if self.padding_id is None and (self.vocab_size, self.eos_id) == (GPT2_VOCAB_SIZE, GPT2_EOS_ID):
            self.padding_id = GPT2_PADDING_ID
        self.sha256 = sha256(tokenizer_json.encode()).hexdigest()

    def __reduce__(self) -> tuple[type["Encoder"], tuple[str, int | None, int | None]]:
        return Encoder, (self.tokenizer_json, self.eos_id, self.padding_id)

    @cached_property
    def _special_tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of a text, with nothing added. What spells a special token is ordinary text unless allow_special."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` for each text; several at a time unless TOKENIZERS_PARALLELISM is "false"."""
        tokenizer = self._special_tokenizer if allow_special else self._tokenizer
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens spelled out; exactly the text that was encoded if the tokenizer keeps it all.

        Ids that stand for nothing (padding past the vocabulary) are left out; bytes that are no UTF-8 become U+FFFD.
        """
        known = [int(token) for token in ids if 0 <= token < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def token_byte_lengths(self) -> np.ndarray | None:
        """int32 [vocab_size]: the bytes of text that each id stands for, 0 for special tokens and unused ids.

        The lengths of a text's ids add up to the UTF-8 length of what `decode` gives back for them. None if the
        tokenizer is not a byte-level one: then tokens have no length of their own.
        """
        if "ByteLevel" not in self._decoder_type:
            return None
        # Byte-level vocabularies write each byte as one printable character, the GPT-2 alphabet. A token with any other
        # character was added as it is read (the runs of spaces of GPT-NeoX's tokenizer).
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        lengths = np.zeros(self.vocab_size, np.int32)
        special = self._special_ids | {self.eos_id, self.padding_id}
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in special:
                lengths[index] = len(token) if alphabet.issuperset(token) else len(token.encode())
        return lengths


def _without_surprises(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's JSON object with what would lose, add or randomise tokens taken out."""
    settings = settings | {"truncation": None, "padding": None}
    settings["model"] = settings["model"] | ({"dropout": None} if "dropout" in settings["model"] else {})
    names = {*EOS_NAMES, *PADDING_NAMES}
    settings["added_tokens"] = [
        token | {"special": token["special"] or token["content"] in names} for token in settings.get("added_tokens", [])
    ]
    if settings.get("decoder") is None:  # decoding would set a space between any two tokens
        is_byte_level = "ByteLevel" in _types(settings.get("pre_tokenizer"))
        settings["decoder"] = json.loads(decoders.ByteLevel().__getstate__()) if is_byte_level else None
    return settings


def _types(part: Mapping[str, Any] | None) -> set[str]:
    """The type names of a tokenizer's part: one, or those that a sequence is made of."""
    if part is None:
        return set()
    inner = part.get("decoders", part.get("pretokenizers", []))
    return {part["type"]}.union(*map(_types, inner))


def _first(vocabulary: Mapping[str, int], names: Iterable[str]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def load_encoder(dataset: "DatasetConfig") -> Encoder:
    """The tokenizer of a dataset config; UserError if it names none or one that can't be loaded."""
    if not dataset.tokenizer_path:
        raise UserError(
            f'dataset {dataset.id}: tokenizer_path is not set; give a tokenizers JSON file, or "gpt2" with '
            "tokenizer_is_pretrained true"
        )
    try:
        return load_encoder_from(dataset.tokenizer_path, dataset.tokenizer_is_pretrained)
    except UserError as error:
        raise UserError(f"dataset {dataset.id}: {error}") from error


def load_encoder_from(path_or_name: str, is_pretrained: bool = False) -> Encoder:
    """Load a tokenizer.

    Args:
        path_or_name: a `tokenizers` JSON file (local or gs://); a local folder with a transformers tokenizer, or with a
            vocabulary and its merges (vocab.json and merges.txt, or encoder.json and vocab.bpe); with is_pretrained,
            also a name on the model hub.
        is_pretrained: whether a name that is no file or folder may be looked up on the model hub.

    Raises:
        UserError: there is no such tokenizer, it can't be reached, or it is not what it is said to be.
    """
    if is_remote(path_or_name) or (exists(path_or_name) and not is_folder(path_or_name)):
        return _from_json_file(path_or_name)
    if exists(path_or_name):
        return _from_folder(path_or_name)
    if is_pretrained:
        return _from_hub(path_or_name)
    raise UserError(
        f"the tokenizer {path_or_name} does not exist; give the path of a tokenizers JSON file "
        "(data/train_tokenizer.py makes one), or say that it is pretrained if it is a name on the model hub"
    )


def _from_json_file(path: str) -> Encoder:
    text = read_text(path)
    try:
        return Encoder(text)
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(
            f"{path} is not a tokenizers JSON file ({error}); give one that data/train_tokenizer.py or "
            "Tokenizer.save() wrote"
        ) from error


def _from_folder(path: str) -> Encoder:
    if exists(join(path, "tokenizer_config.json")):
        return _from_transformers(path)
    if exists(join(path, "tokenizer.json")):
        return _from_json_file(join(path, "tokenizer.json"))
    for vocabulary, merges in _VOCABULARY_AND_MERGES:
        if exists(join(path, vocabulary)) and exists(join(path, merges)):
            return load_vocabulary(join(path, vocabulary), join(path, merges))
    raise UserError(
        f"the folder {path} holds no tokenizer; it needs tokenizer.json, a transformers tokenizer, "
        + " or ".join(f"{vocabulary} and {merges}" for vocabulary, merges in _VOCABULARY_AND_MERGES)
    )


def load_vocabulary(vocabulary: str, merges: str) -> Encoder:
    """A byte-level BPE of GPT-2's kind from its two files, local or gs://; UserError if they aren't that.

    Args:
        vocabulary: {token: id} as JSON (vocab.json, encoder.json).
        merges: two tokens a line, the first merge first (merges.txt, vocab.bpe).
    """
    try:
        lines = [line for line in read_text(merges).splitlines() if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(json.loads(read_text(vocabulary)), [tuple(line.split(" ")) for line in lines]))
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(f"{vocabulary} and {merges} are not a BPE vocabulary and its merges ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = (*EOS_NAMES, *PADDING_NAMES)
    tokenizer.add_special_tokens([name for name in names if tokenizer.token_to_id(name) is not None])
    return Encoder(tokenizer.to_str())


def _from_hub(name: str) -> Encoder:
    """A tokenizer of the model hub: the copy kept from an earlier download, else a download."""
    from huggingface_hub import HfApi  # here, because these two take seconds to import
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    instead = "give a local folder that holds the tokenizer (tokenizer.json, or vocab.json and merges.txt)"
    try:
        return _from_transformers(name, local_files_only=True)
    except UserError:
        pass  # not downloaded yet
    try:
        # Asked first, because transformers itself tries an unreachable hub for a minute and a half.
        HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise UserError(f"the tokenizer {name} is neither a file, nor a folder, nor a name on the model hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(f'the model hub has no "{name}", or none that you may read; {instead}') from error
    except OSError as error:  # connection refused, no such host, time-out, HTTP errors, offline mode
        raise UserError(f'the model hub can\'t be reached for "{name}" ({type(error).__name__}); {instead}') from error
    return _from_transformers(name)


def _from_transformers(path_or_name: str, local_files_only: bool = False) -> Encoder:
    from transformers import AutoTokenizer  # here, because it takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, local_files_only=local_files_only)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the tokenizer {path_or_name} can't be loaded ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {path_or_name} has no fast version (no tokenizer.json); choose one that has")
    return Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.pad_token_id)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def special_ids(config: "ModelConfig") -> SpecialIds:
    """The ids that end and pad documents: the model config's, else its datasets', else their tokenizers'.

    A tokenizer is only loaded if an id is given nowhere, and GPT-2's by name not even then.

    Raises:
        UserError: an id is given nowhere, or two datasets disagree on it.
    """
    tokenizers: dict[str, dict[str, int | None]] = {}
    ids = {
        key: getattr(config, key) if getattr(config, key) is not None else _common_id(key, config, tokenizers)
        for key in ("eos_id", "padding_id")
    }
    return SpecialIds(**ids)


def _common_id(key: str, config: "ModelConfig", tokenizers: dict[str, dict[str, int | None]]) -> int:
    """The one id that the datasets and their tokenizers agree on; `tokenizers` keeps what has been looked up."""
    found: dict[str, int | None] = {}
    for dataset in (source.dataset for source in config.datasets):
        found[dataset.id] = getattr(dataset, key)
        if found[dataset.id] is None:
            if dataset.id not in tokenizers:
                tokenizers[dataset.id] = _tokenizer_ids(dataset)
            found[dataset.id] = tokenizers[dataset.id][key]
    ids = {index for index in found.values() if index is not None}
    if len(ids) > 1:
        listed = ", ".join(f"{name}: {index}" for name, index in found.items())
        raise UserError(f"{key} differs between the datasets ({listed}); set {key} in the model config")
    if not ids:
        raise UserError(
            f"{key} is given neither by the model config, nor by a dataset config, nor by a tokenizer "
            f"(datasets: {', '.join(found) or 'none'}); set {key} in the model config"
        )
    return ids.pop()


def _tokenizer_ids(dataset: "DatasetConfig") -> dict[str, int | None]:
    if not dataset.tokenizer_path:
        return {"eos_id": None, "padding_id": None}
    if dataset.tokenizer_is_pretrained and dataset.tokenizer_path in GPT2_NAMES:
        return {"eos_id": GPT2_EOS_ID, "padding_id": GPT2_PADDING_ID}
    encoder = load_encoder(dataset)
    return {"eos_id": encoder.eos_id, "padding_id": encoder.padding_id}
