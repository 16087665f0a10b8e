"""A small valid configuration for tests, and how to read what a wrong one is told."""

from typing import Any

import pytest

from config import ModelConfig, make_model_config
from errors import UserError

BASE: dict[str, Any] = {
    "n_head": 2,
    "n_embd": 8,
    "n_layer": 4,
    "n_ctx": 128,
    "n_vocab": 64,
    "lr": 0.001,
    "train_batch_size": 4,
    "train_steps": 10,
    "datasets": [["train_*.tfrecords", "", 1, "chunks", 1.0]],
    "model_path": "runs/test",
}


def make(**changes: Any) -> ModelConfig:
    return make_model_config(BASE | changes, "test")


def refusal(values: dict[str, Any], *, overrides: dict[str, Any] | None = None) -> list[str]:
    """The lines of the error, without the name that starts each of them."""
    with pytest.raises(UserError) as caught:
        make_model_config(values, "test", overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith("test: ") for line in lines)
    return [line.removeprefix("test: ") for line in lines]
