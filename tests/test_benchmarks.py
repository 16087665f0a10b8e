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
