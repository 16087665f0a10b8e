"""The benchmarks still run."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_input_pipeline_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.input_pipeline", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [line.split("`")[1] for line in done.stdout.splitlines() if line.startswith("| `")] == [
        "chunks",
        "chunks, short ones left out",
        "documents_fixed",
        "documents_random",
    ]


@pytest.mark.slow
def test_making_tfrecords_is_measured() -> None:
    # By its path: the folder of the benchmarks must not hide Python's own `tokenize`.
    command = [sys.executable, "benchmarks/tokenize.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert [len(row) for row in rows] == [6] * 5
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[1:5])
