"""What a plan finds wrong, and what would be better."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from config import ModelConfig
from mesh.hardware import Hardware
from mesh.layout import MeshLayout, misfits
from mesh.plan import Plan, Weight
from models.dims import TENSORS
from planning.alternatives import Alternative, settings
from planning.sizes import sizes_to_split
from planning.units import in_units

_GIANT = 0.05  # a weight that lies whole on every device is worth a word from this share of its memory
_MOSTLY = 0.5  # and so are all of them together from this share
_NEARLY_FULL = 0.9


def too_large(plan: Plan, found: Sequence[Alternative], hardware: Hardware | None) -> list[str]:
    """Why `plan` does not fit into a device's memory, and which of the alternatives `found` would."""
    if hardware is None or plan.total <= hardware.memory:
        return []
    sentence = f"{in_units(plan.total)} do not fit into the {in_units(hardware.memory)} of a device of {hardware.name}"
    fitting = [other for other in found if other.plan.total <= hardware.memory]
    if fitting:
        return [f"{sentence}; with {settings(min(fitting, key=lambda other: other.plan.flops).config)} they do"]
    least = min(found, key=lambda other: other.plan.total).plan
    kept = least.parameters + least.slots + least.gradients
    if kept > hardware.memory:
        return [
            f"{sentence}: weights, slots and gradients alone are {in_units(kept)}; split more of the weights, into "
            "more parts: a longer axis for heads, vocab and intermediate_expanded, or for embd"
        ]
    return [f"{sentence}; split more dimensions in layout, over more devices, or lower train_batch_size or n_ctx"]


def barely(plan: Plan, hardware: Hardware | None) -> list[str]:
    """A warning where `plan` fits with little to spare."""
    if hardware is None or not _NEARLY_FULL * hardware.memory < plan.total <= hardware.memory:
        return []
    return ["it fits barely; leave a tenth of the memory to TensorFlow itself"]


def idle(layout: MeshLayout) -> Iterator[str]:
    """Axes over which nothing is split."""
    for axis, ways in layout.axes.items():
        if ways > 1 and axis not in layout.rules.values():
            yield f"no rule of the layout uses axis {axis!r}, so its {ways} devices do the same; split more over it"


def whole_everywhere(config: ModelConfig, plan: Plan, layout: MeshLayout) -> Iterator[str]:
    """What could be split and lies whole on every device, the weights of all layers together."""
    if layout.size == 1:
        return
    kept = (plan.parameters + plan.slots + plan.gradients) / plan.parameters  # bytes for each byte of a weight
    whole = [weight for weight in plan.weights if weight.copies == layout.size]
    together = kept * sum(weight.bytes for weight in whole)
    if len(whole) == len(plan.weights) and together >= _MOSTLY * plan.total and not any(idle(layout)):
        yield (
            f"all weights lie whole on every device: with slots and gradients {in_units(together)} of "
            f"{in_units(plan.total)}; give the mesh a second axis and split heads, vocab and intermediate_expanded "
            "over it, or embd"
        )
        return
    alike: dict[str, list[Weight]] = defaultdict(list)
    for weight in whole:
        alike[re.sub(r"/h\d+/", "/h*/", weight.name)].append(weight)
    for name, weights in sorted(alike.items(), key=lambda item: -sum(weight.bytes for weight in item[1])):
        size, shape = kept * sum(weight.bytes for weight in weights), weights[0].shape
        if size < _GIANT * plan.total or any(layout.ways(dim) > 1 for dim in shape):  # by a rule advised before
            continue
        layout, advised = _split(config, shape, layout)
        each = ", ".join(f"{dim} {length}" for dim, length in shape.items())
        many = f"{len(weights)} x " if len(weights) > 1 else ""
        yield (
            f"{many}{name} [{each}] {'lie' if many else 'lies'} whole on every device: with slots and gradients "
            f"{in_units(size)} of {in_units(plan.total)}; {advised}"
        )


def _split(config: ModelConfig, shape: Mapping[str, int], layout: MeshLayout) -> tuple[MeshLayout, str]:
    """The layout with one more rule, which splits a weight of `shape`, and what to say of it or of its absence."""
    sizes = sizes_to_split(config)
    odd: list[str] = []  # what other sizes would allow
    taken: list[str] = []  # what another axis would
    dims = sorted((dim for dim in shape if dim in sizes), key=lambda dim: dim == "embd")  # which communicates most
    for dim, (axis, ways) in itertools.product(dims, layout.axes.items()):
        if ways == 1:
            continue
        longer = replace(layout, rules={**layout.rules, dim: axis})
        found = list(misfits(longer, sizes, TENSORS))
        uneven = {source: size for source, size in sizes[dim].items() if size % ways}
        if not found:
            return longer, f"add {dim}:{axis} to the layout"
        if not uneven:
            taken.append(dim)
        elif len(found) == len(uneven):
            ((source, size), *_) = uneven.items()
            odd.append(f"with {source} a multiple of {ways}, such as {-(-size // ways) * ways}, {dim}:{axis} could")
    if odd:
        return layout, f"no rule of this mesh can split it; {odd[0]}"
    if taken:
        return layout, f"no rule of this mesh can split it; on one more axis {' or '.join(dict.fromkeys(taken))} could"
    return layout, "no rule of this mesh can split it"
