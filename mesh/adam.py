"""Adam's update of a weight and its two slots as one operation.

On local devices it is TensorFlow's fused kernel, which reads and writes all three in place, after one pass for the
weight's decay if any. Written out, an update takes a dozen passes, each with a result of the weight's size. A TPU has
it written out: XLA joins the passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf
from mesh_tensorflow.ops import assign_slice
from mesh_tensorflow.simd_mesh_impl import SimdMeshImpl

from mesh import mtf
from mesh.operations import SlicedOperation


@dataclass(frozen=True)
class AdamSettings:
    """m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  w <- w - rate (m / (sqrt(v) + eps) + decay w).

    eps is `epsilon`. arXiv:1412.6980 without bias correction, with the decay of arXiv:1711.05101.
    """

    beta1: float
    beta2: float
    epsilon: float
    decay: float

    def new_values(
        self, w: tf.Tensor, m: tf.Tensor, v: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """What w, m and v become."""
        m = self.beta1 * m + (1 - self.beta1) * gradient
        v = self.beta2 * v + (1 - self.beta2) * tf.square(gradient)
        step = m / (tf.sqrt(v) + self.epsilon)
        return w - rate * (step + self.decay * w if self.decay else step), m, v

    def in_place(
        self, w: tf.Variable, m: tf.Variable, v: tf.Variable, gradient: tf.Tensor, rate: tf.Tensor
    ) -> tf.Operation:
        """Update the three."""
        # the decay depends on no gradient: left to itself it may come before the step has read the weight
        with tf.control_dependencies([gradient]):
            decayed = [w.assign_sub(rate * self.decay * w.read_value(), read_value=False)] if self.decay else []
        with tf.control_dependencies(decayed):
            # with powers of 0 the kernel corrects no bias
            return tf.raw_ops.ResourceApplyAdam(
                var=w.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=0.0,
                beta2_power=0.0,
                lr=rate,
                beta1=self.beta1,
                beta2=self.beta2,
                epsilon=self.epsilon,
                grad=gradient,
            )


class AdamUpdate(SlicedOperation):
    """Updates the variables `w`, `m` and `v` by `gradient`, all float32 and of one shape.

    `rate` is a float32 scalar. There are no outputs.
    """

    def __init__(
        self, variables: Sequence[mtf.Variable], gradient: mtf.Tensor, rate: mtf.Tensor, settings: AdamSettings
    ):
        super().__init__([*(variable.value for variable in variables), gradient, rate], [], "adam")
        assert all(x.shape == gradient.shape and x.dtype == tf.float32 for x in self.inputs[:-1]), self.inputs
        assert all(variable.slice_dtype == tf.float32 for variable in variables), variables
        self.variables = tuple(variables)
        self.settings = settings

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        variables = [lowering.variables[variable] for variable in self.variables]
        *old, gradient, rate = (lowering.tensors[x].to_laid_out_tensor() for x in self.inputs)
        if isinstance(mesh_impl, SimdMeshImpl):
            values = mesh_impl.slicewise(self.settings.new_values, *old, gradient, rate)
            updates = [
                variable.assign_to_slices(assign_slice, value.all_slices)
                for variable, value in zip(variables, values, strict=True)
            ]
        else:
            slices = [variable.laid_out_tensor.all_slices for variable in variables]
            updates = mtf.parallel(
                mesh_impl.devices, self.settings.in_place, *slices, gradient.all_slices, rate.all_slices
            )
        lowering.operations[self] = tf.group(updates)
