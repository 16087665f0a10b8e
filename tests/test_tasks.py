"""LAMBADA: what is read and downloaded, and its scores against the numpy model."""

import http.server
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from config_fields import EVAL_TASKS
from data import lambada
from data.encoders import Encoder, load_encoder_from
from errors import UserError
from tasks import TASKS
from tests.record_files import write_records
from tests.reference_model import ReferenceModel
from tests.workspace import Workspace

LETTERS = "abcdefg"
EOS = 0


def save_letters(folder: Path, merges: list[tuple[str, str]] | None = None) -> str:
    """The path of a byte-level tokenizer of ten tokens and its merges: end, padding, the space, and letters."""
    tokens = ["<|endoftext|>", "<pad>", "Ġ", *LETTERS, *("".join(pair) for pair in merges or [])]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "letters.json"))
    return str(folder / "letters.json")


def ids(text: str) -> list[int]:
    return [2 if letter == " " else 3 + LETTERS.index(letter) for letter in text]


def random_texts() -> list[str]:
    """Some longer than the context of eight, some of one word; and so many short ones that a model is right on some."""
    random = np.random.default_rng(3)
    word = lambda size: "".join(random.choice(list(LETTERS), size))  # noqa: E731
    texts = [" ".join(word(random.integers(1, 5)) for _ in range(random.integers(2, 6))) for _ in range(20)]
    return [*texts, *LETTERS, *(f"{first} {second}" for first in LETTERS for second in LETTERS)]


def expected_scores(model: ReferenceModel, texts: list[str], n_ctx: int) -> dict[str, float]:
    """Every passage alone, its word scored token by token."""
    words_right, last_right, losses, tokens = 0, 0, 0.0, 0
    for text in texts:
        word = text.rpartition(" ")[2]
        scored = len(word) + (word != text)
        sequence = ([EOS] if word == text else []) + ids(text)
        sequence = sequence[-n_ctx - 1 :]
        logits = model.logits(np.array(sequence[:-1]))[-scored:]
        labels = np.array(sequence[-scored:])
        right = logits.argmax(-1) == labels
        words_right, last_right, tokens = words_right + right.all(), last_right + right[-1], tokens + scored
        losses += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(scored), labels]).sum()
    number = len(texts)
    return {
        "last_word_accuracy": words_right / number,
        "last_token_accuracy": last_right / number,
        "perplexity_per_word": math.exp(losses / number),
        "perplexity_per_token": math.exp(losses / tokens),
        "texts": number,
        "tokens": tokens,
    }


def workspace(folder: Path, **changes: Any) -> Workspace:
    """A model of ten tokens whose dataset has no eval_path and names a file of LAMBADA that is not there."""
    dataset = {
        "id": "mine",
        "path": str(folder / "train_*"),
        "tokenizer_path": save_letters(folder),
        "lambada_path": str(folder / "tasks" / "lambada.jsonl"),
    }
    run = Workspace(
        folder,
        n_layer=1,
        attention_types=[[["global"], 1]],
        n_vocab=10,
        eval_batch_size=8,
        eval_tasks=["lambada"],
        datasets=[[dataset, 1, "chunks", 1.0]],
        **changes,
    )
    write_records(folder / "train_0_64.tfrecords", [list(range(1, 10))] * 64)
    (folder / "tasks").mkdir()
    return run


