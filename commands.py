"""What main.py's actions do once the config is read: assemble the TPUEstimator and run it."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import tensorflow.compat.v1 as tf

import evaluation
import inputs
import prediction
from config import ModelConfig, config_to_json
from data.encoders import SpecialIds, special_ids
from errors import UserError
from mesh.devices import LocalDevices, local_devices, tpu_resolver
from mesh.layout import MeshLayout, check_devices, check_layout, parse
from model_fns import Run, make_model_fn
from models.dims import TENSORS, layout_sizes
from sample import Sampling
from training.checkpoints import latest_step
from training.hooks import BatchBar, StopOnSignal

logger = logging.getLogger(__name__)

Resolver: TypeAlias = tf.distribute.cluster_resolver.TPUClusterResolver


def check_dataset(config: ModelConfig) -> int:
    """Print the audit of the config's datasets; 1 if they do not fit the model."""
    report = inputs.check_dataset(config)
    print(report.text())
    return 0 if report.ok else 1


@dataclass(frozen=True)
class Job:
    """A config on its devices: everything the actions share."""

    args: argparse.Namespace
    config: ModelConfig
    special: SpecialIds
    layout: MeshLayout
    devices: LocalDevices | None
    resolver: Resolver | None
    stop: StopOnSignal

    @property
    def predict_batch_size(self) -> int:
        """predict_batch_size, rounded up to what the layout can split; surplus rows are dummies."""
        ways = self.layout.ways("batch")
        return -(-self.config.predict_batch_size // ways) * ways

    def estimator(self) -> tf.estimator.tpu.TPUEstimator:
        """The TPUEstimator, which on local devices is an ordinary Estimator."""
        config, args = self.config, self.args
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.max_new_tokens, args.sampling_seed)
        run = Run(
            config, self.layout, self.devices, args.steps_per_checkpoint, self.special.eos_id, sampling, self.stop
        )
        tpu_config = tf.estimator.tpu.TPUConfig(
            num_shards=self.layout.size,
            iterations_per_loop=min(config.iterations, args.steps_per_checkpoint),
            num_cores_per_replica=1,
            per_host_input_for_training=tf.estimator.tpu.InputPipelineConfig.BROADCAST,
        )
        run_config = tf.estimator.tpu.RunConfig(
            cluster=self.resolver,
            model_dir=config.model_path,
            session_config=self.devices.session_config() if self.devices else None,
            save_checkpoints_steps=None,  # the model function's own hook saves
            save_checkpoints_secs=None,
            save_summary_steps=0,
            log_step_count_steps=None,
            tpu_config=tpu_config,
        )
        return tf.estimator.tpu.TPUEstimator(
            model_fn=make_model_fn(run),
            use_tpu=self.resolver is not None,
            config=run_config,
            train_batch_size=config.train_batch_size,
            eval_batch_size=config.eval_batch_size,
            predict_batch_size=self.predict_batch_size,
            params={},
        )


def prepare(args: argparse.Namespace, config: ModelConfig, stop: StopOnSignal, batch_keys: list[str]) -> Job:
    """Find the devices and check the mesh, before any graph is built; `batch_keys` name the batches that will run."""
    resolver = tpu_resolver(args.tpu) if args.tpu else None
    devices = None if resolver else local_devices(args.gpu_ids)
    if resolver is not None:
        count, what = _num_tpu_cores(args.tpu, resolver), "TPU cores"
    else:
        assert devices is not None
        count, what = (
            len(devices.names),
            f"{devices.kind} devices" if len(devices.names) > 1 else f"{devices.kind} device",
        )
    layout = parse(config.mesh_shape, config.layout, count)
    check_devices(layout, count, what)
    check_layout(layout, layout_sizes(config, {key: getattr(config, key) for key in batch_keys}), TENSORS)
    return Job(args, config, special_ids(config), layout, devices, resolver, stop)


def _num_tpu_cores(name: str, resolver: Resolver) -> int:
    try:
        return resolver.num_accelerators()["TPU"] * max(1, resolver.cluster_spec().num_tasks("worker"))
    except Exception as error:  # whatever gRPC raises when nobody answers
        raise UserError(
            f"--tpu {name!r} does not answer ({type(error).__name__}); check that the node is READY, or use --gpu_ids"
        ) from error


