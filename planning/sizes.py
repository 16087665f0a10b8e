"""What a layout may split."""

from config import ModelConfig
from models.dims import layout_sizes


def sizes_to_split(config: ModelConfig, evaluates: bool | None = None) -> dict[str, dict[str, int]]:
    """Of what a layout may split, with the batch of evaluation where training evaluates, or where `evaluates`."""
    if evaluates is None:
        evaluates = config.eval_steps > 0 or bool(config.eval_tasks)
    keys = ["train_batch_size", *(["eval_batch_size"] if evaluates else [])]
    return layout_sizes(config, {key: getattr(config, key) for key in keys})
