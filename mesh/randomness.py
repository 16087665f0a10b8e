"""Random numbers that depend on nothing but their key and their place in the tensor.

Mesh-TensorFlow seeds from Python's `random` and salted string hashes, so a resumed run, another mesh or another
process draws other numbers. Here every draw is keyed by (seed, step, microbatch, name of the place), and the number at
an index of a tensor is the same however the tensor is split.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.operations import SlicedOperation, SlicewiseOperation, slice_start

KEY = mtf.Dimension("random_key", 2)  # a key is an int32 mtf.Tensor [random_key]; no layout splits it

_PHILOX = 1  # tf.random.Algorithm.PHILOX
_NUMBERS_PER_COUNT = 4  # Philox-4x32: each step of the counter yields four numbers


def name_hash(name: str) -> int:
    """A number in [0, 2^31) that is the same for the same name in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def make_key(mesh: mtf.Mesh, seed: int, step: tf.Tensor | int) -> mtf.Tensor:
    """The key of everything that is drawn at `step` of a run with `seed`."""
    key = tf.stack([tf.constant(seed & 0x7FFFFFFF, tf.int32), tf.cast(step, tf.int32)])
    return mtf.import_fully_replicated(mesh, key, mtf.Shape([KEY]), name="random_key")


def fold_in(key: mtf.Tensor, data: mtf.Tensor) -> mtf.Tensor:
    """A key derived from `key` and the int32 scalar `data`, such as the number of a microbatch or a position."""
    return SlicewiseOperation(_fold, [key, data], [(key.shape, tf.int32)], name="fold_in").outputs[0]


def _fold(key: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    """By Philox on every device, where TensorFlow would choose another generator for a TPU."""
    return tf.random.experimental.stateless_fold_in(key, data, alg="philox")


def _draw_slice(
    key: tf.Tensor, salt: int, full: list[int], part: list[int], starts: Sequence[tf.Tensor | int]
) -> tf.Tensor:
    """The slice of shape `part` at `starts` of a uniform draw of shape `full`.

    A slice of the first dimension is a run of the flat tensor: the counter is set to where the run begins. Along other
    split dimensions the whole extent is drawn and cut.
    """
    key_, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=_fold(key, tf.constant(salt, tf.int32)))
    row = int(np.prod(full[1:], dtype=np.int64))
    drawn, cut = list(full), list(starts)
    if full and part[0] != full[0] and (part[0] * row) % _NUMBERS_PER_COUNT == 0:
        first = tf.cast(starts[0], tf.int64) * row // _NUMBERS_PER_COUNT
        # through int64, since not every device adds uint64
        counter = tf.bitcast(tf.bitcast(counter, tf.int64) + tf.stack([first, tf.zeros_like(first)]), tf.uint64)
        drawn[0], cut[0] = part[0], 0
    numbers = tf.raw_ops.StatelessRandomUniformV2(shape=drawn, key=key_, counter=counter, alg=_PHILOX, dtype=tf.float32)
    return numbers if drawn == part else tf.slice(numbers, cut, part)


class _KeyedUniform(SlicedOperation):
    """Shared by the operations that draw: the slice of a uniform [0, 1) draw that belongs to each processor."""

    def __init__(self, inputs: list[mtf.Tensor], outputs: list[tuple[mtf.Shape, tf.DType]], name: str):
        super().__init__(inputs, outputs, name.rsplit("/", 1)[-1])
        self._drawn_shape = self.outputs[0].shape
        self._salt = name_hash(name)

    def _draw(self, lowering: mtf.Lowering, fn: Callable, *inputs: mtf.Tensor) -> Any:
        """`fn(uniform slice, *input slices)` on every processor; the key is the operation's last input."""
        mesh_impl = lowering.mesh_impl(self)
        shape = self._drawn_shape
        part = mesh_impl.slice_shape(shape)
        starts = [slice_start(mesh_impl, dim) for dim in shape.dims]

        def drawn(key: tf.Tensor, *slices: Any) -> Any:
            uniform = _draw_slice(key, self._salt, shape.to_integer_list, part, slices[: len(starts)])
            return fn(uniform, *slices[len(starts) :])

        key = lowering.tensors[self.inputs[-1]]
        return mesh_impl.slicewise(drawn, key, *starts, *[lowering.tensors[x] for x in inputs])


