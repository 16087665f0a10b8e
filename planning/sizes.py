"""What a layout may split."""

from config import ModelConfig
from models.dims import layout_sizes


def sizes_to_split(config: ModelConfig, with_evaluation: bool = True) -> dict[str, dict[str, int]]:
    """Of what a layout may split; unless told otherwise with the batch of evaluation, where training evaluates."""
    evaluates = with_evaluation and (config.eval_steps > 0 or bool(config.eval_tasks))
    keys = ["train_batch_size", *(["eval_batch_size"] if evaluates else [])]
    return layout_sizes(config, {key: getattr(config, key) for key in keys})
