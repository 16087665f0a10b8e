"""--plan, held to a real step and to numbers worked out by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import main
from benchmarks.plans import DOCUMENT, PLANNED, row, rows_written
from config import ModelConfig
from errors import UserError
from mesh.hardware import GIB, GPUS, hardware
from mesh.layout import MeshLayout, parse
from mesh.plan import Plan
from planning.advice import too_large
from planning.report import make_report
from planning.target import Target
from planning.training_plan import plan_training
from tests.config_values import make
from tests.plan_reference import plan_config, run_step
from tests.tiny import tiny_config

MODEL_PARALLEL = "batch:x,heads:y,intermediate_expanded:y,vocab:y"
ONE_LAYER: dict[str, Any] = {"n_layer": 1, "attention_types": []}
RUN_HERE = {"quickstart", "linear_small_cpu", "mlm_small_cpu", "moe_small_cpu"}  # configs for this very machine
EXPERTS = ONE_LAYER | {"moe_layers": [0], "moe_params": {"moe_num_experts": 4, "moe_hidden_size": 64}}


def plan(config: ModelConfig, mesh_shape: str, layout: str, on_tpu: bool = False) -> Plan:
    return plan_training(config, parse(mesh_shape, layout, 1), on_tpu)


def by_kind(plan: Plan) -> dict[str, int]:
    """{kind of collective: bytes}, over one axis."""
    return {traffic.kind: traffic.bytes for traffic in plan.traffic}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        (("x:2,y:2", MODEL_PARALLEL), ONE_LAYER | {"weight_decay": 0.1}),
        (
            ("x:2,y:2", "batch:x,experts:x,heads:y"),
            ONE_LAYER | EXPERTS | {"opt_name": "adafactor", "precision": "bfloat16"},
        ),
        (("x:1", ""), {"recompute_grad": True, "tokens_per_mb_per_replica": 128}),
        (("x:1", ""), {"entmax_loss": True, "tokens_per_mb_per_replica": 128}),
    ],
)
def test_a_real_step_costs_what_was_planned(tmp_path: Path, mesh: tuple[str, str], settings: dict[str, Any]) -> None:
    config = plan_config(tmp_path, **settings)
    planned, real = plan(config, *mesh), run_step(config, *mesh)
    assert (planned.parameters, planned.slots) == (real.parameters, real.slots)
    assert {(t.kind, tuple("xy".index(axis) for axis in t.axes)): t.bytes for t in planned.traffic} == real.traffic
    assert [planned.peak] * len(real.peaks) == pytest.approx(real.peaks, rel=0.2)


def test_arithmetic_by_hand(tmp_path: Path) -> None:
    width, layers, context, vocab, batch = 256, 2, 64, 512, 4
    config = plan_config(tmp_path, n_embd=width, n_ctx=context, n_vocab=vocab, train_batch_size=batch)
    kernels = 2 * (12 * width**2 * layers + vocab * width)  # for each token: four of attention, two of 4 x width, wte
    attention = 2 * 2 * context * width * layers
    by_hand = 3 * batch * context * (kernels + attention)  # gradients of both factors cost as much again, each
    assert by_hand < plan(config, "x:1", "").flops < 1.1 * by_hand


def test_data_parallelism_sums_every_gradient_once(tmp_path: Path) -> None:
    found = plan(plan_config(tmp_path), "x:4", "batch:x")
    assert [(t.kind, t.axes, t.ways) for t in found.traffic] == [("all-reduce", ("x",), 4)]
    scalars = found.traffic[0].bytes - found.parameters
    assert 0 < scalars <= 16  # losses and how many tokens are scored
    assert found.traffic[0].sent == pytest.approx(2 * 3 / 4 * found.traffic[0].bytes)  # twice around a ring of four
    assert found.gradients == found.parameters == found.slots / 2


def test_what_saves_memory(tmp_path: Path) -> None:
    """The layers' activations are kept once for each layer, or not; those of a microbatch are a part of the batch's."""
    report = make_report(plan_config(tmp_path, n_layer=4, attention_types=[]), parse("x:2", "batch:x", 2))
    kept = {(a.config.recompute_grad, a.microbatches): a.plan for a in report.alternatives}
    assert list(kept) == [(False, 1), (False, 4), (True, 1), (True, 4)]
    assert kept[False, 1] is report.plan
    assert kept[True, 1].peak < 0.5 * kept[False, 1].peak
    assert kept[False, 4].activations < 0.35 * kept[False, 1].activations
    assert kept[True, 1].flops > 1.2 * kept[False, 1].flops
    assert {p.parameters for p in kept.values()} == {report.plan.parameters}
    text = report.text()
    for size in (report.plan.parameters, report.plan.slots, report.plan.activations, report.plan.traffic[0].bytes):
        assert f"{size:,}" in text
    assert re.search(r"^ +false +64 +4 +[\d.]+ [kM]B +[\d.]+ [kM]B$", text, re.MULTILINE)
    assert text.endswith("fits its mesh and layout; --device NAME also says whether it fits into memory")


def test_what_a_tpu_does_otherwise(tmp_path: Path) -> None:
    config, layout = plan_config(tmp_path), ("x:2", "memory_length:x,embd:x")
    local, tpu = (plan(config, *layout, on_tpu) for on_tpu in (False, True))
    assert (tpu.parameters, tpu.slots) == (local.parameters, local.slots)
    assert tpu.flops > local.flops  # rows of the table are looked up by a product
    gathered, summed = (by_kind(p) for p in (local, tpu))
    assert gathered.keys() == {"all-reduce", "all-gather"} and summed.keys() == {"all-reduce"}
    highest = 4 * config.n_layer * config.train_batch_size * config.n_head * config.n_ctx  # of scores: gathered there
    assert summed["all-reduce"] == sum(gathered.values()) + highest


def test_types_in_which_a_tpu_sends(tmp_path: Path) -> None:
    """bfloat16 numbers are summed as float32 where more than 8 are, and experts are sent bfloat16 alone."""
    config = plan_config(tmp_path, precision="bfloat16", n_head=16, **ONE_LAYER)
    for ways, times in ((8, 1), (16, 2)):
        local, tpu = (plan(config, f"x:{ways}", "heads:x,intermediate_expanded:x", on_tpu) for on_tpu in (False, True))
        assert by_kind(tpu)["all-reduce"] == pytest.approx(times * by_kind(local)["all-reduce"], rel=1e-3)  # + scalars
    local, tpu = (
        plan(plan_config(tmp_path, **EXPERTS), "x:2", "batch:x,experts:x", on_tpu) for on_tpu in (False, True)
    )
    assert by_kind(tpu)["all-to-all"] == by_kind(local)["all-to-all"] / 2
    assert by_kind(tpu)["all-reduce"] == by_kind(local)["all-reduce"]


def test_what_is_held_at_the_peak_adds_up(tmp_path: Path) -> None:
    for on_tpu in (False, True):
        found = plan(plan_config(tmp_path, **ONE_LAYER), "x:2,y:2", MODEL_PARALLEL, on_tpu)
        assert sum(size for _, _, size in found.largest) == found.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "width", "heads", "billions"), [(96, 12288, 96, 174.6), (16, 73728, 256, 1047.5)], ids=["175B", "1T"]
)
def test_models_larger_than_any_device(layers: int, width: int, heads: int, billions: float) -> None:
    """GPT-3 (arXiv:2005.14165), and a trillion parameters."""
    values = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_ctx": 2048, "n_vocab": 50257}
    config = make(
        **values, attention_types=[], train_batch_size=1536, recompute_grad=True, tokens_per_mb_per_replica=2048
    )
    layout = parse("x:64,y:32", "batch:x,heads:y,intermediate_expanded:y", 1)
    report = make_report(config, layout, Target.of(hardware("a100-80")), alternatives=False)
    found = report.plan
    parameters = sum(math.prod(weight.shape.values()) for weight in found.weights)
    assert parameters == pytest.approx(billions * 1e9, rel=1e-3)
    assert sum(weight.bytes * layout.size // weight.copies for weight in found.weights) == 4 * parameters
    assert found.slots == 2 * found.parameters == 2 * found.gradients
    assert 6 * parameters * config.tokens_per_batch < found.flops * layout.size  # as papers count, without recomputing
    assert "weights, slots and gradients alone are" in report.problems[0]


@pytest.mark.slow
def test_the_table_is_true_and_every_config_is_planned() -> None:
    written = rows_written()
    assert written.keys() == PLANNED.keys() == {path.stem for path in Path("configs").glob("*.json")} - RUN_HERE
    for name, line in written.items():
        assert row(name) == line


@pytest.mark.slow
def test_commands_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^python main\.py (.*)$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main.main(command.split()) == 0, command
        assert re.search(r'verdict: \w+ can be trained so\n$|^"layout": "[\w:,]+"\n$', capsys.readouterr().out), command


def test_misfits_are_findings(tmp_path: Path) -> None:
    config = plan_config(tmp_path, n_head=4, n_vocab=257)
    layout = parse("x:2,y:8", "batch:x,heads:y,vocab:y,embd:x,head:y", 1)
    report = make_report(config, layout, Target.of(hardware("v3-8")), alternatives=False)
    assert report.layout.rules == {"batch": "x"}
    for sentence, part in zip(
        report.problems,
        (
            "'heads:y' splits n_head = 4 into 8 parts, which does not divide it; change n_head to a multiple of 8, let "
            "axis 'y' have 4",
            "'vocab:y' splits n_vocab = 257 into 8 parts",
            "names dimension 'head', which this model does not have; did you mean 'heads'?",
            "splits 'batch' and 'embd' over the same axis 'x', but one tensor [batch, sequence, embd] has both",
            "has 16 processors but there are 8 TPU devices in v3-8; use a mesh whose sizes multiply to 8",
        ),
        strict=True,
    ):
        assert part in sentence
    assert "planned without heads:y, vocab:y, embd:x, head:y, which does not fit" in report.text()
    assert report.text().endswith("cannot be trained so")
    assert not report.advice


def test_training_may_fit_where_its_evaluation_does_not(tmp_path: Path) -> None:
    config = plan_config(tmp_path, eval_steps=1, eval_batch_size=3, **ONE_LAYER)
    report = make_report(config, parse("x:2", "batch:x", 2), alternatives=False)
    assert "splits eval_batch_size = 3 into 2 parts" in report.problems[0]
    assert report.layout.rules == {"batch": "x"} and not report.left_out


def test_advice_can_be_followed_all_at_once(tmp_path: Path) -> None:
    config = plan_config(tmp_path, n_vocab=1024, train_batch_size=2, n_ctx=24)
    idle, *advice = make_report(config, parse("x:2,y:2", "batch:x", 4), alternatives=False).advice
    assert idle == "no rule of the layout uses axis 'y', so its 2 devices do the same; split more over it"
    assert "2 x gpt2/h*/mlp/conv1d_main/c_fc/kernel [embd 32, intermediate_expanded 128] lie whole" in "".join(advice)
    rules = [sentence.rpartition("add ")[2].removesuffix(" to the layout") for sentence in advice]
    assert rules == ["vocab:y", "intermediate_expanded:y"]
    followed = make_report(config, parse("x:2,y:2", ",".join(["batch:x", *rules]), 4), alternatives=False)
    assert not followed.problems and not followed.advice


def test_what_lies_whole_on_every_device(tmp_path: Path) -> None:
    config = plan_config(tmp_path, n_vocab=4096, train_batch_size=2, n_ctx=8)
    parallel = make_report(config, parse("x:2", "batch:x", 2), alternatives=False)
    assert "all weights lie whole on every device" in parallel.advice[0]
    split = make_report(config, parse("x:2,y:2", "batch:x,heads:y", 4), alternatives=False)
    assert "gpt2/wte [vocab 4096, embd 32] lies whole on every device" in split.advice[0]
    assert split.advice[0].endswith("add vocab:y to the layout")
    odd = make_report(
        plan_config(tmp_path, n_vocab=4097, train_batch_size=2, n_ctx=8), split.layout, alternatives=False
    )
    assert odd.advice[0].endswith("split it; with n_vocab a multiple of 2, such as 4098, vocab:y could")
    lone = make_report(config, parse("x:2", "batch:x,embed_sequence:x", 2), alternatives=False)
    assert lone.advice[0].endswith("no rule of this mesh can split it; on one more axis vocab or embd could")
    assert not make_report(config, parse("x:1", "", 1), alternatives=False).advice


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    config = plan_config(tmp_path, n_layer=3, attention_types=[])
    report = make_report(config, parse("x:1", "", 1))
    found = {(a.config.recompute_grad, a.microbatches): a.plan for a in report.alternatives}

    def said(memory: int) -> str:
        (sentence,) = too_large(report.plan, report.alternatives, replace(GPUS["t4-16"], memory=memory))
        return sentence.partition("; ")[2].removeprefix("with ").removesuffix(" they do")

    assert found[True, 8].total < found[False, 8].total < found[True, 1].total < found[False, 1].total
    assert said(found[False, 8].total) == "--set recompute_grad=false --set tokens_per_mb_per_replica=64"
    assert said(found[True, 8].total) == "--set recompute_grad=true --set tokens_per_mb_per_replica=64"
    assert said(found[True, 8].total - 1).startswith("split more dimensions in layout")
    kept = report.plan.parameters + report.plan.slots + report.plan.gradients
    assert (
        "weights, slots and gradients alone"
        in too_large(report.plan, report.alternatives, replace(GPUS["t4-16"], memory=kept - 1))[0]
    )
    assert not too_large(report.plan, report.alternatives, GPUS["t4-16"])
    assert not too_large(report.plan, report.alternatives, None)


def test_hardware() -> None:
    v3, v4, a100 = (hardware(name) for name in ("v3-32", "v4-8", "a100-80"))
    assert (v3.count, v3.memory, v3.is_tpu) == (32, 16 * GIB, True)
    assert (v4.count, v4.memory) == (4, 32 * GIB)
    assert (a100.count, a100.memory, a100.flops["bfloat16"], a100.is_tpu) == (None, 80 * GIB, 312e12, False)
    assert hardware("v3-2048").count == 2048
    for name in ("v3-12", "v3-4", "v9-8", "v2-1024", "a100", ""):
        with pytest.raises(UserError, match=f"--device '{name}' is not known; known are t4-16, .*v2-N up to v2-512"):
            hardware(name)


def test_time_at_best(tmp_path: Path) -> None:
    report = make_report(
        tiny_config(tmp_path),
        MeshLayout({"x": 2}, {"batch": "x"}),
        Target.of(hardware("a100-40")),
        alternatives=False,
    )
    seconds = report.plan.flops / 156e12, report.plan.traffic[0].sent / 300e9
    assert (
        f"a step takes {max(seconds):.3g} s at best: {seconds[0]:.3g} s of arithmetic, {seconds[1]:.3g} s of comm"
        in report.text()
    )
