"""What a configuration may say: the typed, frozen objects behind configs/*.json and configs/dataset_configs/*.json.

Attribute names are the JSON keys. Each field says what it accepts by its annotated type; a rule between keys is a
field validator on the key declared last, which sees the keys above it in `info.data` (only those that are valid
themselves), so every mistake of a file is found in one pass. `config.py` turns the mistakes into sentences.
"""

import difflib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

logger = logging.getLogger(__name__)

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

_NEVER_OFF = object()


def nearest(word: Any, known: Iterable[str]) -> str | None:
    """The known word that looks most like `word`, or None when none is close."""
    found = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return found[0] if found else None


def listed(names: Iterable[str]) -> str:
    """`"a", "b", "c"`."""
    return ", ".join(f'"{name}"' for name in names)


def _accepts(convert: Callable[[Any], Any], expected: str, off: Any = _NEVER_OFF) -> BeforeValidator:
    """A field that keeps convert(value), None meaning that the value is not `expected`; false gives `off`, if there is one."""

    def parse(value: Any) -> Any:
        if value is False and off is not _NEVER_OFF:
            return off
        kept = convert(value)
        if kept is None:
            raise ValueError(f"it must be {expected}")
        return kept

    return BeforeValidator(parse)


def _whole(value: Any) -> int | None:
    """An int, or a float such as 1e3 that is whole; true and false are no numbers."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def _int(minimum: int, off: Any = _NEVER_OFF, maximum: int | None = None) -> BeforeValidator:
    def convert(value: Any) -> int | None:
        number = _whole(value)
        fits = number is not None and number >= minimum and (maximum is None or number <= maximum)
        return number if fits else None

    bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    return _accepts(convert, f"a whole number {bounds}{_or_off(off)}", off)


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
    """`name:value,name:value` with each name once, kept without spaces; empty is off."""

    def convert(value: Any) -> str | None:
        if not isinstance(value, str):
            return None
        pairs = [pair.strip() for pair in value.split(",")] if value.strip() else []
        names = [pair.split(":")[0] for pair in pairs]
        well_formed = all(re.fullmatch(rf"\w+:{value_pattern}", pair) for pair in pairs)
        return ",".join(pairs) if well_formed and len(set(names)) == len(names) else None

    return _accepts(convert, expected, off=None)


def _natural(value: Any) -> int | None:
    number = _whole(value)
    return number if number is not None and number >= 0 else None


Switch = Annotated[bool, _accepts(lambda value: value if isinstance(value, bool) else None, "true or false")]
Text = Annotated[str, _accepts(lambda value: value if isinstance(value, str) and value else None, "a non-empty string")]
OptionalText = Annotated[
    str | None, _accepts(lambda value: value if isinstance(value, str) else None, "a string", None)
]
Size = Annotated[int, _int(1)]
OptionalSize = Annotated[int | None, _int(1, off=None)]
Count = Annotated[int, _int(0, off=0)]
TokenId = Annotated[int | None, _int(0, off=None)]
TokenIds = Annotated[tuple[int, ...], _list_of(_natural, "token ids (whole numbers of at least 0)")]
Dropout = Annotated[float, _float(lambda value: 0 <= value < 1, "of at least 0 and below 1", off=0.0)]
Beta = Annotated[float, _float(lambda value: 0 <= value < 1, "of at least 0 and below 1")]
Probability = Annotated[float, _float(lambda value: 0 <= value <= 1, "from 0 to 1", off=0.0)]
Positive = Annotated[float, _float(lambda value: value > 0, "above 0")]
OptionalPositive = Annotated[float | None, _float(lambda value: value > 0, "above 0", off=None)]
NotNegative = Annotated[float, _float(lambda value: value >= 0, "of at least 0", off=0.0)]
Activation = Annotated[str, _name(ACTIVATION_NAMES)]


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """An optional key that is null is as if it were not there."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in fields or fields[key].is_required()
        }


