"""The Mesh-TensorFlow graph that a step is built in."""

import logging
from collections.abc import Mapping
from typing import Any, TypeAlias

import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.devices import LocalDevices, local_mesh, tpu_mesh
from mesh.experts import with_expert_rules
from mesh.layout import MeshLayout
from models.context import Context, variable_dtype
from models.dims import Dims, make_dims
from training.checkpoints import stored_shapes

logger = logging.getLogger(__name__)

Features: TypeAlias = Mapping[str, tf.Tensor]


class ModelGraph:
    """A model's mtf graph on its mesh, from imported features to exported tensors.

    Attributes:
      config: the model.
      layout: the mesh and how the model lies on it.
      graph: what the model is built in.
      mesh, mesh_impl: on the devices.
      dims: for a batch of `batch_size` and sequences of `length`, or else n_ctx.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: MeshLayout,
        devices: LocalDevices | None,
        batch_size: int,
        length: int | None = None,
        *,
        is_training: bool = False,
        tpu_context: Any = None,
    ):
        """`devices` None: on the TPU whose `tpu_context` TPUEstimator gives."""
        self.config, self.layout = config, layout
        self.graph = mtf.Graph()
        rules = with_expert_rules(layout)
        if devices is None:
            self.mesh, self.mesh_impl = tpu_mesh(self.graph, rules, tpu_context)
        else:
            self.mesh, self.mesh_impl = local_mesh(self.graph, rules, devices)
        self.dims: Dims = make_dims(config, batch_size, length)
        self._variable_dtype = variable_dtype(config, is_training)
        self._final_norm = _has_final_norm(config)

    def import_batch(self, features: Features) -> dict[str, mtf.Tensor]:
        """[batch] and [batch, sequence] features as mtf tensors."""
        dims = [self.dims.batch, self.dims.sequence]
        return {
            name: mtf.import_tf_tensor(self.mesh, value, mtf.Shape(dims[: value.shape.ndims]), name=name)
            for name, value in features.items()
        }

    def context(self, dims: Dims | None = None, **changes: Any) -> Context:
        """What a pass of the model over `dims`, or else the whole batch, is told; `changes` are fields of Context."""
        return Context(
            self.config,
            self.mesh,
            dims or self.dims,
            self._variable_dtype,
            final_norm=self._final_norm,
            **changes,
        )

    def lower(self) -> mtf.Lowering:
        """The graph as TensorFlow operations on the devices; nothing can be added to it afterwards."""
        # operations of our own look variables up in the lowering, which stacking them would replace
        return mtf.Lowering(self.graph, {self.mesh: self.mesh_impl}, autostack=False)


def _has_final_norm(config: ModelConfig) -> bool:
    """Whether the final norm runs: GPT-Neo stored none beside a head of its own, and such a checkpoint goes without."""
    stored = stored_shapes(config.model_path) if config.no_weight_tie else None
    if stored is None or "gpt2/ln_f/g" in stored:
        return True
    logger.warning("the checkpoint in %s has no final norm ln_f: the model runs without it", config.model_path)
    return False
