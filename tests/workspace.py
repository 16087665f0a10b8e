"""A folder with tiny records, a config and a model, and main.py run on it in this process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import main
from config import ModelConfig, load_model_config
from models.size import variable_shapes
from tests.record_files import write_records
from tests.tiny import TINY


class Workspace:
    """Records of n_ctx + 1 random tokens for training and evaluation, and the config TINY reading them."""

    def __init__(self, directory: Path, **changes: Any):
        self.directory = directory
        self.model_path = directory / "model"
        random = np.random.default_rng(0)
        length = changes.get("n_ctx", TINY["n_ctx"]) + 1
        for name, count in (("train", 64), ("eval", 10)):
            write_records(directory / f"{name}_0_{count}.tfrecords", random.integers(2, 32, [count, length]).tolist())
        self.values = TINY | {
            "no_dataset": False,
            "datasets": [[str(directory / "train_*.tfrecords"), str(directory / "eval_*.tfrecords"), 1, "chunks", 1.0]],
            "model_path": str(self.model_path),
            **changes,
        }
        self.config_path = directory / "config.json"
        self.config_path.write_text(json.dumps(self.values))

    def main(self, *flags: str) -> int:
        """The exit code of `main.py --model <this config> flags`."""
        return main.main(["--model", str(self.config_path), *flags])

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.model_path / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics()]

    def weights(self) -> dict[str, np.ndarray]:
        """Every variable of the newest checkpoint."""
        reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(self.model_path)))
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

    def config(self) -> ModelConfig:
        return load_model_config(str(self.config_path))

    def save_random_weights(self, step: int) -> None:
        """A checkpoint of the config's variables, without training: large enough that every part of the model tells."""
        random = np.random.default_rng(0)
        with tf.Graph().as_default(), tf.Session() as session:
            for name, shape in sorted(variable_shapes(self.config()).items()):
                tf.Variable((0.4 * random.normal(size=shape)).astype(np.float32), name=name)
            tf.Variable(np.int64(step), name="global_step")
            session.run(tf.global_variables_initializer())
            tf.train.Saver(save_relative_paths=True).save(session, str(self.model_path / "model.ckpt"), step)


def save_tokenizer(folder: Path, words: int = 32) -> str:
    """The path of a tokenizer of so many tokens in which the word `w<i>` is token i, from 2 on."""
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1} | {f"w{index}": index for index in range(2, words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tok.json"))
    return str(folder / "tok.json")