class DatasetConfig(_Schema):
    """One dataset: where its tfrecords are and which tokenizer made them. `id` is the file's stem, not a JSON key."""

    id: Text
    n_vocab: OptionalSize = None
    path: Text = Field(description="the glob of the training tfrecords")
    eval_path: Annotated[str, _accepts(lambda value: value if isinstance(value, str) else None, "a string", "")] = ""
    tokenizer_path: OptionalText = None
    tokenizer_is_pretrained: Switch = False
    eos_id: TokenId = None
    padding_id: TokenId = None

    @field_validator("tokenizer_is_pretrained")
    @classmethod
    def _names_its_tokenizer(cls, value: bool, info: ValidationInfo) -> bool:
        if value and "tokenizer_path" in info.data and not info.data["tokenizer_path"]:
            raise ValueError('it needs the pretrained tokenizer\'s name in tokenizer_path, for example "gpt2"')
        return value

    @field_validator("eos_id")
    @classmethod
    def _is_in_the_vocabulary(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _below_n_vocab(value, info)


class DatasetSource(_Schema):
    """One entry of `datasets`: a dataset and how it is sampled."""

    dataset: DatasetConfig
    stitch: Size = 1
    sampling_mode: Annotated[str, _name(SAMPLING_MODES)] = "chunks"
    weight: Positive = 1.0

    @field_validator("sampling_mode")
    @classmethod
    def _resolve_alias(cls, value: str) -> str:
        return "documents_random" if value == "random_sample" else value


class ModelConfig(_Schema):
    """Everything a run is told. Two configs are equal when all but their names are."""

    name: Text = "config"
    model: Annotated[str, _name(("GPT",))] = "GPT"
    model_path: Text = Field(description="the directory (or gs:// bucket) for checkpoints and logs")

    no_dataset: Switch = False
    datasets: Annotated[tuple[DatasetSource, ...], Field(validate_default=True)] = ()
    shuffle_input_filenames: Switch = True
    remove_partial_sequences: Switch = False

    n_vocab: Size = Field(description="the number of tokens in the vocabulary, for example 50257")
    n_ctx: Size = 2048
    n_layer: Size = Field(description="the number of layers, for example 12")
    n_head: Size = Field(description="the number of attention heads, for example 12")
    n_embd: Size = Field(description="the size of the hidden layers, divisible by n_head, for example 768")
    attention_types: tuple[tuple[tuple[str, ...], int], ...] = ()
    local_attention_radius: Size = 256
    activation_function: Activation = "gelu"
    embed_dropout: Dropout = 0.0
    res_dropout: Dropout = 0.0
    attn_dropout: Dropout = 0.0
    scale_by_depth: Switch = False
    scale_by_in: Switch = False
    eos_id: TokenId = None
    padding_id: TokenId = None

    axial_pos_emb: tuple[int, int] | None = None
    rotary_emb: Switch = False
    mlp_glu: Switch = False
    scalenorm: Switch = False
    rezero: Switch = False
    num_mem_kv: Count = 0
    macaron: Switch = False
    share_parameters: Switch = False
    no_weight_tie: Switch = False
    moe_layers: Annotated[tuple[int, ...], _list_of(_natural, "layer numbers, counted from 0")] = ()
    moe_params: Annotated[
        dict[str, Any], _accepts(lambda value: value if isinstance(value, dict) else None, "an object of settings", {})
    ] = {}
    moe_activation: Activation = "relu"

    lr: Positive = Field(description="the peak learning rate, for example 0.0006")
    lr_decay: Annotated[str, _name(("cosine", "linear"))] = "cosine"
    lr_decay_end: OptionalSize = None
    warmup_steps: Count = 0
    opt_name: Annotated[str, _name(("adam", "adafactor"))] = "adam"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: Positive = 1e-8
    ada_epsilon1: NotNegative = 1e-30
    ada_epsilon2: NotNegative = 1e-3
    weight_decay: NotNegative = 0.0
    gradient_clipping: OptionalPositive = None
    z_loss: NotNegative = 1e-4
    entmax_loss: Switch = False

    train_batch_size: Size = Field(description="the number of sequences in a training step, for example 16")
    train_steps: Size = Field(description="the number of training steps")
    eval_batch_size: Size = Field(default_factory=lambda data: data.get("train_batch_size", 1))
    eval_steps: Count = 0
    eval_tasks: Annotated[
        tuple[str, ...],
        _list_of(
            lambda task: task if task in EVAL_TASKS else None,
            f"evaluation tasks; the known ones are {listed(EVAL_TASKS)}",
        ),
    ] = ()
    predict_batch_size: Size = 1
    predict_steps: Count = 0
    predict_max_steps: OptionalSize = None
    iterations: Size = 500
    seed: Annotated[int, _int(0, maximum=2**31 - 1)] = 1
    log_grads: Switch = False

    mesh_shape: Annotated[
        str | None, _pairs("[1-9][0-9]*", 'mesh axes and their sizes, each axis once, for example "x:4,y:2"')
    ] = None
    layout: Annotated[
        str | None, _pairs(r"\w+", 'dimensions and their mesh axes, each dimension once, for example "batch:x,embd:y"')
    ] = None
    precision: Annotated[str, _name(("float32", "bfloat16"))] = "float32"
    tokens_per_mb_per_replica: OptionalSize = None
    recompute_grad: Switch = False

    mlm_mask_id: TokenId = None
    mlm_cls_token_id: TokenId = None
    mlm_mask_prob: Probability = 0.15
    mlm_same_token_prob: Probability = 0.1
    mlm_random_token_prob: Probability = 0.1
    mlm_mask_ignore_ids: TokenIds = ()
    mlm_training: Switch = False

    @property
    def layer_attention(self) -> tuple[str, ...]:
        """The attention type of each layer, n_layer names; global where attention_types is absent."""
        return expand_attention_types(self.attention_types) or ("global",) * self.n_layer

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.n_embd // self.n_head

    @property
    def lr_end_step(self) -> int:
        """The step at which the learning rate's decay ends."""
        return self.lr_decay_end or self.train_steps

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in one training step."""
        return self.train_batch_size * self.n_ctx

    def __eq__(self, other: object) -> bool:
        """The name is where a config came from, not what it says: a run's copy equals its original."""
        return isinstance(other, ModelConfig) and self._said() == other._said()

    def __hash__(self) -> int:
        return hash(self.model_dump_json(exclude={"name"}))

    def _said(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name"})

    @field_validator("datasets")
    @classmethod
    def _has_a_dataset(cls, value: tuple[DatasetSource, ...], info: ValidationInfo) -> tuple[DatasetSource, ...]:
        if not value and not info.data.get("no_dataset", True):
            raise ValueError(
                "it needs at least one [dataset id, stitch, sampling mode, weight], or no_dataset set to true"
            )
        return value

    @field_validator("n_vocab")
    @classmethod
    def _holds_the_datasets(cls, value: int, info: ValidationInfo) -> int:
        wider = [source.dataset for source in info.data.get("datasets", ()) if (source.dataset.n_vocab or 0) > value]
        if wider:
            found = ", ".join(f'{dataset.n_vocab} in dataset "{dataset.id}"' for dataset in wider)
            needed = max(dataset.n_vocab or 0 for dataset in wider)
            raise ValueError(f"it is smaller than n_vocab {found}; it must be at least {needed}")
        return value

    @field_validator("n_embd")
    @classmethod
    def _divides_into_heads(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("n_head", 1)
        if value % heads:
            below = value - value % heads
            near = f"{below} or {below + heads}" if below else f"{heads}"
            raise ValueError(f"it must be divisible by n_head {heads}; {near} would work")
        return value

    @field_validator("attention_types", mode="before")
    @classmethod
    def _expands_to_layers(cls, value: Any, info: ValidationInfo) -> tuple[tuple[tuple[str, ...], int], ...]:
        groups = () if value is False else _attention_groups(value)
        layers = info.data.get("n_layer")
        expanded = len(expand_attention_types(groups))
        if groups and layers is not None and expanded != layers:
            raise ValueError(f"it must name n_layer {layers} layers, and names {expanded}")
        return groups

    @field_validator("axial_pos_emb", mode="before")
    @classmethod
    def _covers_the_context(cls, value: Any, info: ValidationInfo) -> tuple[int, int] | None:
        if value is False:
            return None
        context = info.data.get("n_ctx")
        if value is True:
            return nearest_factors(context or 1)
        sizes = [_natural(size) for size in value] if isinstance(value, list | tuple) else []
        if len(sizes) != 2 or not all(sizes):
            raise ValueError("it must be true, false or two whole numbers whose product is n_ctx")
        first, second = (size or 0 for size in sizes)
        if context is not None and first * second != context:
            near = json.dumps(nearest_factors(context))
            raise ValueError(f"its product {first * second} must be n_ctx {context}; {near} would work")
        return first, second

    @field_validator("rotary_emb")
    @classmethod
    def _halves_the_head(cls, value: bool, info: ValidationInfo) -> bool:
        if value and "n_embd" in info.data and "n_head" in info.data:
            size = info.data["n_embd"] // info.data["n_head"]
            if size % 2:
                raise ValueError(f"it needs an even head size, and n_embd / n_head is {size}")
        return value

    @field_validator("moe_layers")
    @classmethod
    def _warns_of_layers_past_the_last(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        layers = info.data.get("n_layer")
        past = [layer for layer in value if layers is not None and layer >= layers]
        if past:
            logger.warning("moe_layers names %s, past the last of n_layer %s layers (counted from 0)", past, layers)
        return value

    @field_validator("eos_id", "mlm_mask_id", "mlm_cls_token_id")
    @classmethod
    def _is_in_the_vocabulary(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _below_n_vocab(value, info)

    @field_validator("mlm_training")
    @classmethod
    def _knows_what_to_mask(cls, value: bool, info: ValidationInfo) -> bool:
        if not value:
            return value
        if "mlm_mask_id" in info.data and info.data["mlm_mask_id"] is None:
            raise ValueError("it needs mlm_mask_id, the id that the tokenizer reserves for the mask")
        if info.data.get("mlm_mask_prob") == 0:
            raise ValueError("it needs an mlm_mask_prob above 0")
        kept, replaced = (info.data.get(f"mlm_{kind}_token_prob", 0) for kind in ("same", "random"))
        if kept + replaced > 1:
            raise ValueError(
                f"mlm_same_token_prob {kept} and mlm_random_token_prob {replaced} must add up to at most 1"
            )
        return value


def expand_attention_types(groups: Iterable[tuple[tuple[str, ...], int]]) -> tuple[str, ...]:
    """[[["global", "local"], 2]] -> global, local, global, local."""
    return tuple(name for names, count in groups for name in names * count)


def nearest_factors(number: int) -> tuple[int, int]:
    """The two factors of `number` that lie closest together, the smaller first: 2048 -> (32, 64)."""
    first = next(size for size in range(math.isqrt(number), 0, -1) if number % size == 0)
    return first, number // first


def _attention_groups(value: Any) -> tuple[tuple[tuple[str, ...], int], ...]:
    shape = 'it must be a list of [names, number of repeats], for example [[["global", "local"], 6]]'
    groups = []
    for group in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(group, list | tuple) or len(group) != 2 or not isinstance(group[0], list | tuple):
            raise ValueError(shape)
        names, count = tuple(group[0]), _whole(group[1])
        unknown = [name for name in names if name not in ATTENTION_NAMES]
        if unknown:
            raise ValueError(f"{json.dumps(unknown[0])} is no attention type; the types are {listed(ATTENTION_NAMES)}")
        if not names or count is None or count < 1:
            raise ValueError(shape)
        groups.append((names, count))
    return tuple(groups)


def _below_n_vocab(value: int | None, info: ValidationInfo) -> int | None:
    vocabulary = info.data.get("n_vocab")
    if value is not None and vocabulary is not None and value >= vocabulary:
        raise ValueError(f"it must be below n_vocab {vocabulary}")
    return value
