"""Functions of each element alone."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import SlicedOperation, SlicewiseOperation


def elementwise(
    fn: Callable[..., tf.Tensor], x: mtf.Tensor, name: str, numbers: Sequence[mtf.Tensor] = ()
) -> mtf.Tensor:
    """`fn(element, *numbers)`, calculated in float32, of each element of `x` alone; same shape and dtype.

    `numbers` are scalars, []. The gradient runs `fn` again rather than keep what it made on the way. (Mesh-TensorFlow's
    own `cwise` cannot take the gradient of a value that is still to be summed over a mesh axis.)
    """

    def forward(x_slice: tf.Tensor, *numbers_: tf.Tensor) -> tf.Tensor:
        return tf.cast(fn(*(tf.cast(value, tf.float32) for value in (x_slice, *numbers_))), x_slice.dtype)

    def gradient(op: mtf.Operation, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
        def back_to_x(dy: tf.Tensor, x_slice: tf.Tensor, *numbers_: tf.Tensor) -> tf.Tensor:
            return tf.gradients([forward(x_slice, *numbers_)], [x_slice], [dy])[0]

        def back_to_numbers(dy: tf.Tensor, x_slice: tf.Tensor, *numbers_: tf.Tensor) -> Any:
            # of this use of the numbers alone: x may stem from an earlier one, where layers share them
            found = tf.gradients([forward(tf.stop_gradient(x_slice), *numbers_)], list(numbers_), [dy])
            return tuple(found) if len(found) > 1 else found[0]

        inputs = [grad_ys[0], *op.inputs]
        dx = SlicewiseOperation(back_to_x, inputs, [(x.shape, x.dtype)], name=f"{name}_gradient").outputs
        if not numbers:
            return dx
        outputs = [(number.shape, number.dtype) for number in numbers]
        summed = SlicewiseOperation(
            back_to_numbers, inputs, outputs, reduced_dims=x.shape.dims, name=f"{name}_back_to_numbers"
        )
        return [*dx, *summed.outputs]

    return SlicewiseOperation(forward, [x, *numbers], [(x.shape, x.dtype)], gradient=gradient, name=name).outputs[0]


def with_slope(fn: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]], x: mtf.Tensor, name: str) -> mtf.Tensor:
    """The first of what `fn` makes of each element of `x`, calculated in float32: y, and its slope dy/dx.

    For back-propagation y and the slope are kept, whatever `fn` needed for them.
    """
    return _WithSlope(fn, x, name).outputs[0]


class _WithSlope(SlicedOperation):
    """Outputs: y; the slope, which nobody reads but the gradient.

    TensorFlow calculates the slope when it has nothing better to do, and until then holds what `fn` made on the way. So
    whoever reads y waits for the slope, if there is a gradient to be.
    """

    def __init__(self, fn: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]], x: mtf.Tensor, name: str):
        super().__init__([x], [(x.shape, x.dtype)] * 2, name)
        self._fn = fn
        self._is_differentiated = False

    def gradient(self, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor]:
        self._is_differentiated = True
        return [grad_ys[0] * self.outputs[1]]

    def lower(self, lowering: mtf.Lowering) -> None:
        def forward(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            y, slope = (tf.cast(value, x.dtype) for value in self._fn(tf.cast(x, tf.float32)))
            with tf.control_dependencies([slope] if self._is_differentiated else []):
                return tf.identity(y), slope

        values = lowering.mesh_impl(self).slicewise(forward, lowering.tensors[self.inputs[0]])
        for output, value in zip(self.outputs, values, strict=True):
            lowering.set_tensor_lowering(output, value)
