"""Our own mtf operations against plain numpy, whole and split over meshes."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from mesh.dense import add_bias
from mesh.elementwise import elementwise
from mesh.layer_norm import standardize
from mesh.operations import cache_update, embedding_lookup
from mesh.softmax import masked_softmax
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


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize(("mesh_shape", "layout"), [("x:1", ""), ("x:2,y:2", "batch:x,vocab:y"), ("x:2", "sequence:x")])
@pytest.mark.parametrize("masked", [True, False])
def test_masked_softmax_and_its_gradient(mesh_shape: str, layout: str, masked: bool) -> None:
    scores, d = (40 * normal(seed, BATCH, SEQUENCE, VOCAB) for seed in (0, 1))
    visible = normal(2, SEQUENCE, VOCAB) < 0.5
    visible[:, 0] = True

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        scores_ = given(mesh, scores, BATCH, SEQUENCE, VOCAB)
        p = masked_softmax(scores_, given(mesh, visible, SEQUENCE, VOCAB) if masked else None)
        total = mtf.reduce_sum(p * given(mesh, d, BATCH, SEQUENCE, VOCAB))
        return {"p": p, "gradient": mtf.gradients([total], [scores_])[0]}

    got = MtfSession(mesh_shape, layout).run(build)
    p = softmax(np.where(visible, scores, -np.inf).astype(np.float64) if masked else scores.astype(np.float64))
    np.testing.assert_allclose(got["p"], p, atol=1e-6)
    np.testing.assert_allclose(got["gradient"], p * (d - (p * d).sum(-1, keepdims=True)), atol=1e-4)
    assert not masked or (got["p"][:, ~visible] == 0).all()


@pytest.mark.parametrize(("mesh_shape", "layout"), [("x:1", ""), ("x:2,y:2", "batch:x,embd:y"), ("x:2", "sequence:x")])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_and_its_gradients(mesh_shape: str, layout: str, affine: bool) -> None:
    x, d = 3 + 2 * normal(0, BATCH, SEQUENCE, EMBD), normal(1, BATCH, SEQUENCE, EMBD)
    gain, bias = (normal(2, EMBD), normal(3, EMBD)) if affine else (np.array(1.5, np.float32), np.zeros(1))

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        learned = [given(mesh, gain, *([EMBD] if affine else [])), *([given(mesh, bias, EMBD)] if affine else [])]
        x_ = given(mesh, x, BATCH, SEQUENCE, EMBD)
        y = standardize(x_, learned[0], learned[1] if affine else None, epsilon=0.01)
        total = mtf.reduce_sum(y * given(mesh, d, BATCH, SEQUENCE, EMBD))
        return {"y": y, "gradients": mtf.gradients([total], [x_, *learned])}

    got = MtfSession(mesh_shape, layout).run(build)
    inverse = 1 / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 0.01)
    x_hat = (x - x.mean(-1, keepdims=True)) * inverse
    d_hat = d * gain
    dx = inverse * (d_hat - d_hat.mean(-1, keepdims=True) - x_hat * (d_hat * x_hat).mean(-1, keepdims=True))
    expected = [dx, *([(d * x_hat).sum((0, 1)), d.sum((0, 1))] if affine else [(d * x_hat).sum()])]
    np.testing.assert_allclose(got["y"], x_hat * gain + bias, atol=1e-5)
    for found, value in zip(got["gradients"], expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


@pytest.mark.parametrize(("mesh_shape", "layout"), [("x:1", ""), ("x:2,y:2", "batch:x,embd:y")])
def test_a_bias_and_its_gradient(mesh_shape: str, layout: str) -> None:
    x, bias, d = normal(0, BATCH, SEQUENCE, EMBD), normal(1, EMBD), normal(2, BATCH, SEQUENCE, EMBD)

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        x_, bias_ = given(mesh, x, BATCH, SEQUENCE, EMBD), given(mesh, bias, EMBD)
        y = add_bias(x_, bias_)
        total = mtf.reduce_sum(y * given(mesh, d, BATCH, SEQUENCE, EMBD))
        return {"y": y, "gradients": mtf.gradients([total], [x_, bias_])}

    got = MtfSession(mesh_shape, layout).run(build)
    np.testing.assert_array_equal(got["y"], x + bias)
    np.testing.assert_array_equal(got["gradients"][0], d)
    np.testing.assert_allclose(got["gradients"][1], d.sum((0, 1)), atol=1e-5)


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
