"""The devices that a plan is for."""

import argparse
from dataclasses import dataclass, replace

from config import ModelConfig
from errors import UserError
from mesh.devices import device_names, local_devices, num_tpu_cores, tpu_resolver
from mesh.hardware import Hardware, hardware
from mesh.layout import parse


@dataclass(frozen=True)
class Target:
    """The devices that a plan is for; they need not be there.

    Attributes:
      count: how many; None for as many as the config's mesh has.
      what: what messages call them.
      hardware: what each of them can do; None if nobody said.
      on_tpu: whether they are a TPU's.
    """

    count: int | None = None
    what: str = "devices"
    hardware: Hardware | None = None
    on_tpu: bool = False

    @classmethod
    def of(cls, device: Hardware) -> "Target":
        """Devices of one kind: as many as a TPU has, or any number of GPUs."""
        if device.is_tpu:
            return cls(device.count, f"TPU devices in {device.name}", device, on_tpu=True)
        return cls(hardware=device)

    def num_devices(self, config: ModelConfig) -> int:
        """How many there are, or else the config's mesh has, or else this machine."""
        if self.count is not None:
            return self.count
        return parse(config.mesh_shape, None, 1).size if config.mesh_shape else len(local_devices(None).names)


ANY = Target()  # as many as a mesh wants, of no known kind


def target(args: argparse.Namespace) -> Target:
    """What --device, --gpu_ids and --tpu name. Raises UserError where they contradict each other or name nothing."""
    device = ANY if args.device is None else Target.of(hardware(args.device))
    named = device_names(args.gpu_ids) if args.gpu_ids else ()
    if device.on_tpu:
        if named:
            raise UserError(
                f"--gpu_ids names {len(named)} device{'s' * (len(named) > 1)} and --device {args.device!r} is a TPU of "
                f"{device.count}; give one of them"
            )
        return device
    if args.tpu:
        if device.hardware is not None:
            raise UserError(f"--tpu {args.tpu!r} and --device {args.device!r}, a GPU, exclude each other; give one")
        try:
            return Target(num_tpu_cores(args.tpu, tpu_resolver(args.tpu)), "TPU cores", on_tpu=True)
        except UserError as error:
            raise UserError(f"{error}; for a TPU that is not there, leave --tpu out and use --device v3-8") from error
    return replace(device, count=len(named), what="devices named") if named else device
