"""What --plan finds, and the words in which it says so."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from config import ModelConfig
from errors import UserError
from mesh.hardware import GIB, Hardware
from mesh.layout import MeshLayout, check_devices, misfits
from mesh.plan import Plan
from models.dims import TENSORS
from planning.advice import barely, idle, too_large, whole_everywhere
from planning.alternatives import Alternative, choices_beside
from planning.sizes import sizes_to_split
from planning.target import ANY, Target
from planning.training_plan import plan_training
from planning.units import in_units
from training.step import num_microbatches

_LARGEST_SHOWN = 8


@dataclass(frozen=True)
class Report:
    """What --plan found.

    Attributes:
      config, layout: what was planned; the layout without the rules that do not fit.
      left_out: these rules.
      plan: of the config as it is.
      alternatives: it and the ones beside it, if they were asked for.
      hardware: the device to compare with, if one was named.
      problems: why it cannot run so.
      advice: what could be better.
    """

    config: ModelConfig
    layout: MeshLayout
    left_out: tuple[str, ...]
    plan: Plan
    alternatives: tuple[Alternative, ...]
    hardware: Hardware | None
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def seconds_of_arithmetic(self) -> float:
        """Of a step on the named device, at its full rate."""
        assert self.hardware is not None
        return self.plan.flops / self.hardware.flops[self.config.precision]

    @property
    def seconds_of_communication(self) -> float:
        """Of a step on the named device, over all its links at once."""
        assert self.hardware is not None
        return self.plan.sent / self.hardware.link

    @property
    def seconds(self) -> float:
        """Of a step at best, when the one hides behind the other."""
        return max(self.seconds_of_arithmetic, self.seconds_of_communication)

    def text(self) -> str:
        """The report, as lines."""
        blocks = [self._head(), self._memory(), self._largest(), self._otherwise(), self._costs(), self._verdict()]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def _head(self) -> list[str]:
        config, layout = self.config, self.layout
        count = num_microbatches(config, layout)
        cut = f", in {count} microbatches" if count > 1 else ""
        devices = f"{layout.size} device{'s' * (layout.size > 1)}"
        lines = [
            f"plan of training {config.name}: {config.n_layer} layers, {config.opt_name}, {config.precision}",
            f"mesh {layout.mesh_shape or '(no axes)'}: {devices}; layout {layout.layout or '(nothing split)'}",
            f"a step: {config.train_batch_size} sequences of {config.n_ctx} tokens{cut}, activations {_kept(config)}",
        ]
        if self.left_out:
            lines.append(f"planned without {', '.join(self.left_out)}, which does not fit: see the problems below")
        return lines

    def _memory(self) -> list[str]:
        plan = self.plan
        rows = {
            "parameters": plan.parameters,
            "optimizer slots": plan.slots,
            "gradients, once all are there": plan.gradients,
            "at the peak: activations": plan.activations,
            "at the peak: gradients": plan.gradients_at_peak,
            "at the peak: all, with parameters and slots": plan.total,
        }
        return [
            "bytes on each device; the peak is the moment of a step when memory holds most",
            *(f"  {name:44} {size:>22,}  {in_units(size):>11}" for name, size in rows.items()),
        ]

    def _largest(self) -> list[str]:
        shown = self.plan.largest[:_LARGEST_SHOWN]
        return [
            "largest at the peak, by the operations that made it (h* is every layer)",
            *(f"  {in_units(size):>10}  {count:4} x {name}" for name, count, size in shown),
        ]

    def _otherwise(self) -> list[str]:
        if not self.alternatives:
            return []
        heads = ("recompute_grad", "tokens_per_mb_per_replica", "microbatches", "activations", "all")
        lines = ["the peak with other settings", "  " + "  ".join(f"{head:>11}" for head in heads)]
        for other in self.alternatives:
            config, plan = other.config, other.plan
            cells = (
                json.dumps(config.recompute_grad),
                json.dumps(config.tokens_per_mb_per_replica),
                f"{other.microbatches}",
                in_units(plan.activations),
                in_units(plan.total),
            )
            row = "  ".join(f"{cell:>{max(len(head), 11)}}" for head, cell in zip(heads, cells, strict=True))
            lines.append(f"  {row}{'  <- as it is' * (plan is self.plan)}")
        return lines

    def _costs(self) -> list[str]:
        lines = ["communication of each device in a step" if self.plan.traffic else "no communication"]
        for traffic in self.plan.traffic:
            over = " and ".join(traffic.axes)
            lines.append(
                f"  over {over} ({traffic.ways} ways): {traffic.kind} of {traffic.bytes:,} bytes, "
                f"{in_units(traffic.sent)} to send"
            )
        return [*lines, f"arithmetic of each device in a step: {self.plan.flops:.3e} FLOPs"]

    def _comparison(self) -> Iterator[str]:
        hardware = self.hardware
        if hardware is None:
            return
        rate, plan = hardware.flops[self.config.precision], self.plan
        share = plan.total / hardware.memory
        yield (
            f"{hardware.name}: {hardware.memory / GIB:.0f} GiB, {rate / 1e12:.1f} TFLOP/s and "
            f"{hardware.link / 1e9:.0f} GB/s for each device ({hardware.source})"
        )
        yield f"  memory: {in_units(plan.total)} of {in_units(hardware.memory)}, {share:.0%}"
        if hardware.is_tpu:
            yield (
                "  XLA joins operations on a TPU, so much of the activations may never be in memory: take them as a "
                "bound"
            )
        computing, sending = self.seconds_of_arithmetic, self.seconds_of_communication
        yield (
            f"  a step takes {self.seconds:.3g} s at best: {computing:.3g} s of arithmetic, {sending:.3g} s of "
            f"communication; {self.config.tokens_per_batch / self.seconds:,.0f} tokens/s"
        )

    def _verdict(self) -> list[str]:
        lines = [*self._comparison()]
        lines += [f"problem: {problem}" for problem in self.problems] + [f"advice: {advice}" for advice in self.advice]
        return [*lines, f"verdict: {self._conclusion()}"]

    def _conclusion(self) -> str:
        name = self.config.name
        if self.problems:
            return f"{name} cannot be trained so"
        if self.hardware is None:
            return f"{name} fits its mesh and layout; --device NAME also says whether it fits into memory"
        return f"{name} can be trained so"


def _kept(config: ModelConfig) -> str:
    return "recomputed" if config.recompute_grad else "kept"


def make_report(
    config: ModelConfig,
    layout: MeshLayout,
    devices: Target = ANY,
    *,
    alternatives: bool = True,
) -> Report:
    """Plan `config` on `layout`.

    Rules of the layout that do not fit are problems, and the rest is planned without them.

    Args:
      config, layout: what to plan.
      devices: what to plan for.
      alternatives: whether to plan also with and without microbatches and recomputation.
    """
    sentences = [misfit.sentence for misfit in misfits(layout, sizes_to_split(config), TENSORS)]
    unfit = {misfit.dim for misfit in misfits(layout, sizes_to_split(config, with_evaluation=False), TENSORS)}
    left_out = tuple(f"{dim}:{axis}" for dim, axis in layout.rules.items() if dim in unfit)
    layout = layout.without(unfit)
    if devices.count is not None:
        try:
            check_devices(layout, devices.count, devices.what)
        except UserError as error:
            sentences.append(str(error))
    choices = choices_beside(config, layout) if alternatives else [config]
    hardware, found = devices.hardware, []
    for choice in tqdm(choices, desc=f"planning {config.name}", unit="plan", leave=False, disable=len(choices) == 1):
        plan = plan_training(choice, layout, devices.on_tpu)
        found.append(Alternative(choice, num_microbatches(choice, layout), plan))
    plan = next(other.plan for other in found if other.config is config)
    advice: list[str] = []
    if not left_out:  # else the layout that is meant needs less than what was planned
        sentences += too_large(plan, found, hardware)
        advice = [*idle(layout), *whole_everywhere(config, plan, layout), *barely(plan, hardware)]
    others = tuple(found) if len(found) > 1 else ()
    return Report(config, layout, left_out, plan, others, hardware, tuple(sentences), tuple(advice))
