"""Mesh shapes and layouts as a user writes them, checked before any graph is built.

A mesh shape "x:4,y:2" names the axes of an array of processors. A layout "batch:x,heads:y" says which dimension of the
model's tensors is split over which axis. This module knows strings, sizes and names, not the model.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from errors import UserError


@dataclass(frozen=True)
class MeshLayout:
    """A parsed pair of mesh shape and layout: `axes` {mesh axis: size}, `rules` {dimension: mesh axis}."""

    axes: Mapping[str, int]
    rules: Mapping[str, str]

    @property
    def size(self) -> int:
        """Number of processors."""
        return math.prod(self.axes.values())

    @property
    def mesh_shape(self) -> str:
        """As Mesh-TensorFlow reads it, e.g. "x:4,y:2"."""
        return ",".join(f"{axis}:{size}" for axis, size in self.axes.items())

    @property
    def layout(self) -> str:
        """As Mesh-TensorFlow reads it, e.g. "batch:x,heads:y"."""
        return ",".join(f"{dim}:{axis}" for dim, axis in self.rules.items())

    def ways(self, dim: str) -> int:
        """Into how many parts the dimension called `dim` is split."""
        return self.axes[self.rules[dim]] if dim in self.rules else 1


def parse(mesh_shape: str | None, layout: str | None, num_devices: int) -> MeshLayout:
    """Read the two strings; where `mesh_shape` is absent, the batch is split over all devices.

    Raises UserError for anything that is not a mesh and a layout on it.
    """
    if mesh_shape is None:
        if layout:
            raise UserError(f"layout {layout!r} needs a mesh_shape; with {num_devices} devices e.g. 'x:{num_devices}'")
        return MeshLayout({"all": num_devices}, {"batch": "all"})
    axes: dict[str, int] = {}
    for axis, size in _pairs("mesh_shape", mesh_shape, "x:4,y:2"):
        if not size.isdigit() or int(size) < 1:
            raise UserError(
                f"mesh_shape {mesh_shape!r}: the size of axis {axis!r} is {size!r}; give a whole number above 0"
            )
        if axis in axes:
            raise UserError(f"mesh_shape {mesh_shape!r} names axis {axis!r} twice; name each axis once")
        axes[axis] = int(size)
    rules: dict[str, str] = {}
    for dim, axis in _pairs("layout", layout or "", "batch:x,heads:y"):
        if axis not in axes:
            raise UserError(
                f"layout {layout!r} splits {dim!r} over axis {axis!r}, which mesh_shape {mesh_shape!r} does not have; "
                f"its axes are {', '.join(axes) or 'none'}"
            )
        if rules.get(dim, axis) != axis:
            raise UserError(f"layout {layout!r} splits {dim!r} over both {rules[dim]!r} and {axis!r}; choose one")
        rules[dim] = axis
    return MeshLayout(axes, rules)


def _pairs(key: str, text: str, example: str) -> list[tuple[str, str]]:
    pairs = []
    for item in text.replace(";", ",").replace(" ", ",").split(","):
        if not item:
            continue
        first, colon, second = item.partition(":")
        if not (first and colon and second) or ":" in second:
            raise UserError(f"{key} {text!r}: {item!r} is not a pair NAME:VALUE; write it like {example!r}")
        pairs.append((first, second))
    return pairs


def check_devices(mesh: MeshLayout, num_devices: int, what: str) -> None:
    """Raise UserError unless the mesh has `num_devices` processors; the message calls the devices `what`."""
    if mesh.size == num_devices:
        return
    shape = mesh.mesh_shape or "(empty)"
    first = next(iter(mesh.axes), "x")
    fitting = f"{first}:{num_devices}"
    raise UserError(
        f"mesh_shape {shape!r} has {mesh.size} processors but there {'is' if num_devices == 1 else 'are'} "
        f"{num_devices} {what}; use a mesh whose sizes multiply to {num_devices}, e.g. --mesh_shape {fitting} "
        f"--layout batch:{first}, or name {mesh.size} devices with --gpu_ids"
    )


def check_layout(mesh: MeshLayout, sizes: Mapping[str, Mapping[str, int]], tensors: Sequence[Sequence[str]]) -> None:
    """Raise UserError unless the layout fits the model.

    Args:
      mesh: the parsed mesh and layout.
      sizes: {dimension name: {what sets its size, e.g. "n_embd" or "train_batch_size": size}}.
      tensors: dimension names of the model's tensors; no two dimensions of one may share a mesh axis.
    """
    for dim, axis in mesh.rules.items():
        if dim not in sizes:
            near = difflib.get_close_matches(dim, sizes, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"layout {mesh.layout!r} names dimension {dim!r}, which this model does not have; "
                f"{hint}its dimensions are {', '.join(sizes)}"
            )
        for source, size in sizes[dim].items():
            if size % mesh.axes[axis]:
                raise UserError(
                    f"layout rule '{dim}:{axis}' splits {source} = {size} into {mesh.axes[axis]} parts, which does not "
                    f"divide it; change {source} to a multiple of {mesh.axes[axis]}, or the mesh_shape or layout"
                )
    for tensor in tensors:
        seen: dict[str, str] = {}
        for dim in tensor:
            taken = mesh.rules.get(dim)
            if taken is None or mesh.axes[taken] == 1:
                continue
            if taken in seen:
                raise UserError(
                    f"layout {mesh.layout!r} splits {seen[taken]!r} and {dim!r} over the same axis {taken!r}, but one "
                    f"tensor [{', '.join(tensor)}] has both; drop one of the two rules or give it another axis"
                )
            seen[taken] = dim
