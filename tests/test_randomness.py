"""Draws depend on their key and place, never on the mesh, the process or what was drawn before."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.randomness import StatelessNormal, dropout, fold_in, make_key, name_hash, uniform
from tests.tiny import MtfSession

BATCH, SEQUENCE, HEADS = mtf.Dimension("batch", 8), mtf.Dimension("sequence", 6), mtf.Dimension("heads", 4)
ODD = mtf.Dimension("batch", 2)  # half of it, times ODD_ROW, is no whole number of Philox counts
ODD_ROW = mtf.Dimension("row", 3)


def draws(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
    key = make_key(mesh, seed=7, step=3)
    shape = mtf.Shape([BATCH, HEADS, SEQUENCE])
    return {
        "a": uniform(key, shape, "a"),
        "b": uniform(key, shape, "b"),
        "next step": uniform(make_key(mesh, seed=7, step=4), shape, "a"),
        "other seed": uniform(make_key(mesh, seed=8, step=3), shape, "a"),
        "microbatch": uniform(fold_in(key, mtf.constant(mesh, 1, dtype=tf.int32)), shape, "a"),
        "odd": uniform(key, mtf.Shape([ODD, ODD_ROW]), "a"),
    }


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    return MtfSession().run(draws)


@pytest.mark.parametrize(
    ("mesh_shape", "layout"),
    [("x:2", "batch:x"), ("x:2", "heads:x"), ("x:2,y:2", "batch:x,heads:y"), ("x:2,y:2", "sequence:x,batch:y")],
)
def test_the_mesh_does_not_matter(whole: dict[str, np.ndarray], mesh_shape: str, layout: str) -> None:
    split = MtfSession(mesh_shape, layout).run(draws)
    for name, expected in whole.items():
        np.testing.assert_array_equal(split[name], expected, err_msg=name)


def test_every_key_and_place_draws_its_own_uniform_numbers(whole: dict[str, np.ndarray]) -> None:
    names = ["a", "b", "next step", "other seed", "microbatch"]
    values = np.concatenate([whole[name].ravel() for name in names])
    assert len(np.unique(values)) == len(values)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 3 * np.sqrt(1 / 12 / len(values))


def test_dropout_keeps_the_mean_and_its_gradient_the_mask() -> None:
    wide = mtf.Dimension("wide", 10_000)

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        x = mtf.ones(mesh, mtf.Shape([wide]))
        y = dropout(x, make_key(mesh, 0, 0), 0.1, "place")
        return {"y": y, "gradient": mtf.gradients([mtf.reduce_sum(y * 2.0)], [x])[0]}

    got = MtfSession().run(build)
    kept = got["y"] != 0
    assert abs(kept.mean() - 0.9) < 0.01
    np.testing.assert_allclose(got["y"][kept], 1 / 0.9, rtol=1e-6)
    np.testing.assert_array_equal(got["gradient"], 2 * got["y"])


def test_initial_values_are_keyed_by_seed_and_name() -> None:
    with tf.Graph().as_default(), tf.Session() as session:
        first, again, other_name, other_seed = session.run(
            [
                StatelessNormal(0.02, seed, name)([1000])
                for seed, name in ((1, "gpt2/wte"), (1, "gpt2/wte"), (1, "gpt2/wpe"), (2, "gpt2/wte"))
            ]
        )
    np.testing.assert_array_equal(first, again)
    assert abs(first.std() - 0.02) < 0.002
    for other in (other_name, other_seed):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_name_hash_is_the_same_in_every_process() -> None:
    assert name_hash("gpt2/wte") == 1196616265
