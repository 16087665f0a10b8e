"""Learning-rate schedules, gradient clipping and the updates of the weights."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.adam import AdamSettings, AdamUpdate
from mesh.operations import sum_of_squares

END_LR_FRACTION = 0.1  # GPT-3: decay to 10% of the peak
ADAFACTOR_DECAY_EXPONENT = 0.8  # arXiv:1804.04235, section 7.2
ADAFACTOR_LEAST_FACTORED = 128  # Mesh-TensorFlow: smaller variables keep all of v
# GPT-3: weight decay acts on matrices, not on norms and biases; nor on what activations learn (arXiv:1502.01852)
_NOT_DECAYED = re.compile(r"norm|bias|ln_f|/activation_")


def learning_rate(config: ModelConfig, step: tf.Tensor) -> tf.Tensor:
    """The rate of `step` (integer scalar): a cosine or linear decay to 10% of the peak, times a linear warm-up from 0.

    The decay is counted from step 0 and holds its last value after `lr_decay_end` (else `train_steps`).
    """
    step = tf.cast(step, tf.float32)
    done = tf.minimum(step / config.lr_end_step, 1.0)
    decayed = {"cosine": lambda: 0.5 * (1.0 + tf.cos(math.pi * done)), "linear": lambda: 1.0 - done}[config.lr_decay]()
    rate = config.lr * (END_LR_FRACTION + (1.0 - END_LR_FRACTION) * decayed)
    if config.warmup_steps:
        rate *= tf.minimum(step / config.warmup_steps, 1.0)
    return rate


def global_norm(tensors: Sequence[mtf.Tensor]) -> mtf.Tensor:
    """The Euclidean norm of all entries of `tensors` together, a float32 scalar."""
    return mtf.sqrt(mtf.add_n([sum_of_squares(x) for x in tensors]))


def gradient_norms(gradients: Sequence[mtf.Tensor]) -> dict[str, mtf.Tensor]:
    """{"grads/norm/<variable>": Euclidean norm} of `gradients`, one for each trainable variable of their graph."""
    variables = gradients[0].graph.trainable_variables
    return {f"grads/norm/{v.name}": global_norm([gradient]) for v, gradient in zip(variables, gradients, strict=True)}


def clip(gradients: Sequence[mtf.Tensor], norm: mtf.Tensor, limit: float | None) -> list[mtf.Tensor]:
    """Gradients scaled down so that their global norm, now `norm`, is at most `limit`; None leaves them as they are."""
    if limit is None:
        return list(gradients)
    scale = limit / mtf.maximum(norm, limit)
    return [gradient * mtf.cast(scale, gradient.dtype) for gradient in gradients]


@dataclass(frozen=True)
class AdamW:
    """Adam without bias correction, with decoupled weight decay, as in mesh.adam.AdamSettings.

    Slots are float32 and called `<variable>/adam_m` and `<variable>/adam_v`.
    """

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    def update(self, variable: mtf.Variable, gradient: mtf.Tensor, rate: mtf.Tensor) -> list[mtf.Operation]:
        """The update of `variable` and its slots in one step."""
        slots = [_slot(variable, suffix).operation for suffix in ("/adam_m", "/adam_v")]
        decay = self.weight_decay if is_decayed(variable.name) else 0.0
        settings = AdamSettings(self.beta1, self.beta2, self.epsilon, decay)
        return [AdamUpdate([variable, *slots], mtf.cast(gradient, tf.float32), rate, settings)]


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv:1804.04235), which keeps means of g^2 over rows and columns in place of g^2 itself.

    v <- decay v + (1 - decay) (g^2 + epsilon1), where decay is 1 - t^-0.8 in step t = 1, 2, ...; factored, vr and vc
    are the same of means over one dimension each, and v is vr vc / mean(vr).
    u = g / sqrt(v);  u <- u max(rms(w), epsilon2) / max(rms(u), 1);  m <- beta1 m + (1 - beta1) lr u;
    w <- w - m - lr weight_decay w. Without beta1 there is no m, and lr u in its place.

    A variable is factored along its two largest dimensions where both are at least 128, as in Mesh-TensorFlow. Slots
    are float32 and called `<variable>_slot_m` and `_slot_v`, or `_slot_vr`, which lacks the largest dimension, and
    `_slot_vc`, which lacks the second largest.
    """

    beta1: float
    epsilon1: float
    epsilon2: float
    weight_decay: float
    decay: mtf.Tensor

    def update(self, variable: mtf.Variable, gradient: mtf.Tensor, rate: mtf.Tensor) -> list[mtf.Operation]:
        """The assignments of one step to `variable` and its slots."""
        step, assignments = self._normalized(variable, mtf.cast(gradient, tf.float32))
        weights = mtf.cast(variable.value, tf.float32)
        step *= rate * mtf.maximum(_rms(weights), self.epsilon2) / mtf.maximum(_rms(step), 1.0)
        if self.beta1:
            m = _slot(variable, "_slot_m")
            step = self.beta1 * m + (1.0 - self.beta1) * step
            assignments.append(mtf.assign(m, step))
        if self.weight_decay and is_decayed(variable.name):
            step += rate * self.weight_decay * weights
        return [*assignments, mtf.assign_sub(variable, step)]

    def _normalized(self, variable: mtf.Variable, gradient: mtf.Tensor) -> tuple[mtf.Tensor, list[mtf.Operation]]:
        """`gradient` / sqrt(v) with the new v, and the assignments to the slots of v."""
        squared = mtf.square(gradient) + self.epsilon1
        assignments: list[mtf.Operation] = []

        def running_mean(suffix: str, shape: mtf.Shape) -> mtf.Tensor:
            slot = _slot(variable, suffix, shape)
            new = self.decay * slot + (1.0 - self.decay) * mtf.reduce_mean(squared, output_shape=shape)
            assignments.append(mtf.assign(slot, new))
            return new

        factored = factored_dims(variable.shape)
        if factored is None:
            return gradient * mtf.rsqrt(running_mean("_slot_v", variable.shape)), assignments
        largest, second = factored
        vr = running_mean("_slot_vr", variable.shape - largest)
        vc = running_mean("_slot_vc", variable.shape - second)
        return gradient * mtf.rsqrt(vr / mtf.reduce_mean(vr, reduced_dim=second)) * mtf.rsqrt(vc), assignments


