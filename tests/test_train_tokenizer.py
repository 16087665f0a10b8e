"""data/train_tokenizer.py and data/gather_python_sources.py: from nothing but Python to a tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import gather_python_sources, train_tokenizer
from data.encoders import Encoder, load_encoder_from
from data.train_tokenizer import OUTPUT_NAME

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the cat sat on the mat, the cat sat on the hat\n" * 20


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_text(TEXT)
    return folder


def run(texts: Path, output: Path, *flags: str) -> int:
    return train_tokenizer.main(["--base_dir", str(texts), "--output_dir", str(output), *flags])


def encoder_in(folder: Path) -> Encoder:
    return load_encoder_from(str(folder / OUTPUT_NAME))


def test_one_file_is_enough_and_the_ids_are_told(texts: Path, tmp_path: Path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("kept")
    assert run(texts, output, "--vocab_size", "270") == 0
    encoder = encoder_in(output)
    assert (encoder.vocab_size, encoder.eos_id, encoder.padding_id) == (270, 0, 1)
    assert len(encoder.encode(TEXT)) < len(TEXT)
    assert sorted(path.name for path in output.iterdir()) == [OUTPUT_NAME, "mine"]
    settings = {"n_vocab": 270, "tokenizer_path": str(output / OUTPUT_NAME), "eos_id": 0, "padding_id": 1}
    assert json.dumps(settings) in capsys.readouterr().out


def test_a_mask_token_takes_the_third_id(texts: Path, tmp_path: Path, capsys):
    assert run(texts, tmp_path, "--vocab_size", "270", "--mask_token") == 0
    assert '{"mlm_mask_id": 2}' in capsys.readouterr().out
    encoder = encoder_in(tmp_path)
    assert encoder.decode([2]) == "[MASK]" and 2 not in encoder.encode("[MASK]")


def test_every_byte_can_be_encoded_though_the_text_lacks_it(texts: Path, tmp_path: Path):
    assert run(texts, tmp_path, "--vocab_size", "260") == 0
    text = "".join(map(chr, [*range(0x500), 0x6F22, 0x1F642]))
    assert encoder_in(tmp_path).decode(encoder_in(tmp_path).encode(text)) == text


def test_training_twice_gives_the_same_file(texts: Path, tmp_path: Path):
    (texts / "two.txt").write_text("çay içtik, çay bitti, çay içtik")
    for name in ("a", "b"):
        assert run(texts, tmp_path / name, "--vocab_size", "300") == 0
    assert (tmp_path / "a" / OUTPUT_NAME).read_bytes() == (tmp_path / "b" / OUTPUT_NAME).read_bytes()


def test_a_tokenizer_is_only_replaced_when_told_to(texts: Path, tmp_path: Path, capsys):
    assert run(texts, tmp_path, "--vocab_size", "262") == 0
    assert run(texts, tmp_path, "--vocab_size", "265") == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert encoder_in(tmp_path).vocab_size == 262
    assert run(texts, tmp_path, "--vocab_size", "265", "--overwrite") == 0
    assert encoder_in(tmp_path).vocab_size == 265


def test_little_text_gives_a_smaller_vocabulary_and_says_so(texts: Path, tmp_path: Path, capsys):
    assert run(texts, tmp_path) == 0
    out = capsys.readouterr().out
    size = encoder_in(tmp_path).vocab_size
    assert size < 400 and f"a vocabulary of {size} tokens only" in out and f'"n_vocab": {size}' in out


def test_the_file_type_chooses_files(texts: Path, tmp_path: Path):
    (texts / "a.jsonl").write_text(json.dumps({"text": "zebra zebra zebra"}))
    (texts / "b.py").write_text("quagga quagga quagga")
    lengths = {}
    for file_type in ("txt", "jsonl", "*.py"):
        assert run(texts, tmp_path / file_type.strip("*."), "--vocab_size", "262", "--file_type", file_type) == 0
        encoder = encoder_in(tmp_path / file_type.strip("*."))
        lengths[file_type] = [len(encoder.encode(word)) for word in ("the", "zebra", "quagga")]
    assert [lengths["txt"][0] < 3, lengths["jsonl"][1] < 5, lengths["*.py"][2] < 6] == [True, True, True]
    assert [lengths["jsonl"][0], lengths["*.py"][1], lengths["txt"][2]] == [3, 5, 6]


def test_a_dataset_config_for_the_records_to_come(texts: Path, tmp_path: Path, capsys):
    output, config = tmp_path / "out", tmp_path / "mine.json"
    flags = [
        "--vocab_size",
        "262",
        "--write_dataset_config",
        str(config),
        "--path",
        str(tmp_path / "train_*.tfrecords"),
    ]
    assert run(texts, output, *flags) == 0
    assert f"dataset config: {config}; its eval_path is empty" in capsys.readouterr().out
    assert json.loads(config.read_text()) == {
        "n_vocab": 262,
        "path": str(tmp_path / "train_*.tfrecords"),
        "eval_path": "",
        "tokenizer_path": str(output / OUTPUT_NAME),
        "tokenizer_is_pretrained": False,
        "eos_id": 0,
        "padding_id": 1,
    }
    (output / OUTPUT_NAME).unlink()
    assert run(texts, output, *flags) == 2 and "mine.json exists; give --overwrite" in capsys.readouterr().err
    flags += ["--overwrite", "--eval_path", str(tmp_path / "heldout_*.tfrecords")]
    assert run(texts, output, *flags) == 0
    assert json.loads(config.read_text())["eval_path"] == str(tmp_path / "heldout_*.tfrecords")
    assert "empty" not in capsys.readouterr().out


def test_strictness_stops_at_what_cannot_be_read(texts: Path, tmp_path: Path, capsys):
    (texts / "broken.jsonl.zst").write_bytes(b"not zstandard")
    assert run(texts, tmp_path / "out", "--strict") == 2
    assert "error: broken.jsonl.zst: " in capsys.readouterr().err and not (tmp_path / "out" / OUTPUT_NAME).exists()
    assert run(texts, tmp_path / "out", "--vocab_size", "262") == 0
    assert "in 2 files, 1 left out" in capsys.readouterr().out


def test_mistakes_are_sentences(texts: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    (texts / "nothing.jsonl").write_text("")
    for flags, message in (
        (["--vocab_size", "257"], "--vocab_size 257 must be at least 258"),
        (["--base_dir", str(tmp_path / "empty")], "has no file to read"),
        (["--file_type", "jsonl"], "gave no document"),
        (["--write_dataset_config", "x.json"], "--write_dataset_config and --path belong together"),
    ):
        assert run(texts, tmp_path / "out", *flags) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train_tokenizer.py", "gather_python_sources.py"])
def test_the_commands_run_from_the_root_and_from_their_folder(script: str):
    for command, folder in (([f"data/{script}"], ROOT), ([script], ROOT / "data")):
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "--output_dir" in done.stdout, done.stderr


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_gathered_sources_are_the_standard_library_split_by_file(tmp_path: Path, capsys):
    output = tmp_path / "texts"
    arguments = ["--output_dir", str(output), "--limit_mb", "1.5"]
    assert gather_python_sources.main(arguments) == 0
    files = files_below(output)
    size = sum(map(len, files.values()))
    assert 1_000_000 < size <= 1_500_000
    held_out = [name for name in files if name.startswith("heldout/")]
    assert held_out and all(name.startswith(("train/", "heldout/")) and name.endswith(".txt") for name in files)
    assert 0.5 < len(held_out) / len(files) * 20 < 2
    assert not {name.removeprefix("train/") for name in files} & {name.removeprefix("heldout/") for name in held_out}
    assert not [name for name in files if "/test/" in name or "site-packages" in name]
    assert f"heldout: {len(held_out)} files" in capsys.readouterr().out

    assert gather_python_sources.main(arguments) == 0 and files_below(output) == files
    assert "nothing to do" in capsys.readouterr().out
    (output / "mine").write_text("kept")
    assert gather_python_sources.main(arguments) == 2 and (output / "mine").exists()
    assert "holds something else" in capsys.readouterr().err
