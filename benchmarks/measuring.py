"""What the benchmarks measure with."""

import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def describe_machine(others: float) -> str:
    """Memory and cores, of which `others` were on average busy with something else."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{memory:.0f} GB, {num_cores()} cores of {platform.machine()}, {others:.2f} of them busy elsewhere"


def traced_devices(run: Callable[..., Any]) -> Iterable[Any]:
    """What each device did in `run`, which passes what it gets on to Session.run: `step_stats.dev_stats`."""
    import tensorflow.compat.v1 as tf

    traced = tf.RunMetadata()
    run(options=tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE), run_metadata=traced)
    return list(traced.step_stats.dev_stats)


def held_bytes(devices: Iterable[Any]) -> list[tuple[int, int]]:
    """(microseconds since the first one, bytes held from then on): what a run allocated and gave back on `devices`, of
    traced_devices. What it found allocated, such as variables, does not count."""
    changes = sorted(
        (record.alloc_micros, record.alloc_bytes)
        for device in devices
        for node in device.node_stats
        for used in node.memory
        for record in used.allocation_records
    )
    held, found = 0, []
    for moment, change in changes:
        held += change
        found.append((moment - changes[0][0], held))
    return found


def peak_bytes(devices: Iterable[Any]) -> int:
    """The most that a run held at a time, of held_bytes."""
    return max((held for _, held in held_bytes(devices)), default=0)


def device_peaks(devices: Iterable[Any]) -> list[int]:
    """The same for each device that allocated anything."""
    parts = defaultdict(list)
    for device in devices:
        parts[device.device].append(device)
    return [peak for part in parts.values() if (peak := peak_bytes(part))]


@dataclass
class Measured:
    """One of several things to compare, and what was measured of it."""

    step: Callable[[], Any]
    peak_bytes: int
    wall: list[float] = field(default_factory=list, kw_only=True)  # seconds, one entry a step
    cpu: list[float] = field(default_factory=list, kw_only=True)  # of all threads


def in_turn(variants: Sequence[Measured], rounds: int) -> float:
    """Run every variant once a round, so that whatever else the machine does meets all of them alike; the order turns
    round with every round. Returns how many cores, on average, were busy meanwhile with something else."""
    start, busy = time.perf_counter(), busy_seconds()
    for number in tqdm(range(rounds), desc="rounds", unit="round", dynamic_ncols=True):
        for variant in variants[:: 1 if number % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            variant.step()
            variant.wall.append(time.perf_counter() - wall)
            variant.cpu.append(time.process_time() - cpu)
    elsewhere = busy_seconds() - busy - sum(sum(variant.cpu) for variant in variants)
    return max(0.0, elsewhere / (time.perf_counter() - start))
