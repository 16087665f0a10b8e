"""alpha-entmax (arXiv:1905.05702) in float64 numpy."""

import numpy as np

ALPHA = 1.3


def numpy_entmax(logits: np.ndarray) -> np.ndarray:
    """[..., vocab] -> probabilities: the root of sum [(alpha - 1) a - tau]_+^(1 / (alpha - 1)) = 1 in tau."""
    scaled = (ALPHA - 1) * (logits.astype(np.float64) - logits.max(-1, keepdims=True))
    low, high = np.full(logits.shape[:-1] + (1,), -1.0), np.zeros(logits.shape[:-1] + (1,))
    for _ in range(100):
        middle = (low + high) / 2
        enough = (np.maximum(scaled - middle, 0) ** (1 / (ALPHA - 1))).sum(-1, keepdims=True) >= 1
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return np.maximum(scaled - low, 0) ** (1 / (ALPHA - 1))


def numpy_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The Fenchel-Young loss of Tsallis' entropy, written out: Omega*(a) + Omega(one hot) - a_y."""
    p = numpy_entmax(logits)
    entropy = (p - p**ALPHA).sum(-1) / (ALPHA * (ALPHA - 1))
    return (p * logits).sum(-1) + entropy - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
