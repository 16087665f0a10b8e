"""Our own mtf operations against plain numpy, whole and split over meshes."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from mesh.operations import cache_update, elementwise, embedding_lookup
from tests.tiny import MtfSession

BATCH, SEQUENCE = mtf.Dimension("batch", 4), mtf.Dimension("sequence", 6)
VOCAB, EMBD = mtf.Dimension("vocab", 10), mtf.Dimension("embd", 8)

MESHES = [
    ("x:1", ""),
    ("x:2", "batch:x"),
    ("x:2", "vocab:x"),
    ("x:2", "embd:x"),
    ("x:2,y:2", "batch:x,vocab:y"),
    ("x:2,y:2", "vocab:x,embd:y"),
]


def given(mesh: mtf.Mesh, array: np.ndarray, *dims: mtf.Dimension) -> mtf.Tensor:
    return mtf.import_tf_tensor(mesh, array, mtf.Shape(dims))


def normal(seed: int, *dims: mtf.Dimension) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=[dim.size for dim in dims]).astype(np.float32)


def ids(seed: int, low: int = 0, high: int = VOCAB.size) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, [BATCH.size, SEQUENCE.size], dtype=np.int32)


@pytest.mark.parametrize(("mesh_shape", "layout"), MESHES)
def test_embedding_lookup_and_its_gradient(mesh_shape: str, layout: str) -> None:
    table, weights = normal(0, VOCAB, EMBD), normal(1, BATCH, SEQUENCE, EMBD)
    tokens = ids(2, low=-1, high=VOCAB.size + 2)  # some lie outside the vocabulary on either side

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        table_ = given(mesh, table, VOCAB, EMBD)
        rows = embedding_lookup(table_, given(mesh, tokens, BATCH, SEQUENCE))
        total = mtf.reduce_sum(rows * given(mesh, weights, BATCH, SEQUENCE, EMBD))
        return {"rows": rows, "gradient": mtf.gradients([total], [table_])[0]}

    got = MtfSession(mesh_shape, layout).run(build)
    inside = (tokens >= 0) & (tokens < VOCAB.size)
    expected = np.where(inside[..., None], table[np.clip(tokens, 0, VOCAB.size - 1)], 0)
    gradient = np.zeros_like(table)
    np.add.at(gradient, tokens[inside], weights[inside])
    np.testing.assert_array_equal(got["rows"], expected)
    np.testing.assert_allclose(got["gradient"], gradient, atol=1e-5)


@pytest.mark.parametrize(("mesh_shape", "layout"), MESHES)
def test_head_cross_entropy_and_its_gradients(mesh_shape: str, layout: str) -> None:
    hidden, table, labels = normal(0, BATCH, SEQUENCE, EMBD), normal(1, VOCAB, EMBD), ids(2)
    dc, dz = normal(3, BATCH, SEQUENCE), normal(4, BATCH, SEQUENCE)

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        hidden_, table_ = given(mesh, hidden, BATCH, SEQUENCE, EMBD), given(mesh, table, VOCAB, EMBD)
        cross_entropy, log_z = head_cross_entropy(hidden_, table_, given(mesh, labels, BATCH, SEQUENCE))
        total = mtf.reduce_sum(cross_entropy * given(mesh, dc, BATCH, SEQUENCE))
        total += mtf.reduce_sum(log_z * given(mesh, dz, BATCH, SEQUENCE))
        d_hidden, d_table = mtf.gradients([total], [hidden_, table_])
        return {"cross_entropy": cross_entropy, "log_z": log_z, "d_hidden": d_hidden, "d_table": d_table}

    got = MtfSession(mesh_shape, layout).run(build)
    logits = (hidden @ table.T).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    one_hot = np.eye(VOCAB.size)[labels]
    d_logits = dc[..., None] * (np.exp(logits - log_z[..., None]) - one_hot)
    d_logits += dz[..., None] * np.exp(logits - log_z[..., None])
    np.testing.assert_allclose(got["log_z"], log_z, atol=1e-5)
    np.testing.assert_allclose(got["cross_entropy"], log_z - (logits * one_hot).sum(-1), atol=1e-5)
    np.testing.assert_allclose(got["d_hidden"], d_logits @ table, atol=1e-5)
    np.testing.assert_allclose(got["d_table"], np.einsum("bsv,bse->ve", d_logits, hidden), atol=1e-5)


@pytest.mark.parametrize("layout", ["", "memory_length:x", "batch:x"])
def test_cache_update_writes_one_position(layout: str) -> None:
    memory = mtf.Dimension("memory_length", 6)
    cache, value = normal(0, memory, BATCH, EMBD), normal(1, BATCH, EMBD)

    def build(mesh: mtf.Mesh) -> list[mtf.Tensor]:
        return [
            cache_update(
                given(mesh, cache, memory, BATCH, EMBD),
                given(mesh, value, BATCH, EMBD),
                mtf.constant(mesh, position, dtype=tf.int32),
            )
            for position in range(memory.size)
        ]

    for position, got in enumerate(MtfSession("x:2", layout).run(build)):
        expected = cache.copy()
        expected[position] = value
        np.testing.assert_array_equal(got, expected)


def test_elementwise_takes_gradients_of_unfinished_sums() -> None:
    """The gradient that arrives may still be a partial sum over the mesh axis of a split contraction."""
    x, kernel = normal(0, BATCH, EMBD), normal(1, EMBD, VOCAB)

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        x_ = given(mesh, x, BATCH, EMBD)
        y = elementwise(tf.tanh, x_, "tanh")
        product = mtf.einsum([y, given(mesh, kernel, EMBD, VOCAB)], mtf.Shape([BATCH, VOCAB]))
        return {"y": y, "gradient": mtf.gradients([mtf.reduce_sum(product)], [x_])[0]}

    got = MtfSession("x:2", "vocab:x").run(build)
    np.testing.assert_allclose(got["y"], np.tanh(x), atol=1e-6)
    np.testing.assert_allclose(got["gradient"], (1 - np.tanh(x) ** 2) * kernel.sum(1), atol=1e-5)
