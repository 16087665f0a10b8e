"""What a configuration may say: the typed, frozen objects behind configs/*.json and configs/dataset_configs/*.json.

Attribute names are the JSON keys. `config_fields.py` says what each value may be. A rule between keys is a field
validator on the key declared last: it sees the keys above it in `info.data`, those that are valid themselves, so that
every mistake of a file is found in one pass. `config.py` turns the mistakes into sentences.
"""

import logging
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

import config_fields as kind
from config_moe import MoeParams, check_moe_params

logger = logging.getLogger(__name__)


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

    @field_validator("eos_id", "mlm_mask_id", "mlm_cls_token_id", check_fields=False)
    @classmethod
    def _is_in_the_vocabulary(cls, value: int | None, info: ValidationInfo) -> int | None:
        # padding_id is free: GPT-2's is 50257, one past its vocabulary, and is masked before the lookup.
        vocabulary = info.data.get("n_vocab")
        if value is not None and vocabulary is not None and value >= vocabulary:
            raise ValueError(f"it must be below n_vocab {vocabulary}")
        return value


class DatasetConfig(_Schema):
    """One dataset: where its tfrecords are and which tokenizer made them. `id` is its file's stem, not a JSON key."""

    id: kind.Text = Field(description="the dataset's name")
    n_vocab: kind.OptionalSize = None
    path: kind.Text = Field(description='the glob of the training files, for example "datasets/mine/train_*.tfrecords"')
    eval_path: kind.Glob = ""
    tokenizer_path: kind.OptionalText = None
    tokenizer_is_pretrained: kind.Switch = False
    eos_id: kind.TokenId = None
    padding_id: kind.TokenId = None
    lambada_path: kind.OptionalText = None

    @field_validator("tokenizer_is_pretrained")
    @classmethod
    def _names_its_tokenizer(cls, value: bool, info: ValidationInfo) -> bool:
        if value and "tokenizer_path" in info.data and not info.data["tokenizer_path"]:
            raise ValueError('it needs the name of the pretrained tokenizer in tokenizer_path, for example "gpt2"')
        return value


class DatasetSource(_Schema):
    """One entry of `datasets`: a dataset, and how it is sampled."""

    dataset: DatasetConfig
    stitch: kind.Size = 1
    sampling_mode: kind.SamplingMode = "chunks"
    weight: kind.Positive = 1.0

    @field_validator("sampling_mode")
    @classmethod
    def _resolve_alias(cls, value: str) -> str:
        return "documents_random" if value == "random_sample" else value


