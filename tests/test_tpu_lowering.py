"""The TPU path without a TPU: the whole step is built and lowered for the cores of a made-up topology."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from tensorflow.python.tpu import device_assignment, topology, tpu

from mesh.layout import parse
from model_fns import Run, make_model_fn
from sample import Sampling
from tests.tiny import random_tokens, tiny_config
from training.hooks import StopOnSignal

CORES = 8
EXPERTS = {
    "n_layer": 1,
    "attention_types": [[["global"], 1]],
    "moe_layers": [0],
    "moe_params": {"moe_num_experts": 4, "moe_hidden_size": 8, "moe_dropout_rate": 0.1},
    "recompute_grad": True,
    "tokens_per_mb_per_replica": 8,
}


def tpu_context() -> types.SimpleNamespace:
    """What model functions read of TPUEstimator's TPUContext, for one host with 2 x 2 chips of two cores."""
    coordinates = [[[x, y, 0, core] for x in range(2) for y in range(2) for core in range(2)]]
    chips = topology.Topology(mesh_shape=[2, 2, 1, 2], device_coordinates=np.array(coordinates, np.int32))
    return types.SimpleNamespace(
        num_hosts=1,
        tpu_host_placement_function=lambda host_id: "/job:worker/task:0/device:CPU:0",
        device_assignment=device_assignment.device_assignment(chips, [1, 1, 1, 1], num_replicas=CORES),
    )


def lower(model_fn: Callable, mode: str, features: dict[str, np.ndarray], pick: Callable[[Any], list]) -> tf.GraphDef:
    """The graph of `model_fn` replicated over the cores, with what `pick` takes of its specification as outputs."""
    context = tpu_context()
    with tf.Graph().as_default() as graph:
        tf.train.get_or_create_global_step()

        def computation(*values: tf.Tensor) -> list:
            named = dict(zip(features, values, strict=True))
            return pick(model_fn(named, None, mode, {"batch_size": 8, "context": context}))

        inputs = [tf.constant(value) for value in features.values()]
        tpu.replicate(computation, [inputs] * CORES, device_assignment=context.device_assignment)
        for operation in graph.get_operations():
            if operation.type in ("SaveV2", "RestoreV2", "MergeV2Checkpoints"):  # a session runs them by itself
                assert graph.is_fetchable(operation) and "_tpu_replicate" not in operation.node_def.attr
        return graph.as_graph_def()


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("batch:x,heads:y,vocab:y,intermediate_expanded:y", {"entmax_loss": True}),
        ("batch:x,memory_length:y,embd:y", {"precision": "bfloat16", "opt_name": "adafactor", "log_grads": True}),
        ("batch:x,experts:x,heads:y", EXPERTS),
    ],
)
def test_every_action_lowers_for_a_tpu(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    dropout = {"embed_dropout": 0.1, "res_dropout": 0.1, "attn_dropout": 0.1}
    config = tiny_config(tmp_path, train_batch_size=8, model_path=str(tmp_path / "model"), **dropout, **changes)
    sampling = Sampling(entmax=config.entmax_loss)
    run = Run(config, parse("x:4,y:2", layout, CORES), None, 100, 0, sampling, StopOnSignal())
    model_fn = make_model_fn(run)
    tokens = {"inputs": random_tokens(8, 8), "labels": random_tokens(8, 8, seed=1)}

    train = lower(model_fn, "train", tokens, lambda spec: [spec.loss, spec.train_op])
    operations = {node.op for node in train.node}
    assert {"TPUReplicate", "TPUReplicateMetadata"} & operations
    assert "CrossReplicaSum" in operations  # the collective of every layout
    assert ("AllToAll" in operations) == ("experts" in layout)  # tokens go to the experts and come back
    assert not {"Gather", "GatherV2"} & {n.op for n in train.node if "embedding_lookup" in n.name}  # one-hot there

    scored = {"weights": np.ones([8, 8], np.float32), "label_bytes": np.ones([8, 8], np.int32)}
    lower(model_fn, "eval", tokens | scored, lambda spec: list(spec.eval_metrics[1].values()))

    prompts = {"prompt_length": np.full(8, 3, np.int32), "prompt_number": np.arange(8, dtype=np.int32)}
    predict = lower(
        model_fn, "infer", {"inputs": tokens["inputs"]} | prompts, lambda spec: list(spec.predictions.values())
    )
    assert "LoopCond" in {node.op for node in predict.node}
