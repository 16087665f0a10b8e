"""What a single value of a configuration may be: one annotated type for each kind, saying what would work.

A type refuses with ValueError("it must be ..."), which `config.py` completes with the key and its value. Where a key
has an off state, false means it.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator

ATTENTION_NAMES = ("global", "local", "linear", "none")
SAMPLING_MODES = ("chunks", "documents_fixed", "documents_random", "random_sample")
ACTIVATION_NAMES = (
    *("gelu", "relu", "sigmoid", "tanh", "selu", "elu", "abs", "sin", "cos", "sign", "silu", "swish", "softplus"),
    *("lrelu001", "lrelu020", "id", "triangle_relax", "square_relax", "spike", "spike2", "tanhshrink", "softsign"),
    *("softmax", "logsoftmax", "bipolarsigmoid", "rrelu", "elish", "arcsinh", "prelu", "parcsinh", "psoftplus"),
    *("proottanh", "aria", "maxsig", "cosid", "minsin", "maxtanh", "mish", "tanhexp", "lisht", "seagull", "snake"),
    *("roottanh", "softplusmone"),
)
EVAL_TASKS = ("lambada",)
# Whether a token also goes to its second expert: always, never, where that gate is above the threshold, or with a
# probability that falls from 1 at the threshold to 0 without a gate.
SECOND_POLICIES = ("all", "none", "threshold", "random")
INT32_MAX = 2**31 - 1  # the largest size, token id and seed that TensorFlow's int32 tensors hold

_NEVER_OFF = object()


def nearest(word: Any, known: Iterable[str]) -> str | None:
    """The known word that looks most like `word`, or None when none is close."""
    found = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.7)
    return found[0] if found else None


def listed(names: Iterable[str]) -> str:
    """`"a", "b", "c"`."""
    return ", ".join(f'"{name}"' for name in names)


def _accepts(convert: Callable[[Any], Any], expected: str, off: Any = _NEVER_OFF) -> BeforeValidator:
    """Keep convert(value), where None means that the value is not `expected`; false is kept as `off`, if given."""

    def parse(value: Any) -> Any:
        if value is False and off is not _NEVER_OFF:
            return off
        kept = convert(value)
        if kept is None:
            raise ValueError(f"it must be {expected}")
        return kept

    return BeforeValidator(parse)


def whole(value: Any) -> int | None:
    """An int, or a float such as 1e3 that is whole; true and false are no numbers."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def _int(minimum: int, off: Any = _NEVER_OFF) -> BeforeValidator:
    expected = f"a whole number of at least {minimum}{_or_off(off)}"

    def parse(value: Any) -> Any:
        if value is False and off is not _NEVER_OFF:
            return off
        number = whole(value)
        if number is None or number < minimum:
            raise ValueError(f"it must be {expected}")
        if number > INT32_MAX:
            raise ValueError(f"it must be at most {INT32_MAX}")
        return number

    return BeforeValidator(parse)


def _float(fits: Callable[[float], bool], bounds: str, off: Any = _NEVER_OFF) -> BeforeValidator:
    def convert(value: Any) -> float | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison refuses NaN, infinities and integers that no float can hold.
        return float(value) if is_number and abs(value) < 1e300 and fits(value) else None

    return _accepts(convert, f"a number {bounds}{_or_off(off)}", off)


def _or_off(off: Any) -> str:
    return ", or null for none" if off is None else ""


