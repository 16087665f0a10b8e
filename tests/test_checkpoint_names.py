"""Checkpoints hold the variables that GPT-Neo's hold, option by option: names, shapes and dtypes, spelled out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from models.size import variable_shapes
from tests.tiny import tiny_config
from tests.workspace import Workspace

Shapes = dict[str, tuple[int, ...]]

E, INNER, VOCAB, CONTEXT = 16, 64, 32, 8  # of tests/tiny.py: 4 heads of 4 features
TABLES: Shapes = {"gpt2/wte": (VOCAB, E), "gpt2/wpe": (CONTEXT, E)}
FINAL: Shapes = {"gpt2/ln_f/g": (E,), "gpt2/ln_f/b": (E,)}


def attention(layer: str) -> Shapes:
    return {
        f"gpt2/{layer}/attn/q": (E, E),
        f"gpt2/{layer}/attn/k": (E, E),
        f"gpt2/{layer}/attn/v": (E, E),
        f"gpt2/{layer}/attn/o": (E, E),
        f"gpt2/{layer}/attn/compute_output_bias/o_b": (E,),
    }


def norm(layer: str, number: int) -> Shapes:
    return {f"gpt2/{layer}/norm_{number}/g": (E,), f"gpt2/{layer}/norm_{number}/b": (E,)}


def gain(layer: str, kind: str) -> Shapes:
    return {f"gpt2/{layer}/{kind}_1/g": (), f"gpt2/{layer}/{kind}_2/g": ()}


def mlp(layer: str, name: str = "mlp", width: int = INNER) -> Shapes:
    return {
        f"gpt2/{layer}/{name}/conv1d_main/c_fc/kernel": (E, width),
        f"gpt2/{layer}/{name}/conv1d_main/c_fc/bias": (width,),
        f"gpt2/{layer}/{name}/conv1d_main/c_proj/kernel": (INNER, E),
        f"gpt2/{layer}/{name}/conv1d_main/c_proj/bias": (E,),
    }


def plain(layer: str) -> Shapes:
    return norm(layer, 1) | attention(layer) | norm(layer, 2) | mlp(layer)


def memory(layer: str) -> Shapes:
    return {f"gpt2/{layer}/attn/attention/mem_k": (3, 4, 4), f"gpt2/{layer}/attn/attention/mem_v": (3, 4, 4)}


def experts(layer: str) -> Shapes:
    return {
        f"gpt2/{layer}/top_2_gating/kernel": (E, 5),
        f"gpt2/{layer}/wi/kernel": (5, E, 12),
        f"gpt2/{layer}/wo/kernel": (5, 12, E),
    }


AXIAL: Shapes = {"gpt2/axial_wpe_1": (2, E), "gpt2/axial_wpe_2": (4, E)}
HEAD: Shapes = {
    "gpt2/wte_final_linear/conv1d_main/linear_out/kernel": (E, VOCAB),
    "gpt2/wte_final_linear/conv1d_main/linear_out/bias": (VOCAB,),
}
WTE: Shapes = {"gpt2/wte": (VOCAB, E)}
MOE = {"moe_layers": [1], "moe_params": {"moe_num_experts": 5, "moe_hidden_size": 12}}
ONE: dict[str, Any] = {"n_layer": 1, "attention_types": [[["global"], 1]]}

CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "plain": ({}, TABLES | plain("h0") | plain("h1") | FINAL),
    "local and linear": ({"attention_types": [[["local", "linear"], 1]]}, TABLES | plain("h0") | plain("h1") | FINAL),
    "none": (
        {"attention_types": [[["none", "global"], 1]]},
        TABLES | norm("h0", 2) | mlp("h0") | plain("h1") | FINAL,
    ),
    "axial_pos_emb": (ONE | {"axial_pos_emb": [2, 4]}, WTE | AXIAL | plain("h0") | FINAL),
    "rotary_emb": (ONE | {"rotary_emb": True}, WTE | plain("h0") | FINAL),
    "num_mem_kv": (ONE | {"num_mem_kv": 3}, TABLES | plain("h0") | memory("h0") | FINAL),
    "macaron": (ONE | {"macaron": True}, TABLES | mlp("h0", "mlp_macaron") | plain("h0") | FINAL),
    "mlp_glu": (
        ONE | {"mlp_glu": True},
        TABLES | norm("h0", 1) | attention("h0") | norm("h0", 2) | mlp("h0", width=2 * INNER) | FINAL,
    ),
    "moe_layers": (MOE, TABLES | plain("h0") | norm("h1", 1) | attention("h1") | norm("h1", 2) | experts("h1") | FINAL),
    "scalenorm": (ONE | {"scalenorm": True}, TABLES | gain("h0", "norm") | attention("h0") | mlp("h0") | FINAL),
    "rezero": (ONE | {"rezero": True}, TABLES | gain("h0", "norm_rezero") | attention("h0") | mlp("h0") | FINAL),
    "share_parameters": ({"share_parameters": True}, TABLES | plain("") | FINAL),
    "no_weight_tie": (ONE | {"no_weight_tie": True}, TABLES | plain("h0") | FINAL | HEAD),
}


@pytest.mark.parametrize("option", CASES)
def test_a_model_has_these_variables_and_no_others(tmp_path: Path, option: str) -> None:
    changes, shapes = CASES[option]
    found = variable_shapes(tiny_config(tmp_path, **changes))
    assert {name: tuple(shape) for name, shape in found.items()} == shapes


def save_as_gpt_neo(run: Workspace, shapes: Shapes, step: int) -> None:
    """A checkpoint of GPT-Neo's under precision bfloat16: weights in bfloat16, Adam's slots in float32."""
    random = np.random.default_rng(0)
    run.model_path.mkdir()
    with tf.Graph().as_default(), tf.Session() as session:
        for name, shape in shapes.items():
            tf.Variable(tf.cast(0.2 * random.normal(size=shape), tf.bfloat16), name=name)
            for slot in ("adam_m", "adam_v"):
                tf.Variable(np.zeros(shape, np.float32), name=f"{name}/{slot}")
        tf.Variable(np.int64(step), name="global_step")
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(sharded=True, save_relative_paths=True)
        saver.save(session, str(run.model_path / "model.ckpt"), step)


TOGETHER = {
    "attention_types": [[["none", "global"], 1]],
    "axial_pos_emb": [2, 4],
    "num_mem_kv": 3,
    "macaron": True,
    "scalenorm": True,
    "no_weight_tie": True,
    **MOE,
}


@pytest.mark.slow
def test_a_checkpoint_of_gpt_neo_evaluates_and_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many options at once; an untied head of GPT-Neo's has no final norm beside it."""
    shapes = (
        WTE | AXIAL | mlp("h0", "mlp_macaron") | {"gpt2/h0/norm_2/g": ()} | mlp("h0")
        | mlp("h1", "mlp_macaron") | gain("h1", "norm") | attention("h1") | memory("h1") | experts("h1") | HEAD
    )  # fmt: skip
    run = Workspace(tmp_path, train_steps=7, **TOGETHER)
    save_as_gpt_neo(run, shapes, 5)
    assert run.main("--eval") == 0
    assert '"global_step": 5' in capsys.readouterr().out
    assert run.main() == 0
    assert [line["step"] for line in run.metrics()] == [6, 7]
    after = run.weights()
    assert {name for name in after if "adam" not in name} == {*shapes, "global_step"}
    for name, shape in shapes.items():
        assert after[name].shape == shape and after[name].dtype == np.float32  # the masters
        assert after[f"{name}/adam_m"].shape == shape and np.abs(after[f"{name}/adam_m"]).max() > 0, name
