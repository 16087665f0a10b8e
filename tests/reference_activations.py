"""Every activation function in plain numpy, as their papers write them."""

from collections.abc import Callable

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def leaky(slope: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.where(x > 0, x, slope * x)


FIXED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * elu(x)),
    "elu": elu,
    "abs": np.abs,
    "sin": np.sin,
    "cos": np.cos,
    "sign": np.sign,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "softplus": softplus,
    "lrelu001": leaky(0.01),
    "lrelu020": leaky(0.2),
    "id": lambda x: x,
    "triangle_relax": lambda x: np.sin(x) - np.sin(3 * x) / 9 + np.sin(5 * x) / 25 - np.sin(7 * x) / 49,
    "square_relax": lambda x: np.cos(x) - np.cos(3 * x) / 3 + np.cos(5 * x) / 5 - np.cos(7 * x) / 7,
    "spike": lambda x: 1 / (1 + x**2),
    "spike2": lambda x: np.exp(-(x**2)),
    "tanhshrink": lambda x: x - np.tanh(x),
    "softsign": lambda x: x / (np.abs(x) + 1),
    "softmax": lambda x: np.exp(log_softmax(x)),
    "logsoftmax": log_softmax,
    "bipolarsigmoid": lambda x: 2 * sigmoid(x) - 1,
    "rrelu": leaky(11 / 48),
    "elish": lambda x: np.where(x > 0, x, elu(x)) * sigmoid(x),
    "arcsinh": np.arcsinh,
    "maxsig": lambda x: np.maximum(x, sigmoid(x)),
    "cosid": lambda x: np.cos(x) - x,
    "minsin": lambda x: np.minimum(x, np.sin(x)),
    "maxtanh": lambda x: np.maximum(x, np.tanh(x)),
    "mish": lambda x: x * np.tanh(softplus(x)),
    "tanhexp": lambda x: x * np.tanh(np.exp(np.minimum(x, 50))),
    "lisht": lambda x: x * np.tanh(x),
    "seagull": lambda x: np.log1p(x**2),
    "snake": lambda x: x + np.sin(x) ** 2,
    "roottanh": lambda x: np.cbrt(x**2 + 1) * np.tanh(x),
    "softplusmone": lambda x: softplus(x) - 1,
}


def proottanh(x: np.ndarray, p: float, q: float, a: float) -> np.ndarray:
    return (np.abs(x) ** p + a) ** (1 / q) * np.tanh(x)


def aria(x: np.ndarray, a: float, k: float, b: float, nu: float, c: float, q: float) -> np.ndarray:
    return x * (a + (k - a) / (c + q * np.exp(np.minimum(-b * x, 300))) ** (1 / nu))


# name -> (function, the numbers that it learns: at first, and after some learning)
LEARNED: dict[str, tuple[Callable[..., np.ndarray], dict[str, tuple[float, float]]]] = {
    "prelu": (lambda x, slope: np.where(x > 0, x, slope * x), {"slope": (0.2, -0.3)}),
    "parcsinh": (lambda x, a, b: b * np.arcsinh(a * x), {"a": (1, 0.7), "b": (1, -1.5)}),
    "psoftplus": (lambda x, a, b, c: b * softplus(a * x) + c, {"a": (1, 1.4), "b": (1, 0.8), "c": (0, -0.2)}),
    "proottanh": (proottanh, {"p": (2, 1.7), "q": (3, 2.4), "a": (1, 0.6)}),
    "aria": (
        aria,
        {"a": (0, -0.1), "k": (1, 1.3), "b": (1, 0.8), "nu": (1, 1.6), "c": (1, 0.7), "q": (1, 1.2)},
    ),
}
REFERENCE: dict[str, Callable[..., np.ndarray]] = FIXED | {name: fn for name, (fn, _) in LEARNED.items()}
NUMBERS = {name: list(numbers) for name, (_, numbers) in LEARNED.items()}
