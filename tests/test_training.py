"""Training through main.py: resuming, stopping, evaluating on the way, and the same numbers on any mesh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from tests.workspace import Workspace, save_tokenizer

DROPOUT = {"embed_dropout": 0.1, "res_dropout": 0.1, "attn_dropout": 0.1}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    straight = Workspace(tmp_path / "straight", train_steps=40, **DROPOUT)
    assert straight.main() == 0
    resumed = Workspace(tmp_path / "resumed", train_steps=40, lr_decay_end=40, **DROPOUT)
    assert resumed.main("--set", "train_steps=20") == 0
    assert len(resumed.losses()) == 20
    assert resumed.main() == 0
    assert [line["step"] for line in resumed.metrics()] == list(range(1, 41))
    assert resumed.losses() == straight.losses()
    expected = straight.weights()
    assert expected["global_step"] == 40
    for name, value in resumed.weights().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


FOUR = ("--gpu_ids", "cpu:0", "cpu:1", "/device:CPU:2", "device:cpu:3")
HEADS = (*FOUR, "--mesh_shape", "x:2,y:2", "--layout", "batch:x,heads:y,intermediate_expanded:y,vocab:y")
WIDTH = (*FOUR, "--mesh_shape", "x:2,y:2", "--layout", "batch:x,embd:y,memory_length:y")


@pytest.mark.slow
def test_a_model_moves_from_mesh_to_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {
        "n_layer": 1,
        "attention_types": [[["global"], 1]],
        "train_steps": 6,
        "epsilon": 1e-5,
        "gradient_clipping": 0.5,
        "weight_decay": 0.1,
        **DROPOUT,
    }
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    one, several = Workspace(tmp_path / "one", **changes), Workspace(tmp_path / "several", **changes)
    assert one.main("--gpu_ids", "device:CPU:0") == 0
    for steps, devices in ((2, HEADS), (4, ("--gpu_ids", "cpu:0")), (6, WIDTH)):
        assert several.main("--set", f"train_steps={steps}", "--set", "lr_decay_end=6", *devices) == 0
    for key in ("loss", "grad_norm"):
        got, expected = ([line[key] for line in run.metrics()] for run in (several, one))
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=key)
    weights = several.weights()
    for name, value in one.weights().items():
        np.testing.assert_allclose(weights[name], value, atol=1e-4, err_msg=name)

    capsys.readouterr()
    results = []
    for devices in (("--gpu_ids", "cpu:0"), HEADS):
        assert several.main("--eval", *devices) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], abs=1e-5)
    assert results[1]["tokens"] == results[0]["tokens"]

    (tmp_path / "prompts").write_text("w3 w4 w5")
    values = json.loads(several.config_path.read_text())
    tokenizer = {"id": "words", "path": values["datasets"][0][0], "tokenizer_path": save_tokenizer(tmp_path)}
    datasets = json.dumps([[tokenizer, 1, "chunks", 1.0]])
    texts = []
    for devices in (("--gpu_ids", "cpu:0"), HEADS):  # one prompt, where the batch is split in two
        flags = ("--prompt", str(tmp_path / "prompts"), "--temperature", "0", "--set", f"datasets={datasets}")
        assert several.main("--predict", *flags, *devices) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].count("w") > 3
    assert texts[1] == texts[0]


def test_evaluation_and_checkpoints_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Workspace(tmp_path, train_steps=5, eval_steps=2)
    assert run.main("--steps_per_checkpoint", "2", "--sacred_id", "7") == 0
    results = [json.loads(line) for line in (run.model_path / "eval_7.jsonl").read_text().splitlines()]
    assert [result["global_step"] for result in results] == [2, 4, 5]
    assert {result["task"] for result in results} == {"validation"}
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == results
    assert {path.name for path in run.model_path.glob("model.ckpt-*.index")} == {
        f"model.ckpt-{step}.index" for step in (0, 2, 4, 5)
    }
    assert json.loads((run.model_path / "config.json").read_text())["n_embd"] == 16
    tags = {
        value.tag
        for path in run.model_path.glob("events.*")
        for event in tf.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    assert {"loss", "lr", "grad_norm"} <= tags


def test_training_that_reached_its_end_does_nothing_and_new_starts_again(tmp_path: Path) -> None:
    run = Workspace(tmp_path, train_steps=2)
    assert run.main() == 0
    first = run.weights()
    assert run.main() == 0
    assert len(run.losses()) == 2
    assert run.main("--new") == 2  # nobody is there to ask
    assert run.main("--new", "--yes") == 0
    assert len(run.losses()) == 2
    for name, value in run.weights().items():
        np.testing.assert_array_equal(value, first[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_ends(tmp_path: Path, signum: int) -> None:
    run = Workspace(tmp_path, train_steps=1_000_000)
    command = [sys.executable, "main.py", "--model", str(run.config_path)]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stderr=log, stdout=log)
    metrics = run.model_path / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < give_up, (tmp_path / "log").read_text()
        time.sleep(0.2)
    os.kill(process.pid, signum)
    assert process.wait(60) == 128 + signum
    log.seek(0)
    text = log.read()
    assert "Traceback" not in text
    step = int(run.weights()["global_step"])
    assert step > 0
    assert f"stopped at step {step}, checkpoint saved" in text
    assert run.metrics()[-1]["step"] == step
