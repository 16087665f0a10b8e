"""What each value of a configuration may be, and the rules between them."""

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import config as config_module
from config import (
    ModelConfig,
    config_to_json,
    make_model_config,
)
from config_fields import ACTIVATION_NAMES
from config_schema import nearest_factors
from errors import UserError
from tests.config_values import BASE, make, refusal


def test_defaults() -> None:
    values = {key: value for key, value in BASE.items() if key != "n_ctx"}
    config = make_model_config(values, "test")
    assert config.name == "test"
    expected = {
        "model": "GPT", "n_ctx": 2048, "iterations": 500, "local_attention_radius": 256, "activation_function": "gelu",
        "lr_decay": "cosine", "lr_decay_end": None, "warmup_steps": 0, "opt_name": "adam", "beta1": 0.9, "beta2": 0.95,
        "epsilon": 1e-8, "ada_epsilon1": 1e-30, "ada_epsilon2": 1e-3, "weight_decay": 0.0, "gradient_clipping": None,
        "eval_batch_size": 4, "eval_steps": 0, "predict_batch_size": 1, "predict_steps": 0, "predict_max_steps": None,
        "mesh_shape": None, "layout": None, "precision": "float32", "tokens_per_mb_per_replica": None, "z_loss": 1e-4,
        "recompute_grad": False, "moe_layers": (), "moe_params": {}, "axial_pos_emb": None, "num_mem_kv": 0, "seed": 1,
        "eval_tasks": (), "shuffle_input_filenames": True, "no_dataset": False, "mlm_mask_prob": 0.15,
        "mlm_same_token_prob": 0.1, "mlm_random_token_prob": 0.1, "mlm_mask_ignore_ids": (), "mlm_mask_id": None,
        "eos_id": None, "padding_id": None, "attention_types": (),
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected


def test_derived_values() -> None:
    config = make(attention_types=[[["global", "local"], 1], [["none"], 2]], lr_decay_end=7)
    assert config.layer_attention == ("global", "local", "none", "none")
    assert make().layer_attention == ("global",) * 4
    assert config.head_size == 4
    assert (config.lr_end_step, make().lr_end_step) == (7, 10)
    assert config.tokens_per_batch == 512


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("train_steps", 1e3, 1000),
        ("train_steps", 7.0, 7),
        ("lr", 1, 1.0),
        ("beta1", 0, 0.0),
        ("lr_decay_end", None, None),
        ("lr_decay_end", False, None),
        ("gradient_clipping", None, None),
        ("gradient_clipping", False, None),
        ("tokens_per_mb_per_replica", False, None),
        ("weight_decay", False, 0.0),
        ("weight_decay", None, 0.0),
        ("z_loss", False, 0.0),
        ("z_loss", None, 1e-4),
        ("warmup_steps", None, 0),
        ("eval_batch_size", None, 4),
        ("eval_batch_size", 2, 2),
        ("n_ctx", None, 2048),
        ("rotary_emb", False, False),
        ("rotary_emb", None, False),
        ("rotary_emb", True, True),
        ("axial_pos_emb", False, None),
        ("axial_pos_emb", None, None),
        ("axial_pos_emb", True, (8, 16)),
        ("axial_pos_emb_", True, (8, 16)),
        ("axial_pos_emb", [32, 4.0], (32, 4)),
        ("num_mem_kv", False, 0),
        ("num_mem_kv", 4, 4),
        ("moe_layers", False, ()),
        ("moe_layers", [1, 3], (1, 3)),
        ("moe_params", {"moe_dropout_rate": 0.0}, {"moe_dropout_rate": 0.0}),
        ("moe_params", False, {}),
        ("eval_tasks", ["lambada"], ("lambada",)),
        ("eval_tasks", False, ()),
        ("attention_types", None, ()),
        ("attention_types", [[["linear"], 4]], ((("linear",), 4),)),
        ("activation_fn", "selu", "selu"),
        ("mlm_mask_ignore_ids", [0, 1], (0, 1)),
        ("mesh_shape", "all:64", "all:64"),
        ("mesh_shape", "x:4, y:2", "x:4,y:2"),
        ("mesh_shape", "x:4;y:2", "x:4,y:2"),
        ("layout", "batch:x,embd:y", "batch:x,embd:y"),
        ("layout", "", ""),
        ("layout", None, None),
        ("padding_id", 64, 64),
        ("predict_max_steps", 5, 5),
        ("model", "GPT", "GPT"),
    ],
)
def test_accepted_values(key: str, value: Any, kept: Any) -> None:
    values = {name: other for name, other in BASE.items() if name != key}
    config = make_model_config(values | {key: value}, "test")
    attribute = getattr(config, config_module.ALIASES.get(key, key))
    assert attribute == kept
    assert type(attribute) is type(kept)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("n_layer", 0, "it must be a whole number of at least 1"),
        ("n_layer", 2.5, "it must be a whole number of at least 1"),
        ("n_layer", True, "it must be a whole number of at least 1"),
        ("n_layer", "4", "it must be a whole number of at least 1"),
        ("n_layer", None, "it must be a whole number of at least 1"),
        ("n_ctx", False, "it must be a whole number of at least 1"),
        ("tokens_per_mb_per_replica", 0, "it must be a whole number of at least 1, or null for none"),
        ("warmup_steps", -1, "it must be a whole number of at least 0"),
        ("seed", -1, "it must be a whole number of at least 0"),
        ("n_ctx", 2**31, "it must be at most 2147483647"),
        (
            "attention_types",
            [[["global"], 10**12]],
            'it names 1000000000000 layers and n_layer is 4; [[["global"], 4]] would work',
        ),
        ("num_mem_kv", True, "it must be a whole number of at least 0"),
        ("lr", 0, "it must be a number above 0"),
        ("lr", "1e-3", "it must be a number above 0"),
        ("lr", float("nan"), "it must be a number above 0"),
        ("lr", float("inf"), "it must be a number above 0"),
        ("gradient_clipping", 0, "it must be a number above 0, or null for none"),
        ("embed_dropout", 1.0, "it must be a number of at least 0 and below 1"),
        ("attn_dropout", -0.1, "it must be a number of at least 0 and below 1"),
        ("beta2", 1, "it must be a number of at least 0 and below 1"),
        ("beta1", True, "it must be a number of at least 0 and below 1"),
        ("mlm_mask_prob", 1.5, "it must be a number from 0 to 1"),
        ("scale_by_depth", "yes", "it must be true or false"),
        ("scale_by_depth", 1, "it must be true or false"),
        ("recompute_grad", "true", "it must be true or false"),
        ("n_embd", 9, "it must be divisible by n_head 2; 8 or 10 would work"),
        ("n_embd", 1, "it must be divisible by n_head 2; 2 would work"),
        ("lr_decay", "cosin", 'did you mean "cosine"? It must be one of "cosine", "linear"'),
        ("opt_name", "sgd", 'it must be one of "adam", "adafactor"'),
        ("precision", "float16", 'did you mean "bfloat16"? It must be one of "float32", "bfloat16"'),
        ("model", "BERT", 'it must be "GPT"'),
        ("model_path", "", "it must be a non-empty string"),
        ("model_path", 3, "it must be a non-empty string"),
        ("eval_tasks", ["piqa"], 'it must be a list of evaluation tasks, from "lambada"'),
        ("eval_tasks", "lambada", 'it must be a list of evaluation tasks, from "lambada"'),
        ("moe_layers", [-1], "it must be a list of layer numbers, counted from 0"),
        ("moe_params", [], "it must be an object of settings"),
        (
            "moe_params",
            {"num_experts": 3},
            'there is no setting "num_experts" (its value is 3); did you mean "moe_num_experts"?',
        ),
        (
            "moe_params",
            {"moe_gating": "switch", "moe_num_experts": 1},
            'its moe_gating is "switch": it must be "top_2"; its moe_num_experts is 1: it must be a whole number of at '
            "least 2",
        ),
        ("mlm_mask_ignore_ids", [True], "it must be a list of token ids, whole numbers of at least 0"),
        ("eos_id", 64, "it must be below n_vocab 64"),
        ("mlm_mask_id", 64, "it must be below n_vocab 64"),
        ("mesh_shape", "x=4", 'it must be axes and their sizes, each axis once, for example "x:4,y:2"'),
        ("mesh_shape", "x:0", 'it must be axes and their sizes, each axis once, for example "x:4,y:2"'),
        ("mesh_shape", "x:2,x:2", 'it must be axes and their sizes, each axis once, for example "x:4,y:2"'),
        (
            "layout",
            "batch:x,batch:y",
            'it must be dimensions and their mesh axes, each dimension once, for example "batch:x,embd:y"',
        ),
        ("axial_pos_emb", [8, 8], "its product is 64 and must be n_ctx 128; [8, 16] would work"),
        ("axial_pos_emb", [128], "it must be true, false or two whole numbers whose product is n_ctx"),
        ("axial_pos_emb", 128, "it must be true, false or two whole numbers whose product is n_ctx"),
        ("attention_types", [[["global"], 3]], 'it names 3 layers and n_layer is 4; [[["global"], 4]] would work'),
        (
            "attention_types",
            [[["sparse"], 4]],
            '"sparse" is no attention type; they are "global", "local", "linear", "none"',
        ),
        (
            "attention_types",
            [["global"], 4],
            'it must be a list of [names, repeats], for example [[["global", "local"], 6]]',
        ),
        (
            "attention_types",
            [[[], 4]],
            'it must be a list of [names, repeats], for example [[["global", "local"], 6]]',
        ),
        ("mlm_training", True, "it needs mlm_mask_id, the id that the tokenizer reserves for its mask"),
        (
            "datasets",
            [],
            'it must hold at least one [dataset id, stitch, sampling mode, weight], or set "no_dataset": true',
        ),
    ],
)
def test_refused_values(key: str, value: Any, sentence: str) -> None:
    assert refusal(BASE | {key: value}) == [f"{key} is {json.dumps(value)}; {sentence}"]


