"""Layers of experts in training: routing and balancing loss against numpy, and what must not change either."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config_moe import MoeParams
from errors import UserError
from mesh import experts, mtf
from mesh.layout import check_layout, parse
from mesh.randomness import make_key, uniform
from models import gpt
from models.context import Context
from models.dims import TENSORS, layout_sizes, make_dims
from models.mixture_of_experts import mixture
from tests.test_microbatches import Step, assert_same, first_step
from tests.tiny import MtfSession, random_tokens, tiny_config
from tests.workspace import Workspace

BATCH, LENGTH, EMBD, EXPERTS, HIDDEN = 3, 9, 6, 3, 5
GROUP = 5  # nine positions make groups of 5 and 4, the last one filled up
GROUPS = 2
SETTINGS: dict[str, Any] = {
    "moe_num_experts": EXPERTS,
    "moe_hidden_size": HIDDEN,
    "moe_group_size": GROUP,
    "moe_capacity_factor_train": 1.5,
    "moe_min_expert_capacity": 1,
    "moe_second_threshold_train": 0.4,
    "moe_loss_coef": 0.5,
}


def test_defaults_are_those_of_mesh_tensorflow() -> None:
    from mesh_tensorflow.transformer import moe

    theirs = moe.HParams()
    moe.set_default_moe_hparams(theirs)
    ours = MoeParams()
    assert {key: getattr(ours, key) for key in vars(theirs)} == vars(theirs)
    layer = moe.MoE1D()._hparams  # the same layer's defaults where the function has none
    for key in ("moe_min_expert_capacity", "moe_dropout_rate"):
        assert getattr(ours, key) == getattr(layer, key)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def route_group(
    x: np.ndarray, weights: dict[str, np.ndarray], policy: str, draws: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """[tokens, embd] of one group -> (outputs, balance terms of first and second choices, choices without room).

    Algorithm 1 of arXiv:2006.16668, with Mesh-TensorFlow's policies for the second choice. `size` is the group's with
    what fills it up, over which the means of the balance are taken.
    """
    capacity = int(size * SETTINGS["moe_capacity_factor_train"] / EXPERTS)
    gates = np.stack([softmax(row @ weights["top_2_gating/kernel"]) for row in x])
    order = np.argsort(-gates, axis=-1)
    threshold = SETTINGS["moe_second_threshold_train"]
    room, dropped, out = np.full(EXPERTS, capacity), 0, np.zeros_like(x)
    for choice in (0, 1):  # every first choice is served before any second one
        for token, row in enumerate(x):
            chosen = gates[token, order[token, :2]]
            share = chosen[choice] / chosen.sum()
            asks = {"all": True, "none": False, "threshold": share > threshold}
            asks["random"] = draws[token] < share / threshold
            if choice and not asks[policy]:
                continue
            expert = order[token, choice]
            if not room[expert]:
                dropped += 1
                continue
            room[expert] -= 1
            hidden = np.maximum(row @ weights["wi/kernel"][expert], 0)
            out[token] += share * (hidden @ weights["wo/kernel"][expert])
    others = gates * (np.arange(EXPERTS) != order[:, :1])
    # what fills the group up has equal gates, which Mesh-TensorFlow counts in the second choices' balance
    filling = (size - len(x)) / EXPERTS
    proxies = [gates.sum(0), (others / others.sum(-1, keepdims=True)).sum(0) + filling]
    chosen = [np.bincount(order[:, choice], minlength=EXPERTS) for choice in (0, 1)]
    return out, np.array([EXPERTS * chosen[i] @ proxies[i] / size**2 for i in (0, 1)]), dropped


def test_training_routes_as_the_paper_does(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=[BATCH, LENGTH, EMBD]).astype(np.float32)
    shapes = {
        "top_2_gating/kernel": (EMBD, EXPERTS),
        "wi/kernel": (EXPERTS, EMBD, HIDDEN),
        "wo/kernel": (EXPERTS, HIDDEN, EMBD),
    }
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    policies = ("all", "none", "threshold", "random")

    def layer(mesh: mtf.Mesh, key: mtf.Tensor | None, **settings: Any) -> tuple[mtf.Tensor, ...]:
        params = SETTINGS | settings
        config = tiny_config(tmp_path, n_embd=EMBD, n_head=1, n_ctx=LENGTH, moe_layers=[0], moe_params=params)
        dims = make_dims(config, BATCH)
        ctx = Context(config, mesh, dims, mtf.VariableDType(tf.float32), dropout_key=key).in_layer(0)
        with tf.variable_scope("layer", reuse=tf.AUTO_REUSE):
            return mixture(ctx, mtf.import_tf_tensor(mesh, x, mtf.Shape([*ctx.activation_dims, dims.embd])))

    def build(mesh: mtf.Mesh) -> dict[str, Any]:
        key = make_key(mesh, 1, 0)
        found: dict[str, Any] = {
            policy: layer(mesh, key, moe_second_policy_train=policy, moe_use_second_place_loss=int(policy == "all"))
            for policy in policies
        }
        found["room"] = layer(mesh, key, moe_capacity_factor_train=EXPERTS, moe_second_policy_train="all")
        found["outside training"] = layer(mesh, None)
        groups = mtf.Shape([mtf.Dimension("batch", GROUPS * BATCH), mtf.Dimension("group", GROUP)])
        return found | {"draws": uniform(key, groups, "h0/moe/second_choice")}

    found = MtfSession().run(build, {f"layer/{name}": value for name, value in weights.items()})
    draws = found["draws"].reshape(BATCH, GROUPS * GROUP)
    np.testing.assert_allclose(found["room"][0], found["outside training"][0], atol=1e-5)
    assert len({found[policy][0].tobytes() for policy in policies}) == len(policies)
    for policy in policies:
        out, loss = np.zeros_like(x), []
        dropped = 0
        for row in range(BATCH):
            for start in range(0, LENGTH, GROUP):
                part = np.s_[row, start : min(start + GROUP, LENGTH)]
                out[part], balance, without_room = route_group(x[part], weights, policy, draws[part], GROUP)
                loss.append(balance[0] + (0.5 * balance[1] if policy == "all" else 0.0))
                dropped += without_room
        assert dropped > 0, policy
        np.testing.assert_allclose(found[policy][0], out, atol=1e-5, err_msg=policy)
        assert found[policy][1] == pytest.approx(SETTINGS["moe_loss_coef"] * np.mean(loss), abs=1e-6), policy


SMALL: dict[str, Any] = {"n_layer": 1, "attention_types": [[["none"], 1]], "moe_layers": [0], "seed": 2}
FOUR_EXPERTS = {"moe_num_experts": 4, "moe_hidden_size": 8, "moe_group_size": 4, "moe_min_expert_capacity": 1}
RANDOM = SMALL | {"moe_params": FOUR_EXPERTS | {"moe_dropout_rate": 0.2}, "res_dropout": 0.1}
STEADY = SMALL | {"moe_params": FOUR_EXPERTS | {"moe_second_policy_train": "all"}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return first_step(tmp_path_factory.mktemp("drawn"), **RANDOM)


@pytest.mark.parametrize(
    ("mesh_shape", "layout"),
    [
        ("x:2,y:2", "batch:x,experts:x,embd:y"),
        ("x:2,y:2", "batch:x,sequence:y,experts:y"),
        ("x:2", "expert_hidden:x,heads:x"),
    ],
)
def test_the_mesh_does_not_matter(tmp_path: Path, drawn: Step, mesh_shape: str, layout: str) -> None:
    assert_same(first_step(tmp_path, (mesh_shape, layout), **RANDOM), drawn, 1e-5)


def test_recomputing_routes_the_same(tmp_path: Path, drawn: Step) -> None:
    assert_same(first_step(tmp_path, recompute_grad=True, **RANDOM), drawn, 0)


def test_microbatches_make_the_same_groups(tmp_path: Path) -> None:
    whole = first_step(tmp_path / "whole", **STEADY)
    assert_same(first_step(tmp_path / "cut", tokens_per_mb_per_replica=16, **STEADY), whole, 1e-6)


def test_products_are_the_same_where_shapes_are_fixed() -> None:
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=[2, 4, 3]), random.normal(size=[2, 3, 5])  # the experts 1 and 2 of several
    choice = np.array([[1, 2, 0, -1], [2, 2, 1, 3]], np.int32)
    expected = np.zeros([2, 4, 5])
    for place in np.ndindex(2, 4):
        if choice[place] in (1, 2):
            expected[place] = x[place] @ kernel[choice[place] - 1]
    with tf.Graph().as_default(), tf.Session() as session:
        inputs = [tf.constant(x), tf.constant(choice), tf.constant(kernel)]
        for products in (experts._own_products, experts._all_products):
            found = session.run(products(inputs[0], inputs[1], inputs[2], 1))
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_outside_training_the_mesh_does_not_matter_either(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SMALL, moe_params=FOUR_EXPERTS)
    dims, tokens = make_dims(config, BATCH + 1, 5), random_tokens(BATCH + 1, 5)

    def build(mesh: mtf.Mesh) -> list[mtf.Tensor]:
        dtype = mtf.VariableDType(tf.float32)
        inputs = mtf.import_tf_tensor(mesh, tokens, mtf.Shape([dims.batch, dims.sequence]))
        whole = gpt.logits(Context(config, mesh, dims, dtype), inputs)
        last = mtf.constant(mesh, 4, dtype=tf.int32)
        token = mtf.import_tf_tensor(mesh, tokens[:, 4], mtf.Shape([dims.batch]))
        return [whole, gpt.logits(Context(config, mesh, dims, dtype, position=last), token)]

    one = MtfSession().run(build)
    np.testing.assert_allclose(one[1], one[0][:, 4], atol=1e-5)
    for layout in ("batch:x,experts:x,expert_hidden:y", "batch:x,experts:x,embd:y"):
        several = MtfSession("x:2,y:2", layout).run(build)
        for found, expected in zip(several, one, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=layout)


def test_training_adds_the_auxiliary_loss_and_resumes_with_the_same_draws(tmp_path: Path) -> None:
    changes = {"train_steps": 4, **RANDOM}
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = Workspace(tmp_path / "straight", eval_steps=1, **changes)
    assert straight.main() == 0
    resumed = Workspace(tmp_path / "resumed", lr_decay_end=4, **changes)
    assert resumed.main("--set", "train_steps=2") == resumed.main() == 0
    assert resumed.losses() == straight.losses()
    for line in straight.metrics():
        assert line["auxiliary_loss"] >= 0.009  # its least is moe_loss_coef, 0.01, but for what a group cannot balance
        z_loss = line["loss"] - line["cross_entropy"] - line["auxiliary_loss"]
        assert 0 < z_loss < 0.01
    evaluated = json.loads((straight.model_path / "eval_.jsonl").read_text())
    assert 0 < evaluated["loss"] - evaluated["cross_entropy"] < 0.005  # no auxiliary loss
    weights = straight.weights()
    assert weights["gpt2/h0/wi/kernel"].shape == (4, 16, 8)
    assert not [name for name in weights if "mlp" in name]


@pytest.mark.parametrize(
    ("layout", "changes", "expected"),
    [
        ("experts:x", {"moe_layers": []}, "names dimension 'experts', which this model does not have"),
        ("experts:x", {"moe_layers": [2]}, "names dimension 'experts', which this model does not have"),
        ("experts:x", {"moe_params": {"moe_num_experts": 3}}, "splits moe_num_experts = 3 into 2 parts"),
        ("expert_hidden:x", {"moe_params": {"moe_hidden_size": 5}}, "splits moe_hidden_size = 5 into 2 parts"),
        ("experts:x,embd:x", {}, r"one tensor \[experts, embd, expert_hidden\] has both"),
        ("batch:x,expert_hidden:x", {}, r"one tensor \[batch, expert_hidden\] has both"),
    ],
)
def test_refused_layouts(tmp_path: Path, layout: str, changes: dict[str, Any], expected: str) -> None:
    config = tiny_config(tmp_path, **({"moe_layers": [0]} | changes))
    with pytest.raises(UserError, match=expected):
        check_layout(parse("x:2", layout, 2), layout_sizes(config, {"train_batch_size": 4}), TENSORS)
