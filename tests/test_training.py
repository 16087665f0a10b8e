"""Training through main.py: resuming, stopping, evaluating on the way, and the same numbers on any mesh."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
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
    curves = read_curves(run)
    assert {"loss", "lr", "grad_norm"} <= curves.keys()
    assert not [tag for tag in curves if "/" in tag]


def read_curves(run: Workspace) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of TensorBoard's scalars."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for path in run.model_path.glob("events.*"):
        for event in tf.train.summary_iterator(str(path)):
            for value in event.summary.value:
                curves[value.tag][event.step] = value.simple_value
    return curves


def test_adafactor_in_bfloat16_resumes_and_every_gradient_is_logged(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"opt_name": "adafactor", "precision": "bfloat16", "log_grads": True, "lr_decay_end": 4}
    settings |= {"n_layer": 1, "attention_types": [[["global"], 1]], "n_embd": 128, "n_vocab": 130, "weight_decay": 0.1}
    settings |= {"tokens_per_mb_per_replica": 16, **DROPOUT}  # two microbatches
    runs = []
    for name, parts in (("straight", [4]), ("resumed", [2, 4])):
        (tmp_path / name).mkdir()
        runs.append(Workspace(tmp_path / name, **settings))
        for steps in parts:
            assert runs[-1].main("--set", f"train_steps={steps}") == 0
    straight, resumed = runs
    assert resumed.losses() == straight.losses()
    expected, found = straight.weights(), resumed.weights()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    slots = {name.rpartition("_slot_")[2]: value.shape for name, value in expected.items() if "gpt2/wte_slot" in name}
    assert slots == {"vr": (128,), "vc": (130,), "m": (130, 128)}

    curves = read_curves(straight)
    variables = {name for name in expected if "_slot_" not in name} - {"global_step"}
    assert {tag for tag in curves if "/" in tag} == {f"grads/norm/{name}" for name in variables}
    for step in range(1, 5):
        norms = [curves[f"grads/norm/{name}"][step] for name in variables]
        assert min(norms) > 0
        assert np.linalg.norm(norms) == pytest.approx(curves["grad_norm"][step], rel=1e-5)
    assert straight.metrics()[0].keys() == {
        *("step", "time", "loss", "cross_entropy", "lr", "grad_norm", "tokens_per_second")
    }


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