@pytest.mark.parametrize("key", [key for key in BASE if key not in ("n_ctx", "datasets")])
def test_missing_key(key: str) -> None:
    values = {name: value for name, value in BASE.items() if name != key}
    [line] = refusal(values)
    assert line == f"{key} is missing; give {ModelConfig.model_fields[key].description}"


def test_every_activation_is_known() -> None:
    assert len(set(ACTIVATION_NAMES)) == 44
    assert [make(activation_function=name).activation_function for name in ACTIVATION_NAMES] == list(ACTIVATION_NAMES)
    [line] = refusal(BASE | {"activation_function": "gellu"})
    assert line.startswith('activation_function is "gellu"; did you mean "gelu"? It must be one of "gelu", "relu", ')
    assert line.endswith('"softplusmone"')


def test_masked_language_modelling() -> None:
    assert make(mlm_training=True, mlm_mask_id=3).mlm_mask_id == 3
    assert refusal(BASE | {"mlm_training": True, "mlm_mask_id": 3, "mlm_same_token_prob": 0.95}) == [
        "mlm_training is true; mlm_same_token_prob 0.95 and mlm_random_token_prob 0.1 must sum to at most 1"
    ]
    assert refusal(BASE | {"mlm_training": True, "mlm_mask_id": 3, "mlm_mask_prob": 0}) == [
        "mlm_training is true; it needs an mlm_mask_prob above 0"
    ]
    for changes, sentence in (
        ({"mlm_cls_token_id": 3}, "it needs an mlm_cls_token_id other than mlm_mask_id"),
        (
            {"mlm_cls_token_id": 4, "n_ctx": 1},
            "mlm_cls_token_id leaves no room for text where n_ctx is 1; n_ctx 2 would work",
        ),
        ({"predict_steps": 1}, "predict_steps must be 0, since a masked model continues no text"),
        ({"eval_tasks": ["lambada"]}, "eval_tasks must be empty, since they score text from left to right"),
    ):
        assert refusal(BASE | {"mlm_training": True, "mlm_mask_id": 3} | changes) == [
            f"mlm_training is true; {sentence}"
        ]


