"""Every dimension of the model, made once from the config. Their names are what layouts refer to."""

from collections.abc import Mapping
from dataclasses import dataclass

from config import ModelConfig
from mesh import mtf

MLP_EXPANSION = 4  # GPT-2: the feed-forward layer is four times as wide as the residual stream


@dataclass(frozen=True)
class Dims:
    """Named dimensions of one graph."""

    batch: mtf.Dimension
    sequence: mtf.Dimension  # positions of the input
    memory_length: mtf.Dimension  # positions attended to; as long as `sequence`
    embed_sequence: mtf.Dimension  # rows of the position table, n_ctx
    embd: mtf.Dimension
    heads: mtf.Dimension
    features_per_head: mtf.Dimension
    intermediate_expanded: mtf.Dimension
    vocab: mtf.Dimension

    @property
    def heads_folded(self) -> mtf.Dimension:
        """Heads and their features as one dimension, as attention's kernels store them; splits where `heads` splits."""
        return mtf.Dimension(self.heads.name, self.heads.size * self.features_per_head.size)


def make_dims(config: ModelConfig, batch_size: int, length: int | None = None) -> Dims:
    """Dimensions for inputs [batch_size, length]; `length` is at most and by default n_ctx."""
    sizes = _sizes(config)
    length = length or config.n_ctx
    assert length <= config.n_ctx, (length, config.n_ctx)
    return Dims(
        batch=mtf.Dimension("batch", batch_size),
        sequence=mtf.Dimension("sequence", length),
        memory_length=mtf.Dimension("memory_length", length),
        features_per_head=mtf.Dimension("features_per_head", config.head_size),
        **{name: mtf.Dimension(name, size) for name, (_, size) in sizes.items()},
    )


def _sizes(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """{dimension that layouts may split and inputs do not change: (what sets its size, size)}"""
    return {
        "embed_sequence": ("n_ctx", config.n_ctx),
        "embd": ("n_embd", config.n_embd),
        "heads": ("n_head", config.n_head),
        "intermediate_expanded": (f"{MLP_EXPANSION} * n_embd", MLP_EXPANSION * config.n_embd),
        "vocab": ("n_vocab", config.n_vocab),
    }


def _expert_sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """What layers of experts add to the dimensions that a layout may name; they make them themselves."""
    if not config.has_experts:
        return {}
    return {
        "experts": {"moe_num_experts": config.moe.moe_num_experts},
        "expert_hidden": {"moe_hidden_size": config.moe.moe_hidden_size},
    }


def layout_sizes(config: ModelConfig, batch_sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """{dimension: {what sets its size: size}} of every dimension a layout may name.

    `batch_sizes` holds the batches that will run, e.g. {"train_batch_size": 512}.
    """
    return {
        "batch": dict(batch_sizes),
        "sequence": {"n_ctx": config.n_ctx},
        "memory_length": {"n_ctx": config.n_ctx},
        "features_per_head": {"n_embd / n_head": config.head_size},
        **{name: {source: size} for name, (source, size) in _sizes(config).items()},
        **_expert_sizes(config),
    }


# Dimension names of the tensors that a layout must keep apart: no two dimensions of one tensor may share a mesh axis.
TENSORS: tuple[tuple[str, ...], ...] = (
    ("batch", "sequence", "embd"),
    ("batch", "sequence", "intermediate_expanded"),
    ("batch", "sequence", "vocab"),
    ("batch", "sequence", "heads", "features_per_head"),
    ("batch", "memory_length", "heads", "features_per_head"),
    ("batch", "heads", "sequence", "memory_length"),
    ("vocab", "embd"),
    ("embed_sequence", "embd"),
    ("embd", "heads"),
    ("embd", "intermediate_expanded"),
    ("experts", "embd", "expert_hidden"),
    ("batch", "expert_hidden"),
)