def train(args: argparse.Namespace, config: ModelConfig) -> int:
    """Train to train_steps from the last checkpoint; evaluate and predict at every checkpoint if the config asks."""
    if args.new:
        _delete_model(config.model_path, args.yes)
    _make_model_dir(config)
    evaluates, predicts = config.eval_steps > 0, config.predict_steps > 0
    with StopOnSignal() as stop:
        job = prepare(args, config, stop, ["train_batch_size"] + ["eval_batch_size"] * evaluates)
        step = latest_step(config.model_path)
        if step >= config.train_steps:
            logger.info(
                "%s is at step %d, train_steps is %d: nothing to do", config.model_path, step, config.train_steps
            )
            return 0
        for evaluate_too in [False, True][: 1 + evaluates]:
            inputs.verify_inputs(config, job.special, evaluate=evaluate_too)
        if step:
            logger.info("resuming from step %d", step)
        estimator, input_fn = job.estimator(), inputs.train_input_fn(config, job.special)
        interval = args.steps_per_checkpoint if evaluates or predicts else config.train_steps
        while step < config.train_steps and stop.signum is None:
            target = min(config.train_steps, (step // interval + 1) * interval)
            with explained(config):
                estimator.train(input_fn, max_steps=target)
            step = latest_step(config.model_path)
            if evaluates and stop.signum is None:
                _evaluate(job, estimator, config.eval_steps)
            if predicts and stop.signum is None:
                _predict(job, step)
        if stop.signum is not None:
            logger.info("stopped at step %d, checkpoint saved; the same command goes on from there", step)
            return 128 + stop.signum
    logger.info("trained to step %d; checkpoints in %s", step, config.model_path)
    return 0


def evaluate(args: argparse.Namespace, config: ModelConfig) -> int:
    """Evaluate the last checkpoint on eval_steps batches, or on all of them where eval_steps is 0."""
    with StopOnSignal() as stop:
        job = prepare(args, config, stop, ["eval_batch_size"])
        _require_checkpoint(config)
        inputs.verify_inputs(config, job.special, evaluate=True)
        steps = config.eval_steps or -(-inputs.count_eval_examples(config) // config.eval_batch_size)
        _evaluate(job, job.estimator(), steps)
    return 0


def predict(args: argparse.Namespace, config: ModelConfig) -> int:
    """Continue the prompts with the last checkpoint."""
    with StopOnSignal() as stop:
        job = prepare(args, config, stop, [])
        _predict(job, _require_checkpoint(config))
    return 0


def _evaluate(job: Job, estimator: tf.estimator.tpu.TPUEstimator, steps: int) -> None:
    config = job.config
    token_bytes = evaluation.token_byte_lengths(config)
    input_fn = inputs.eval_input_fn(config, job.special, steps, token_bytes)
    with explained(config):
        sums = estimator.evaluate(input_fn, steps=steps, hooks=[BatchBar(f"eval {config.name}", steps)])
    result = evaluation.summarize(sums, knows_bytes=token_bytes is not None)
    evaluation.report(result, config.model_path, job.args.sacred_id)


def _predict(job: Job, step: int) -> None:
    config, args = job.config, job.args
    encoder = prediction.require_encoder(config)
    prompts = prediction.read_prompts(args.prompt, args.prompt_per_line)
    encoded = [
        prediction.encode_prompt(encoder, text, config, args.max_new_tokens, job.special.eos_id) for text in prompts
    ]
    length = prediction.decode_length(encoded, config, args.max_new_tokens, job.layout)
    input_fn = inputs.predict_input_fn(encoded, job.predict_batch_size, length, job.special.padding_id)
    logger.info("continuing %d prompts from step %d", len(prompts), step)
    output = args.output or os.path.join(config.model_path, f"predictions_{args.sacred_id}_{step}.txt")
    with explained(config):
        rows = job.estimator().predict(input_fn, yield_single_examples=True)
        prediction.write(output, sys.stdout, prompts, encoded, rows, encoder, as_json=args.json)
    logger.info("written to %s", output)


@contextlib.contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Turn what TensorFlow raises for a user's mistake into the sentence that says it."""
    try:
        yield
    except tf.train.NanLossDuringTrainingError as error:
        raise UserError(
            f"the loss is no longer a number; lr {config.lr} may be too high or warmup_steps {config.warmup_steps} "
            f"too few; the last checkpoint in {config.model_path} is whole, so lower lr and run again"
        ) from error
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            f"the devices ran out of memory; lower train_batch_size {config.train_batch_size}, set "
            "tokens_per_mb_per_replica or recompute_grad, or split more dimensions in layout"
        ) from error
    except (tf.errors.OpError, ValueError) as error:
        explanation = inputs.explain_input_error(error, config)
        if explanation is None:
            raise
        raise explanation from error


def _require_checkpoint(config: ModelConfig) -> int:
    """The step of the newest checkpoint; UserError where there is none."""
    if tf.train.latest_checkpoint(config.model_path) is None:
        raise UserError(
            f"model_path {config.model_path!r} holds no checkpoint; train the model first or correct model_path"
        )
    return latest_step(config.model_path)


def _make_model_dir(config: ModelConfig) -> None:
    """Create model_path and write the run's config there, whole or not at all."""
    path = os.path.join(config.model_path, "config.json")
    try:
        tf.io.gfile.makedirs(config.model_path)
        with tf.io.gfile.GFile(path + ".tmp", "w") as file:
            file.write(config_to_json(config))
        tf.io.gfile.rename(path + ".tmp", path, overwrite=True)
    except tf.errors.OpError as error:
        raise UserError(
            f"model_path {config.model_path!r} cannot be written ({error.message}); choose a folder you may write to"
        ) from error


def _delete_model(model_path: str, yes: bool) -> None:
    """Delete the folder `model_path` and all in it, if it is a model's and the user agrees."""
    if not tf.io.gfile.exists(model_path):
        return
    names = tf.io.gfile.listdir(model_path)
    if names and not {"config.json", "checkpoint"} & set(names):
        raise UserError(
            f"--new would delete model_path {model_path!r}, but no model was trained there; delete it by hand"
        )
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"--new would delete {model_path!r} and nobody is there to ask; add --yes to agree")
        if input(f"delete {model_path!r} and start again at step 0? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError(f"--new: {model_path!r} was kept; run without --new to go on from its last checkpoint")
    tf.io.gfile.rmtree(model_path)
