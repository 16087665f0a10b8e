"""data/create_tfrecords.py interrupted: what is done stays done, and the finished set is as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import parallel_tokenizer
from data.parallel_tokenizer import TextTokenizer, TokenBatch
from data.records import Records
from data.tfrecord_writer import RecordSetWriter
from tests.tfrecords_run import Run, random_documents, save_tokenizer, write_texts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, tokenizer_path, capsys)


def interrupted_at(call: int) -> Callable[[RecordSetWriter, Records], bool]:
    """`RecordSetWriter.write`, interrupted when it is called for the `call`-th time."""
    calls = 0
    write = RecordSetWriter.write

    def interrupted(self: RecordSetWriter, records: Records) -> bool:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return write(self, records)

    return interrupted


@pytest.mark.parametrize("flags", [[], ["--mode", "chunks", "--chunk_size", "7"], ["--split", "3:1:1"]])
def test_an_interrupted_run_goes_on_behind_its_last_file(run: Run, tmp_path: Path, monkeypatch, flags: list[str]):
    monkeypatch.setattr(parallel_tokenizer, "_BATCH_CHARACTERS", 100)
    documents = random_documents(60, seed=2)
    write_texts(run.input, documents)
    flags = ["--files_per", "4", "--minimum_size", "9", *flags]
    whole = tmp_path / "whole"
    run.output, out = whole, run.output
    assert run(*flags) == 0
    run.output = out
    assert out != whole and not out.exists()
    read: list[int] = []
    for at in (20, 12):  # two interruptions, at a batch each
        with monkeypatch.context() as patch:
            patch.setattr(RecordSetWriter, "write", interrupted_at(at))
            assert run(*flags) == 130
        assert run.manifest["complete"] is False
        listed = {entry["file"] for part in run.manifest["progress"].values() for entry in part["files"]}
        assert listed and {path.name for path in out.iterdir()} == {*listed, "set.manifest.json"}
        assert run(*flags, "--files_per", "3") == 2 and "made otherwise (files_per 4 there, 3 now)" in run.err
    with monkeypatch.context() as patch:
        tokenize = TextTokenizer.tokenize

        def counted(self: TextTokenizer, texts: list[str]) -> TokenBatch:
            read.append(len(texts))
            return tokenize(self, texts)

        patch.setattr(TextTokenizer, "tokenize", counted)
        assert run(*flags) == 0
    assert 0 < sum(read) < len(documents) - 10
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, out)]
    assert contents[0] == contents[1] and len(contents[0]) > 5


def test_an_interrupted_run_of_which_a_file_changed_begins_again(run: Run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parallel_tokenizer, "_BATCH_CHARACTERS", 100)
    write_texts(run.input, random_documents(9, seed=2))
    assert run("--files_per", "2") == 0
    whole = {path.name: path.read_bytes() for path in run.output.iterdir()}
    with monkeypatch.context() as patch:
        run.output = tmp_path / "again"
        patch.setattr("data.make_records._results", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("--files_per", "2")
    (run.output / "set_0_2.tfrecords").write_bytes(b"cut")
    assert run("--files_per", "2") == 0
    assert {path.name: path.read_bytes() for path in run.output.iterdir()} == whole


def write_lines(folder: Path, documents: list[str]) -> None:
    """Three files of JSON lines."""
    folder.mkdir()
    for number in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in documents[number::3])
        (folder / f"{number}.jsonl").write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--mode", "chunks", "--chunk_size", "64"], ["--split", "5:4:1"]])
def test_killed_at_any_moment_it_goes_on_to_the_same_files(tmp_path: Path, tokenizer_path: Path, flags: list[str]):
    write_lines(tmp_path / "in", random_documents(4000, seed=1))
    arguments = ["5", "1", str(tmp_path), "--input_dir", str(tmp_path / "in"), "--encoder_path", str(tokenizer_path)]
    arguments += ["--processes", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", *arguments, "--files_per", "300", "--no-ftfy", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *kills, result = map(json.loads, done.stdout.splitlines())
    assert len(kills) == 5 and any(name.endswith("_300.tfrecords") for kill in kills for name in kill["left"])
    assert result == {"tensorflow": False, "same": [True] * len(result["same"])} and result["same"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, run: Run, signum: int):
    documents = random_documents(20_000, seed=2) * 3
    write_lines(tmp_path / "in", documents)
    flags = ["--files_per", "200", "--no-ftfy"]
    command = [sys.executable, "data/create_tfrecords.py", *run.arguments(*flags, processes=2)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    give_up = time.monotonic() + 100
    while not (run.output / "set_0_200.tfrecords").exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as Ctrl-C in a terminal does
    else:
        process.send_signal(signum)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == (130 if signum == signal.SIGINT else -signum)
    assert "Traceback" not in errors
    assert len(workers) >= 2
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    if signum == signal.SIGKILL:
        assert run(*flags, processes=1) == 0
        assert len(run.records()) == len(documents)


def test_only_one_process_makes_a_set(run: Run):
    write_texts(run.input, ["hello"])
    assert run() == 0
    holder = "import sys; sys.path.insert(0, '.'); from data.record_set import being_made; import time\n"
    holder += "with being_made(sys.argv[1], 'set'): print('held', flush=True); time.sleep(100)"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run.output)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert run() == 2 and f"another process is making the set set in {run.output}; wait" in run.err
        assert run("--name", "other") == 0
        other.kill()
    assert (run.output / "set.lock").exists()
    assert run() == 0 and not (run.output / "set.lock").exists()
