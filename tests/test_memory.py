"""What TensorFlow holds at once while operations of our own run forward and back, by its own account."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import tensorflow.compat.v1 as tf

from benchmarks.measuring import peak_bytes, traced_devices
from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from mesh.dense import linear
from mesh.devices import local_mesh
from mesh.layout import parse
from models.activations import activation
from models.context import Context
from models.dims import make_dims
from tests.config_values import make
from tests.tiny import cpu_devices

ROWS, WIDTH = mtf.Dimension("rows", 1024), 256


def peaks(dims: Sequence[Sequence[mtf.Dimension]], loss: Callable[..., mtf.Tensor]) -> list[float]:
    """MB that some runs hold at most, in which `loss` of random tensors of `dims` and its gradients are calculated."""
    devices = cpu_devices(1)
    draw = np.random.default_rng(0)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, parse("x:1", "", 1), devices)
        shapes = [mtf.Shape(each) for each in dims]
        fed = [tf.placeholder(tf.float32, shape.to_integer_list) for shape in shapes]
        given = [mtf.import_tf_tensor(mesh, x, shape) for x, shape in zip(fed, shapes, strict=True)]
        total = loss(*given)
        # sums, since what a run returns is held as well
        outputs = [total, *(mtf.reduce_sum(dx) for dx in mtf.gradients([total], given))]
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        fetches = [lowering.export_to_tf_tensor(output) for output in outputs]
        feeds = {x: draw.normal(size=x.shape.as_list()) / 16 for x in fed}
        settings = devices.session_config()
        # one thread alone, as where others are busy: what nobody waits for yet is put off
        settings.inter_op_parallelism_threads, settings.use_per_session_threads = 1, True
        with tf.Session(config=settings) as session:
            session.run(fetches, feeds)  # the first run allocates what the later ones find
            return [peak_bytes(traced_devices(partial(session.run, fetches, feeds))) / 1e6 for _ in range(7)]


def test_logits_are_held_once() -> None:
    vocab, embd = mtf.Dimension("vocab", 2048), mtf.Dimension("embd", 32)
    logits = ROWS.size * vocab.size * 4 / 1e6

    def loss(hidden: mtf.Tensor, table: mtf.Tensor) -> mtf.Tensor:
        labels = mtf.mod(mtf.range(hidden.mesh, ROWS, tf.int32), vocab.size)
        cross_entropy, log_z = head_cross_entropy(hidden, table, labels)
        return mtf.reduce_mean(cross_entropy + log_z)

    found = peaks([[ROWS, embd], [vocab, embd]], loss)
    assert logits < min(found) and max(found) < 1.25 * logits


def test_gelu_keeps_its_result_and_its_slope() -> None:
    """The results are kept as well for the products that they are the factors of."""
    layers, one = 8, ROWS.size * WIDTH * 4 / 1e6
    names = [mtf.Dimension(f"width_{layer}", WIDTH) for layer in range(layers + 1)]

    def loss(x: mtf.Tensor, *kernels: mtf.Tensor) -> mtf.Tensor:
        config = make()
        ctx = Context(config, x.mesh, make_dims(config, 1), mtf.VariableDType(tf.float32))
        for kernel in kernels:
            x = activation(ctx, "gelu", linear(x, kernel))
        return mtf.reduce_sum(x)

    found = peaks([[ROWS, names[0]], *([before, after] for before, after in zip(names, names[1:], strict=False))], loss)
    assert 2 * layers * one < min(found) and max(found) < (2 * layers + 5) * one  # and what is on its way
