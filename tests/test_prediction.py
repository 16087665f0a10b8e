"""Prompts: how a file is cut into them, and what of a long one the model sees."""

from pathlib import Path

import pytest

from errors import UserError
from mesh.layout import parse
from prediction import decode_length, encode_prompt, read_prompts
from tests.tiny import tiny_config


class WordEncoder:
    """Each word is a number and its own id."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "per_line", "prompts"),
    [
        ("one\ntwo\n", False, ["one\ntwo"]),
        ("one\ntwo\n---\nthree", False, ["one\ntwo", "three"]),
        ("one\ntwo\n\nthree\n", True, ["one", "two", "three"]),
        ("a --- b\n", False, ["a --- b"]),
    ],
)
def test_a_file_holds_one_prompt_or_several(tmp_path: Path, text: str, per_line: bool, prompts: list[str]) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    assert read_prompts(str(tmp_path / "prompts.txt"), per_line) == prompts


@pytest.mark.parametrize(
    ("length", "new_tokens", "kept"),
    [(3, None, 3), (7, None, 7), (8, None, 4), (3, 7, 3), (3, 100, 3), (7, 7, 7), (8, 2, 6), (20, 2, 6), (20, 100, 4)],
)
def test_only_a_prompt_that_leaves_no_room_loses_its_front(
    tmp_path: Path, length: int, new_tokens: int | None, kept: int
) -> None:
    config = tiny_config(tmp_path)  # n_ctx 8
    text = " ".join(str(token) for token in range(2, 2 + length))
    ids = encode_prompt(WordEncoder(), text, config, new_tokens, eos_id=0)  # type: ignore[arg-type]
    assert ids == list(range(2, 2 + length))[-kept:]


def test_an_empty_prompt_is_the_end_of_a_text(tmp_path: Path) -> None:
    assert encode_prompt(WordEncoder(), "", tiny_config(tmp_path), None, eos_id=5) == [5]  # type: ignore[arg-type]


def test_a_prompt_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token id 32 but n_vocab is 32"):
        encode_prompt(WordEncoder(), "3 32", tiny_config(tmp_path), None, eos_id=0)  # type: ignore[arg-type]


def test_decoding_is_as_long_as_needed_and_divides(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert decode_length([[1], [1, 2]], config, None, parse("x:1", "", 1)) == 8
    assert decode_length([[1], [1, 2]], config, 3, parse("x:1", "", 1)) == 5
    assert decode_length([[1], [1, 2]], config, 3, parse("x:2", "memory_length:x", 2)) == 6
    assert decode_length([[1], [1, 2]], config, 30, parse("x:1", "", 1)) == 8
