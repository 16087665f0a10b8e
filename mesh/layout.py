"""Mesh shapes and layouts as a user writes them, checked before any graph is built.

A mesh shape "x:4,y:2" names the axes of an array of processors. A layout "batch:x,heads:y" says which dimension of the
model's tensors is split over which axis. This module knows strings, sizes and names, not the model.
"""

import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from errors import UserError


@dataclass(frozen=True)
class MeshLayout:
    """A parsed pair of mesh shape and layout.

    Attributes:
      axes: {mesh axis: size}.
      rules: {dimension: mesh axis}.
      assumed: whether nobody wrote them.
    """

    axes: Mapping[str, int]
    rules: Mapping[str, str]
    assumed: bool = field(default=False, compare=False)

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

    def without(self, dims: Collection[str]) -> "MeshLayout":
        """The same with `dims` not split."""
        return replace(self, rules={dim: axis for dim, axis in self.rules.items() if dim not in dims})


def parse(mesh_shape: str | None, layout: str | None, num_devices: int) -> MeshLayout:
    """Read the two strings; where `mesh_shape` is absent, the batch is split over all devices.

    Raises UserError for anything that is not a mesh and a layout on it.
    """
    if mesh_shape is None:
        if layout:
            devices = f"{num_devices} device{'s' * (num_devices > 1)}"
            raise UserError(f"layout {layout!r} needs a mesh_shape; with {devices} e.g. 'x:{num_devices}'")
        return MeshLayout({"all": num_devices}, {"batch": "all"}, assumed=True)
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
    others = f"use a TPU of {mesh.size}" if "TPU" in what else f"name {mesh.size} devices with --gpu_ids"
    raise UserError(
        f"mesh_shape {shape!r} has {mesh.size} processors but there {'is' if num_devices == 1 else 'are'} "
        f"{num_devices} {what}; use a mesh whose sizes multiply to {num_devices}, e.g. --mesh_shape {fitting} "
        f"--layout batch:{first}, or {others}"
    )


@dataclass(frozen=True)
class Misfit:
    """Why a layout does not fit a model: a sentence with what would, and the dimension that cannot be split so."""

    sentence: str
    dim: str


def check_layout(mesh: MeshLayout, sizes: Mapping[str, Mapping[str, int]], tensors: Sequence[Sequence[str]]) -> None:
    """Raise UserError, with the first of the misfits, unless the layout fits the model. Arguments as for `misfits`."""
    for misfit in misfits(mesh, sizes, tensors):
        raise UserError(misfit.sentence)


def misfits(
    mesh: MeshLayout, sizes: Mapping[str, Mapping[str, int]], tensors: Sequence[Sequence[str]]
) -> Iterator[Misfit]:
    """Everything that keeps the layout from the model.

    Args:
      mesh: the parsed mesh and layout.
      sizes: {dimension name: {what sets its size, e.g. "n_embd" or "train_batch_size": size}}.
      tensors: dimension names of the model's tensors; no two dimensions of one may share a mesh axis.
    """
    for dim, axis in mesh.rules.items():
        if dim not in sizes:
            near = difflib.get_close_matches(dim, sizes, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield Misfit(
                f"layout {mesh.layout!r} names dimension {dim!r}, which this model does not have; "
                f"{hint}its dimensions are {', '.join(sizes)}",
                dim,
            )
        for source, size in sizes.get(dim, {}).items():
            if size % mesh.axes[axis]:
                yield Misfit(_indivisible(mesh, dim, source, size), dim)
    seen: set[tuple[str, str]] = set()
    for tensor in tensors:
        for first, second in _pairs_on_one_axis(mesh, tensor):
            if (first, second) not in seen:
                yield Misfit(
                    f"layout {mesh.layout!r} splits {first!r} and {second!r} over the same axis "
                    f"{mesh.rules[first]!r}, but one tensor [{', '.join(tensor)}] has both; drop one of the two rules "
                    "or give it another axis",
                    second,
                )
            seen.add((first, second))


def _indivisible(mesh: MeshLayout, dim: str, source: str, size: int) -> str:
    axis, ways = mesh.rules[dim], mesh.ways(dim)
    if mesh.assumed:
        return (
            f"without a mesh_shape the batch is split over all {ways} devices, and {source} = {size} is no multiple of "
            f"{ways}; change {source}, name other devices with --gpu_ids, or give a mesh_shape and a layout"
        )
    fewer = max(ways_ for ways_ in range(1, ways) if size % ways_ == 0)
    smaller = f", let axis {axis!r} have {fewer}" if fewer > 1 else ""
    return (
        f"layout rule '{dim}:{axis}' splits {source} = {size} into {ways} parts, which does not divide it; change "
        f"{source} to a multiple of {ways}{smaller}, or change the mesh_shape or layout"
    )


def _pairs_on_one_axis(mesh: MeshLayout, tensor: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Dimensions of `tensor` that the layout splits over the same axis, each with the first one there.

    Mesh-TensorFlow refuses them on an axis of one processor as well.
    """
    taken: dict[str, str] = {}
    for dim in tensor:
        axis = mesh.rules.get(dim)
        if axis is None:
            continue
        if axis in taken:
            yield taken[axis], dim
        taken.setdefault(axis, dim)


def mesh_shapes(num_devices: int) -> Iterator[dict[str, int]]:
    """Meshes {axis: size} of so many devices with one axis or two, the longer one first."""
    yield {"x": num_devices}
    for shorter in range(2, math.isqrt(num_devices) + 1):
        if num_devices % shorter == 0:
            yield {"x": num_devices // shorter, "y": shorter}