def _name(names: tuple[str, ...]) -> BeforeValidator:
    def parse(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        near = nearest(value, names)
        guess = f'did you mean "{near}"? It' if near else "it"
        raise ValueError(f"{guess} must be {'one of ' if len(names) > 1 else ''}{listed(names)}")

    return BeforeValidator(parse)


def _list_of(convert: Callable[[Any], Any], expected: str) -> BeforeValidator:
    def convert_all(value: Any) -> tuple[Any, ...] | None:
        kept = tuple(map(convert, value)) if isinstance(value, list | tuple) else (None,)
        return None if None in kept else kept

    return _accepts(convert_all, f"a list of {expected}", off=())


def _pairs(value_pattern: str, expected: str) -> BeforeValidator:
    """`name:value,name:value` with each name once; Mesh-TensorFlow's other separators are kept as commas."""

    def convert(value: Any) -> str | None:
        if not isinstance(value, str):
            return None
        pairs = re.sub("[,.;]", " ", value).split()
        names = [pair.split(":")[0] for pair in pairs]
        well_formed = all(re.fullmatch(rf"\w+:{value_pattern}", pair) for pair in pairs)
        return ",".join(pairs) if well_formed and len(set(names)) == len(names) else None

    return _accepts(convert, expected, off=None)


def natural(value: Any) -> int | None:
    """A whole number of at least 0 that int32 holds, or None."""
    number = whole(value)
    return number if number is not None and 0 <= number <= INT32_MAX else None


def _attention_groups(value: Any) -> tuple[tuple[tuple[str, ...], int], ...]:
    if value is False:
        return ()
    groups = []
    for group in value if isinstance(value, list | tuple) else (value,):
        names, count = group if isinstance(group, list | tuple) and len(group) == 2 else (None, None)
        repeats = whole(count)
        if not isinstance(names, list | tuple) or not names or repeats is None or repeats < 1:
            raise ValueError('it must be a list of [names, repeats], for example [[["global", "local"], 6]]')
        for name in names:
            if name not in ATTENTION_NAMES:
                raise ValueError(f"{json.dumps(name)} is no attention type; they are {listed(ATTENTION_NAMES)}")
        groups.append((tuple(names), repeats))
    return tuple(groups)


def _if_type(kind: type) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, kind) else None


Switch = Annotated[bool, _accepts(_if_type(bool), "true or false")]
Text = Annotated[str, _accepts(lambda value: _if_type(str)(value) or None, "a non-empty string")]
OptionalText = Annotated[str | None, _accepts(_if_type(str), "a string", off=None)]
Glob = Annotated[str, _accepts(_if_type(str), "a string", off="")]
Settings = Annotated[dict[str, Any], _accepts(_if_type(dict), "an object of settings", off={})]
Size = Annotated[int, _int(1)]
Experts = Annotated[int, _int(2)]
OptionalSize = Annotated[int | None, _int(1, off=None)]
Count = Annotated[int, _int(0, off=0)]
TokenId = Annotated[int | None, _int(0, off=None)]
Seed = Annotated[int, _int(0)]
TokenIds = Annotated[tuple[int, ...], _list_of(natural, "token ids, whole numbers of at least 0")]
LayerNumbers = Annotated[tuple[int, ...], _list_of(natural, "layer numbers, counted from 0")]
TaskNames = Annotated[
    tuple[str, ...],
    _list_of(lambda task: task if task in EVAL_TASKS else None, f"evaluation tasks, from {listed(EVAL_TASKS)}"),
]
Dropout = Annotated[float, _float(lambda value: 0 <= value < 1, "of at least 0 and below 1", off=0.0)]
Beta = Annotated[float, _float(lambda value: 0 <= value < 1, "of at least 0 and below 1")]
Probability = Annotated[float, _float(lambda value: 0 <= value <= 1, "from 0 to 1", off=0.0)]
Positive = Annotated[float, _float(lambda value: value > 0, "above 0")]
OptionalPositive = Annotated[float | None, _float(lambda value: value > 0, "above 0", off=None)]
NotNegative = Annotated[float, _float(lambda value: value >= 0, "of at least 0", off=0.0)]
Activation = Annotated[str, _name(ACTIVATION_NAMES)]
SamplingMode = Annotated[str, _name(SAMPLING_MODES)]
ModelKind = Annotated[str, _name(("GPT",))]
LrDecay = Annotated[str, _name(("cosine", "linear"))]
Optimizer = Annotated[str, _name(("adam", "adafactor"))]
Gating = Annotated[str, _name(("top_2",))]
SecondPolicy = Annotated[str, _name(SECOND_POLICIES)]
Precision = Annotated[str, _name(("float32", "bfloat16"))]
AttentionTypes = Annotated[tuple[tuple[tuple[str, ...], int], ...], BeforeValidator(_attention_groups)]
MeshShape = Annotated[str | None, _pairs("[1-9][0-9]*", 'axes and their sizes, each axis once, for example "x:4,y:2"')]
Layout = Annotated[
    str | None, _pairs(r"\w+", 'dimensions and their mesh axes, each dimension once, for example "batch:x,embd:y"')
]
