"""What main.py's actions do once the config is read: assemble the TPUEstimator and run it."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import tensorflow.compat.v1 as tf

import evaluation
import inputs
import prediction
import serving
import tasks
from config import ModelConfig
from data.encoders import Encoder, SpecialIds, special_ids
from errors import UserError
from input_pipeline.samples import write_samples
from mesh.devices import LocalDevices, Resolver, local_devices, num_tpu_cores, tpu_resolver
from mesh.layout import MeshLayout, check_devices, check_layout, mesh_shapes, parse
from model_fns import Run, make_model_fn
from models.dims import TENSORS, layout_sizes
from planning.report import make_report
from planning.search import search_layout
from planning.target import Target, target
from sample import Sampling
from training.checkpoints import latest_step, newest_checkpoint
from training.failures import explained
from training.hooks import BatchBar, StopOnSignal
from training.model_dir import KeepConfig, delete_model, make_model_dir, warn_of_changes
from training.tpu_hooks import OneRunBar

logger = logging.getLogger(__name__)


def check_dataset(args: argparse.Namespace, config: ModelConfig) -> int:
    """Print the audit of the config's datasets, write the examples asked for; 1 if they do not fit the model."""
    report = inputs.check_dataset(config)
    print(report.text())
    if args.sample and report.ok:
        output = args.output or os.path.join(config.model_path, "dataset_examples.txt")
        write_samples(config, args.sample, output)
        logger.info("%d training examples written to %s", args.sample, output)
    return 0 if report.ok else 1


def plan(args: argparse.Namespace, config: ModelConfig) -> int:
    """Print what training `config` costs each device; 1 if it cannot be trained so. Needs neither devices nor data."""
    return _print_plan(config, target(args))


def _print_plan(config: ModelConfig, devices: Target) -> int:
    report = make_report(config, parse(config.mesh_shape, config.layout, devices.num_devices(config)), devices)
    print(report.text())
    return 1 if report.problems else 0


def auto_layout(args: argparse.Namespace, config: ModelConfig) -> int:
    """Print the layout of least memory as a config has it, and the mesh if that is asked for; with --plan its plan."""
    devices = target(args)
    count = devices.num_devices(config)
    meshes = list(mesh_shapes(count))
    if args.auto_layout:
        mesh = parse(config.mesh_shape or f"x:{count}", None, count)
        check_devices(mesh, count, devices.what)
        meshes = [dict(mesh.axes)]
    layout = search_layout(config, meshes, devices.on_tpu)
    lines = [f'"mesh_shape": "{layout.mesh_shape}",'] if args.auto_layout_and_mesh_shape else []
    print("\n".join([*lines, f'"layout": "{layout.layout}"']))
    if not args.plan:
        return 0
    print()
    return _print_plan(config.model_copy(update={"mesh_shape": layout.mesh_shape, "layout": layout.layout}), devices)


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

    def log_devices(self) -> None:
        """Say where the model is going to run."""
        where = ", ".join(self.devices.names) if self.devices else f"{self.layout.size} TPU cores"
        layout = self.layout.layout or "(nothing split)"
        logger.info("devices: %s; mesh %s, layout %s", where, self.layout.mesh_shape, layout)

    @property
    def sampling(self) -> Sampling:
        """How prediction draws: the command line's word, then the config's."""
        args = self.args
        new_tokens = args.max_new_tokens or self.config.predict_max_steps
        return Sampling(args.temperature, args.top_k, args.top_p, new_tokens, args.sampling_seed, args.entmax_sampling)

    @property
    def run(self) -> Run:
        """What the model functions are told of this job."""
        every_steps, eos_id = self.args.steps_per_checkpoint, self.special.eos_id
        return Run(self.config, self.layout, self.devices, every_steps, eos_id, self.sampling, self.stop)

    def batch_bar(self, what: str, steps: int) -> BatchBar:
        """The progress bar of an evaluation of so many batches."""
        return (BatchBar if self.resolver is None else OneRunBar)(f"{what} {self.config.name}", steps)

    def estimator(self, task: str = "") -> tf.estimator.tpu.TPUEstimator:
        """The TPUEstimator, which on local devices is an ordinary Estimator; `task` is what it evaluates."""
        config, args = self.config, self.args
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
            model_fn=make_model_fn(replace(self.run, task=task)),
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
        count, what = num_tpu_cores(args.tpu, resolver), "TPU cores"
    else:
        assert devices is not None
        count = len(devices.names)
        what = f"{devices.kind} device" + "s" * (count > 1)
    layout = parse(config.mesh_shape, config.layout, count)
    check_devices(layout, count, what)
    check_layout(layout, layout_sizes(config, {key: getattr(config, key) for key in batch_keys}), TENSORS)
    return Job(args, config, special_ids(config), layout, devices, resolver, stop)


