"""The TPU path without a TPU: the whole step is built and lowered for the cores of a made-up topology."""

import types
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from tensorflow.python.tpu import device_assignment, topology, tpu

from mesh import mtf
from mesh.layout import MeshLayout, parse
from model_fns import ModelFn, Run, make_model_fn
from sample import Sampling
from tests.tiny import random_tokens, tiny_config
from tests.variable_order import Accesses
from training.hooks import StopOnSignal

# What a config asks for, how it lies on a mesh of one axis, and how on one of two.
MODELS: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain": (
        {"n_layer": 1, "attention_types": [[["global"], 1]], "entmax_loss": True},
        "batch:x",
        "batch:x,heads:y,vocab:y,intermediate_expanded:y",
    ),
    "local and linear": (
        {
            "attention_types": [[["local", "linear"], 1]],
            "local_attention_radius": 3,
            "precision": "bfloat16",
            "opt_name": "adafactor",
            "log_grads": True,
        },
        "batch:x",
        "batch:x,memory_length:y,embd:y",
    ),
    "experts": (
        {
            "n_layer": 1,
            "attention_types": [[["global"], 1]],
            "moe_layers": [0],
            "moe_params": {"moe_num_experts": 8, "moe_hidden_size": 8, "moe_dropout_rate": 0.1},
            "recompute_grad": True,
            "tokens_per_mb_per_replica": 8,
        },
        "batch:x,experts:x",
        "batch:x,experts:x,heads:y",
    ),
}
DROPOUT = {"embed_dropout": 0.1, "res_dropout": 0.1, "attn_dropout": 0.1}
BATCH, LENGTH = 16, 8


