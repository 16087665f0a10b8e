"""LAMBADA (arXiv:1606.06031): texts whose last word can be guessed from all that stands before it, and from no less."""

import http.client
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Sequence

from tqdm import tqdm

from config import DatasetConfig, ModelConfig, read_text
from data.encoders import Encoder, load_encoder
from data.files import exists, write_text
from errors import UserError

logger = logging.getLogger(__name__)

URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"  # as GPT-2 was measured on it
_PATIENCE = 30.0  # seconds for a server to go on
_CHUNK_BYTES = 1 << 16


def texts_of(config: ModelConfig, eos_id: int) -> list[tuple[list[int], int]]:
    """(token ids, how many of them at the end are the last word) of each text that `lambada_path` holds.

    Raises:
        UserError: no dataset names the file and a tokenizer, or the file is not what it should be.
    """
    dataset = _dataset(config)
    assert dataset.lambada_path is not None
    if not exists(dataset.lambada_path):
        raise UserError(
            f'lambada_path {dataset.lambada_path!r} of dataset "{dataset.id}" is not there; put the JSON lines of '
            "LAMBADA there, or let --download_tasks fetch them"
        )
    texts = parse(read_text(dataset.lambada_path), dataset.lambada_path)
    rows = split_last_words(load_encoder(dataset), texts, eos_id)
    highest = max(max(tokens) for tokens, _ in rows)
    if highest >= config.n_vocab:
        raise UserError(
            f"{dataset.lambada_path}: its texts have token id {highest} but n_vocab is {config.n_vocab}; use the "
            "tokenizer the model was trained with"
        )
    return rows


def _dataset(config: ModelConfig) -> DatasetConfig:
    for source in config.datasets:
        if source.dataset.lambada_path and source.dataset.tokenizer_path:
            return source.dataset
    raise UserError(
        'eval_tasks has "lambada", but no dataset config of datasets gives both lambada_path and tokenizer_path; add '
        'them, for example "lambada_path": "datasets/lambada/lambada_test.jsonl"'
    )


def parse(content: str, origin: str) -> list[str]:
    """The texts of JSON lines {"text": ...}; UserError names the line of `origin` that is none."""
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{origin}, line {number} is not a JSON object with a text: {{"text": "..."}}')
        texts.append(text.strip())
    if not texts:
        raise UserError(f'{origin} holds no text; it needs lines like {{"text": "..."}}')
    return texts


def split_last_words(encoder: Encoder, texts: Sequence[str], eos_id: int) -> list[tuple[list[int], int]]:
    """(token ids, how many at the end are the last word with the space before it) of each text.

    A line break before the word is part of what is known. A text of one word is predicted from the end of another text,
    `eos_id`.
    """
    contexts = [text[: len(text) - len(text.split()[-1])].removesuffix(" ") for text in texts]
    rows = []
    for text, context, whole, before in zip(
        texts, contexts, encoder.encode_batch(texts), encoder.encode_batch(contexts), strict=True
    ):
        # where a token would reach over the edge, the two sides are encoded each alone
        word = whole[len(before) :] if whole[: len(before)] == before else encoder.encode(text[len(context) :])
        if not word:
            raise UserError(
                f'lambada_path: the tokenizer makes nothing of the last word of "...{text[-40:]}"; use one that knows '
                "every word"
            )
        rows.append(((before or [eos_id]) + word, len(word)))
    return rows


def fetch(config: ModelConfig) -> None:
    """Download LAMBADA to where `lambada_path` says, unless it is there: all of it or nothing.

    Raises:
        UserError: it can't be fetched, is not LAMBADA, or can't be written.
    """
    path = _dataset(config).lambada_path
    assert path is not None
    if exists(path):
        return
    content = _download(URL)
    number = len(parse(content, URL))
    write_text(path, content)
    logger.info("%s: %d texts from %s", path, number, URL)


def _download(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            content = bytearray()
            with tqdm(total=total, unit="B", unit_scale=True, desc="lambada") as bar:
                while chunk := response.read(_CHUNK_BYTES):
                    content += chunk
                    bar.update(len(chunk))
        if total not in (None, len(content)):
            raise http.client.IncompleteRead(bytes(content), (total or 0) - len(content))
        return content.decode()
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"--download_tasks: {url} can't be fetched ({reason}); get the file in another way and name it in "
            "lambada_path"
        ) from error
