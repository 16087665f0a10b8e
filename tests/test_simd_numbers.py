"""The graph that TPUs run gives the numbers that local devices give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.experts import with_expert_rules
from mesh.layout import parse
from model_fns import continue_prompts
from model_graph import ModelGraph
from models import gpt
from models.context import Context
from sample import Sampling
from tests.simd_emulation import collectives_in, emulated_losses, loops, lower_on_cores, session_on_cores, start
from tests.tiny import cpu_devices, tiny_config, training_features
from tests.training_steps import run_steps, train_step, weights_of
from training.step import num_microbatches, training_step

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


Values = list[np.ndarray]


def on_devices_and_cores(
    monkeypatch: pytest.MonkeyPatch,
    config: ModelConfig,
    rules: str,
    build: Callable[[ModelGraph], list[mtf.Tensor]],
    is_training: bool = False,
) -> tuple[Values, list[Values], list[int]]:
    """The values of `build(graph)` on local devices, those on each emulated core, and the collectives of each loop."""
    layout = parse("x:2,y:2", rules, 4)
    weights = weights_of(config)
    with tf.Graph().as_default():
        graph = ModelGraph(config, layout, cpu_devices(4), config.train_batch_size, is_training=is_training)
        outputs = [mtf.anonymize(output) for output in build(graph)]

        def whole(lowering: mtf.Lowering) -> list[tf.Tensor]:
            return [lowering.export_to_tf_tensor(output) for output in outputs]

        local = graph.lower()
        on_devices = whole(local)
        copies, on_cores = lower_on_cores(monkeypatch, with_expert_rules(layout), graph.mesh, whole)
        with session_on_cores(layout) as session:
            start(session, weights, [*copies, local.copy_masters_to_slices()])
            expected, found = session.run([on_devices, on_cores])
        return expected, found, [collectives_in(loop) for loop in loops()]


@pytest.mark.slow
def test_cores_add_up_the_gradients_of_microbatches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, rules, _ = CASES["plain, by heads"]
    config = tiny_config(tmp_path, model_path=str(tmp_path / "none"), tokens_per_mb_per_replica=8, **changes)

    def loss_and_norm(graph: ModelGraph) -> list[mtf.Tensor]:
        assert num_microbatches(config, graph.layout) == 2
        step = training_step(graph, training_features(config), tf.constant(3, tf.int64))
        return [step.losses["loss"], step.norm]

    expected, found, collectives = on_devices_and_cores(monkeypatch, config, rules, loss_and_norm, is_training=True)
    assert len(collectives) == 4 and all(collectives)
    np.testing.assert_allclose(found, [expected] * 4, atol=1e-5)


GREEDY, DRAWN = Sampling(temperature=0), Sampling(top_k=20, top_p=0.95, max_new_tokens=5)
PROMPT_LENGTHS = [3, 1, 6, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "samplings"),
    [("plain, by heads", [GREEDY, DRAWN]), ("local and linear", [GREEDY, DRAWN]), ("experts", [GREEDY])],
)
def test_cores_evaluate_and_continue_as_local_devices_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, samplings: list[Sampling]
) -> None:
    changes, rules, _ = CASES[name]
    config = tiny_config(tmp_path, model_path=str(tmp_path / "none"), **changes)

    def losses_and_continuations(graph: ModelGraph) -> list[mtf.Tensor]:
        features = training_features(config)
        labels = graph.import_batch(features)["labels"]
        prompts = {"prompt_length": tf.constant(PROMPT_LENGTHS), "prompt_number": tf.range(len(PROMPT_LENGTHS))}

        def losses(ctx: Context, inputs: mtf.Tensor) -> mtf.Tensor:
            return gpt.losses(ctx, inputs, labels).cross_entropy

        outputs: list[mtf.Tensor] = []
        for sampling in samplings:
            # the loss of each token, tokens, lengths
            outputs += continue_prompts(graph, features | prompts, losses, sampling, 0)
        return outputs

    expected, found, collectives = on_devices_and_cores(monkeypatch, config, rules, losses_and_continuations)
    assert len(collectives) == 4 * len(samplings) and all(collectives)
    for core in found:
        for value, wanted in zip(core, expected, strict=True):
            if wanted.dtype == np.int32:  # tokens and lengths
                np.testing.assert_array_equal(value, wanted)
            else:
                np.testing.assert_allclose(value, wanted, atol=1e-5)
    for tokens, lengths in zip(expected[1::3], expected[2::3], strict=True):
        assert (lengths > PROMPT_LENGTHS).all() and len(set(tokens.flat)) > 4