def tpu_context(cores: int) -> types.SimpleNamespace:
    """What model functions read of TPUEstimator's TPUContext: hosts of 2 x 2 chips each, of two cores each."""
    hosts = cores // 8
    columns = {1: 1, 2: 1, 4: 2}[hosts]  # of hosts, in the rectangle that they form
    coordinates = [
        [
            [2 * (host // columns) + x, 2 * (host % columns) + y, 0, core]
            for x in range(2)
            for y in range(2)
            for core in range(2)
        ]
        for host in range(hosts)
    ]
    shape = [2 * hosts // columns, 2 * columns, 1, 2]
    chips = topology.Topology(mesh_shape=shape, device_coordinates=np.array(coordinates, np.int32))
    return types.SimpleNamespace(
        num_hosts=hosts,
        tpu_host_placement_function=lambda host_id: f"/job:worker/task:{host_id}/device:CPU:0",
        device_assignment=device_assignment.device_assignment(chips, [1, 1, 1, 1], num_replicas=cores),
    )


class Lowered:
    """The graph of a model function replicated over the cores, with what `pick` takes of its specification as outputs.

    Attributes:
      nodes: all of them, by name.
      inside: those that the cores run.
    """

    def __init__(self, run: Run, mode: str, features: dict[str, np.ndarray], pick: Callable[[Any], list]):
        model_fn: ModelFn = make_model_fn(run)
        context = tpu_context(run.layout.size)
        with tf.Graph().as_default() as graph:
            tf.train.get_or_create_global_step()

            def computation(*values: tf.Tensor) -> list:
                named = dict(zip(features, values, strict=True))
                return pick(model_fn(named, None, mode, {"batch_size": BATCH, "context": context}))

            inputs = [tf.constant(value) for value in features.values()]
            tpu.replicate(computation, [inputs] * run.layout.size, device_assignment=context.device_assignment)
            for operation in graph.get_operations():
                if operation.type in ("SaveV2", "RestoreV2", "MergeV2Checkpoints"):  # a session runs them by itself
                    assert graph.is_fetchable(operation) and "_tpu_replicate" not in operation.node_def.attr
            self.nodes: Mapping[str, tf.NodeDef] = {node.name: node for node in graph.as_graph_def().node}
        self.inside = [node for node in self.nodes.values() if "_tpu_replicate" in node.attr]

    def operations(self) -> set[str]:
        return {node.op for node in self.inside}

    def groups(self, operation: str) -> set[int]:
        """Of how many cores are the groups that run the collective `operation` together."""
        with_groups = (self.nodes[node.input[1].split(":")[0]] for node in self.inside if node.op == operation)
        return {tf.make_ndarray(node.attr["value"].tensor).shape[1] for node in with_groups}

    def masters(self) -> dict[str, tf.NodeDef]:
        """The variables that checkpoints hold, without the global step."""
        handles = (node for node in self.nodes.values() if node.op == "VarHandleOp")
        return {node.name: node for node in handles if "_slice_" not in node.name and node.name != "global_step"}

    def unordered(self) -> list[tuple[str, str]]:
        """(read, write) of the same variable of which neither waits for the other; each is written once."""
        accesses = Accesses(self.inside, self.nodes)
        assert set(accesses.writes) == set(accesses.reads)
        assert {len(found) for found in accesses.writes.values()} == {1}
        return accesses.unordered()


def run_of(directory: Path, model: str, mesh_shape: str) -> Run:
    changes, on_one_axis, on_two_axes = MODELS[model]
    config = tiny_config(directory, train_batch_size=BATCH, model_path=str(directory / "model"), **DROPOUT | changes)
    layout: MeshLayout = parse(mesh_shape, on_two_axes if "y" in mesh_shape else on_one_axis, 1)
    return Run(config, layout, None, 100, 0, Sampling(entmax=config.entmax_loss), StopOnSignal())


TOKENS = {"inputs": random_tokens(BATCH, LENGTH), "labels": random_tokens(BATCH, LENGTH, seed=1)}


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", ["x:8", "x:4,y:2", "x:8,y:4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_lowers_for_a_tpu(tmp_path: Path, model: str, mesh_shape: str) -> None:
    run = run_of(tmp_path, model, mesh_shape)
    axes = [dim.size for dim in mtf.convert_to_shape(mesh_shape)]
    train = Lowered(run, "train", TOKENS, lambda spec: [spec.loss, spec.train_op])
    assert train.groups("CrossReplicaSum") == set(axes)  # gradients over x; activations, and some gradients, over y
    assert train.groups("AllToAll") == ({axes[0]} if model == "experts" else set())  # tokens to experts and back
    assert not {"Gather", "GatherV2"} & {n.op for n in train.inside if "embedding_lookup" in n.name}  # one-hot there
    assert model != "experts" or "LoopCond" in train.operations()  # over the microbatches
    products = {tf.as_dtype(n.attr["T"].type) for n in train.inside if n.op in ("MatMul", "BatchMatMulV2", "Einsum")}
    assert (tf.bfloat16 in products) == (model == "local and linear")
    assert not train.unordered()

    masters = train.masters()
    slices = Counter(n.device for n in train.nodes.values() if n.op == "VarHandleOp" and "_slice_" in n.name)
    assert slices == dict.fromkeys(slices, len(masters)) and len(slices) == run.layout.size  # one on each core
    assert {tf.as_dtype(node.attr["dtype"].type) for node in masters.values()} == {tf.float32}
    sizes = {name: 4 * tf.TensorShape(node.attr["shape"].shape).num_elements() for name, node in masters.items()}
    held = [
        sum(sizes[name] for name, node in masters.items() if f"/task:{host}/" in node.device)
        for host in range(run.layout.size // 8)
    ]
    if len(held) > 1:  # the first host is left to the input's buffers, which are larger than this model
        assert held.pop(0) == 0
    assert sum(held) == sum(sizes.values()) and max(held) - min(held) <= max(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_evaluation_and_prediction_lower_for_a_tpu(tmp_path: Path, model: str) -> None:
    run = run_of(tmp_path, model, "x:4,y:2")
    scored = {"weights": np.ones([BATCH, LENGTH], np.float32), "label_bytes": np.ones([BATCH, LENGTH], np.int32)}
    evaluate = Lowered(run, "eval", TOKENS | scored, lambda spec: list(spec.eval_metrics[1].values()))
    assert evaluate.groups("CrossReplicaSum") == {4, 2}

    prompts = {"prompt_length": np.full(BATCH, 3, np.int32), "prompt_number": np.arange(BATCH, dtype=np.int32)}
    features = {"inputs": TOKENS["inputs"]} | prompts
    predict = Lowered(run, "infer", features, lambda spec: list(spec.predictions.values()))
    assert "LoopCond" in predict.operations()
