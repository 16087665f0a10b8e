"""Settings that train the same model in other memory: microbatches, and activations computed again."""

import json
from dataclasses import dataclass

from config import ModelConfig
from mesh.layout import MeshLayout
from mesh.plan import Plan
from training.step import num_microbatches


@dataclass(frozen=True)
class Alternative:
    """The plan of a config with other microbatches or with activations recomputed, or not."""

    config: ModelConfig
    microbatches: int
    plan: Plan


def settings(config: ModelConfig) -> str:
    """What tells one of the alternatives from the others, as flags."""
    keys = ("recompute_grad", "tokens_per_mb_per_replica")
    return " ".join(f"--set {key}={json.dumps(getattr(config, key))}" for key in keys)


def choices_beside(config: ModelConfig, layout: MeshLayout) -> list[ModelConfig]:
    """`config` and what differs from it in microbatches, or none, and in recomputation."""
    tokens = config.tokens_per_mb_per_replica
    choices: dict[tuple[bool, int], ModelConfig] = {}
    for recompute in (False, True):
        for limit in (None, tokens or config.n_ctx):
            choice = config.model_copy(update={"recompute_grad": recompute, "tokens_per_mb_per_replica": limit})
            same = (recompute, limit) == (config.recompute_grad, tokens)
            choices.setdefault((recompute, num_microbatches(choice, layout)), choice)
            if same:
                choices[recompute, num_microbatches(choice, layout)] = config
    return list(choices.values())
