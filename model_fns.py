"""Estimator specifications: one function each for training, evaluation and prediction."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow.compat.v1 as tf

import optimizers
from config import ModelConfig
from mesh import mtf
from mesh.devices import LocalDevices, local_mesh, tpu_mesh
from mesh.experts import with_expert_rules
from mesh.layout import MeshLayout
from mesh.operations import one_at_a_time
from mesh.plan import TrainingGraph, variables_described
from mesh.randomness import fold_in, make_key
from models import gpt
from models.context import Context, variable_dtype
from models.dims import Dims, make_dims
from models.scoring import score
from sample import Sampling, decode
from tasks import TASKS
from training.checkpoints import CheckpointHook, CheckpointSaver, stored_shapes, verify_checkpoint
from training.hooks import FiniteHook, ProgressHook, StopOnSignal
from training.sums import running_sum
from training.tpu_hooks import RunProgressHook, count_batches, loss_for_host, summaries_by_host

logger = logging.getLogger(__name__)

Features = Mapping[str, tf.Tensor]
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


class _Graph:
    """One mtf graph on its mesh, from imported features to exported tensors."""

    def __init__(
        self,
        run: Run,
        params: Mapping[str, Any],
        batch_size: int,
        length: int | None = None,
        is_training: bool = False,
    ):
        self.run = run
        self.graph = mtf.Graph()
        layout = with_expert_rules(run.layout)
        if run.devices is None:
            self.mesh, self.mesh_impl = tpu_mesh(self.graph, layout, params["context"])
        else:
            self.mesh, self.mesh_impl = local_mesh(self.graph, layout, run.devices)
        self.dims: Dims = make_dims(run.config, batch_size, length)
        self.variable_dtype = variable_dtype(run.config, is_training)
        self.final_norm = _has_final_norm(run.config)

    def import_batch(self, features: Features) -> dict[str, mtf.Tensor]:
        """[batch] and [batch, sequence] features as mtf tensors."""
        dims = [self.dims.batch, self.dims.sequence]
        return {
            name: mtf.import_tf_tensor(self.mesh, value, mtf.Shape(dims[: value.shape.ndims]), name=name)
            for name, value in features.items()
        }

    def context(self, dims: Dims | None = None, **changes: Any) -> Context:
        return Context(
            self.run.config,
            self.mesh,
            dims or self.dims,
            self.variable_dtype,
            final_norm=self.final_norm,
            **changes,
        )

    def lower(self) -> mtf.Lowering:
        # operations of our own look variables up in the lowering, which stacking them would replace
        return mtf.Lowering(self.graph, {self.mesh: self.mesh_impl}, autostack=False)


def _has_final_norm(config: ModelConfig) -> bool:
    """Whether the final norm runs: GPT-Neo stored none beside a head of its own, and such a checkpoint goes without."""
    stored = stored_shapes(config.model_path) if config.no_weight_tie else None
    if stored is None or "gpt2/ln_f/g" in stored:
        return True
    logger.warning("the checkpoint in %s has no final norm ln_f: the model runs without it", config.model_path)
    return False


def num_microbatches(config: ModelConfig, layout: MeshLayout) -> int:
    """Into how many microbatches a training batch is cut: the fewest, dividing the batch of one replica, whose tokens
    do not exceed `tokens_per_mb_per_replica` (but at least one sequence each)."""
    if config.tokens_per_mb_per_replica is None:
        return 1
    per_replica = config.train_batch_size // layout.ways("batch")
    at_most = min(per_replica, max(1, config.tokens_per_mb_per_replica // config.n_ctx))
    size = next(size for size in range(at_most, 0, -1) if per_replica % size == 0)
    return per_replica // size


def _gradients(
    graph: _Graph, features: dict[str, mtf.Tensor], key: mtf.Tensor
) -> tuple[list[mtf.Tensor], dict[str, mtf.Tensor]]:
    """Gradients of the mean objective for every trainable variable, and the mean losses, over all microbatches.

    A label outside the vocabulary, such as the padding id of GPT-2, is not scored.
    """
    config, dims = graph.run.config, graph.dims
    count = num_microbatches(config, graph.run.layout)

    def scored(labels: mtf.Tensor) -> mtf.Tensor:
        inside = mtf.logical_and(mtf.greater_equal(labels, 0), mtf.less(labels, config.n_vocab))
        return mtf.cast(inside, tf.float32)

    num_scored = mtf.maximum(mtf.reduce_sum(scored(features["labels"])), 1.0)

    def mean_losses(batch: dict[str, mtf.Tensor], dims: Dims, key: mtf.Tensor) -> dict[str, mtf.Tensor]:
        per_token = gpt.losses(graph.context(dims, dropout_key=key), batch["inputs"], batch["labels"])
        weights = scored(batch["labels"])
        losses = {
            "loss": mtf.reduce_sum(per_token.objective * weights) / num_scored,
            "cross_entropy": mtf.reduce_sum(per_token.cross_entropy * weights) / num_scored,
        }
        if per_token.auxiliary is not None:
            losses["auxiliary_loss"] = per_token.auxiliary / count
            losses["loss"] += losses["auxiliary_loss"]
        return losses

    if count == 1:
        losses = mean_losses(features, dims, key)
        return mtf.gradients([losses["loss"]], [v.outputs[0] for v in graph.graph.trainable_variables]), losses

    microbatch_dims = make_dims(config, dims.batch.size // count)
    # serialize_training_step deals row b to microbatch b % count, so each microbatch can read its number off its rows
    rows = mtf.mod(mtf.range(graph.mesh, dims.batch, tf.int32), count)

    def microbatch(batch: dict[str, mtf.Tensor]) -> dict[str, mtf.Tensor]:
        return mean_losses(batch, microbatch_dims, fold_in(key, mtf.reduce_max(batch["microbatch"])))

    return one_at_a_time(*mtf.serialize_training_step(features | {"microbatch": rows}, microbatch, dims.batch, count))


@dataclass(frozen=True)
class _Step:
    """A training step as Mesh-TensorFlow operations: mean losses, gradients of all trainable variables, their global
    norm, under log_grads the norm of each, the learning rate, and the assignments to variables."""

    losses: dict[str, mtf.Tensor]
    gradients: list[mtf.Tensor]
    norm: mtf.Tensor
    norms: dict[str, mtf.Tensor]
    rate: tf.Tensor
    updates: list[mtf.Operation]


def _training_step(graph: _Graph, features: Features, global_step: tf.Tensor) -> _Step:
    config = graph.run.config
    batch = graph.import_batch({name: features[name] for name in ("inputs", "labels")})
    gradients, losses = _gradients(graph, batch, make_key(graph.mesh, config.seed, global_step))
    tf_rate = optimizers.learning_rate(config, global_step)
    rate = mtf.import_fully_replicated(graph.mesh, tf_rate, mtf.Shape([]), name="learning_rate")
    updates, norm = optimizers.apply_gradients(config, gradients, rate, global_step)
    norms = optimizers.gradient_norms(gradients) if config.log_grads else {}
    return _Step(losses, gradients, norm, norms, tf_rate, updates)


def training_graph(config: ModelConfig, layout: MeshLayout) -> TrainingGraph:
    """A training step of `config` to be looked at, on any mesh: no variable is made, and nothing can be run."""
    devices = LocalDevices(tuple(f"/device:CPU:{i}" for i in range(layout.size)))  # mere names
    run = Run(config, layout, devices, 1, 0, Sampling(), StopOnSignal())
    with variables_described():
        graph = _Graph(run, {}, config.train_batch_size, is_training=True)
        tokens = tf.placeholder(tf.int32, [config.train_batch_size, config.n_ctx])
        step = _training_step(graph, {"inputs": tokens, "labels": tokens}, tf.placeholder(tf.int64, []))
    return TrainingGraph(graph.graph, step.gradients, [*step.losses.values(), step.norm, *step.norms.values()])


def train_spec(run: Run, features: Features, params: dict[str, Any]) -> tf.estimator.tpu.TPUEstimatorSpec:
    """One training step: losses, gradients, clipping, update. Logs what is about to be trained."""
    config = run.config
    global_step = tf.train.get_or_create_global_step()
    graph = _Graph(run, params, params["batch_size"], is_training=True)
    step = _training_step(graph, features, global_step)
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
    graph = _Graph(run, params, params["batch_size"])
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
    graph = _Graph(run, params, *features["inputs"].shape.as_list())
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
    graph = _Graph(run, params, *features["inputs"].shape.as_list())
    _, tokens, lengths = _continue(graph, features, gpt.hidden_states)
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
    graph = _Graph(run, {}, *features["inputs"].shape.as_list())
    logits, tokens, lengths = _continue(graph, features, gpt.logits)
    lowering = graph.lower()
    # whoever loads the graph runs no hook that would copy masters to slices
    assert all(variable.slice_is_master for variable in lowering.variables.values())
    outputs = {"logits": logits, "tokens": tokens, "length": lengths}
    return {name: lowering.export_to_tf_tensor(value) for name, value in outputs.items()}


def _continue(
    graph: _Graph, features: Features, first_pass: Callable[[Context, mtf.Tensor], Any]
) -> tuple[Any, mtf.Tensor, mtf.Tensor]:
    """What `first_pass` makes of the whole prompts, and tokens [batch, sequence] and lengths [batch] of `decode`."""
    run = graph.run
    batch = graph.import_batch({"inputs": features["inputs"], "prompt_length": features["prompt_length"]})
    whole = graph.context(keep_states_until=mtf.reduce_min(batch["prompt_length"]) - 1)
    result = first_pass(whole, batch["inputs"])
    names = list(whole.states)

    def step(token: mtf.Tensor, position: mtf.Tensor, states: list[mtf.Tensor]) -> tuple[mtf.Tensor, list[mtf.Tensor]]:
        one = graph.context(position=position, states=dict(zip(names, states, strict=True)))
        return gpt.logits(one, token), [one.states[name] for name in names]

    key = make_key(graph.mesh, run.sampling.seed, features["prompt_number"][0])
    states = [whole.states[name] for name in names]
    return result, *decode(batch["inputs"], batch["prompt_length"], states, step, key, run.sampling, run.eos_id)
