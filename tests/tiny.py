"""A tiny model and a session to run it in: what most tests of the model start from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from config import ModelConfig, load_model_config
from mesh import mtf
from mesh.devices import LocalDevices, local_mesh, use_graph_mode
from mesh.experts import with_expert_rules
from mesh.layout import MeshLayout, parse

use_graph_mode()

TINY = {
    "n_head": 4,
    "n_embd": 16,
    "n_layer": 2,
    "n_ctx": 8,
    "n_vocab": 32,
    "lr": 0.01,
    "train_batch_size": 4,
    "train_steps": 4,
    "attention_types": [[["global"], 2]],
    "datasets": [],
    "no_dataset": True,
    "model_path": "unused",
    "eos_id": 0,
    "padding_id": 1,
}


def tiny_config(directory: Path, **changes: Any) -> ModelConfig:
    """The config TINY with `changes`, read from a file in `directory` as a user's would be."""
    path = directory / "tiny.json"
    path.write_text(json.dumps(TINY | changes))
    return load_model_config(str(path))


def cpu_devices(count: int) -> LocalDevices:
    return LocalDevices(tuple(f"/device:CPU:{i}" for i in range(count)))


class MtfSession:
    """An mtf graph on logical CPU devices; `run(fn)` builds `fn(mesh)`, lowers it and fetches what it returned."""

    def __init__(self, mesh_shape: str = "x:1", layout: str = ""):
        self.layout: MeshLayout = with_expert_rules(parse(mesh_shape, layout, 1))
        self.devices = cpu_devices(self.layout.size)

    def run(self, build: Callable[[mtf.Mesh], Any], weights: dict[str, np.ndarray] | None = None) -> Any:
        """Numpy values of the (nested) mtf.Tensors that `build` returns, its variables set to `weights` by name."""
        with tf.Graph().as_default():
            graph = mtf.Graph()
            mesh, mesh_impl = local_mesh(graph, self.layout, self.devices)
            tensors = build(mesh)
            # anonymous dimensions, so that what is split or still to be summed arrives whole
            exported = tf.nest.map_structure(mtf.anonymize, tensors)
            lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
            fetches = tf.nest.map_structure(lowering.export_to_tf_tensor, exported)
            restore = lowering.copy_masters_to_slices()
            settings = self.devices.session_config()
            # optimizing the graph takes longer than running it once
            settings.graph_options.rewrite_options.disable_meta_optimizer = True
            with tf.Session(config=settings) as session:
                session.run(tf.global_variables_initializer())
                for variable in tf.global_variables():
                    if weights and variable.op.name in weights:
                        variable.load(weights[variable.op.name], session)
                session.run(restore)
                return session.run(fetches)


def random_tokens(*shape: int, seed: int = 0, vocab: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape, dtype=np.int32)


def training_features(config: ModelConfig) -> dict[str, tf.Tensor]:
    """`inputs` and `labels` [batch, n_ctx] of a batch, the same every time."""
    tokens = random_tokens(config.train_batch_size, config.n_ctx + 1, vocab=config.n_vocab)
    return {"inputs": tf.constant(tokens[:, :-1]), "labels": tf.constant(tokens[:, 1:])}
