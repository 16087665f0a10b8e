"""The configurations in configs/, and the settings that GPT-Neo's own had."""

import json
import re
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
from mesh.devices import use_graph_mode
from mesh.layout import check_layout, parse
from models.dims import TENSORS, layout_sizes
from models.size import num_parameters, variable_shapes
from tests.config_values import make

ROOT = CONFIG_DIR.parent
use_graph_mode()


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_model_config(path.stem)
    assert config.name == path.stem
    assert make_model_config(json.loads(config_to_json(config)), "again") == config


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


# What all of GPT-Neo's own configs say, and what nearly all of them do.
GPT_NEO_COMMON: dict[str, Any] = {
    "lr_decay": "cosine", "warmup_steps": 3000, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-08, "opt_name": "adam",
    "scale_by_depth": True, "scale_by_in": False, "activation_function": "gelu", "gradient_clipping": 1.0,
    "embed_dropout": 0, "attn_dropout": 0, "res_dropout": 0, "predict_batch_size": 1, "predict_steps": 1, "n_ctx": 2048,
    "weight_decay": 0.1, "eval_steps": 0, "iterations": 500,
    "datasets": [["openwebtext-documents", 25, "documents_random", 1.0]],
}  # fmt: skip
PILE = {"datasets": [["pile", 25, "documents_random", 1.0]], "train_steps": 286150, "eval_steps": 10}
ADA = {"ada_epsilon1": 1e-30, "ada_epsilon2": 0.001}
MICROBATCHES = {"tokens_per_mb_per_replica": 2048, "recompute_grad": True}
POD_128 = {"mesh_shape": "x:128,y:2", "layout": "embd:y,batch:x", "recompute_grad": True}
POD_64 = {"mesh_shape": "x:64,y:4", "recompute_grad": False, "iterations": 2500}
# name: n_head, n_vocab, lr, train_batch_size, eval_batch_size, n_embd, n_layer, train_steps; what else differs
GPT_NEO: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {
    "gpt2_small": (
        (6, 50257, 0.0006, 512, 128, 768, 12, 1000000),
        {
            "embed_dropout": 0.1, "attn_dropout": 0.1, "res_dropout": 0.1, "weight_decay": 0, "lr_decay_end": 300000,
            "eval_steps": 30, "predict_steps": 0, "predict_batch_size": 8, "iterations": 2500, "n_ctx": 1024,
            "datasets": ["openwebtext2_new_inputs"], "mesh_shape": "all:64", "layout": "batch:all",
            "recompute_grad": False,
        },
    ),
    "gpt3_13B_256": (
        (40, 50257, 0.0001, 1024, 128, 5120, 40, 143075),
        ADA | MICROBATCHES | {"attention_types": [[["global", "local"], 20]], "precision": "bfloat16"}
        | {"mesh_shape": "x:16,y:16", "layout": "batch:x,embd:y,memory_length:y"},
    ),
    "gpt3_13B_256_Pile": (
        (40, 50257, 0.0001, 1024, 512, 5120, 40, 286150),
        PILE | MICROBATCHES | {"precision": "bfloat16"}
        | {"mesh_shape": "x:16,y:16", "layout": "batch:x,memory_length:y,embd:y"},
    ),
    "gpt3_2-7B_256": ((32, 50257, 0.00016, 512, 128, 2560, 32, 286150), POD_128 | ADA),
    "gpt3_6-7B_256": ((32, 50257, 0.00012, 1024, 128, 4096, 32, 143075), POD_128),
    "gpt3_PAR_small_256": (
        (12, 50304, 0.0006, 256, 64, 768, 19, 572300),
        POD_64 | {"attention_types": [[["global", "none", "none"], 5], [["none"], 4]], "iterations": 1000}
        | {"layout": "batch:x,heads:y,vocab:y,intermediate_expanded:y"},
    ),
    "gpt3_XL_256_Pile": (
        (32, 50257, 0.0002, 512, 512, 2048, 24, 286150),
        POD_128 | PILE | MICROBATCHES | {"layout": "batch:x,memory_length:y,embd:y", "precision": "bfloat16"},
    ),
    "gpt3_large_256": (
        (16, 50304, 0.00025, 256, 64, 1536, 24, 572300),
        POD_64 | ADA | MICROBATCHES | {"layout": "batch:x,vocab:y,heads:y"},
    ),
    "gpt3_medium_256": (
        (16, 50304, 0.0003, 256, 64, 1024, 24, 572300), POD_64 | {"layout": "batch:x,heads:y,vocab:y"}
    ),
    "gpt3_small_256": (
        (12, 50304, 0.0006, 256, 64, 768, 12, 572300),
        POD_64 | {"layout": "batch:x,heads:y,vocab:y,intermediate_expanded:y"},
    ),
}  # fmt: skip
NUMBERS = ("n_head", "n_vocab", "lr", "train_batch_size", "eval_batch_size", "n_embd", "n_layer", "train_steps")


