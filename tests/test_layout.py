"""Mesh shapes and layouts: what is read, and every refusal before a graph is built."""

import pytest

from errors import UserError
from mesh import mtf
from mesh.layout import MeshLayout, check_devices, check_layout, parse

SIZES = {"batch": {"train_batch_size": 8}, "heads": {"n_head": 6}, "vocab": {"n_vocab": 10}, "embd": {"n_embd": 12}}
TENSORS = [("batch", "heads"), ("vocab", "embd")]


def test_parse_reads_both_strings() -> None:
    layout = parse("x:4,y:2", "batch:x,heads:y", 8)
    assert layout == MeshLayout({"x": 4, "y": 2}, {"batch": "x", "heads": "y"})
    assert (layout.size, layout.mesh_shape, layout.layout) == (8, "x:4,y:2", "batch:x,heads:y")
    assert (layout.ways("batch"), layout.ways("heads"), layout.ways("vocab")) == (4, 2, 1)


def test_without_a_mesh_shape_the_batch_goes_over_all_devices() -> None:
    assert parse(None, None, 3) == MeshLayout({"all": 3}, {"batch": "all"})


@pytest.mark.parametrize(
    ("mesh_shape", "layout", "expected"),
    [
        ("x", "", "'x' is not a pair"),
        ("x:two", "", "the size of axis 'x' is 'two'"),
        ("x:0", "", "the size of axis 'x' is '0'"),
        ("x:2,x:4", "", "names axis 'x' twice"),
        ("x:2", "batch:y", "over axis 'y', which mesh_shape 'x:2' does not have; its axes are x"),
        ("x:2,y:2", "batch:x,batch:y", "splits 'batch' over both 'x' and 'y'"),
        ("x:2", "batch", "'batch' is not a pair"),
        (None, "batch:x", "needs a mesh_shape"),
    ],
)
def test_parse_refuses(mesh_shape: str | None, layout: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse(mesh_shape, layout, 2)


def test_the_mesh_must_have_as_many_processors_as_there_are_devices() -> None:
    check_devices(parse("x:4,y:2", "", 8), 8, "GPU devices")
    with pytest.raises(UserError, match="has 8 processors but there is 1 CPU device; .*--mesh_shape x:1"):
        check_devices(parse("x:4,y:2", "", 1), 1, "CPU device")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("head:x", "names dimension 'head', .*did you mean 'heads'"),
        ("nothing:x", "its dimensions are batch, heads, vocab, embd"),
        ("heads:x", "n_head = 6 into 4 parts"),
        ("vocab:x,embd:x", r"'vocab' and 'embd' over the same axis 'x', but one tensor \[vocab, embd\]"),
    ],
)
def test_a_layout_must_fit_the_model(layout: str, expected: str) -> None:
    sizes = SIZES | {"vocab": {"n_vocab": 12}}
    with pytest.raises(UserError, match=expected):
        check_layout(parse("x:4", layout, 4), sizes, TENSORS)


def test_mesh_tensorflow_wants_dimensions_apart_on_one_processor_too() -> None:
    with pytest.raises(UserError, match="'vocab' and 'embd' over the same axis 'x'"):
        check_layout(parse("x:1", "vocab:x,embd:x", 1), SIZES, TENSORS)
    with pytest.raises(ValueError, match="may not map to the same Mesh Dimension"):
        mtf.convert_to_layout_rules("vocab:x,embd:x").tensor_layout(
            mtf.convert_to_shape("vocab:8,embd:8"), mtf.convert_to_shape("x:1")
        )