def test_rotary_needs_an_even_head() -> None:
    assert refusal(BASE | {"rotary_emb": True, "n_embd": 6}) == [
        "rotary_emb is true; n_embd / n_head is 3; it must be even, since the head's halves are turned"
    ]


def test_moe_layer_past_the_last_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert make(moe_layers=[2, 4, 6]).moe_layers == (2, 4, 6)
    assert caplog.messages == ["moe_layers [4, 6]: past the last of 4 layers, which count from 0; ignored"]


@pytest.mark.parametrize(("number", "factors"), [(2048, (32, 64)), (1, (1, 1)), (12, (3, 4)), (13, (1, 13))])
def test_nearest_factors(number: int, factors: tuple[int, int]) -> None:
    assert nearest_factors(number) == factors


def test_equality() -> None:
    assert make() == make_model_config(BASE, "another")
    assert make() != make(lr=0.002)
    assert make() != BASE


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "global", "x:2", "gelu", "chunks"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "path", "x"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([*ModelConfig.model_fields, *config_module.ALIASES, "zebra"]), value=JSON_VALUES)
def test_any_value_is_accepted_or_refused_in_a_sentence(key: str, value: Any) -> None:
    try:
        config = make_model_config(BASE | {key: value}, "test")
    except UserError as error:
        assert all(line.startswith("test: ") for line in str(error).splitlines())
    else:
        assert make_model_config(json.loads(config_to_json(config)), "test") == config
        assert key == "n_layer" or len(config.layer_attention) == 4