def train(args: argparse.Namespace, config: ModelConfig) -> int:
    """Train to train_steps from the last checkpoint; evaluate and predict at every checkpoint if the config asks."""
    evaluates = config.eval_steps > 0 or bool(config.eval_tasks)
    with StopOnSignal() as stop:
        job = prepare(args, config, stop, ["train_batch_size"] + ["eval_batch_size"] * evaluates)
        step = 0 if args.new else latest_step(config.model_path)
        if step >= config.train_steps:
            logger.info(
                "%s is at step %d, train_steps is %d: nothing to do", config.model_path, step, config.train_steps
            )
            return 0
        inputs.verify_inputs(config, job.special, evaluate=False)
        at_checkpoints = _at_checkpoints(job)
        input_fn = inputs.train_input_fn(config, job.special)
        # From here on files are touched: nothing is lost to a mistake that the lines above could find.
        if args.new:
            delete_model(config.model_path, args.yes)
        make_model_dir(config)
        job.log_devices()
        if step:
            warn_of_changes(config)
            logger.info("resuming from step %d", step)
        step = _train_from(job, input_fn, step, at_checkpoints)
        if stop.signum is not None:
            logger.info("stopped at step %d, checkpoint saved; the same command goes on from there", step)
            return 128 + stop.signum
    logger.info("trained to step %d; checkpoints in %s", step, config.model_path)
    return 0


def _at_checkpoints(job: Job) -> list[Callable[[], None]]:
    """What is done at every checkpoint; finds out now, not at the first one, what cannot be read."""
    config = job.config
    actions: list[Callable[[], None]] = []
    if config.eval_steps > 0:
        inputs.verify_inputs(config, job.special, evaluate=True)
        evaluation.token_byte_lengths(config)
        actions.append(partial(_evaluate, job, config.eval_steps))
    for name, texts in _task_texts(job).items():
        actions.append(partial(_evaluate_task, job, name, texts))
    if config.predict_steps > 0:
        _encoded_prompts(job)
        actions.append(partial(_predict, job))
    return actions


