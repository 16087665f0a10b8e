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


@pytest.mark.slow
def test_linear_attention_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.linear_attention", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows] == ["tokens", "---", "64", "128"]
    table = {int(row[0]): dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[2:]}
    assert all(value > 0 for row in table.values() for value in row.values())
    growth = {kind: table[128][f"{kind}, MB"] / table[64][f"{kind}, MB"] for kind in ("linear", "global")}
    assert growth["linear"] < growth["global"]  # 2 and 4, but for what happens to be held at the same time