class _Uniform(_KeyedUniform):
    def __init__(self, key: mtf.Tensor, shape: mtf.Shape, name: str):
        super().__init__([key], [(shape, tf.float32)], name)

    def lower(self, lowering: mtf.Lowering) -> None:
        lowering.set_tensor_lowering(self.outputs[0], self._draw(lowering, tf.identity))


def uniform(key: mtf.Tensor, shape: mtf.Shape, name: str) -> mtf.Tensor:
    """Uniform numbers in [0, 1), float32, of `shape`, from `key` and the `name` of the place that draws them."""
    return _Uniform(key, mtf.convert_to_shape(shape), name).outputs[0]


class _Dropout(_KeyedUniform):
    """Outputs: the thinned tensor, and which entries were kept (bool, a byte each, for the gradient)."""

    def __init__(self, x: mtf.Tensor, key: mtf.Tensor, rate: float, name: str):
        super().__init__([x, key], [(x.shape, x.dtype), (x.shape, tf.bool)], name)
        self._rate = rate

    def gradient(self, grad_ys: Sequence[mtf.Tensor | None]) -> list[mtf.Tensor | None]:
        x = self.inputs[0]
        rate = self._rate
        thinned = SlicewiseOperation(
            lambda dy, kept: _thin(dy, kept, rate),
            [grad_ys[0], self.outputs[1]],
            [(x.shape, x.dtype)],
            name="dropout_gradient",
        )
        return [thinned.outputs[0], None]

    def lower(self, lowering: mtf.Lowering) -> None:
        rate = self._rate

        def thin(uniform_: tf.Tensor, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            kept = uniform_ >= rate
            return _thin(x, kept, rate), kept

        for output, value in zip(self.outputs, self._draw(lowering, thin, self.inputs[0]), strict=True):
            lowering.set_tensor_lowering(output, value)


def _thin(x: tf.Tensor, kept: tf.Tensor, rate: float) -> tf.Tensor:
    grown = tf.cast(tf.cast(x, tf.float32) * (1.0 / (1.0 - rate)), x.dtype)  # a rounded factor would shift the mean
    return tf.where_v2(kept, grown, tf.zeros_like(x))


def dropout(x: mtf.Tensor, key: mtf.Tensor, rate: float, name: str) -> mtf.Tensor:
    """Inverted dropout: each entry of `x` is 0 with probability `rate`, else divided by 1 - rate.

    The entries are chosen by `key` and the `name` of the place alone, whatever the mesh. Recomputation draws the same.
    """
    return x if rate == 0 else _Dropout(x, key, rate, name).outputs[0]


class StatelessNormal:
    """Initializer: normal(0, stddev), keyed by (seed, variable name), so that any mesh and order starts alike.

    A `truncated` one draws again what is further than two deviations from 0.
    """

    def __init__(self, stddev: float, seed: int, variable_name: str, truncated: bool = False):
        self._draw = tf.random.stateless_truncated_normal if truncated else tf.random.stateless_normal
        self._stddev = stddev
        self._seed = [seed & 0x7FFFFFFF, name_hash(variable_name)]

    def __call__(self, shape: Any, dtype: tf.DType = tf.float32, partition_info: Any = None) -> tf.Tensor:
        """`shape` as tf.get_variable passes it; values are drawn in float32 and cast to `dtype`."""
        del partition_info  # part of TensorFlow's initializer signature
        normal = self._draw(shape, seed=self._seed, stddev=self._stddev, alg="philox")
        return tf.cast(normal, dtype)