@pytest.mark.slow
def test_scores_are_the_numpy_models_on_one_device_and_on_four(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, texts = workspace(tmp_path), random_texts()
    (tmp_path / "tasks" / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run.save_random_weights(step=7)
    expected = expected_scores(ReferenceModel(run.config(), run.weights()), texts, n_ctx=8)
    assert 0 < expected["last_word_accuracy"] < expected["last_token_accuracy"]
    for mesh in ("", "--gpu_ids cpu:0 cpu:1 cpu:2 cpu:3 --mesh_shape x:2,y:2 --layout batch:x,vocab:y"):
        capsys.readouterr()
        assert run.main("--eval", *mesh.split()) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result.pop("task"), result.pop("global_step"), result.pop("time") > 0) == ("lambada", 7, True)
        assert result == pytest.approx(expected, rel=1e-5)
    assert len((run.model_path / "eval_.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(address, {path: content}) of a web server; content that ends in "..." is announced longer than it is."""
    pages: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"") + 9 * (content or b"").endswith(b"...")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", pages
        running.shutdown()


@pytest.mark.slow
def test_training_scores_a_task_that_it_downloaded_at_every_checkpoint(
    tmp_path: Path, server: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = workspace(tmp_path, train_steps=2)
    assert run.main() == 2
    assert "let --download_tasks fetch them" in capsys.readouterr().err
    assert not run.model_path.exists()
    address, pages = server
    pages["/lambada.jsonl"] = b'{"text": "ab cd"}\n{"text": "a b"}\n'
    monkeypatch.setattr(lambada, "URL", f"{address}/lambada.jsonl")
    assert run.main("--download_tasks", "--steps_per_checkpoint", "1") == 0
    assert (tmp_path / "tasks" / "lambada.jsonl").read_bytes() == pages["/lambada.jsonl"]
    results = [json.loads(line) for line in (run.model_path / "eval_.jsonl").read_text().splitlines()]
    assert [(result["task"], result["global_step"], result["texts"]) for result in results] == [
        ("lambada", 1, 2), ("lambada", 2, 2),
    ]  # fmt: skip
    curves = {
        (event.step, value.tag): value.simple_value
        for path in (run.model_path / "eval_lambada").glob("events.*")
        for event in tf.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    for result in results:
        for name in ("last_word_accuracy", "perplexity_per_word"):
            assert curves[result["global_step"], name] == pytest.approx(result[name], rel=1e-5)


def test_a_download_that_fails_leaves_nothing(
    tmp_path: Path, server: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, pages = server
    pages |= {"/cut": b'{"text": "ab cd"}\n...', "/strange": b"<html>\n"}
    config = workspace(tmp_path).config()
    for page, says in (
        ("/cut", "can't be fetched (IncompleteRead(21 bytes read, 9 more expected))"),
        ("/strange", "/strange, line 1 is not a JSON object with a text"),
        ("/nowhere", "can't be fetched (Not Found)"),
    ):
        monkeypatch.setattr(lambada, "URL", address + page)
        with pytest.raises(UserError) as caught:
            lambada.fetch(config)
        assert says in str(caught.value)
    assert list((tmp_path / "tasks").iterdir()) == []
    pages["/good"] = b'{"text": "ab cd"}'
    monkeypatch.setattr(lambada, "URL", address + "/good")
    lambada.fetch(config)
    pages.clear()
    lambada.fetch(config)  # it is there


def encoder(folder: Path, *merges: tuple[str, str]) -> Encoder:
    return load_encoder_from(save_letters(folder, list(merges)))


def test_the_last_word_is_what_follows_the_context(tmp_path: Path) -> None:
    plain = encoder(tmp_path)
    assert lambada.split_last_words(plain, ["ab cd", "ab", "a b"], EOS) == [
        (ids("ab cd"), 3), ([EOS, *ids("ab")], 2), (ids("a b"), 2),
    ]  # fmt: skip
    space_in_word = encoder(tmp_path, ("Ġ", "c"))
    assert lambada.split_last_words(space_in_word, ["ab cd"], EOS) == [([3, 4, 10, 6], 2)]
    over_the_edge = encoder(tmp_path, ("b", "Ġ"))  # a token that holds the context's end and the word's space
    assert over_the_edge.encode("ab cd") == [3, 10, 5, 6]
    assert lambada.split_last_words(over_the_edge, ["ab cd"], EOS) == [(ids("ab cd"), 3)]
    assert [scored for _, scored in lambada.split_last_words(plain, ["ab\ncd", "ab  cd"], EOS)] == [2, 3]
    with pytest.raises(UserError, match=r'nothing of the last word of "...xyz"'):
        lambada.split_last_words(plain, ["xyz"], EOS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no text"),
        ("\n \n", "holds no text"),
        ('{"text": "a b"}\n{"text": ', "line 2 is not a JSON object with a text"),
        ('{"text": "a b"}\n\n{"words": "a b"}', "line 3 is not"),
        ('{"text": 3}', "line 1 is not"),
        ('{"text": " "}', "line 1 is not"),
        ('["text"]', "line 1 is not"),
    ],
)
def test_a_file_that_is_not_lambada_is_named(content: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^mine.jsonl,? ?{says}"):
        lambada.parse(content, "mine.jsonl")


def test_every_task_that_a_config_may_name_is_there() -> None:
    assert tuple(TASKS) == EVAL_TASKS
