"""What surrounds a TPU's steps, without a TPU: the Estimator's graphs and hooks, and those that run on its host."""

import argparse
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf
from tensorflow.python.tpu import tpu_system_metadata

from commands import Job
from config import ModelConfig
from data.encoders import special_ids
from inputs import eval_input_fn, predict_input_fn, train_input_fn
from mesh.layout import parse
from tests.test_tpu_lowering import tpu_context
from tests.tiny import tiny_config
from tests.workspace import Workspace
from training.checkpoints import CheckpointHook, latest_step
from training.hooks import StopOnSignal
from training.tpu_hooks import OneRunBar, RunProgressHook, count_batches, loss_for_host

CORES, HOSTS = 16, 2


class Node(tf.distribute.cluster_resolver.ClusterResolver):
    """A TPU of two hosts that is not there."""

    environment, task_type, task_id = "", "worker", 0

    def cluster_spec(self) -> tf.train.ClusterSpec:
        return tf.train.ClusterSpec({"worker": [f"localhost:{host + 1}" for host in range(HOSTS)]})

    def master(self, *_: Any, **__: Any) -> str:
        return "grpc://localhost:1"

    def num_accelerators(self, *_: Any, **__: Any) -> dict[str, int]:
        return {"TPU": CORES // HOSTS}


class Opening(Exception):
    """The Estimator opens its session, with these hooks."""

    def __init__(self, **arguments: Any):
        self.hooks: list[Any] = arguments["hooks"]
        for hook in self.hooks:
            hook.begin()
        self.operations = tf.get_default_graph().get_operations()
        super().__init__()

    def names(self) -> list[str]:
        return [type(hook).__name__ for hook in self.hooks]

    def count(self, operation: str) -> dict[str, int]:
        """{device: operations of this type on it}."""
        return dict(Counter(op.device for op in self.operations if op.type == operation))


def opening(action: Callable[[], Any]) -> Opening:
    with pytest.raises(Opening) as raised:
        action()
    return raised.value


def behind(fetches: list[Any]) -> set[tf.Operation]:
    """Every operation that `fetches` wait for."""
    waiting = [getattr(fetch, "op", fetch) for fetch in fetches]
    seen: set[tf.Operation] = set()
    while waiting:
        operation = waiting.pop()
        if operation not in seen:
            seen.add(operation)
            waiting += [tensor.op for tensor in operation.inputs] + operation.control_inputs
    return seen


@pytest.mark.slow
def test_the_estimator_builds_every_action_for_the_hosts_of_a_tpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any, **arguments: Any) -> None:
        raise Opening(**arguments)

    metadata = tpu_system_metadata.TPUSystemMetadata(
        CORES, HOSTS, CORES // HOSTS, tpu_context(CORES).device_assignment.topology, ()
    )
    monkeypatch.setattr(tpu_system_metadata, "_query_tpu_system_metadata", lambda *_, **__: metadata)
    monkeypatch.setattr(tf.train.MonitoredSession, "__init__", raising)
    changes = {"n_layer": 1, "attention_types": [[["global"], 1]], "precision": "bfloat16"}
    batches = dict.fromkeys(("train_batch_size", "eval_batch_size", "predict_batch_size"), 4)
    config = Workspace(tmp_path, **changes, **batches).config()
    args = argparse.Namespace(
        steps_per_checkpoint=100,
        max_new_tokens=None,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        sampling_seed=0,
        entmax_sampling=False,
    )
    layout = parse("x:4,y:4", "batch:x,heads:y,vocab:y", CORES)
    job = Job(args, config, special_ids(config), layout, None, Node(), StopOnSignal())
    hosts = [f"/job:worker/task:{host}/device:CPU:0" for host in range(HOSTS)]

    train = opening(lambda: job.estimator().train(train_input_fn(config, job.special), max_steps=10))
    assert train.count("InfeedEnqueueTuple") == dict.fromkeys(hosts, CORES // HOSTS)  # each host feeds its own cores
    assert sum(train.count("IteratorGetNext").values()) == 1  # what one of them has read
    assert train.count("WriteSummary") == {hosts[0]: 4}  # loss, cross_entropy, lr, grad_norm
    names = train.names()
    order = ["_TPUStopAtStepHook", "NanTensorHook", "MtfRestoreHook", "RunProgressHook", "CheckpointHook"]
    assert sorted(order, key=names.index) == order  # found out to be NaN, a loss ends training before anything is saved
    hooks = dict(zip(names, train.hooks, strict=True))
    assert hooks["NanTensorHook"]._loss_tensor is hooks["RunProgressHook"]._loss
    assert "TPU" not in hooks["RunProgressHook"]._loss.device
    assert type(hooks["GracefulShutdownHook"]._saver).__name__ == "_NotSaver"  # it would save masters of long ago

    with job.batch_bar("eval", 2) as bar:
        evaluate = opening(
            lambda: job.estimator().evaluate(eval_input_fn(config, job.special, 2, None), steps=2, hooks=[bar])
        )
    assert bar in evaluate.hooks and evaluate.count("InfeedEnqueueTuple") == dict.fromkeys(hosts, CORES // HOSTS)
    outfeed = evaluate.hooks[evaluate.names().index("TPUInfeedOutfeedSessionHook")]
    assert "sum_of_batches" in {op.name for op in behind(outfeed._dequeue_ops)}  # counted by the host, batch by batch

    prompts = predict_input_fn([[3, 2, 5]], job.predict_batch_size, config.n_ctx, job.special.padding_id)
    predict = opening(lambda: next(job.estimator().predict(prompts)))
    assert "TPUInfeedOutfeedSessionHookForPrediction" in predict.names()


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    (tmp_path / "model").mkdir()
    return tiny_config(tmp_path, model_path=str(tmp_path / "model"), train_steps=10)


def run_of_steps(steps: int, losses: list[float]) -> tuple[tf.Operation, tf.Tensor]:
    """(train_op, loss) of a run of several steps, as the Estimator has them on the host; `losses` one for each run."""
    step = tf.train.get_or_create_global_step()
    runs = tf.get_variable("runs", [], tf.int32, tf.zeros_initializer(), trainable=False)
    loss = tf.gather(tf.constant(losses), runs.read_value())
    with tf.control_dependencies([loss]):
        train_op = tf.group(step.assign_add(steps), runs.assign_add(1))
    tf.add_to_collection(tf.GraphKeys.LOSSES, loss)
    return train_op, loss


def test_a_run_of_steps_shows_its_progress(config: ModelConfig, capfd: pytest.CaptureFixture[str]) -> None:
    with tf.Graph().as_default():
        train_op, _ = run_of_steps(5, [3.5, 2.25])
        progress = RunProgressHook(config)
        with tf.train.MonitoredSession(hooks=[progress]) as session:
            for _ in range(2):
                session.run(train_op)
    shown = capfd.readouterr().err
    assert "10/10" in shown and "loss 2.2500, " in shown and "tokens/s" in shown
    progress.close()


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_run_that_ends_without_a_finite_number_is_not_saved(config: ModelConfig, last: float) -> None:
    with tf.Graph().as_default():
        train_op, grad_norm = run_of_steps(5, [1.0, last])
        loss = loss_for_host({"loss": tf.constant(2.5), "grad_norm": grad_norm})
        hooks = [tf.train.NanTensorHook(loss), CheckpointHook(config.model_path, 5, 5)]
        session = tf.train.MonitoredSession(hooks=hooks)
        assert session.run([train_op, loss])[1] == 2.5
        with pytest.raises(tf.train.NanLossDuringTrainingError):
            session.run([train_op, loss])
    assert latest_step(config.model_path) == 5


def test_the_bar_follows_an_evaluation_that_is_one_run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneRunBar, "_INTERVAL", 0.02)
    seen: list[int] = []
    monkeypatch.setattr(OneRunBar, "show", lambda self, done: seen.append(done))
    with tf.Graph().as_default():
        count = count_batches()
        queue = tf.FIFOQueue(1, [tf.int32])
        whole_run, finish = queue.dequeue(), queue.enqueue(1)
        with OneRunBar("eval", 3) as bar, tf.train.MonitoredSession(hooks=[bar]) as session:

            def batches(raw: tf.Session) -> None:
                for done in (1, 2):
                    raw.run(count)
                    give_up = time.monotonic() + 60
                    while done not in seen and time.monotonic() < give_up:  # the bar's thread comes by meanwhile
                        time.sleep(0.01)
                raw.run([count, finish])

            host = threading.Thread(target=batches, args=(session._tf_sess(),))
            host.start()
            session.run(whole_run)
            host.join()
    assert sorted(set(seen)) in ([0, 1, 2, 3], [1, 2, 3]) and seen[-1] == 3
