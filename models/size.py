"""How large a model is, counted without making it."""

import math
from types import SimpleNamespace
from typing import Any

import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from models import gpt
from models.context import Context
from models.dims import make_dims


def variable_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """{name in checkpoints: shape} of every variable that `config` trains.

    The model is only described, as a Mesh-TensorFlow graph: nothing is lowered to devices, no TensorFlow variable is
    made and no memory is allocated, so that the largest model takes as little as a small one.
    """

    def stand_in(getter: Any, name: str, **settings: Any) -> Any:
        return SimpleNamespace(name=f"{name}:0")

    with tf.Graph().as_default(), tf.variable_scope("", custom_getter=stand_in):
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        dims = make_dims(config, batch_size=1)
        tokens = mtf.zeros(mesh, mtf.Shape([dims.batch, dims.sequence]), tf.int32)
        gpt.logits(Context(config, mesh, dims, mtf.VariableDType(tf.float32)), tokens)
        return {variable.name: variable.shape.to_integer_list for variable in mesh.graph.trainable_variables}


def num_parameters(config: ModelConfig) -> int:
    """How many numbers `config` trains."""
    return sum(math.prod(shape) for shape in variable_shapes(config).values())
