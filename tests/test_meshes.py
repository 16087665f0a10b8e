"""One model, any mesh: losses, gradients, weights after 30 steps, evaluation and texts are those of one device."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.answers import answers_of
from tests.tiny import tiny_config
from tests.training_steps import Steps, run_steps

STEPS = 30
# A larger epsilon than usual: where a gradient is nearly 0, Adam would make a whole step of its rounding.
PLAIN = {
    "n_layer": 1, "attention_types": [[["global"], 1]], "epsilon": 1e-5, "embed_dropout": 0.1, "res_dropout": 0.1,
    "attn_dropout": 0.1, "train_batch_size": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "experts": PLAIN | {"moe_layers": [0], "moe_params": {"moe_num_experts": 4, "moe_hidden_size": 8}},
}
MESHES = [
    ("plain", "x:2", "batch:x"),
    ("plain", "x:2", "heads:x,vocab:x,intermediate_expanded:x"),
    *(
        ("plain", "x:2,y:2", f"batch:x,{split}")
        for split in (
            *("heads:y", "embd:y", "vocab:y", "intermediate_expanded:y", "memory_length:y", "sequence:y"),
            *("heads:y,vocab:y", "heads:y,intermediate_expanded:y", "vocab:y,intermediate_expanded:y"),
            *("embd:y,memory_length:y", "memory_length:y,vocab:y", "memory_length:y,intermediate_expanded:y"),
        )
    ),
    ("plain", "x:4,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y"),
    ("plain", "x:2,y:4", "batch:x,embd:y,memory_length:y"),
    ("experts", "x:2,y:2", "batch:x,experts:y"),
    ("experts", "x:2,y:2", "batch:x,experts:x,heads:y"),
]


def steps_on(directory: Path, model: str, mesh_shape: str, rules: str) -> Steps:
    config = tiny_config(directory, **MODELS[model])
    return run_steps(config, mesh_shape, rules, STEPS, beside=answers_of(config))


@cache
def on_one_device(directory: Path, model: str) -> Steps:
    return steps_on(directory, model, "x:1", "")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh_shape", "rules"), MESHES)
def test_a_mesh_computes_what_one_device_computes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, model: str, mesh_shape: str, rules: str
) -> None:
    one = on_one_device(tmp_path_factory.getbasetemp(), model)
    several = steps_on(tmp_path, model, mesh_shape, rules)
    assert one.losses[-1] < one.losses[0] - 0.5
    np.testing.assert_allclose(several.losses, one.losses, atol=1e-5)
    for name, gradient in one.gradients.items():
        np.testing.assert_allclose(several.gradients[name], gradient, atol=1e-5, err_msg=name)
    for name, weight in one.weights.items():
        np.testing.assert_allclose(several.weights[name], weight, atol=1e-4, err_msg=name)

    assert several.beside.losses == pytest.approx(one.beside.losses, rel=0, abs=1e-5)
    assert (one.beside.greedy["tokens"] != one.beside.sampled["tokens"]).any()
    for found, expected in ((several.beside.greedy, one.beside.greedy), (several.beside.sampled, one.beside.sampled)):
        assert expected["length"].max() == expected["tokens"].shape[1]  # some rows go on to the end of the context
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
