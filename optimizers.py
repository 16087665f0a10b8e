"""Learning-rate schedules, gradient clipping and the updates of the weights."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf

END_LR_FRACTION = 0.1  # GPT-3: decay to 10% of the peak
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
    return mtf.sqrt(mtf.add_n([mtf.reduce_sum(mtf.square(mtf.cast(x, tf.float32))) for x in tensors]))


def clip(gradients: Sequence[mtf.Tensor], norm: mtf.Tensor, limit: float | None) -> list[mtf.Tensor]:
    """Gradients scaled down so that their global norm, now `norm`, is at most `limit`; None leaves them as they are."""
    if limit is None:
        return list(gradients)
    scale = limit / mtf.maximum(norm, limit)
    return [gradient * mtf.cast(scale, gradient.dtype) for gradient in gradients]


@dataclass(frozen=True)
class AdamW:
    """Adam (arXiv:1412.6980) without bias correction, with decoupled weight decay (arXiv:1711.05101).

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  w <- w - lr (m / (sqrt(v) + epsilon) + decay w).
    Slots are float32 and called `<variable>/adam_m` and `<variable>/adam_v`.
    """

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    def update(self, variable: mtf.Variable, gradient: mtf.Tensor, rate: mtf.Tensor) -> list[mtf.Operation]:
        """The assignments of one step to `variable` and its slots."""
        gradient = mtf.cast(gradient, tf.float32)
        m, v = (_slot(variable, suffix) for suffix in ("adam_m", "adam_v"))
        new_m = self.beta1 * m + (1.0 - self.beta1) * gradient
        new_v = self.beta2 * v + (1.0 - self.beta2) * mtf.square(gradient)
        step = new_m / (mtf.sqrt(new_v) + self.epsilon)
        if self.weight_decay and is_decayed(variable.name):
            step += self.weight_decay * mtf.cast(variable.value, tf.float32)
        return [mtf.assign(m, new_m), mtf.assign(v, new_v), mtf.assign_sub(variable, rate * step)]


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on the variable called `name`."""
    return not _NOT_DECAYED.search(name)


def _slot(variable: mtf.Variable, suffix: str) -> mtf.Tensor:
    return mtf.get_variable(
        variable.mesh,
        f"{variable.name}/{suffix}",
        variable.shape,
        dtype=mtf.VariableDType(tf.float32),
        initializer=tf.zeros_initializer(),
        trainable=False,
    )


def make_optimizer(config: ModelConfig) -> AdamW:
    """The optimizer that `opt_name` and its keys describe."""
    return AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay)


def apply_gradients(
    config: ModelConfig, gradients: Sequence[mtf.Tensor], rate: mtf.Tensor
) -> tuple[list[mtf.Operation], mtf.Tensor]:
    """Clip `gradients`, one for each trainable variable of their graph in order, and apply them at learning `rate`.

    Returns the assignments and the gradients' global norm before clipping.
    """
    variables = list(gradients[0].graph.trainable_variables)
    norm = global_norm(gradients)
    optimizer = make_optimizer(config)
    clipped = clip(gradients, norm, config.gradient_clipping)
    updates = [
        optimizer.update(variable, gradient, rate) for variable, gradient in zip(variables, clipped, strict=True)
    ]
    return [operation for update in updates for operation in update], norm