def _train_from(job: Job, input_fn: inputs.InputFn, step: int, at_checkpoints: list[Callable[[], None]]) -> int:
    """Train from `step` until the end or a signal; the step reached."""
    config, stop, estimator = job.config, job.stop, job.estimator()
    interval = job.args.steps_per_checkpoint if at_checkpoints else config.train_steps
    while step < config.train_steps and stop.signum is None:
        target = min(config.train_steps, (step // interval + 1) * interval)
        with explained(config, "train_batch_size"):
            estimator.train(input_fn, max_steps=target, hooks=[KeepConfig(config)])
        step = latest_step(config.model_path)
        for action in at_checkpoints:
            if stop.signum is None:
                action()
    return step


def evaluate(args: argparse.Namespace, config: ModelConfig) -> int:
    """Evaluate the last checkpoint: on eval_steps batches of the validation data, or all of them where eval_steps is
    0, and on eval_tasks. With tasks there may be no validation data."""
    with StopOnSignal() as stop:
        job = prepare(args, config, stop, ["eval_batch_size"])
        step = _require_checkpoint(config)
        texts = _task_texts(job)
        validates = not texts or any(source.dataset.eval_path for source in config.datasets)
        steps = 0
        if validates:
            inputs.verify_inputs(config, job.special, evaluate=True)
            steps = config.eval_steps or -(-inputs.count_eval_examples(config) // config.eval_batch_size)
        job.log_devices()
        what = [f"{steps} {'batches' if steps > 1 else 'batch'}"] * validates
        logger.info("evaluating step %d on %s", step, ", ".join([*what, *texts]))
        if validates:
            _evaluate(job, steps)
        for name in texts:
            _evaluate_task(job, name, texts[name])
    return 0


def _task_texts(job: Job) -> dict[str, tasks.Texts]:
    """{task: what it scores} of eval_tasks, downloaded first where --download_tasks asks for it."""
    names = job.config.eval_tasks
    if job.args.download_tasks:
        if not names:
            raise UserError(
                '--download_tasks has nothing to do: eval_tasks is empty; set it, for example to ["lambada"]'
            )
        for name in names:
            tasks.TASKS[name].fetch(job.config)
    return {name: tasks.read_texts(name, job.config, job.special.eos_id) for name in names}


def predict(args: argparse.Namespace, config: ModelConfig) -> int:
    """Continue the prompts with the last checkpoint."""
    _require_left_to_right(config, "--predict")
    with StopOnSignal() as stop:
        job = prepare(args, config, stop, [])
        _require_checkpoint(config)
        job.log_devices()
        _predict(job)
    return 0


def export(args: argparse.Namespace, config: ModelConfig) -> int:
    """Write the last checkpoint as a SavedModel, built on the CPU whatever the devices, since it is for any."""
    _require_left_to_right(config, "--export")
    with StopOnSignal() as stop:
        step = _require_checkpoint(config)
        path = os.path.join(config.model_path, serving.FOLDER, str(step))
        if tf.io.gfile.exists(path):
            logger.info("%s is there already and stays as it is; remove it to export step %d again", path, step)
            return 0
        job = Job(args, config, special_ids(config), parse(None, None, 1), local_devices(["cpu:0"]), None, stop)
        with explained(config, "predict_batch_size"):
            serving.export(job.run, job.special.padding_id, path)
    logger.info("exported step %d to %s", step, path)
    return 0


def _evaluate(job: Job, steps: int) -> None:
    config = job.config
    token_bytes = evaluation.token_byte_lengths(config)
    input_fn = inputs.eval_input_fn(config, job.special, steps, token_bytes)
    with explained(config, "eval_batch_size"), job.batch_bar("eval", steps) as bar:
        sums = job.estimator().evaluate(input_fn, steps=steps, hooks=[bar])
    result = evaluation.summarize(sums, knows_bytes=token_bytes is not None)
    evaluation.report(result, config.model_path, job.args.sacred_id)


def _evaluate_task(job: Job, name: str, texts: tasks.Texts) -> None:
    config = job.config
    input_fn = tasks.task_input_fn(texts, tasks.task_length(texts, job.layout), job.special.padding_id)
    steps = -(-len(texts) // config.eval_batch_size)
    with explained(config, "eval_batch_size"), job.batch_bar(name, steps) as bar:
        found = job.estimator(task=name).evaluate(input_fn, steps=steps, hooks=[bar], name=name)
    evaluation.report(evaluation.summarize_task(name, found), config.model_path, job.args.sacred_id)


def _encoded_prompts(job: Job) -> tuple[Encoder, list[str], list[list[int]]]:
    """(tokenizer, prompts, their token ids)."""
    encoder = prediction.require_encoder(job.config)
    prompts = prediction.read_prompts(job.args.prompt, job.args.prompt_per_line)
    encoded = [
        prediction.encode_prompt(encoder, text, job.config, job.sampling.max_new_tokens, job.special.eos_id)
        for text in prompts
    ]
    return encoder, prompts, encoded


def _predict(job: Job) -> None:
    config, args = job.config, job.args
    step = latest_step(config.model_path)
    encoder, prompts, encoded = _encoded_prompts(job)
    length = prediction.decode_length(encoded, config, job.sampling.max_new_tokens, job.layout)
    input_fn = inputs.predict_input_fn(encoded, job.predict_batch_size, length, job.special.padding_id)
    logger.info("step %d continues %d %s", step, len(prompts), "prompts" if len(prompts) > 1 else "prompt")
    output = args.output or os.path.join(config.model_path, f"predictions_{args.sacred_id}_{step}.txt")
    with explained(config, "predict_batch_size"):
        rows = job.estimator().predict(input_fn, yield_single_examples=True)
        prediction.write(output, sys.stdout, prompts, encoded, rows, encoder, as_json=args.json)
    logger.info("written to %s", output)


def _require_left_to_right(config: ModelConfig, flag: str) -> None:
    """UserError for a model that continues no text."""
    if config.mlm_training:
        raise UserError(
            f"mlm_training is true, and a masked model fills gaps and continues no text; {flag} needs a model trained "
            "without it (--eval measures this one)"
        )


def _require_checkpoint(config: ModelConfig) -> int:
    """The step of the newest checkpoint; UserError where there is none."""
    if newest_checkpoint(config.model_path) is None:
        raise UserError(
            f"model_path {config.model_path!r} holds no checkpoint; train the model first or correct model_path"
        )
    warn_of_changes(config)
    return latest_step(config.model_path)
