"""Which devices a plan is for."""

import pytest

import main
from errors import UserError
from mesh.hardware import hardware
from planning.target import ANY, Target, target
from tests.test_tpu_estimator import CORES, Node

A100, V3 = hardware("a100-40"), hardware("v3-32")
FLAGS = {
    "": ANY,
    "--device a100-40": Target(hardware=A100),
    "--device v3-32": Target(32, "TPU devices in v3-32", V3, on_tpu=True),
    "--device v3-32 --tpu node": Target(32, "TPU devices in v3-32", V3, on_tpu=True),
    "--tpu node": Target(CORES, "TPU cores", on_tpu=True),
    "--gpu_ids gpu:0 gpu:1": Target(2, "devices named"),
    "--gpu_ids gpu:0 gpu:1 --device a100-40": Target(2, "devices named", A100),
}


@pytest.fixture(autouse=True)
def a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planning.target.tpu_resolver", lambda name: Node())


@pytest.mark.parametrize("flags", FLAGS)
def test_what_the_flags_name(flags: str) -> None:
    assert target(main.parse_arguments(["--model", "any", "--plan", *flags.split()])) == FLAGS[flags]


def test_a_tpu_is_no_gpu() -> None:
    with pytest.raises(UserError, match="--tpu 'node' and --device 'a100-40', a GPU, exclude each other"):
        target(main.parse_arguments(["--model", "any", "--plan", "--tpu", "node", "--device", "a100-40"]))


def test_a_tpu_that_is_there_is_planned_as_one_of_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model gpt3_small_256 --mesh_shape x:16 --layout batch:x --set tokens_per_mb_per_replica=2048 --plan"
    said = []
    for device in (["--tpu", "node"], ["--device", "v3-16"], ["--gpu_ids", *(f"gpu:{gpu}" for gpu in range(16))]):
        assert main.main([*flags.split(), *device]) == 0
        said.append(capsys.readouterr().out.partition("largest at the peak")[0])
    assert said[0] == said[1] != said[2]
