"""data/create_tfrecords.py: every token accounted for, whatever the files, formats and processes."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import parallel_tokenizer, tfrecords_job
from data.encoders import Encoder
from tests.tfrecords_run import VOCAB_SIZE, Run, check_account, in_order, random_documents, save_tokenizer, write_texts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer_path: Path) -> Encoder:
    return Encoder(tokenizer_path.read_text())


@pytest.fixture
def run(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, tokenizer_path, capsys)


@pytest.mark.parametrize("count", [1, 2, 31])
@pytest.mark.parametrize("minimum_size", [0, 40])
def test_a_record_is_a_document(run: Run, encoder: Encoder, count: int, minimum_size: int):
    documents = random_documents(count - 1, seed=count) + ["a mat " * 50]
    write_texts(run.input, documents)
    assert run("--minimum_size", str(minimum_size), "--files_per", "4", "--no-ftfy") == 0
    encoded = encoder.encode_batch(in_order(documents))
    kept = [ids for ids in encoded if len(ids) >= minimum_size]
    assert run.records() == kept
    check_account(run.manifest)
    account = run.manifest["account"]
    assert account["documents"] == count
    assert account["tokens"] == sum(map(len, encoded))
    assert account["discarded_documents"] == count - len(kept)
    assert account["separators"] == account["tail"] == 0
    assert account["text_bytes"] == sum(len(document.encode()) for document in documents)
    assert run.manifest["max_id"] == max(map(max, kept)) and run.manifest["min_id"] == min(map(min, kept))
    for file in run.manifest["files"]:
        name = re.fullmatch(r"set_(\d+)_(\d+)\.tfrecords", file["file"])
        assert name is not None and int(name[2]) == file["records"] <= 4
    assert run.files == [f"set_{i}_{file['records']}.tfrecords" for i, file in enumerate(run.manifest["files"])]
    assert {path.name for path in run.output.iterdir()} == {*run.files, "set.manifest.json"}


@pytest.mark.parametrize("count", [1, 2, 31])
@pytest.mark.parametrize(("flags", "separator"), [([], [0]), (["--separator", "[5, 6]"], [5, 6])])
def test_chunks_are_the_documents_joined_by_the_separator(run: Run, encoder: Encoder, count, flags, separator):
    documents = random_documents(count - 1, seed=count) + ["a mat " * 50]
    write_texts(run.input, documents)
    assert run("--mode", "chunks", "--chunk_size", "16", "--files_per", "10", "--no-ftfy", *flags) == 0
    stream: list[int] = []
    for ids in encoder.encode_batch(in_order(documents)):
        stream += (separator if stream else []) + ids
    whole = len(stream) - len(stream) % 17
    assert run.records() == [stream[start : start + 17] for start in range(0, whole, 17)]
    check_account(run.manifest)
    assert run.manifest["account"]["separators"] == (count - 1) * len(separator)
    assert run.manifest["account"]["tail"] == len(stream) - whole


def test_the_files_do_not_depend_on_the_number_of_processes(run: Run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parallel_tokenizer, "_BATCH_CHARACTERS", 500)  # many batches of a little text
    write_texts(run.input, random_documents(100, seed=0))
    flags = ["--mode", "chunks", "--chunk_size", "16", "--files_per", "50"]
    contents = []
    for processes in (1, 3):
        run.output = tmp_path / f"out{processes}"
        assert run(*flags, processes=processes) == 0
        contents.append({path.name: path.read_bytes() for path in run.output.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) > 3


def test_spellings_of_special_tokens_are_text_unless_allowed(run: Run, tmp_path: Path, encoder: Encoder):
    write_texts(run.input, ["a <|endoftext|> b"])
    assert run() == 0
    assert 0 not in run.records()[0] and encoder.decode(run.records()[0]) == "a <|endoftext|> b"
    run.output = tmp_path / "allowed"
    assert run("--allow_special") == 0
    assert run.records()[0].count(0) == 1


def test_text_is_mended_unless_told_otherwise(run: Run, tmp_path: Path, encoder: Encoder):
    write_texts(run.input, ["âœ” ﬁne\r\n"])
    assert run() == 0
    assert encoder.decode(run.records()[0]) == "✔ fine\n"
    run.output = tmp_path / "as it is"
    assert run("--no-ftfy") == 0
    assert encoder.decode(run.records()[0]) == "âœ” ﬁne\r\n"
    run.output = tmp_path / "WikiText"
    assert run("--no-ftfy", "--wikitext-detokenize") == 0


def test_what_cannot_be_read_is_named_and_the_rest_is_read(run: Run, encoder: Encoder):
    write_texts(run.input, ["hello", "world"])
    (run.input / "empty.txt").write_bytes(b"")
    (run.input / "latin.txt").write_bytes("café".encode("latin-1"))
    (run.input / "broken.jsonl").write_text('{"text": "one"}\nnot json\n{"words": 1}\n"two"\n')
    (run.input / "garbage.jsonl.zst").write_bytes(b"garbage")
    (run.input / "picture.png").write_bytes(b"\x89PNG")
    assert run() == 0
    assert [encoder.decode(ids) for ids in run.records()] == ["one", "two", "hello", "world"]
    for said in (
        "empty.txt: it is empty",
        "latin.txt: not UTF-8 text (byte 3)",
        "broken.jsonl, line 2: not JSON",
        'broken.jsonl, line 3: no key "text" (it has words)',
        "garbage.jsonl.zst: ",
    ):
        assert any(said in problem for problem in run.manifest["problems"]), run.manifest["problems"]
        assert said in run.err
    assert run.manifest["problem_count"] == 5 and "5 left out" in run.out
    assert "1 files (picture.png)" in run.err


def test_a_complete_set_is_left_alone_and_another_one_refused(run: Run):
    write_texts(run.input, random_documents(5, seed=1))
    assert run() == 0
    before = {path: path.stat().st_mtime_ns for path in run.output.iterdir()}
    assert run(processes=2) == 0
    assert "nothing to do" in run.out and "tokens: " in run.out
    assert run("--minimum_size", "3") == 2
    assert "minimum_size 0 there, 3 now" in run.err and "--name" in run.err
    (run.input / "more.txt").write_text("more")
    assert run() == 2 and "input files 5 there, 6 now" in run.err
    assert {path: path.stat().st_mtime_ns for path in run.output.iterdir()} == before
    (run.input / "more.txt").unlink()
    (run.output / run.files[0]).unlink()
    assert run() == 2 and "which is not there" in run.err


def test_files_without_a_manifest_are_not_touched(run: Run):
    write_texts(run.input, ["hello"])
    run.output.mkdir()
    (run.output / "set_0_7.tfrecords").write_bytes(b"precious")
    assert run() == 2 and "already holds set_0_7.tfrecords" in run.err
    assert (run.output / "set_0_7.tfrecords").read_bytes() == b"precious"


def test_a_seed_shuffles_the_files_and_nothing_else(run: Run, tmp_path: Path):
    write_texts(run.input, random_documents(20, seed=3))
    assert run() == 0
    by_name = run.records()
    orders: list[list[list[int]]] = []
    for seed in ("1", "1", "2"):
        run.output = tmp_path / f"seed{len(orders)}"
        assert run("--seed", seed) == 0
        orders.append(run.records())
    assert orders[0] == orders[1] != orders[2] != by_name
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(by_name)


def test_the_dataset_config_names_what_was_made(run: Run, tmp_path: Path, tokenizer_path: Path):
    write_texts(run.input, ["hello"])
    path = tmp_path / "configs" / "mine.json"
    assert run("--write_dataset_config", str(path)) == 0
    assert json.loads(path.read_text()) == {
        "n_vocab": VOCAB_SIZE,
        "path": str(run.output / "set_*.tfrecords"),
        "eval_path": "",
        "tokenizer_path": str(tokenizer_path),
        "tokenizer_is_pretrained": False,
        "eos_id": 0,
        "padding_id": 1,
    }
    assert run("--write_dataset_config", str(path)) == 0
    path.unlink()
    assert run("--write_dataset_config", str(path), "--eval_path", "/records/held_*.tfrecords") == 0
    assert json.loads(path.read_text())["eval_path"] == "/records/held_*.tfrecords" and "empty" not in run.out
    path.write_text("{}")
    assert run("--write_dataset_config", str(path)) == 2 and "exists with other content" in run.err


def test_paths_with_a_scheme_go_through_gfile(run: Run, tmp_path: Path):
    """file:// stands for gs:// here: both are opened by tf.io.gfile only."""
    write_texts(run.input, random_documents(7, seed=5))
    for suffix, content in ((".jsonl.gz", gzip.compress(b'"zipped"')), (".tar", b""), (".zip", b"garbage")):
        (run.input / f"more{suffix}").write_bytes(content)
    assert run("--files_per", "3") == 0
    local, problems = run.records(), run.manifest["problems"]
    flags = ["--input_dir", f"file://{run.input}", "--output_dir", f"file://{tmp_path}/remote", "--files_per", "3"]
    assert run(*flags) == 0
    run.output = tmp_path / "remote"
    assert run.records() == local and run.manifest["problems"] == problems and len(problems) == 2
    assert {path.name for path in run.output.iterdir()} == {*run.files, "set.manifest.json"}
    assert run(*flags) == 0 and "nothing to do" in run.out
    assert run(*flags, "--input_dir", f"file://{run.input}/more.jsonl.gz", "--name", "one") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_gpt2_tokenizer"], "--tokenizer, and --vocab_file with --merges_file (2 are given)"),
        (["--input_dir", "/nowhere"], "the input /nowhere does not exist"),
        (["--encoder_path", "nowhere.json"], "nowhere.json does not exist"),
        (["--name", "a/b"], "--name a/b: use letters"),
        (["--mode", "chunks", "--separator", "[999]"], "--separator [999]: 999 is no id below 290"),
        (["--mode", "chunks", "--separator", "end"], '--separator "end" must be token ids in list form'),
        (["--split", "0:1"], "--split 0:1 must be two or three whole numbers"),
        (["--split", "1"], "--split 1 must be two or three whole numbers"),
        (["--mode", "chunks"], "fewer than one record of --chunk_size 2048 + 1"),
        (["--minimum_size", "1000"], "each shorter than --minimum_size 1000"),
    ],
)
def test_mistakes_are_sentences(run: Run, flags: list[str], message: str):
    write_texts(run.input, ["hello"])
    assert run(*flags) == 2
    assert run.err.splitlines()[-1].startswith("error: ") and message in run.err
    assert not list(run.output.glob("*.tfrecords"))


def test_an_input_without_text_is_a_mistake(run: Run):
    run.input.mkdir()
    assert run() == 2 and "has no file to read (it is empty)" in run.err
    (run.input / "a.png").write_bytes(b"x")
    assert run() == 2 and "has no file to read (it holds a.png)" in run.err and ".jsonl.zst" in run.err
    (run.input / "a.txt").write_bytes(b"")
    assert run() == 2 and "gave 0 documents" in run.err


@pytest.mark.parametrize("given", [["0", "1"], ["[0, 1]"], [" [ 0,1 ] "], ["[0,", "1]"], ["0,1"]])
def test_the_separator_may_be_written_with_or_without_brackets(encoder: Encoder, given: list[str]):
    assert tfrecords_job._separator(given, "", encoder) == (0, 1)


def test_the_command_runs_from_the_root_and_from_its_folder(run: Run):
    without_flags = [sys.executable, "data/create_tfrecords.py"]
    help_text = subprocess.run(without_flags, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--minimum_size" in help_text
    write_texts(run.input, random_documents(3, seed=4))
    command = [sys.executable, "create_tfrecords.py", *run.arguments(processes=2)]
    done = subprocess.run(command, cwd=ROOT / "data", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout and len(run.records()) == 3
