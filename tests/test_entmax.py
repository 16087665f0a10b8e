"""alpha-entmax against a float64 numpy implementation: probabilities, loss and gradient, whole and split."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.entmax import entmax, entmax_loss, softmax_terms
from tests.reference_entmax import numpy_entmax, numpy_loss
from tests.tiny import MtfSession

BATCH, SEQUENCE, VOCAB = mtf.Dimension("batch", 4), mtf.Dimension("sequence", 6), mtf.Dimension("vocab", 40)


def cases() -> tuple[np.ndarray, np.ndarray]:
    """Logits from flat to very confident, shifted ones among them, and labels, likely and unlikely."""
    random = np.random.default_rng(0)
    logits = random.normal(size=[BATCH.size, SEQUENCE.size, VOCAB.size])
    logits *= np.array([0, 0.5, 2, 10, 1e3, 1e6])[:, None]
    logits[1] += 500
    labels = random.integers(0, VOCAB.size, [BATCH.size, SEQUENCE.size], dtype=np.int32)
    labels[2] = logits[2].argmax(-1)
    return logits.astype(np.float32), labels


def test_probabilities() -> None:
    logits, _ = cases()
    with tf.Graph().as_default(), tf.Session() as session:
        got = session.run(entmax(tf.constant(logits)))
    expected = numpy_entmax(logits)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)
    assert not got[expected == 0].any()
    assert (expected[:, 3:] == 0).mean() > 0.3


@pytest.mark.parametrize(
    ("mesh_shape", "layout"), [("x:1", ""), ("x:2", "vocab:x"), ("x:2,y:2", "batch:x,vocab:y"), ("x:2", "sequence:x")]
)
def test_loss_and_gradient(mesh_shape: str, layout: str) -> None:
    logits, labels = cases()
    random = np.random.default_rng(1)
    weights, z_weights = (random.normal(size=labels.shape).astype(np.float32) for _ in range(2))

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        rows = mtf.Shape([BATCH, SEQUENCE])
        logits_ = mtf.import_tf_tensor(mesh, logits, rows + VOCAB)
        labels_, weights_, z_weights_ = (mtf.import_tf_tensor(mesh, x, rows) for x in (labels, weights, z_weights))
        loss = entmax_loss(logits_, labels_)
        cross_entropy, log_z = softmax_terms(logits_, labels_)
        gradient, z_gradient = (
            mtf.gradients([mtf.reduce_sum(total)], [logits_])[0] for total in (loss * weights_, log_z * z_weights_)
        )
        return {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "log_z": log_z,
            "gradient": gradient,
            "z_gradient": z_gradient,
        }

    got = MtfSession(mesh_shape, layout).run(build)
    one_hot = np.eye(VOCAB.size)[labels]
    peak = logits.astype(np.float64).max(-1, keepdims=True)
    exponentials = np.exp(logits - peak)
    log_z = np.log(exponentials.sum(-1)) + peak[..., 0]
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    np.testing.assert_allclose(got["loss"], numpy_loss(logits, labels), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got["gradient"], (numpy_entmax(logits) - one_hot) * weights[..., None], atol=1e-5)
    np.testing.assert_allclose(got["log_z"], log_z, rtol=1e-6)
    np.testing.assert_allclose(got["cross_entropy"], log_z - (logits * one_hot).sum(-1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got["z_gradient"], softmax * z_weights[..., None], atol=1e-5)


def test_the_gradient_is_that_of_the_loss() -> None:
    """p - one_hot is the slope of the loss as numpy_loss writes it out."""
    random = np.random.default_rng(2)
    logits, direction = random.normal(size=[2, 5, VOCAB.size]) * np.array([1, 3])[:, None, None]
    labels = random.integers(0, VOCAB.size, 5)
    step = 1e-5
    slope = (numpy_loss(logits + step * direction, labels) - numpy_loss(logits - step * direction, labels)) / (2 * step)
    np.testing.assert_allclose(
        ((numpy_entmax(logits) - np.eye(VOCAB.size)[labels]) * direction).sum(-1), slope, atol=1e-6
    )
    assert (numpy_loss(logits, labels) >= 0).all()