def factored_dims(shape: mtf.Shape) -> tuple[mtf.Dimension, mtf.Dimension] | None:
    """The largest and the second largest dimension of a variable that Adafactor factors; None for one that it does not.

    Of equal dimensions the first counts as the larger.
    """
    ordered = sorted(shape.dims, key=lambda dim: -dim.size)
    if len(ordered) < 2 or ordered[1].size < ADAFACTOR_LEAST_FACTORED:
        return None
    return ordered[0], ordered[1]


def _rms(x: mtf.Tensor) -> mtf.Tensor:
    return mtf.sqrt(mtf.reduce_mean(mtf.square(x)))


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on the variable called `name`."""
    return not _NOT_DECAYED.search(name)


def _slot(variable: mtf.Variable, suffix: str, shape: mtf.Shape | None = None) -> mtf.Tensor:
    """The float32 variable `<variable><suffix>`, of the variable's shape unless another is given; zeros at first."""
    return mtf.get_variable(
        variable.mesh,
        variable.name + suffix,
        variable.shape if shape is None else shape,
        dtype=mtf.VariableDType(tf.float32),
        initializer=tf.zeros_initializer(),
        trainable=False,
    )


def _make_adam(config: ModelConfig, mesh: mtf.Mesh, step: tf.Tensor) -> AdamW:
    del mesh, step  # what it does depends on no step
    return AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay)


def _make_adafactor(config: ModelConfig, mesh: mtf.Mesh, step: tf.Tensor) -> Adafactor:
    decay = 1.0 - tf.pow(tf.cast(step, tf.float32) + 1.0, -ADAFACTOR_DECAY_EXPONENT)
    decay = mtf.import_fully_replicated(mesh, decay, mtf.Shape([]), name="adafactor_decay")
    return Adafactor(config.beta1, config.ada_epsilon1, config.ada_epsilon2, config.weight_decay, decay)


# opt_name -> the optimizer of a step
OPTIMIZERS: dict[str, Callable[[ModelConfig, mtf.Mesh, tf.Tensor], AdamW | Adafactor]] = {
    "adam": _make_adam,
    "adafactor": _make_adafactor,
}


def apply_gradients(
    config: ModelConfig, gradients: Sequence[mtf.Tensor], rate: mtf.Tensor, step: tf.Tensor
) -> tuple[list[mtf.Operation], mtf.Tensor]:
    """Clip `gradients`, one for each trainable variable of their graph in order, and apply them at learning `rate`.

    `step` is the number of steps done (integer scalar). Returns the assignments and the gradients' global norm before
    clipping.
    """
    variables = list(gradients[0].graph.trainable_variables)
    norm = global_norm(gradients)
    optimizer = OPTIMIZERS[config.opt_name](config, gradients[0].mesh, step)
    clipped = clip(gradients, norm, config.gradient_clipping)
    updates = [
        optimizer.update(variable, gradient, rate) for variable, gradient in zip(variables, clipped, strict=True)
    ]
    return [operation for update in updates for operation in update], norm