class ModelConfig(_Schema):
    """Everything a run is told. Two configs are equal when all but their names are."""

    name: kind.Text = "config"
    model: kind.ModelKind = "GPT"
    model_path: kind.Text = Field(description="the directory for checkpoints and logs, local or gs://")

    no_dataset: kind.Switch = False
    datasets: Annotated[tuple[DatasetSource, ...], Field(validate_default=True)] = ()
    shuffle_input_filenames: kind.Switch = True
    remove_partial_sequences: kind.Switch = False

    n_vocab: kind.Size = Field(description="the number of tokens in the vocabulary, for example 50257")
    n_ctx: kind.Size = 2048
    n_layer: kind.Size = Field(description="the number of layers, for example 12")
    n_head: kind.Size = Field(description="the number of attention heads, for example 12")
    n_embd: kind.Size = Field(description="the size of the hidden layers, for example 768")
    attention_types: kind.AttentionTypes = ()
    local_attention_radius: kind.Size = 256
    activation_function: kind.Activation = "gelu"
    embed_dropout: kind.Dropout = 0.0
    res_dropout: kind.Dropout = 0.0
    attn_dropout: kind.Dropout = 0.0
    scale_by_depth: kind.Switch = False
    scale_by_in: kind.Switch = False
    eos_id: kind.TokenId = None
    padding_id: kind.TokenId = None

    axial_pos_emb: tuple[int, int] | None = None
    rotary_emb: kind.Switch = False
    mlp_glu: kind.Switch = False
    scalenorm: kind.Switch = False
    rezero: kind.Switch = False
    num_mem_kv: kind.Count = 0
    macaron: kind.Switch = False
    share_parameters: kind.Switch = False
    no_weight_tie: kind.Switch = False
    moe_layers: kind.LayerNumbers = ()
    moe_params: kind.Settings = {}
    moe_activation: kind.Activation = "relu"  # mtf's own for this layer

    lr: kind.Positive = Field(description="the peak learning rate, for example 0.0006")
    lr_decay: kind.LrDecay = "cosine"
    lr_decay_end: kind.OptionalSize = None
    warmup_steps: kind.Count = 0
    opt_name: kind.Optimizer = "adam"
    beta1: kind.Beta = 0.9
    beta2: kind.Beta = 0.95
    epsilon: kind.Positive = 1e-8
    ada_epsilon1: kind.Positive = 1e-30
    ada_epsilon2: kind.NotNegative = 1e-3
    weight_decay: kind.NotNegative = 0.0
    gradient_clipping: kind.OptionalPositive = None
    z_loss: kind.NotNegative = 1e-4
    entmax_loss: kind.Switch = False

    train_batch_size: kind.Size = Field(description="the number of sequences in a training step, for example 16")
    train_steps: kind.Size = Field(description="the number of training steps, for example 600")
    eval_batch_size: kind.Size = Field(default_factory=lambda data: data.get("train_batch_size", 1))
    eval_steps: kind.Count = 0
    eval_tasks: kind.TaskNames = ()
    predict_batch_size: kind.Size = 1
    predict_steps: kind.Count = 0
    predict_max_steps: kind.OptionalSize = None
    iterations: kind.Size = 500
    seed: kind.Seed = 1
    log_grads: kind.Switch = False

    mesh_shape: kind.MeshShape = None
    layout: kind.Layout = None
    precision: kind.Precision = "float32"
    tokens_per_mb_per_replica: kind.OptionalSize = None
    recompute_grad: kind.Switch = False

    mlm_mask_id: kind.TokenId = None
    mlm_cls_token_id: kind.TokenId = None
    mlm_mask_prob: kind.Probability = 0.15
    mlm_same_token_prob: kind.Probability = 0.1
    mlm_random_token_prob: kind.Probability = 0.1
    mlm_mask_ignore_ids: kind.TokenIds = ()
    mlm_training: kind.Switch = False

    @property
    def layer_attention(self) -> tuple[str, ...]:
        """The attention type of each layer, n_layer names; all global where attention_types is absent."""
        return expand_attention_types(self.attention_types) or ("global",) * self.n_layer

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.n_embd // self.n_head

    @property
    def moe(self) -> MoeParams:
        """The settings of the layers of experts, with the defaults of those that `moe_params` leaves out."""
        return MoeParams.model_validate(self.moe_params)

    @property
    def has_experts(self) -> bool:
        """Whether any layer is one of experts."""
        return any(layer < self.n_layer for layer in self.moe_layers)

    @property
    def lr_end_step(self) -> int:
        """The step at which the learning rate's decay ends."""
        return self.lr_decay_end or self.train_steps

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in one training step."""
        return self.train_batch_size * self.n_ctx

    # The name says where a config was found, not what it says: the copy that a run keeps equals its original.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self._said() == other._said()

    def __hash__(self) -> int:
        return hash((self.model_path, self.n_layer, self.n_embd, self.n_ctx, self.lr, self.seed))

    def _said(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name"})

    @field_validator("datasets")
    @classmethod
    def _has_a_dataset(cls, value: tuple[DatasetSource, ...], info: ValidationInfo) -> tuple[DatasetSource, ...]:
        if not value and not info.data.get("no_dataset", True):
            raise ValueError(
                'it must hold at least one [dataset id, stitch, sampling mode, weight], or set "no_dataset": true'
            )
        return value

    @field_validator("n_vocab")
    @classmethod
    def _holds_the_datasets(cls, value: int, info: ValidationInfo) -> int:
        sizes = {source.dataset.id: source.dataset.n_vocab or 0 for source in info.data.get("datasets", ())}
        larger = [f'dataset "{name}" (n_vocab {size})' for name, size in sizes.items() if size > value]
        if larger:
            raise ValueError(f"{' and '.join(larger)} needs at least {max(sizes.values())}")
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

    @field_validator("attention_types")
    @classmethod
    def _names_every_layer(cls, value: kind.AttentionTypes, info: ValidationInfo) -> kind.AttentionTypes:
        # Counted, not expanded: a mistyped number of repeats must not fill the memory.
        layers, named = info.data.get("n_layer"), sum(len(names) * repeats for names, repeats in value)
        if value and layers is not None and named != layers:
            raise ValueError(f'it names {named} layers and n_layer is {layers}; [[["global"], {layers}]] would work')
        return value

    @field_validator("axial_pos_emb", mode="before")
    @classmethod
    def _covers_the_context(cls, value: Any, info: ValidationInfo) -> tuple[int, ...] | None:
        context = info.data.get("n_ctx")
        if isinstance(value, bool):
            return nearest_factors(context) if value and context else None
        sizes = [kind.natural(size) for size in value] if isinstance(value, list | tuple) else []
        known = tuple(size for size in sizes if size)
        if len(sizes) != 2 or len(known) != 2:
            raise ValueError("it must be true, false or two whole numbers whose product is n_ctx")
        if context is not None and math.prod(known) != context:
            near = list(nearest_factors(context))
            raise ValueError(f"its product is {math.prod(known)} and must be n_ctx {context}; {near} would work")
        return known

    @field_validator("rotary_emb")
    @classmethod
    def _halves_the_head(cls, value: bool, info: ValidationInfo) -> bool:
        if value and "n_embd" in info.data and "n_head" in info.data:
            size = info.data["n_embd"] // info.data["n_head"]
            if size % 2:
                raise ValueError(f"n_embd / n_head is {size}; it must be even, since the head's halves are turned")
        return value

    @field_validator("moe_layers")
    @classmethod
    def _warns_of_layers_past_the_last(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        layers = info.data.get("n_layer")
        past = [layer for layer in value if layers is not None and layer >= layers]
        if past:
            logger.warning("moe_layers %s: past the last of %s layers, which count from 0; ignored", past, layers)
        return value

    @field_validator("moe_params")
    @classmethod
    def _are_settings_of_the_layer(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_moe_params(value)
        return value

    @field_validator("mlm_training")
    @classmethod
    def _knows_what_to_mask(cls, value: bool, info: ValidationInfo) -> bool:
        if not value:
            return value
        if "mlm_mask_id" in info.data and info.data["mlm_mask_id"] is None:
            raise ValueError("it needs mlm_mask_id, the id that the tokenizer reserves for its mask")
        if info.data.get("mlm_mask_prob") == 0:
            raise ValueError("it needs an mlm_mask_prob above 0")
        if info.data.get("mlm_cls_token_id") is not None:
            if info.data["mlm_cls_token_id"] == info.data.get("mlm_mask_id"):
                raise ValueError("it needs an mlm_cls_token_id other than mlm_mask_id")
            if info.data.get("n_ctx") == 1:
                raise ValueError("mlm_cls_token_id leaves no room for text where n_ctx is 1; n_ctx 2 would work")
        if info.data.get("predict_steps"):
            raise ValueError("predict_steps must be 0, since a masked model continues no text")
        if info.data.get("eval_tasks"):
            raise ValueError("eval_tasks must be empty, since they score text from left to right")
        kept, replaced = (info.data.get(f"mlm_{what}_token_prob", 0.0) for what in ("same", "random"))
        if kept + replaced > 1:
            raise ValueError(f"mlm_same_token_prob {kept} and mlm_random_token_prob {replaced} must sum to at most 1")
        return value


def expand_attention_types(groups: Iterable[tuple[tuple[str, ...], int]]) -> tuple[str, ...]:
    """[[["global", "local"], 2]] -> global, local, global, local."""
    return tuple(name for names, count in groups for name in names * count)


def nearest_factors(number: int) -> tuple[int, int]:
    """The two factors of `number` that lie closest together, the smaller first: 2048 -> (32, 64)."""
    first = next(size for size in range(math.isqrt(number), 0, -1) if number % size == 0)
    return first, number // first
