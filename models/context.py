"""What one pass of the model carries from layer to layer besides the activations."""

from dataclasses import dataclass, field, replace

import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.operations import cast_variable
from mesh.randomness import StatelessNormal, dropout
from models.dims import Dims


def variable_dtype(config: ModelConfig, is_training: bool) -> mtf.VariableDType:
    """The types under `precision`: of the masters, which checkpoints hold, the slices on the devices, the activations.

    Training updates the slices; bfloat16, with eight binary digits, would lose most of what it adds. All else only
    reads them, and has nothing but the activations' type.
    """
    activations = tf.as_dtype(config.precision)
    return mtf.VariableDType(*([tf.float32, tf.float32] if is_training else 2 * [activations]), activations)


@dataclass(frozen=True)
class Context:
    """One pass over one input.

    A whole-sequence pass has `position` None and activations [batch, sequence, ...]. A decoding step sees one token of
    each row: `position` is its index (int32 scalar), activations are [batch, ...], and what attention remembers of the
    earlier positions is read from `states` and written back. A whole-sequence pass with `keep_states_until` (int32
    scalar) fills them with what the positions before that one leave behind.
    """

    config: ModelConfig
    mesh: mtf.Mesh
    dims: Dims
    variable_dtype: mtf.VariableDType
    dropout_key: mtf.Tensor | None = None  # None outside training: nothing is dropped
    position: mtf.Tensor | None = None
    keep_states_until: mtf.Tensor | None = None
    final_norm: bool = True  # False only for a checkpoint that was trained without
    states: dict[str, mtf.Tensor] = field(default_factory=dict)
    auxiliary: list[mtf.Tensor] = field(default_factory=list)  # losses that layers add in training, float32 scalars
    layer: str = ""  # names draws and states; scopes cannot where layers share their parameters

    def in_layer(self, layer: int) -> "Context":
        """The same pass inside layer number `layer`."""
        return replace(self, layer=f"h{layer}/")

    @property
    def decodes(self) -> bool:
        """Whether this is a decoding step."""
        return self.position is not None

    @property
    def causal(self) -> bool:
        """Whether a position sees itself and what is before it alone; a masked language model sees all positions."""
        return not self.config.mlm_training

    @property
    def activation_dims(self) -> list[mtf.Dimension]:
        """The leading dimensions of every activation: [batch, sequence], or [batch] in a decoding step."""
        return [self.dims.batch] if self.decodes else [self.dims.batch, self.dims.sequence]

    @property
    def stored_dtype(self) -> mtf.VariableDType:
        """The types of a variable that comes as its slices are: the optimizer sees those, and gradients of their type,
        and what the model calculates with is cast from them."""
        kinds = self.variable_dtype
        return mtf.VariableDType(kinds.master_dtype, kinds.slice_dtype, kinds.slice_dtype)

    def normal(
        self,
        name: str,
        shape: list[mtf.Dimension],
        stddev: float,
        dtype: tf.DType | None = None,
        truncated: bool = False,
    ) -> mtf.Tensor:
        """The variable `name` in the current scope, drawn from normal(0, stddev) at the start of a run.

        It comes as the activations' type unless `dtype` names another.
        """
        scope = tf.get_variable_scope().name
        initializer = StatelessNormal(stddev, self.config.seed, f"{scope}/{name}", truncated)
        return self._variable(name, shape, initializer, dtype)

    def constant(
        self, name: str, shape: list[mtf.Dimension], value: float, dtype: tf.DType | None = None
    ) -> mtf.Tensor:
        """The variable `name` in the current scope, starting at `value` everywhere; its type is as in `normal`."""
        return self._variable(name, shape, tf.constant_initializer(value), dtype)

    def _variable(
        self, name: str, shape: list[mtf.Dimension], initializer: object, dtype: tf.DType | None
    ) -> mtf.Tensor:
        activations = self.variable_dtype.activation_dtype
        stored = self.stored_dtype if dtype in (None, activations) else mtf.VariableDType(dtype)
        value = mtf.get_variable(self.mesh, name, mtf.Shape(shape), dtype=stored, initializer=initializer)
        return cast_variable(value, dtype or activations)

    def dropout(self, x: mtf.Tensor, rate: float, name: str) -> mtf.Tensor:
        """Thin `x` while training; the draw is named after the layer and `name`."""
        return x if self.dropout_key is None else dropout(x, self.dropout_key, rate, f"{self.layer}{name}")