@pytest.mark.parametrize("name", GPT_NEO)
def test_gpt_neos_configs_are_kept_as_written(name: str) -> None:
    numbers, others = GPT_NEO[name]
    expected = GPT_NEO_COMMON | dict(zip(NUMBERS, numbers, strict=True)) | others
    expected.setdefault("attention_types", [[["global"], expected["n_layer"]]])
    given = json.loads((CONFIG_DIR / f"{name}.json").read_text())
    assert given == expected | {"model_path": f"runs/{name}"}
    config = load_model_config(name)
    written = json.loads(config_to_json(config))
    assert {key: written[key] for key in given if key != "datasets"} == {
        key: value for key, value in given.items() if key != "datasets"
    }
    assert len(config.layer_attention) == given["n_layer"]


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_fits_its_mesh(path: Path) -> None:
    config = load_model_config(path.stem)
    layout = parse(config.mesh_shape, config.layout, 1)
    batches = {"train_batch_size": config.train_batch_size, "eval_batch_size": config.eval_batch_size}
    check_layout(layout, layout_sizes(config, batches), TENSORS)


def test_the_readme_tells_every_config() -> None:
    """Parameters are those of the graphs; 1.3B and 2.7B have as many as the models that EleutherAI released."""
    table = (ROOT / "README.md").read_text().split("\n## Available configs\n")[1].split("\n## ")[0]
    rows = {row[1]: row[0] for row in re.findall(r"^(\| `([\w-]+)` \|.*\|)[^|]+\|$", table, re.MULTILINE)}
    for path in sorted(CONFIG_DIR.glob("*.json")):
        config = load_model_config(path.stem)
        sizes = (config.n_layer, config.n_embd, config.n_head, config.n_ctx)
        mesh = config.mesh_shape or "any"
        cells = (f"`{path.stem}`", f"{num_parameters(config):,}", *sizes, mesh, config.train_batch_size)
        assert rows.pop(path.stem, None) == "".join(f"| {cell} " for cell in cells) + "|", "a row of the README"
    assert not rows
    for name, parameters in (("colab_XL", 1_315_575_808), ("gpt3_2-7B_256", 2_651_307_520)):
        assert num_parameters(load_model_config(name)) == parameters


def test_parameters_of_a_model_counted_by_hand() -> None:
    width, vocabulary, context = 8, 64, 128
    norm, attention = 2 * width, 4 * width**2 + width
    mlp = 2 * 4 * width**2 + 4 * width + width
    expected = (vocabulary + context) * width + 4 * (2 * norm + attention + mlp) + norm
    assert num_parameters(make()) == expected
    assert num_parameters(make(share_parameters=True)) == expected - 3 * (2 * norm + attention + mlp)
    assert variable_shapes(make(no_weight_tie=True))["gpt2/wte_final_linear/conv1d_main/linear_out/kernel"] == [8, 64]


def test_the_reference_example_is_accepted() -> None:
    moe = [2, 4, 6, 8, 10, 12]
    config = make(n_layer=12, moe_layers=moe, moe_params={"moe_dropout_rate": 0.0}, n_heads=2, axial_pos_emb_=True)
    assert (config.moe_layers, config.axial_pos_emb) == (tuple(moe), (8, 16))


def test_quickstart() -> None:
    config = load_model_config("quickstart")
    assert (config.n_ctx, config.n_embd, config.n_head, config.n_layer, config.n_vocab) == (128, 192, 6, 4, 4096)
    assert (config.lr, config.train_steps, config.mesh_shape, config.layout) == (0.0015, 400, None, None)
    assert config.datasets == (DatasetSource(dataset=load_dataset_config("quickstart")),)
