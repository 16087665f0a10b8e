"""Every activation function against numpy: values, slopes along the input and along what it learns, on any mesh."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.randomness import make_key
from models.activations import ACTIVATIONS, activation
from models.context import Context
from models.dims import make_dims
from tests.reference_activations import LEARNED, NUMBERS, REFERENCE
from tests.tiny import MtfSession, tiny_config

ROWS = mtf.Dimension("batch", 4)
WIDTH = mtf.Dimension("intermediate_expanded", 64)


LEARNT: dict[str, np.ndarray] = {
    f"activation_{name}/{number}": np.array(later, np.float32)
    for name, (_, numbers) in LEARNED.items()
    for number, (_, later) in numbers.items()
}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, width], 0 and large ones among them, and weights of the outputs."""
    random = np.random.default_rng(0)
    x = random.normal(size=[ROWS.size, WIDTH.size]) * 2
    x[0, :8] = [0, -1e-3, 1e-3, -5, 5, 8, -8, 1]
    return x.astype(np.float32), random.normal(size=x.shape).astype(np.float32)


def build_all(
    folder: Path, x: np.ndarray, weights: np.ndarray, names: Iterable[str] = ACTIVATIONS
) -> Callable[[mtf.Mesh], dict[str, Any]]:
    """A builder of {name: (values, slopes of their weighted sum along x, and along each number learned)}."""
    config = tiny_config(folder)

    def build(mesh: mtf.Mesh) -> dict[str, Any]:
        ctx = Context(config, mesh, make_dims(config, ROWS.size), mtf.VariableDType(tf.float32))
        given, weights_ = (mtf.import_tf_tensor(mesh, value, mtf.Shape([ROWS, WIDTH])) for value in (x, weights))
        found = {}
        for name in names:
            y = activation(ctx, name, given)
            learned = [v.outputs[0] for v in mesh.graph.trainable_variables if v.name.startswith(f"activation_{name}/")]
            total = mtf.reduce_sum(y * weights_)
            found[name] = (y, *mtf.gradients([total], [given, *learned]))
        return found

    return build


def test_values_and_slopes_equal_numpy(tmp_path: Path) -> None:
    x, weights = inputs()
    found = MtfSession().run(build_all(tmp_path, x, weights), LEARNT)
    assert set(found) == set(REFERENCE)
    x64, step = x.astype(np.float64), 1e-6
    rows, columns = np.arange(ROWS.size)[:, None], np.arange(WIDTH.size)
    for name, (y, dx, *d_numbers) in found.items():
        numbers = [float(LEARNT[f"activation_{name}/{number}"]) for number in NUMBERS.get(name, [])]

        def total(x: np.ndarray, *numbers: float, name: str = name) -> float:
            return float((REFERENCE[name](x, *numbers) * weights).sum())

        np.testing.assert_allclose(y, REFERENCE[name](x64, *numbers), rtol=1e-5, atol=1e-5, err_msg=name)
        for row, column in np.ndindex(3, WIDTH.size):
            moved = step * ((rows == row) & (columns == column))
            if x[row, column] != 0:  # where some have a corner
                slope = (total(x64 + moved, *numbers) - total(x64 - moved, *numbers)) / (2 * step)
                assert dx[row, column] == pytest.approx(slope, abs=2e-5, rel=2e-5), (name, x[row, column])
        assert len(d_numbers) == len(numbers)
        for index, got in enumerate(d_numbers):
            ahead, behind = (
                total(x64, *[value + sign * step * (i == index) for i, value in enumerate(numbers)]) for sign in (1, -1)
            )
            assert got == pytest.approx((ahead - behind) / (2 * step), abs=1e-4, rel=1e-5), (name, NUMBERS[name][index])


def test_numbers_are_variables_with_names_and_sensible_starts(tmp_path: Path) -> None:
    x, weights = inputs()
    config = tiny_config(tmp_path)

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        ctx = Context(config, mesh, make_dims(config, ROWS.size), mtf.VariableDType(tf.float32))
        given = mtf.import_tf_tensor(mesh, x, mtf.Shape([ROWS, WIDTH]))
        with tf.variable_scope("gpt2/h0/mlp/conv1d_main", reuse=tf.AUTO_REUSE):
            found = {name: activation(ctx, name, given) for name in ("aria", "silu", "proottanh", "roottanh", *LEARNED)}
        return found | {v.name: v.outputs[0] for v in mesh.graph.trainable_variables}

    found = MtfSession().run(build)
    starts = {
        f"gpt2/h0/mlp/conv1d_main/activation_{name}/{number}": first
        for name, (_, numbers) in LEARNED.items()
        for number, (first, _) in numbers.items()
    }
    assert {name: float(value) for name, value in found.items() if name.startswith("gpt2/")} == pytest.approx(starts)
    np.testing.assert_allclose(found["aria"], found["silu"], atol=1e-5)
    np.testing.assert_allclose(found["proottanh"], found["roottanh"], rtol=1e-5)


def test_nothing_is_infinite(tmp_path: Path) -> None:
    """Neither values nor slopes, at 0 and far out, even where what is learned has gone astray."""
    x = np.zeros([ROWS.size, WIDTH.size], np.float32)
    x[0] = np.linspace(-1e2, 1e2, WIDTH.size)
    x[1] = np.linspace(-1e-6, 1e-6, WIDTH.size)
    x[2] = np.linspace(-1e4, 1e4, WIDTH.size)
    astray = {name: np.array(-1, np.float32) for name in LEARNT if name.endswith(("/nu", "/c", "/q", "/a"))}
    for names, learnt in ((ACTIVATIONS, {}), (LEARNED, astray)):
        found = MtfSession().run(build_all(tmp_path, x, np.ones_like(x), names), learnt)
        for name, values in found.items():
            assert all(np.isfinite(value).all() for value in values), name


def test_a_split_width_changes_nothing(tmp_path: Path) -> None:
    build = build_all(tmp_path, *inputs(), names=["rrelu", "softmax", "logsoftmax", *LEARNED])
    one = MtfSession().run(build, LEARNT)
    several = MtfSession("x:2", "intermediate_expanded:x").run(build, LEARNT)
    for name, values in one.items():
        for expected, got in zip(values, several[name], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_rrelu_draws_one_slope_for_a_call_in_training(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)

    def build(mesh: mtf.Mesh) -> list[mtf.Tensor]:
        ones = -mtf.ones(mesh, mtf.Shape([ROWS, WIDTH]))
        found = []
        for step in range(8):
            for layer in range(2):
                key = make_key(mesh, 1, step)
                dims = make_dims(config, ROWS.size)
                ctx = Context(config, mesh, dims, mtf.VariableDType(tf.float32), dropout_key=key).in_layer(layer)
                found.append(activation(ctx, "rrelu", ones))
        return found

    found = -np.array(MtfSession("x:2", "batch:x").run(build))
    slopes = found[:, 0, 0]
    np.testing.assert_array_equal(found, np.broadcast_to(slopes[:, None, None], found.shape))
    assert len(set(slopes)) == len(slopes)  # each step and layer draws its own
    assert slopes.min() >= 1 / 8 and slopes.max() <= 1 / 3
    assert slopes.mean() == pytest.approx(11 / 48, abs=4 * (1 / 3 - 1 / 8) / np.sqrt(12 * len(slopes)))
