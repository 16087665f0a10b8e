"""Estimator specifications: one function each for training, evaluation and prediction."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.devices import LocalDevices
from mesh.layout import MeshLayout
from mesh.randomness import make_key
from model_graph import Features, ModelGraph
from models import gpt
from models.context import Context
from models.scoring import score
from sample import Sampling, decode
from tasks import TASKS
from training.checkpoints import CheckpointHook, CheckpointSaver, verify_checkpoint
from training.hooks import FiniteHook, ProgressHook, StopOnSignal
from training.step import num_microbatches, training_step
from training.sums import running_sum
from training.tpu_hooks import RunProgressHook, count_batches, loss_for_host, summaries_by_host

logger = logging.getLogger(__name__)

ModelFn = Callable[[Features, Any, str, dict[str, Any]], tf.estimator.tpu.TPUEstimatorSpec]


@dataclass(frozen=True)
class Run:
    """What a model function needs besides its input.

    Attributes:
      config: the model.
      layout: the mesh and how the model lies on it.
      devices: local devices in mesh order, or None on a TPU.
      steps_per_checkpoint: steps between checkpoints.
      eos_id: the token that ends a text.
      sampling: how prediction draws.
      stop: asked after every training step whether to stop.
      task: what evaluation evaluates: a name of TASKS, or "" for the validation data.
    """

    config: ModelConfig
    layout: MeshLayout
    devices: LocalDevices | None
    steps_per_checkpoint: int
    eos_id: int
    sampling: Sampling
    stop: StopOnSignal
    task: str = ""

    def graph(
        self, params: Mapping[str, Any], batch_size: int, length: int | None = None, *, is_training: bool = False
    ) -> ModelGraph:
        """The graph of a batch on these devices; `params` are what the Estimator passes to a model function."""
        return ModelGraph(
            self.config,
            self.layout,
            self.devices,
            batch_size,
            length,
            is_training=is_training,
            tpu_context=params.get("context"),
        )


def make_model_fn(run: Run) -> ModelFn:
    """The `model_fn(features, labels, mode, params)` of a TPUEstimator."""
    specs = {
        tf.estimator.ModeKeys.TRAIN: train_spec,
        tf.estimator.ModeKeys.EVAL: task_spec if run.task else evaluate_spec,
        tf.estimator.ModeKeys.PREDICT: predict_spec,
    }

    def model_fn(features: Features, labels: Any, mode: str, params: dict[str, Any]) -> Any:
        del labels  # also among the features
        return specs[mode](run, features, params)

    return model_fn


def train_spec(run: Run, features: Features, params: dict[str, Any]) -> tf.estimator.tpu.TPUEstimatorSpec:
    """One training step: losses, gradients, clipping, update. Logs what is about to be trained."""
    config = run.config
    global_step = tf.train.get_or_create_global_step()
    graph = run.graph(params, params["batch_size"], is_training=True)
    step = training_step(graph, features, global_step)
    lowering = graph.lower()

    metrics = {name: lowering.export_to_tf_tensor(value) for name, value in step.losses.items()}
    metrics |= {"lr": step.rate, "grad_norm": lowering.export_to_tf_tensor(step.norm)}
    details = {name: lowering.export_to_tf_tensor(value) for name, value in step.norms.items()}
    update_ops = [lowering.lowered_operation(operation) for operation in step.updates]
    with tf.control_dependencies(update_ops):
        train_op = tf.assign_add(global_step, 1)
    _log_model(config, run.layout, sum(variable.size for variable in graph.graph.trainable_variables))
    verify_checkpoint(config.model_path, tf.global_variables())

    on_tpu = run.devices is None
    with mtf.utils.outside_all_rewrites():  # on a TPU, what a session runs by itself stays out of the computation
        to_masters = lowering.copy_slices_to_masters()
        steps_per_run = config.iterations if on_tpu else 1
        save = CheckpointHook(config.model_path, run.steps_per_checkpoint, steps_per_run)
    save.before.append(lambda session: session.run(to_masters))
    loss, host_call = metrics["loss"], None
    hooks: list[Any] = [mtf.MtfRestoreHook(lowering)]
    progress: ProgressHook | RunProgressHook
    if on_tpu:
        loss, host_call = loss_for_host(metrics), summaries_by_host(config.model_path, metrics | details, train_op)
        progress = RunProgressHook(config)
    else:
        progress = ProgressHook(config, metrics, details)
        save.before.append(progress.flush)
        hooks.append(FiniteHook(metrics))
    run.stop.closing.callback(progress.close)
    return tf.estimator.tpu.TPUEstimatorSpec(
        tf.estimator.ModeKeys.TRAIN,
        loss=loss,
        train_op=train_op,
        host_call=host_call,
        training_hooks=[*hooks, progress, save, run.stop],  # `save` after what finds out that there is nothing to save
    )


def _log_model(config: ModelConfig, layout: MeshLayout, parameters: int) -> None:
    count = num_microbatches(config, layout)
    logger.info(
        "model %s: %s parameters; batch: %d sequences of %d = %s tokens%s",
        config.name,
        f"{parameters:,}",
        config.train_batch_size,
        config.n_ctx,
        f"{config.tokens_per_batch:,}",
        f", in {count} microbatches" if count > 1 else "",
    )


def _restore_all(model_path: str) -> None:
    """Let the Estimator restore every variable of the graph from the newest checkpoint, which must hold them."""
    verify_checkpoint(model_path, tf.global_variables())
    with mtf.utils.outside_all_rewrites():
        tf.add_to_collection(tf.GraphKeys.SAVERS, CheckpointSaver(model_path))


def evaluate_spec(run: Run, features: Features, params: dict[str, Any]) -> tf.estimator.tpu.TPUEstimatorSpec:
    """Token-weighted means `cross_entropy` and `objective` over all batches, and the sums `tokens` and `bytes`."""
    tf.train.get_or_create_global_step()
    graph = run.graph(params, params["batch_size"])
    batch = graph.import_batch({name: features[name] for name in ("inputs", "labels", "weights")})
    losses = gpt.losses(graph.context(), batch["inputs"], batch["labels"])
    sums = {
        "cross_entropy": mtf.reduce_sum(losses.cross_entropy * batch["weights"]),
        "objective": mtf.reduce_sum(losses.objective * batch["weights"]),
    }
    lowering = graph.lower()
    # sums of one batch, each as a vector of one entry, which is what a TPU passes to its host
    totals = {name: lowering.export_to_tf_tensor(value) for name, value in sums.items()}
    totals["tokens"] = tf.reduce_sum(features["weights"])
    totals["bytes"] = tf.reduce_sum(features["weights"] * tf.cast(features["label_bytes"], tf.float32))
    tensors = {name: tf.reshape(total, [1]) for name, total in totals.items()}
    _restore_all(run.config.model_path)

    def metric_fn(**totals: tf.Tensor) -> dict[str, Any]:
        sums = {name: running_sum(name, tf.reduce_sum(total)) for name, total in totals.items()}
        tokens, update = sums["tokens"]
        sums["tokens"] = tokens, tf.group(update, count_batches())
        return sums | {name: (sums[name][0] / tokens, sums[name][1]) for name in ("cross_entropy", "objective")}

    return tf.estimator.tpu.TPUEstimatorSpec(
        tf.estimator.ModeKeys.EVAL,
        loss=tensors["objective"][0] / tf.maximum(tensors["tokens"][0], 1.0),
        eval_metrics=(metric_fn, tensors),
        evaluation_hooks=[mtf.MtfRestoreHook(lowering)],
    )


def task_spec(run: Run, features: Features, params: dict[str, Any]) -> tf.estimator.tpu.TPUEstimatorSpec:
    """The metrics of `run.task` over all batches; features as tasks.py makes them."""
    tf.train.get_or_create_global_step()
    task = TASKS[run.task]
    graph = run.graph(params, *features["inputs"].shape.as_list())
    scored = mtf.Shape([graph.dims.batch, mtf.Dimension("scored", features["labels"].shape.as_list()[1])])
    places = [mtf.import_tf_tensor(graph.mesh, features[name], scored) for name in ("positions", "labels")]
    inputs = graph.import_batch({"inputs": features["inputs"]})["inputs"]
    sums = task.sums(score(graph.context(), inputs, *places))
    lowering = graph.lower()
    tensors = {name: tf.reshape(lowering.export_to_tf_tensor(value), [1]) for name, value in sums.items()}
    _restore_all(run.config.model_path)

    def metric_fn(**totals: tf.Tensor) -> dict[str, Any]:
        sums = {name: running_sum(name, tf.reduce_sum(total)) for name, total in totals.items()}
        update = tf.group(count_batches(), *[operation for _, operation in sums.values()])
        metrics = task.metrics({name: value for name, (value, _) in sums.items()})
        return {name: (value, update) for name, value in metrics.items()}

    return tf.estimator.tpu.TPUEstimatorSpec(
        tf.estimator.ModeKeys.EVAL,
        loss=tensors["loss"][0],
        eval_metrics=(metric_fn, tensors),
        evaluation_hooks=[mtf.MtfRestoreHook(lowering)],
    )


def predict_spec(run: Run, features: Features, params: dict[str, Any]) -> tf.estimator.tpu.TPUEstimatorSpec:
    """Continue the prompts `inputs` [batch, length], of which `prompt_length` [batch] tokens are given.

    Predictions: `tokens` [batch, length] int32, `length` [batch] of prompt and continuation.
    """
    tf.train.get_or_create_global_step()
    graph = run.graph(params, *features["inputs"].shape.as_list())
    _, tokens, lengths = continue_prompts(graph, features, gpt.hidden_states, run.sampling, run.eos_id)
    # anonymous dimensions, which no layout splits, so that every row leaves whole
    outputs = {"tokens": mtf.anonymize(tokens), "length": mtf.anonymize(lengths)}
    lowering = graph.lower()
    predictions = {name: lowering.export_to_tf_tensor(value) for name, value in outputs.items()}
    _restore_all(run.config.model_path)
    return tf.estimator.tpu.TPUEstimatorSpec(
        tf.estimator.ModeKeys.PREDICT,
        predictions=predictions,
        prediction_hooks=[mtf.MtfRestoreHook(lowering)],
    )


def serving_outputs(run: Run, features: Features) -> dict[str, tf.Tensor]:
    """What an exported model answers to the `features` of predict_spec, on a mesh of one local device.

    `tokens` and `length` as predict_spec gives them, and `logits` [batch, length, vocab] float32 of the prompts.
    """
    graph = run.graph({}, *features["inputs"].shape.as_list())
    logits, tokens, lengths = continue_prompts(graph, features, gpt.logits, run.sampling, run.eos_id)
    lowering = graph.lower()
    # whoever loads the graph runs no hook that would copy masters to slices
    assert all(variable.slice_is_master for variable in lowering.variables.values())
    outputs = {"logits": logits, "tokens": tokens, "length": lengths}
    return {name: lowering.export_to_tf_tensor(value) for name, value in outputs.items()}


def continue_prompts(
    graph: ModelGraph,
    features: Features,
    first_pass: Callable[[Context, mtf.Tensor], Any],
    sampling: Sampling,
    eos_id: int,
) -> tuple[Any, mtf.Tensor, mtf.Tensor]:
    """What `first_pass` makes of the whole prompts, and tokens [batch, sequence] and lengths [batch] of `decode`."""
    batch = graph.import_batch({"inputs": features["inputs"], "prompt_length": features["prompt_length"]})
    whole = graph.context(keep_states_until=mtf.reduce_min(batch["prompt_length"]) - 1)
    result = first_pass(whole, batch["inputs"])
    names = list(whole.states)

    def step(token: mtf.Tensor, position: mtf.Tensor, states: list[mtf.Tensor]) -> tuple[mtf.Tensor, list[mtf.Tensor]]:
        one = graph.context(position=position, states=dict(zip(names, states, strict=True)))
        return gpt.logits(one, token), [one.states[name] for name in names]

    key = make_key(graph.mesh, sampling.seed, features["prompt_number"][0])
    states = [whole.states[name] for name in names]
    return result, *decode(batch["inputs"], batch["prompt_length"], states, step, key, sampling, eos_id)
