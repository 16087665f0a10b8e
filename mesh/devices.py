"""From what the user named to devices, and from devices to a mesh implementation."""

import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc  # type: ignore[import-untyped]
import tensorflow.compat.v1 as tf
from mesh_tensorflow.placement_mesh_impl import PlacementMeshImpl
from mesh_tensorflow.simd_mesh_impl import SimdMeshImpl
from tensorflow import Variable  # the class of all variables, where compat.v1's is that of reference variables

from errors import UserError
from mesh import mtf
from mesh.layout import MeshLayout

Resolver: TypeAlias = tf.distribute.cluster_resolver.TPUClusterResolver

logger = logging.getLogger(__name__)

_DEVICE = re.compile(r"^/?(?:device:)?(?P<kind>gpu|cpu):(?P<index>\d+)$", re.IGNORECASE)
_TPU_PATIENCE = 15.0  # seconds for a server of a TPU to answer


@dataclass(frozen=True)
class LocalDevices:
    """Devices of this machine, in mesh order, named as TensorFlow does: "/device:GPU:0"."""

    names: tuple[str, ...]

    @property
    def kind(self) -> str:
        """ "GPU" or "CPU"."""
        return self.names[0].split(":")[1]

    def session_config(self) -> tf.ConfigProto:
        """Without soft placement: what cannot run where the mesh puts it is an error, never a silent move."""
        num_cpus = 1 + max((int(name.rsplit(":", 1)[1]) for name in self.names if ":CPU:" in name), default=0)
        config = tf.ConfigProto(allow_soft_placement=False, device_count={"CPU": num_cpus})
        config.gpu_options.allow_growth = True
        return config


def local_devices(gpu_ids: Sequence[str] | None) -> LocalDevices:
    """The devices that `--gpu_ids` names ("device:GPU:0", "gpu:0", "cpu:1", ...); without it all GPUs, else the CPU.

    Logical CPU devices are made as asked for. Raises UserError for a name that is no device and for an absent GPU.
    """
    visible = len(tf.config.list_physical_devices("GPU"))
    if not gpu_ids:
        if visible:
            return LocalDevices(tuple(f"/device:GPU:{i}" for i in range(visible)))
        return LocalDevices(("/device:CPU:0",))
    devices = device_names(gpu_ids)
    for given, device in zip(gpu_ids, devices, strict=True):
        if ":GPU:" in device and int(device.rsplit(":", 1)[1]) >= visible:
            there = f"the visible GPUs are gpu:0 ... gpu:{visible - 1}" if visible else _why_no_gpu()
            raise UserError(
                f"--gpu_ids {given!r} names a GPU that is not there; {there}; for the CPU use --gpu_ids cpu:0"
            )
    return LocalDevices(devices)


def device_names(gpu_ids: Sequence[str]) -> tuple[str, ...]:
    """What `--gpu_ids` names, as TensorFlow does, whether it is there or not. Raises UserError for a name that is no
    device."""
    names: list[str] = []
    kinds = {match["kind"].upper() for given in gpu_ids if (match := _DEVICE.match(given))}
    if len(kinds) > 1:
        raise UserError(f"--gpu_ids {' '.join(gpu_ids)!r} mixes GPUs and CPUs; a mesh is made of one kind")
    for given in gpu_ids:
        match = _DEVICE.match(given)
        if match is None:
            raise UserError(f"--gpu_ids {given!r} is not a device; write it like device:GPU:0, gpu:0 or cpu:0")
        name = f"/device:{match['kind'].upper()}:{int(match['index'])}"
        if name in names:
            raise UserError(f"--gpu_ids names {given!r} twice; name each device once")
        names.append(name)
    return tuple(names)


def _why_no_gpu() -> str:
    if tf.test.is_built_with_cuda():
        return "TensorFlow sees no GPU here"
    return "this TensorFlow is built for CPUs alone (requirements-gpu.txt names the one for GPUs)"


