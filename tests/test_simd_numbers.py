"""The graph that TPUs run gives the numbers that local devices give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.experts import with_expert_rules
from mesh.layout import parse
from tests.simd_emulation import emulated_losses
from tests.tiny import tiny_config
from tests.training_steps import run_steps, train_step, weights_of

STEPS = 10
BY_HEADS = "batch:x,heads:y,vocab:y,intermediate_expanded:y"
BY_WIDTH = "batch:x,embd:y,memory_length:y"
ONE_LAYER = {"n_layer": 1, "attention_types": [[["global"], 1]], "res_dropout": 0.1}
MIXED = {"attention_types": [[["local", "linear"], 1]], "local_attention_radius": 3}
EXPERTS = ONE_LAYER | {"moe_layers": [0], "moe_params": {"moe_num_experts": 4, "moe_hidden_size": 8}}
# What sends tokens to experts and back rounds them to bfloat16: Mesh-TensorFlow's all-to-all on a TPU.
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "plain, by heads": (ONE_LAYER, BY_HEADS, 1e-5),
    "plain, by width": (ONE_LAYER, BY_WIDTH, 1e-5),
    "local and linear": (MIXED, BY_HEADS, 1e-5),
    "experts": (EXPERTS, "batch:x,experts:x,heads:y,vocab:y", 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cores_compute_what_local_devices_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, rules, tolerance = CASES[name]
    config = tiny_config(tmp_path, **changes)
    expected = run_steps(config, "x:2,y:2", rules, STEPS).losses
    assert expected[-1] < expected[0]
    layout = with_expert_rules(parse("x:2,y:2", rules, 4))
    found = emulated_losses(monkeypatch, layout, train_step(config), weights_of(config), STEPS)
    np.testing.assert_allclose(found, expected, atol=tolerance)
