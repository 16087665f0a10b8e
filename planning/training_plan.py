"""The plan of a config on a layout."""

from config import ModelConfig
from mesh.experts import with_expert_rules
from mesh.layout import MeshLayout
from mesh.plan import Plan, make_plan
from training.step import training_graph


def plan_training(config: ModelConfig, layout: MeshLayout, on_tpu: bool = False) -> Plan:
    """What a training step of `config` costs each device; UserError where the layout does not allow an operation."""
    return make_plan(training_graph(config, layout), with_expert_rules(layout), on_tpu)
