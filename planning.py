"""--plan: what training a config on a mesh costs each device, said before anything is run; and --auto_layout."""

import itertools
import json
import logging
import math
import re
from collections import defaultdict
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
            *(f"  {name:44} {size:>22,}  {_said(size):>11}" for name, size in rows.items()),
        ]

    def _largest(self) -> list[str]:
        shown = self.plan.largest[:_LARGEST_SHOWN]
        return [
            "largest at the peak, by the operations that made it (h* is every layer)",
            *(f"  {_said(size):>10}  {count:4} x {name}" for name, count, size in shown),
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
                _said(plan.activations),
                _said(plan.total),
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
                f"{_said(traffic.sent)} to send"
            )
        return [*lines, f"arithmetic of each device in a step: {self.plan.flops:.3e} FLOPs"]

    def _verdict(self) -> list[str]:
        lines = [*_comparison(self)]
        lines += [f"problem: {problem}" for problem in self.problems] + [f"advice: {advice}" for advice in self.advice]
        return [*lines, f"verdict: {self._conclusion()}"]

    def _conclusion(self) -> str:
        name = self.config.name
        if self.problems:
            return f"{name} cannot be trained so"
        if self.hardware is None:
            return f"{name} fits its mesh and layout; --device NAME also says whether it fits into memory"
        return f"{name} can be trained so"


def _said(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:.0f} bytes"


def _kept(config: ModelConfig) -> str:
    return "recomputed" if config.recompute_grad else "kept"


def _settings(config: ModelConfig) -> str:
    """What tells one of the alternatives from the others, as flags."""
    keys = ("recompute_grad", "tokens_per_mb_per_replica")
    return " ".join(f"--set {key}={json.dumps(getattr(config, key))}" for key in keys)


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
    yield f"  memory: {_said(plan.total)} of {_said(hardware.memory)}, {share:.0%}"
    if hardware.is_tpu:
        yield "  XLA joins operations on a TPU, so much of the activations may never be in memory: take them as a bound"
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
    sentences = [misfit.sentence for misfit in misfits(layout, _sizes(config), TENSORS)]
    unfit = {misfit.dim for misfit in misfits(layout, _sizes(config, evaluates=False), TENSORS)}
    left_out = tuple(f"{dim}:{axis}" for dim, axis in layout.rules.items() if dim in unfit)
    layout = layout.without(unfit)
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
    advice: list[str] = []
    if not left_out:  # else the layout that is meant needs less than what was planned
        sentences += too_large(plan, found, hardware)
        advice = [*_idle(layout), *_whole_everywhere(config, plan, layout), *_barely(plan, hardware)]
    others = tuple(found) if len(found) > 1 else ()
    return Report(config, layout, left_out, plan, others, hardware, tuple(sentences), tuple(advice))


def search_layout(config: ModelConfig, meshes: Sequence[Mapping[str, int]]) -> MeshLayout:
    """The layout that trains `config` in least memory: Mesh-TensorFlow's choice on each of `meshes` {axis: size}, and
    of these the one whose plan is the smallest. Raises UserError if nothing can be split."""
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
            layout = least_memory(step, axes, _sizes(config, evaluates=True), TENSORS)
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


def _sizes(config: ModelConfig, evaluates: bool | None = None) -> dict[str, dict[str, int]]:
    """Of what a layout may split, with the batch of evaluation where training evaluates, or where `evaluates`."""
    if evaluates is None:
        evaluates = config.eval_steps > 0 or bool(config.eval_tasks)
    keys = ["train_batch_size", *(["eval_batch_size"] if evaluates else [])]
    return layout_sizes(config, {key: getattr(config, key) for key in keys})


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
    sentence = f"{_said(plan.total)} do not fit into the {_said(hardware.memory)} of a device of {hardware.name}"
    fitting = [other for other in found if other.plan.total <= hardware.memory]
    if fitting:
        return [f"{sentence}; with {_settings(min(fitting, key=lambda other: other.plan.flops).config)} they do"]
    least = min(found, key=lambda other: other.plan.total).plan
    kept = least.parameters + least.slots + least.gradients
    if kept > hardware.memory:
        return [
            f"{sentence}: weights, slots and gradients alone are {_said(kept)}; split more of the weights, into more "
            "parts: a longer axis for heads, vocab and intermediate_expanded, or for embd"
        ]
    return [f"{sentence}; split more dimensions in layout, over more devices, or lower train_batch_size or n_ctx"]


def _barely(plan: Plan, hardware: Hardware | None) -> list[str]:
    if hardware is None or not _NEARLY_FULL * hardware.memory < plan.total <= hardware.memory:
        return []
    return ["it fits barely; leave a tenth of the memory to TensorFlow itself"]


def _idle(layout: MeshLayout) -> Iterator[str]:
    for axis, ways in layout.axes.items():
        if ways > 1 and axis not in layout.rules.values():
            yield f"no rule of the layout uses axis {axis!r}, so its {ways} devices do the same; split more over it"


def _whole_everywhere(config: ModelConfig, plan: Plan, layout: MeshLayout) -> Iterator[str]:
    """What could be split and lies whole on every device, the weights of all layers together."""
    if layout.size == 1:
        return
    kept = (plan.parameters + plan.slots + plan.gradients) / plan.parameters  # bytes for each byte of a weight
    whole = [weight for weight in plan.weights if weight.copies == layout.size]
    together = kept * sum(weight.bytes for weight in whole)
    if len(whole) == len(plan.weights) and together >= _MOSTLY * plan.total and not any(_idle(layout)):
        yield (
            f"all weights lie whole on every device: with slots and gradients {_said(together)} of "
            f"{_said(plan.total)}; give the mesh a second axis and split heads, vocab and intermediate_expanded over "
            "it, or embd"
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
            f"{_said(size)} of {_said(plan.total)}; {advised}"
        )


def _split(config: ModelConfig, shape: Mapping[str, int], layout: MeshLayout) -> tuple[MeshLayout, str]:
    """The layout with one more rule, which splits a weight of `shape`, and what to say of it or of its absence."""
    sizes = _sizes(config)
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
