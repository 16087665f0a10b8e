"""What `moe_params` may say: the settings of Mesh-TensorFlow's mixture-of-experts layer, under its own names.

Where a setting is absent, its value is Mesh-TensorFlow's.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

import config_fields as kind


class MoeParams(BaseModel):
    """Settings of the layers in `moe_layers`.

    The evaluation's capacity factor and the two-level layer's are accepted, since GPT-Neo's configs may hold them, and
    change nothing: outside training every token finds room, and the layer has one level.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    moe_gating: kind.Gating = "top_2"
    moe_num_experts: kind.Experts = 16
    moe_hidden_size: kind.Size = 4096
    moe_group_size: kind.Size = 1024
    moe_capacity_factor_train: kind.Positive = 1.25
    moe_capacity_factor_eval: kind.Positive = 2.0
    moe_capacity_factor_second_level: kind.Positive = 1.0
    moe_min_expert_capacity: kind.Size = 4
    moe_loss_coef: kind.NotNegative = 1e-2
    moe_use_second_place_loss: kind.Switch = False
    moe_second_policy_train: kind.SecondPolicy = "random"
    moe_second_policy_eval: kind.SecondPolicy = "random"
    moe_second_threshold_train: kind.Probability = 0.2
    moe_second_threshold_eval: kind.Probability = 0.2
    moe_dropout_rate: kind.Dropout = 0.0

    @model_validator(mode="before")
    @classmethod
    def _as_mesh_tensorflow_writes_it(cls, data: Any) -> Any:
        """A setting that is null is as if it were not there, and the switch may be 0 or 1."""
        kept = {key: value for key, value in data.items() if value is not None}
        switch = kept.get("moe_use_second_place_loss")
        return kept | ({"moe_use_second_place_loss": bool(switch)} if switch in (0, 1) else {})


def check_moe_params(values: Mapping[str, Any]) -> None:
    """Raise ValueError, with a clause for each mistake, unless `values` are settings of the layer."""
    try:
        MoeParams.model_validate(dict(values))
    except ValidationError as error:
        clauses = [_clause(detail) for detail in error.errors(include_url=False)]
        raise ValueError("; ".join(clauses)) from error


def _clause(detail: Mapping[str, Any]) -> str:
    setting, value = str(detail["loc"][0]), json.dumps(detail["input"], default=repr)
    if detail["type"] != "extra_forbidden":
        return f"its {setting} is {value}: {detail['ctx']['error']}"
    near = kind.nearest(setting, MoeParams.model_fields)
    hint = f'did you mean "{near}"?' if near else f"its settings are {kind.listed(MoeParams.model_fields)}"
    return f'there is no setting "{setting}" (its value is {value}); {hint}'
