"""data/create_tfrecords.py run in this process on random documents, and what it wrote read again by TensorFlow."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from data import create_tfrecords
from data.train_tokenizer import train_tokenizer

TEXT = "the cat sat on a mat; déjà vu, çay 🙂 while <|endoftext|> x = [1, 2]\n"
WORDS = re.findall("[^ ]+", TEXT)
VOCAB_SIZE = 290


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of VOCAB_SIZE ids that knows TEXT well."""
    path = folder / "byte-level-bpe.tokenizer.json"
    path.write_text(train_tokenizer([TEXT] * 3, VOCAB_SIZE).to_str())
    return path


def random_documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(count)]


def write_texts(folder: Path, documents: list[str]) -> None:
    for index, document in enumerate(documents):
        path = folder / f"part{index % 3}" / f"{index:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.encode())


def in_order(documents: list[str]) -> list[str]:
    """The documents in the order of the files that write_texts makes."""
    return [documents[index] for part in range(3) for index in range(part, len(documents), 3)]


class Run:
    """A call of the command, with its exit code and what it wrote."""

    def __init__(self, tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.input = tmp_path / "in"
        self.output = tmp_path / "out"
        self.flags = ["--encoder_path", str(tokenizer_path)]
        self._capsys = capsys

    def arguments(self, *flags: str, processes: int = 1) -> list[str]:
        """The command line behind the name of the command."""
        folders = ["--input_dir", str(self.input), "--output_dir", str(self.output)]
        return [*folders, "--name", "set", "--processes", str(processes), *self.flags, *flags]

    def __call__(self, *flags: str, processes: int = 1) -> int:
        code = create_tfrecords.main(self.arguments(*flags, processes=processes))
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code

    @property
    def manifest(self) -> dict:
        return json.loads((self.output / "set.manifest.json").read_text())

    @property
    def files(self) -> list[str]:
        return [entry["file"] for entry in self.manifest["files"]]

    def records(self) -> list[list[int]]:
        return [ids for file in self.files for ids in read_records(self.output / file)]


def read_records(path: Path) -> Iterator[list[int]]:
    for record in tf.compat.v1.io.tf_record_iterator(str(path)):
        features = tf.train.Example.FromString(record).features.feature
        assert list(features) == ["text"]
        yield list(features["text"].int64_list.value)


def check_account(manifest: dict) -> None:
    account = manifest["account"]
    gone = account["discarded_tokens"] + account["tail"]
    assert account["tokens"] + account["separators"] == account["written"] + gone
    gone = account["discarded_documents"] + account["tail_documents"]
    assert account["documents"] == account["written_documents"] + gone
    assert sum(file["tokens"] for file in manifest["files"]) == account["written"]
    assert sum(file["records"] for file in manifest["files"]) == manifest["records"]
