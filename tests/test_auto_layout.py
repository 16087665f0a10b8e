"""--auto_layout and --auto_layout_and_mesh_shape: what they print is a config's form, of little memory, and runs."""

import json
from pathlib import Path

import pytest

from config import ModelConfig
from errors import UserError
from mesh.layout import MeshLayout, check_layout, mesh_shapes, parse
from models.dims import TENSORS, layout_sizes
from planning.report import make_report
from planning.search import search_layout
from tests.plan_reference import plan_config
from tests.workspace import Workspace

FOUR = ["--gpu_ids", "cpu:0", "cpu:1", "cpu:2", "cpu:3"]


def test_meshes_of_a_number_of_devices() -> None:
    assert list(mesh_shapes(12)) == [{"x": 12}, {"x": 6, "y": 2}, {"x": 4, "y": 3}]
    assert list(mesh_shapes(7)) == [{"x": 7}]
    assert [len(list(mesh_shapes(count))) for count in (1, 2, 4, 256)] == [1, 1, 2, 5]


def total(config: ModelConfig, layout: MeshLayout) -> int:
    return make_report(config, layout, alternatives=False).plan.total


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_layout_found_needs_least_memory(tmp_path: Path, recompute: bool) -> None:
    """At least as little as the ones of GPT-Neo."""
    layers = 4 if recompute else 1
    values = {"n_vocab": 257, "n_embd": 128, "n_ctx": 32} if recompute else {"n_vocab": 2048}
    config = plan_config(tmp_path, n_layer=layers, attention_types=[], recompute_grad=recompute, **values)
    found = search_layout(config, [{"x": 2, "y": 2}], on_tpu=False)
    check_layout(found, layout_sizes(config, {"train_batch_size": 8}), TENSORS)
    others = ("batch:x", "batch:x,heads:y,vocab:y,intermediate_expanded:y", "batch:x,embd:y,memory_length:y")
    assert total(config, found) <= min(total(config, parse("x:2,y:2", other, 4)) for other in others)


def test_nothing_can_be_split(tmp_path: Path) -> None:
    config = plan_config(tmp_path, n_layer=1, attention_types=[])
    with pytest.raises(UserError, match="one device splits nothing; say how many there are with --mesh_shape"):
        search_layout(config, [{"x": 1}], on_tpu=False)
    with pytest.raises(UserError, match="no dimension of the model can be split over 11 devices; use fewer"):
        search_layout(config, [{"x": 11}], on_tpu=False)


@pytest.mark.slow
def test_what_is_found_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Workspace(tmp_path, n_layer=1, attention_types=[], train_steps=1)
    assert run.main("--auto_layout_and_mesh_shape", *FOUR, "--plan") == 0
    lines, _, report = capsys.readouterr().out.partition("\n\n")
    found = json.loads("{" + lines + "}")
    assert found.keys() == {"mesh_shape", "layout"}
    assert f"mesh {found['mesh_shape']}: 4 devices; layout {found['layout']}\n" in report
    assert "verdict: config fits its mesh and layout" in report
    assert not run.model_path.exists()

    assert run.main("--auto_layout", *FOUR, "--mesh_shape", "x:2,y:2") == 0
    (line,) = capsys.readouterr().out.splitlines()
    layout = json.loads("{" + line + "}")["layout"]
    assert run.main(*FOUR, "--mesh_shape", "x:2,y:2", "--layout", layout) == 0
    on_four = run.losses()
    assert run.main("--new", "--yes", "--mesh_shape", "x:1", "--layout", "") == 0
    assert run.losses() == pytest.approx(on_four, abs=1e-5)
