"""--auto_layout: the layout of least memory."""

import logging
import math
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from config import ModelConfig
from errors import UserError
from mesh.layout import MeshLayout
from models.dims import TENSORS
from planning.sizes import sizes_to_split
from planning.training_plan import plan_training
from training.step import num_microbatches, training_graph

logger = logging.getLogger(__name__)


def search_layout(config: ModelConfig, meshes: Sequence[Mapping[str, int]], on_tpu: bool) -> MeshLayout:
    """The layout that trains `config` in least memory: Mesh-TensorFlow's choice on each of `meshes` {axis: size}, and
    of these the one whose plan, `on_tpu` or not, is the smallest. Raises UserError if nothing can be split."""
    from mesh.auto_layout import least_memory  # here, because the solver takes a second to import and few runs need it

    devices = math.prod(meshes[0].values())
    if devices == 1:
        raise UserError(
            "one device splits nothing; say how many there are with --mesh_shape, --gpu_ids, or --plan and --device"
        )
    found: list[tuple[int, MeshLayout]] = []
    problem = f"no dimension of the model can be split over {devices} devices; use fewer"
    with tqdm(meshes, desc="searching layouts", unit="mesh", leave=False) as bar:
        for axes in bar:
            bar.set_postfix_str(",".join(f"{axis}:{size}" for axis, size in axes.items()))
            batch = _batch_to_search(config, axes)
            step = training_graph(
                config.model_copy(update={"train_batch_size": batch, "tokens_per_mb_per_replica": None}),
                MeshLayout(axes, {}),
            )
            layout = least_memory(step, axes, sizes_to_split(config), TENSORS)
            layout = layout.without({dim for dim in layout.rules if layout.ways(dim) == 1})
            logger.info(
                "mesh %s: %s; searched on a step of %d sequences in all %d layers, %d operations",
                layout.mesh_shape,
                layout.layout or "nothing to split",
                batch,
                config.n_layer,
                len(step.graph.operations),
            )
            if layout.rules:
                try:
                    found.append((plan_training(config, layout, on_tpu).total, layout))
                except UserError as error:
                    problem = str(error)
    if not found:
        raise UserError(problem)
    return min(found, key=lambda pair: pair[0])[1]


def _batch_to_search(config: ModelConfig, axes: Mapping[str, int]) -> int:
    """Sequences that are in memory at once if the batch is split over the longest axis: Mesh-TensorFlow does not look
    into the loop of microbatches."""
    longest = max(axes, key=lambda axis: axes[axis])
    if config.train_batch_size % axes[longest]:
        return config.train_batch_size
    return config.train_batch_size // num_microbatches(config, MeshLayout(axes, {"batch": longest}))