def tpu_resolver(name: str) -> Resolver:
    """The cluster behind `--tpu`; "colab" finds the TPU of a Colab notebook. Raises UserError when it cannot be had,
    within a minute: TensorFlow itself would wait for ever for an address where nobody answers."""
    target = name
    if name == "colab":
        address = os.environ.get("COLAB_TPU_ADDR")
        if not address:
            raise UserError("--tpu 'colab': COLAB_TPU_ADDR is not set; choose a TPU runtime in the notebook's menu")
        target = f"grpc://{address}"
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TPU_PATIENCE)  # which the metadata server is asked with
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(target)
        workers = [] if target == "local" else resolver.cluster_spec().job_tasks("worker")
    except Exception as error:  # the resolver raises whatever its HTTP and metadata clients raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"--tpu {name!r} cannot be found ({reason}); "
            "give the name of a TPU node of this project and zone, or its grpc:// address"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    for worker in workers:
        _require_answer(name, worker)
    return resolver


def num_tpu_cores(name: str, resolver: Resolver) -> int:
    """Cores of the TPU that `--tpu` names, on all its hosts. Raises UserError where it has none or does not tell."""
    try:
        cores = resolver.num_accelerators()["TPU"] * max(1, resolver.cluster_spec().num_tasks("worker"))
    except Exception as error:  # whatever gRPC raises
        raise UserError(
            f"--tpu {name!r} does not tell its cores ({type(error).__name__}); check that the node is READY"
        ) from error
    if not cores:
        raise UserError(f"--tpu {name!r} has no TPU cores; give the name of a TPU node or its grpc:// address")
    return int(cores)


def _require_answer(name: str, address: str) -> None:
    """UserError unless a gRPC server answers at `address` ("host:port")."""
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_TPU_PATIENCE)
        except grpc.FutureTimeoutError as error:
            raise UserError(
                f"--tpu {name!r}: nothing answers at {address} within {_TPU_PATIENCE:.0f} seconds; check that the node "
                "is READY and can be reached from here, or use --gpu_ids"
            ) from error


def local_mesh(graph: mtf.Graph, layout: MeshLayout, devices: LocalDevices) -> tuple[mtf.Mesh, mtf.MeshImpl]:
    """A mesh on local devices. On one device the variables live there; on several the masters live on the CPU."""
    placer = _OneDevice(devices.names[0]) if len(devices.names) == 1 else None
    mesh = mtf.Mesh(graph, "mesh", placer)
    return mesh, _LocalMesh(layout.mesh_shape, layout.layout, list(devices.names))


class _LocalMesh(PlacementMeshImpl):
    """Reads each variable once a step, before it can be updated.

    Mesh-TensorFlow lays out the variable itself, and TensorFlow then reads it anew for every operation that uses it.
    The update of a kernel waits for the kernel's gradient alone, so back-propagation through the layer could read what
    the update had already written: seldom, and oftener on a busy machine, gradients came out wrong without any error.
    """

    def slicewise(self, fn: Callable, *inputs: Any) -> Any:
        def with_values(*slices: Any) -> Any:
            found = fn(*slices)
            return tf.convert_to_tensor(found) if isinstance(found, Variable) else found

        return super().slicewise(with_values, *inputs)


class _OneDevice:
    """Variable placer in the form mtf.Mesh takes."""

    def __init__(self, name: str):
        self.device_function = name


def tpu_mesh(graph: mtf.Graph, layout: MeshLayout, context: Any) -> tuple[mtf.Mesh, mtf.MeshImpl]:
    """A mesh on the cores of a TPU, whose `context` TPUEstimator gives; variables spread over the hosts' memory."""
    hosts = [context.tpu_host_placement_function(host_id=i) for i in range(context.num_hosts)]
    # The first host also holds 300 MB of input buffers for each core of its own and of the other hosts' eight.
    memory_in_use = [300_000_000 * 8 * context.num_hosts] + [0] * (context.num_hosts - 1)
    mesh = mtf.Mesh(graph, "mesh", mtf.utils.BalancedVariablePlacer(hosts, memory_in_use))
    impl = SimdMeshImpl(
        mtf.convert_to_shape(layout.mesh_shape),
        mtf.convert_to_layout_rules(layout.layout),
        device_assignment=context.device_assignment,
    )
    return mesh, impl


def use_graph_mode() -> None:
    """Make TensorFlow build graphs with resource variables; call it before anything is built.

    With reference variables an update may overwrite a weight that back-propagation still reads, and training is then
    wrong without any error.
    """
    tf.disable_v2_behavior()
    tf.enable_resource_variables()
