"""--plan: what training a config on a mesh costs each device, said before anything is run; and --auto_layout."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from config import ModelConfig
from errors import UserError
from mesh.experts import with_expert_rules
from mesh.hardware import GIB, Hardware
from mesh.layout import MeshLayout, check_devices, misfits
from mesh.plan import Plan, Weight, make_plan
from model_fns import num_microbatches, training_graph
from models.dims import TENSORS, layout_sizes

logger = logging.getLogger(__name__)

_GIANT = 0.05  # a weight that lies whole on every device is worth a word from this share of its memory
_MOSTLY = 0.5  # and so are all of them together from this share
_NEARLY_FULL = 0.9
_LARGEST_SHOWN = 8


@dataclass(frozen=True)
class Alternative:
    """The plan of a config with other microbatches or with activations recomputed, or not."""

    config: ModelConfig
    microbatches: int
    plan: Plan


@dataclass(frozen=True)
class Report:
    """What --plan found.

    Attributes:
      config, layout: what was planned; the layout without the rules that do not fit.
      plan: of the config as it is.
      alternatives: it and the ones beside it, if they were asked for.
      hardware: the device to compare with, if one was named.
      problems: why it cannot run so.
      advice: what could be better.
    """

    config: ModelConfig
    layout: MeshLayout
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
        return [
            f"plan of training {config.name}: {config.n_layer} layers, {config.opt_name}, {config.precision}",
            f"mesh {layout.mesh_shape}: {devices}; layout {layout.layout or '(nothing split)'}",
            f"a step: {config.train_batch_size} sequences of {config.n_ctx} tokens{cut}, "
            f"activations {'recomputed' if config.recompute_grad else 'kept'}",
        ]

    def _memory(self) -> list[str]:
        plan = self.plan
        rows = {
            "parameters": plan.parameters,
            "optimizer slots": plan.slots,
            "gradients": plan.gradients,
            "at the peak: activations": plan.activations,
            "at the peak: gradients": plan.gradients_at_peak,
            "at the peak: all": plan.total,
        }
        return ["bytes on each device", *(f"  {name:24} {size:>22,}  {_gb(size):>11}" for name, size in rows.items())]

    def _largest(self) -> list[str]:
        shown = self.plan.largest[:_LARGEST_SHOWN]
        return ["largest at the peak", *(f"  {_gb(size):>10}  {count:4} x {name}" for name, count, size in shown)]

    def _otherwise(self) -> list[str]:
        if not self.alternatives:
            return []
        lines = ["at the peak, otherwise        activations         all"]
        for other in self.alternatives:
            plan, mark = other.plan, "  <- as it is" if other.plan is self.plan else ""
            lines.append(f"  {_said(other):26} {_gb(plan.activations):>12} {_gb(plan.total):>11}{mark}")
        return lines

    def _costs(self) -> list[str]:
        lines = ["communication of each device in a step" if self.plan.traffic else "no communication"]
        for traffic in self.plan.traffic:
            over = " and ".join(traffic.axes)
            lines.append(
                f"  over {over} ({traffic.ways} ways): {traffic.kind} of {traffic.bytes:,} bytes, "
                f"{_gb(traffic.sent)} to send"
            )
        return [*lines, f"arithmetic of each device in a step: {self.plan.flops:.3e} FLOPs"]

    def _verdict(self) -> list[str]:
        lines = [*_comparison(self)]
        lines += [f"problem: {problem}" for problem in self.problems] + [f"advice: {advice}" for advice in self.advice]
        what = "cannot be trained so" if self.problems else "can be trained so"
        return [*lines, f"verdict: {self.config.name} {what}"]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.3f} MB"


def _said(other: Alternative) -> str:
    cut = f"{other.microbatches} microbatches" if other.microbatches > 1 else "whole batch"
    return f"{cut}, {'recomputed' if other.config.recompute_grad else 'kept'}"


def _comparison(report: Report) -> Iterator[str]:
    hardware = report.hardware
    if hardware is None:
        return
    rate, plan = hardware.flops[report.config.precision], report.plan
    share = plan.total / hardware.memory
    yield (
        f"{hardware.name}: {hardware.memory / GIB:.0f} GiB, {rate / 1e12:.1f} TFLOP/s and {hardware.link / 1e9:.0f} "
        f"GB/s for each device ({hardware.source})"
    )
    yield f"  memory: {_gb(plan.total)} of {_gb(hardware.memory)}, {share:.0%}"
    computing, sending = report.seconds_of_arithmetic, report.seconds_of_communication
    yield (
        f"  a step takes {report.seconds:.3g} s at best: {computing:.3g} s of arithmetic, {sending:.3g} s of "
        f"communication; {report.config.tokens_per_batch / report.seconds:,.0f} tokens/s"
    )


def make_report(
    config: ModelConfig,
    layout: MeshLayout,
    hardware: Hardware | None = None,
    there: tuple[int, str] | None = None,
    *,
    alternatives: bool = True,
) -> Report:
    """Plan `config` on `layout`.

    Rules of the layout that do not fit are problems, and the rest is planned without them.

    Args:
      config, layout: what to plan.
      hardware: what to compare with.
      there: how many devices there are, and what messages call them; None for as many as the mesh wants.
      alternatives: whether to plan also with and without microbatches and recomputation.
    """
    problems = list(_misfits(config, layout))
    layout = layout.without([dim for dim, _ in problems])
    sentences = [sentence for _, sentence in problems]
    if there is not None:
        try:
            check_devices(layout, *there)
        except UserError as error:
            sentences.append(str(error))
    choices = _choices(config, layout) if alternatives else [config]
    on_tpu = hardware is not None and hardware.is_tpu
    found = []
    for choice in tqdm(choices, desc=f"planning {config.name}", unit="plan", leave=False, disable=len(choices) == 1):
        plan = make_plan(training_graph(choice, layout), with_expert_rules(layout), on_tpu)
        found.append(Alternative(choice, num_microbatches(choice, layout), plan))
    plan = next(other.plan for other in found if other.config is config)
    sentences += too_large(plan, found, hardware)
    advice = [*_whole_everywhere(config, plan, layout), *_barely(plan, hardware)]
    others = tuple(found) if len(found) > 1 else ()
    return Report(config, layout, plan, others, hardware, tuple(sentences), tuple(advice))


def search_layout(config: ModelConfig, meshes: Sequence[Mapping[str, int]]) -> MeshLayout:
    """The layout that trains `config` in least memory: Mesh-TensorFlow's choice on each of `meshes` {axis: size}, and
    of these the one whose plan is the smallest. Raises UserError if nothing can be split."""
    from mesh.auto_layout import least_memory  # here, because the solver takes a second to import and few runs need it

    sizes = {"train_batch_size": config.train_batch_size, "eval_batch_size": config.eval_batch_size}
    found: list[tuple[int, MeshLayout]] = []
    problem = f"no dimension of the model can be split over {math.prod(meshes[0].values())} devices; use fewer"
    with tqdm(meshes, desc="searching layouts", unit="mesh", leave=False) as bar:
        for axes in bar:
            bar.set_postfix_str(",".join(f"{axis}:{size}" for axis, size in axes.items()))
            batch = _batch_to_search(config, axes)
            step = training_graph(
                config.model_copy(update={"train_batch_size": batch, "tokens_per_mb_per_replica": None}),
                MeshLayout(axes, {}),
            )
            layout = least_memory(step, axes, layout_sizes(config, sizes), TENSORS)
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
                    total = make_plan(training_graph(config, layout), with_expert_rules(layout)).total
                    found.append((total, layout))
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


def _sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    keys = ["train_batch_size", *(["eval_batch_size"] if config.eval_steps else [])]
    return layout_sizes(config, {key: getattr(config, key) for key in keys})


def _misfits(config: ModelConfig, layout: MeshLayout) -> Iterator[tuple[str, str]]:
    """(dimension that cannot be split, sentence), until the layout without these fits."""
    for misfit in misfits(layout, _sizes(config), TENSORS):
        yield misfit.dim, misfit.sentence


def _choices(config: ModelConfig, layout: MeshLayout) -> list[ModelConfig]:
    """`config` and what differs from it in microbatches, or none, and in recomputation."""
    tokens = config.tokens_per_mb_per_replica
    choices: dict[tuple[bool, int], ModelConfig] = {}
    for recompute in (False, True):
        for limit in (None, tokens or config.n_ctx):
            choice = config.model_copy(update={"recompute_grad": recompute, "tokens_per_mb_per_replica": limit})
            same = (recompute, limit) == (config.recompute_grad, tokens)
            choices.setdefault((recompute, num_microbatches(choice, layout)), config if same else choice)
            if same:
                choices[recompute, num_microbatches(choice, layout)] = config
    return list(choices.values())


def too_large(plan: Plan, found: Sequence[Alternative], hardware: Hardware | None) -> list[str]:
    if hardware is None or plan.total <= hardware.memory:
        return []
    sentence = f"{_gb(plan.total)} do not fit into the {_gb(hardware.memory)} of a device of {hardware.name}"
    fitting = [other for other in found if other.plan.total <= hardware.memory]
    if fitting:
        config = min(fitting, key=lambda other: other.plan.flops).config
        limit = "null" if config.tokens_per_mb_per_replica is None else config.tokens_per_mb_per_replica
        return [
            f"{sentence}; --set recompute_grad={str(config.recompute_grad).lower()} "
            f"--set tokens_per_mb_per_replica={limit} would"
        ]
    least = min(found, key=lambda other: other.plan.total).plan
    kept = least.parameters + least.slots + least.gradients
    if kept > hardware.memory:
        return [
            f"{sentence}: weights, slots and gradients alone are {_gb(kept)}; split more of the weights, over "
            "more devices"
        ]
    return [f"{sentence}; split more dimensions in layout, over more devices, or lower train_batch_size or n_ctx"]


def _barely(plan: Plan, hardware: Hardware | None) -> list[str]:
    if hardware is None or not _NEARLY_FULL * hardware.memory < plan.total <= hardware.memory:
        return []
    return ["it fits barely, and TensorFlow itself needs some memory; leave it a tenth"]


def _whole_everywhere(config: ModelConfig, plan: Plan, layout: MeshLayout) -> Iterator[str]:
    """What could be split and lies whole on every device."""
    if layout.size == 1:
        return
    kept = (plan.parameters + plan.slots + plan.gradients) / plan.parameters  # bytes for each byte of a weight
    whole = [weight for weight in plan.weights if weight.copies == layout.size]
    together = kept * sum(weight.bytes for weight in whole)
    if len(whole) == len(plan.weights) and together >= _MOSTLY * plan.total:
        yield (
            f"all weights lie whole on every device: with slots and gradients {_gb(together)} of {_gb(plan.total)}; "
            "give the mesh a second axis and split heads, vocab and intermediate_expanded over it, or embd"
        )
        return
    for weight in whole:
        if kept * weight.bytes >= _GIANT * plan.total:
            shape = ", ".join(f"{dim} {size}" for dim, size in weight.shape.items())
            yield (
                f"{weight.name} [{shape}] lies whole on every device: with slots and gradient "
                f"{_gb(kept * weight.bytes)} of {_gb(plan.total)}; {_splits(config, weight, layout)}"
            )


def _splits(config: ModelConfig, weight: Weight, layout: MeshLayout) -> str:
    """The rules that would split `weight`, or why there is none."""
    sizes, reasons = _sizes(config), []
    for dim in weight.shape:
        for axis, ways in layout.axes.items():
            if dim not in sizes or dim in layout.rules or ways == 1:
                continue
            longer = replace(layout, rules={**layout.rules, dim: axis})
            found = next(misfits(longer, sizes, TENSORS), None)
            if found is None:
                return f"add {dim}:{axis} to the layout"
            reasons.append(found.sentence.split(";")[0])
    return f"no axis can take it: {reasons[0]}" if reasons else "no rule can split it"
