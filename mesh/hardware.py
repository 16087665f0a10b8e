"""What devices can do, as their vendors publish it: memory, arithmetic and links between them."""

import re
from dataclasses import dataclass

from errors import UserError

GIB = 1024**3


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
      name: as --device takes it.
      is_tpu: whether a compiler arranges a whole step for it.
      memory: bytes of one device.
      flops: {"float32" or "bfloat16": matrix products in additions and multiplications a second}.
      link: bytes a second that a device can send to the others of its kind, over all its links together.
      source: where the numbers are from.
      count: devices there are; None where it is for the user to say.
    """

    name: str
    is_tpu: bool
    memory: int
    flops: dict[str, float]
    link: float
    source: str
    count: int | None = None


def _gpu(name: str, gib: int, float32: float, bfloat16: float, gb_per_second: float, source: str) -> Hardware:
    rates = {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}
    return Hardware(name, False, gib * GIB, rates, gb_per_second * 1e9, source)


# Dense matrix products; float32 is TF32 where a GPU has it, as TensorFlow uses it. Links: one direction.
GPUS: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4-16", 16, 8.1, 8.1, 16, "NVIDIA T4 data sheet; PCIe 3.0 x16"),
        _gpu("v100-16", 16, 15.7, 15.7, 150, "NVIDIA V100 (SXM2) data sheet; NVLink 2; no bfloat16 units"),
        _gpu("v100-32", 32, 15.7, 15.7, 150, "NVIDIA V100 (SXM2) data sheet; NVLink 2; no bfloat16 units"),
        _gpu("a10-24", 24, 62.5, 125, 32, "NVIDIA A10 data sheet; PCIe 4.0 x16"),
        _gpu("l4-24", 24, 60, 121, 32, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
        _gpu("rtx3090-24", 24, 35.6, 71, 32, "NVIDIA GA102 white paper; PCIe 4.0 x16"),
        _gpu("rtx4090-24", 24, 82.6, 165.2, 32, "NVIDIA Ada white paper; PCIe 4.0 x16"),
        _gpu("a100-40", 40, 156, 312, 300, "NVIDIA A100 (SXM4) data sheet; NVLink 3"),
        _gpu("a100-80", 80, 156, 312, 300, "NVIDIA A100 (SXM4) data sheet; NVLink 3"),
        _gpu("h100-80", 80, 494.7, 989.4, 450, "NVIDIA H100 (SXM5) data sheet; NVLink 4"),
    )
}


@dataclass(frozen=True)
class _Chip:
    """A TPU's chip: devices on it, and the rest as of Hardware, for the whole chip.

    A TPU's name counts `cores`; `largest` is the number of the largest one.
    """

    cores: int
    largest: int
    devices: int
    gib: int
    tera_flops: float
    link: float
    source: str


# Products of float32 numbers are made of bfloat16 factors, summed in float32: one rate for both.
_CHIPS = {
    "2": _Chip(2, 512, 2, 16, 46, 4 * 62e9, "Cloud TPU documentation; CACM 63(7), 2020: four links of 496 Gbit/s"),
    "3": _Chip(2, 2048, 2, 32, 123, 4 * 82e9, "Cloud TPU documentation; CACM 63(7), 2020: four links of 656 Gbit/s"),
    "4": _Chip(2, 8192, 1, 32, 275, 6 * 50e9, "arXiv:2304.01433: six links of 50 GB/s; two cores are one device"),
}


def hardware(name: str) -> Hardware:
    """What `--device` names: a GPU of the table, or a TPU such as "v3-8", whose number counts cores. UserError else."""
    if name in GPUS:
        return GPUS[name]
    match = re.fullmatch(r"v([234])-(\d+)", name)
    cores = int(match[2]) if match else 0
    chip = _CHIPS[match[1]] if match else None
    if chip is None or not 8 <= cores <= chip.largest or cores & (cores - 1):
        tpus = " or ".join(f"v{version}-N up to v{version}-{chip.largest}" for version, chip in _CHIPS.items())
        raise UserError(
            f"--device {name!r} is not known; known are {', '.join(GPUS)}, or of TPUs, with N = 8, 16, 32, ... cores, "
            f"{tpus}"
        )
    rate = chip.tera_flops * 1e12 / chip.devices
    return Hardware(
        name,
        True,
        chip.gib * GIB // chip.devices,
        {"float32": rate, "bfloat16": rate},
        chip.link / chip.devices,
        chip.source,
        cores * chip.devices // chip.cores,
    )
