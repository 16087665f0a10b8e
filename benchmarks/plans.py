"""Plans of GPT-Neo's configs, as the table of docs/meshes.md: python -m benchmarks.plans writes it anew.

Each is planned as --plan does, for the devices that it was made for. Nothing is run, so the numbers are the same on any
machine.
"""

import re
from pathlib import Path

from tqdm import tqdm

from config import load_model_config
from mesh.devices import use_graph_mode
from mesh.hardware import hardware
from mesh.layout import parse
from planning.report import make_report
from planning.target import Target

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "meshes.md"
# config: what it is planned for
PLANNED = {
    "colab_XL": "a100-40",
    "gpt2_small": "v3-64",
    "gpt3_small_256": "v3-256",
    "gpt3_PAR_small_256": "v3-256",
    "gpt3_medium_256": "v3-256",
    "gpt3_large_256": "v3-256",
    "gpt3_XL_256_Pile": "v3-256",
    "gpt3_2-7B_256": "v3-256",
    "gpt3_6-7B_256": "v3-256",
    "gpt3_13B_256": "v3-256",
    "gpt3_13B_256_Pile": "v3-256",
}
HEAD = (
    "| config | mesh | layout | parameters | slots | gradients | activations | all | of | sent a step "
    "| step at best |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def row(name: str) -> str:
    """The line of a config: GB on each device, and seconds."""
    config = load_model_config(name)
    layout, device = parse(config.mesh_shape, config.layout, 1), hardware(PLANNED[name])
    report = make_report(config, layout, Target.of(device), alternatives=False)
    plan = report.plan
    sizes = (plan.parameters, plan.slots, plan.gradients, plan.activations, plan.total)
    cells = [f"`{name}`", layout.mesh_shape, layout.layout, *(f"{size / 1e9:.2f}" for size in sizes)]
    cells += [f"{device.memory / 1e9:.1f} ({device.name})", f"{plan.sent / 1e9:.1f}", f"{report.seconds:.2g} s"]
    return "| " + " | ".join(cells) + " |"


def rows_written() -> dict[str, str]:
    """{config: its line in the document}"""
    return {match[2]: match[1] for match in re.finditer(r"^(\| `([\w-]+)` \| \w+:\d.*\|)$", DOCUMENT.read_text(), re.M)}


def main() -> None:
    """Put the table into the document, in place of the one that is there."""
    table = HEAD + "".join(row(name) + "\n" for name in tqdm(PLANNED, desc="planning", unit="config"))
    text = DOCUMENT.read_text()
    pattern = re.escape(HEAD) + r"(\|.*\n)*"
    assert len(re.findall(pattern, text)) == 1, "the table's head is not in the document"
    DOCUMENT.write_text(re.sub(pattern, lambda _: table, text))


if __name__ == "__main__":
    use_graph_mode()
    main()
