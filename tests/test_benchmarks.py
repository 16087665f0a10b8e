"""The benchmarks still run."""

import subprocess
import sys
from pathlib import Path

import pytest


def printed(*arguments: str) -> list[str]:
    """The lines that Python prints with these arguments."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_input_pipeline_is_measured() -> None:
    arguments = ("-m", "benchmarks.input_pipeline", "--small")
    assert [line.split("`")[1] for line in printed(*arguments) if line.startswith("| `")] == [
        "chunks",
        "chunks, short ones left out",
        "documents_fixed",
        "documents_random",
    ]


@pytest.mark.slow
def test_making_tfrecords_is_measured() -> None:
    # By its path: the folder of the benchmarks must not hide Python's own `tokenize`.
    arguments = ("benchmarks/tokenize.py", "--quick")
    rows = [line.split("|")[1:-1] for line in printed(*arguments) if line.startswith("| ") and "---" not in line]
    assert [len(row) for row in rows] == [6] * 5
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[1:5])


@pytest.mark.slow
def test_linear_attention_is_measured() -> None:
    arguments = ("-m", "benchmarks.linear_attention", "--quick")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed(*arguments) if "|" in line]
    assert [row[0] for row in rows] == ["tokens", "---", "64", "128"]
    table = {int(row[0]): dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[2:]}
    assert all(value > 0 for row in table.values() for value in row.values())
    growth = {kind: table[128][f"{kind}, MB"] / table[64][f"{kind}, MB"] for kind in ("linear", "global")}
    assert growth["linear"] < growth["global"]  # 2 and 4, but for what happens to be held at the same time


@pytest.mark.slow
def test_the_memory_of_a_step_is_measured(tmp_path: Path) -> None:
    arguments = ("-m", "benchmarks.memory", "--quick", "--picture", str(tmp_path / "memory.png"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed(*arguments) if "|" in line]
    table = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[2:]}
    whole, cut, recomputed, both = table.values()
    assert both["peak, MB"] < cut["peak, MB"] < 0.6 * whole["peak, MB"]  # four microbatches: 0.37 when it was written
    assert both["peak, MB"] < recomputed["peak, MB"] < 0.8 * whole["peak, MB"]  # 0.60
    assert all(row["loss"] == pytest.approx(whole["loss"], abs=1e-5) for row in table.values())
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_meshes_are_measured() -> None:
    arguments = ("-m", "benchmarks.meshes", "--quick")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed(*arguments) if "|" in line]
    assert [row[0] for row in rows[2:]] == ["x:1", "x:4", "x:4", "x:2,y:2", "x:2,y:2"]
    table = [dict(zip(rows[0][2:], map(float, row[2:]), strict=True)) for row in rows[2:]]
    for row in table:
        # tests/test_plan.py says how good plans are; of so small a step chance decides a large part
        assert 0.5 < row["peak of the real step, MB"] / row["peak planned, MB"] < 1.5
        assert row["loss"] == pytest.approx(table[0]["loss"], abs=1e-5)
        assert (row["to send, MB"] > 0) == (row is not table[0])
