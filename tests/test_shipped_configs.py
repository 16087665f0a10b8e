"""The configurations in configs/, and the settings that GPT-Neo's own had."""

import json
from pathlib import Path
from typing import Any

import pytest

from config import (
    CONFIG_DIR,
    DATASET_CONFIG_DIR,
    DatasetSource,
    config_to_json,
    load_dataset_config,
    load_model_config,
    make_model_config,
)
from tests.config_values import make


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_model_config(path.stem, allow_unbuilt=True)
    assert config.name == path.stem
    assert make_model_config(json.loads(config_to_json(config)), "again", allow_unbuilt=True) == config


@pytest.mark.parametrize(
    ("dataset_id", "values"),
    [
        ("pile", (50257, "gpt2", True, 50256, 50257)),
        ("openwebtext2_new_inputs", (50257, "gpt2", True, 50256, 50257)),
        ("openwebtext-documents", (50257, "gpt2", True, 50256, 50257)),
        ("example", (32768, "datasets/example/tokenizer/byte-level-bpe.tokenizer.json", False, 0, 1)),
        ("quickstart", (4096, "runs/quickstart/tokenizer/byte-level-bpe.tokenizer.json", False, 0, 1)),
    ],
)
def test_shipped_dataset_configs(dataset_id: str, values: tuple[Any, ...]) -> None:
    found = load_dataset_config(dataset_id)
    kept = (found.n_vocab, found.tokenizer_path, found.tokenizer_is_pretrained, found.eos_id, found.padding_id)
    assert (found.id, kept) == (dataset_id, values)
    assert "://" not in found.path + found.eval_path


def test_every_shipped_dataset_config_loads() -> None:
    stems = sorted(path.stem for path in DATASET_CONFIG_DIR.glob("*.json"))
    assert [load_dataset_config(stem).id for stem in stems] == stems


# The settings that GPT-Neo's own configs share, and those in which they differ.
GPT_NEO_COMMON: dict[str, Any] = {
    "lr_decay": "cosine", "warmup_steps": 3000, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-08, "opt_name": "adam",
    "scale_by_depth": True, "scale_by_in": False, "activation_function": "gelu", "gradient_clipping": 1.0,
    "embed_dropout": 0, "attn_dropout": 0, "res_dropout": 0, "predict_batch_size": 1, "predict_steps": 1, "n_ctx": 2048,
    "weight_decay": 0.1, "eval_steps": 0, "ada_epsilon1": 1e-30, "ada_epsilon2": 0.001, "iterations": 500,
    "datasets": [["openwebtext-documents", 25, "documents_random", 1.0]], "model_path": "runs/gpt-neo",
}  # fmt: skip


GPT_NEO_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2_small": {
        "n_head": 6, "n_vocab": 50257, "embed_dropout": 0.1, "lr": 0.0006, "weight_decay": 0, "train_batch_size": 512,
        "attn_dropout": 0.1, "train_steps": 1000000, "lr_decay_end": 300000, "eval_steps": 30, "predict_steps": 0,
        "res_dropout": 0.1, "eval_batch_size": 128, "predict_batch_size": 8, "iterations": 2500, "n_embd": 768,
        "datasets": ["openwebtext2_new_inputs"], "n_ctx": 1024, "n_layer": 12, "attention_types": [[["global"], 12]],
        "mesh_shape": "all:64", "layout": "batch:all", "recompute_grad": False,
    },
    "gpt3_13B_256": {
        "n_head": 40, "n_vocab": 50257, "lr": 0.0001, "train_batch_size": 1024, "train_steps": 143075,
        "eval_batch_size": 128, "n_embd": 5120, "n_layer": 40, "attention_types": [[["global", "local"], 20]],
        "mesh_shape": "x:16,y:16", "layout": "batch:x,embd:y,memory_length:y", "recompute_grad": True,
        "tokens_per_mb_per_replica": 2048, "precision": "bfloat16",
    },
    "gpt3_XL_256_Pile": {
        "n_head": 32, "n_vocab": 50257, "lr": 0.0002, "train_batch_size": 512, "train_steps": 286150, "eval_steps": 10,
        "eval_batch_size": 512, "n_embd": 2048, "datasets": [["pile", 25, "documents_random", 1.0]], "n_layer": 24,
        "attention_types": [[["global"], 24]], "mesh_shape": "x:128,y:2", "layout": "batch:x,memory_length:y,embd:y",
        "recompute_grad": True, "tokens_per_mb_per_replica": 2048, "precision": "bfloat16",
    },
    "gpt3_PAR_small_256": {
        "n_head": 12, "n_vocab": 50304, "lr": 0.0006, "train_batch_size": 256, "train_steps": 572300,
        "eval_batch_size": 64, "iterations": 1000, "n_embd": 768, "n_layer": 19,
        "attention_types": [[["global", "none", "none"], 5], [["none"], 4]], "mesh_shape": "x:64,y:4",
        "layout": "batch:x,heads:y,vocab:y,intermediate_expanded:y", "recompute_grad": False,
    },
}  # fmt: skip


GPT_NEO_SIZES = {  # name: n_head, n_vocab, lr, train_batch_size, n_embd, n_layer
    "gpt3_13B_256_Pile": (40, 50257, 0.0001, 1024, 5120, 40),
    "gpt3_2-7B_256": (32, 50257, 0.00016, 512, 2560, 32),
    "gpt3_6-7B_256": (32, 50257, 0.00012, 1024, 4096, 32),
    "gpt3_large_256": (16, 50304, 0.00025, 256, 1536, 24),
    "gpt3_medium_256": (16, 50304, 0.0003, 256, 1024, 24),
    "gpt3_small_256": (12, 50304, 0.0006, 256, 768, 12),
}


GPT_NEO_CONFIGS |= {
    name: {
        **dict(zip(("n_head", "n_vocab", "lr", "train_batch_size", "n_embd", "n_layer"), sizes, strict=True)),
        **{"attention_types": [[["global"], sizes[-1]]], "train_steps": 572300, "recompute_grad": True},
    }
    for name, sizes in GPT_NEO_SIZES.items()
}


@pytest.mark.parametrize("name", GPT_NEO_CONFIGS)
def test_gpt_neo_settings_are_kept_as_written(name: str) -> None:
    values = GPT_NEO_COMMON | GPT_NEO_CONFIGS[name]
    config = make_model_config(values, name, allow_unbuilt=True)
    written = json.loads(config_to_json(config))
    assert {key: written[key] for key in values if key != "datasets"} == {
        key: value for key, value in values.items() if key != "datasets"
    }
    assert len(config.layer_attention) == values["n_layer"]


def test_the_reference_example_is_accepted() -> None:
    moe = [2, 4, 6, 8, 10, 12]
    config = make(n_layer=12, moe_layers=moe, moe_params={"moe_dropout_rate": 0.0}, n_heads=2, axial_pos_emb_=True)
    assert (config.moe_layers, config.axial_pos_emb) == (tuple(moe), (8, 16))


def test_quickstart() -> None:
    config = load_model_config("quickstart")
    assert (config.n_ctx, config.n_embd, config.n_head, config.n_layer, config.n_vocab) == (128, 192, 6, 4, 4096)
    assert (config.lr, config.train_steps, config.mesh_shape, config.layout) == (0.0015, 400, None, None)
    assert config.datasets == (DatasetSource(dataset=load_dataset_config("quickstart")),)
