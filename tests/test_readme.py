"""What the README says: its commands are run or parsed, its tables compared with the code, all links followed.

The commands run as they stand, in a copy of the project whose configs are small. `python -m tests.test_readme` is the
process that runs them: one for all, so that TensorFlow is loaded once.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import main
from config import ALIASES, DatasetConfig, ModelConfig, load_model_config
from config_fields import ACTIVATION_NAMES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# What is done with a command, by its shape; the first that matches the whole command counts.
HANDLING = (
    (r"(DEVICE=gpu )?make [a-z-]+", "target of the Makefile"),
    (r"source \.venv/bin/activate", "environment of the Makefile"),
    (r"cp \.env\.example \.env|docker compose up -d", "compose file"),  # tests/test_compose.py
    (r"tensorboard --logdir \S+", "viewer"),
    (r"python main\.py .*(--tpu |GPU:\d).*", "parsed"),  # needs a TPU or GPUs
    (r"python data/create_tfrecords\.py .*--use_gpt2_tokenizer", "parsed"),  # needs the model hub
    (r"python -m tracking\.plots .*", "run"),
    (r"python (main|run_experiment|summarize|data/\w+)\.py .*", "run"),
)
# What a command that is run prints, by a part of it.
PRINTED = (
    ("gather_python_sources.py", r"text/heldout: \d+ files"),
    ("train_tokenizer.py", r"learned from \d+ documents"),
    ("create_tfrecords.py", r"tokens: .* written .*\n[\d,]+ records in 1 files"),
    (
        "--auto_layout_and_mesh_shape",
        r'^"mesh_shape": "(x:8|x:4,y:2)",\n"layout": "[\w:,]+"\n\n[\s\S]*verdict: mine can be trained',
    ),
    ("--auto_layout", r'^"layout": "[\w:,]+"\n$'),
    ("--plan", r"parameters +[\d,]+ [\s\S]*verdict: mine (can be trained so|fits its mesh and layout)"),
    ("--check_dataset", "verdict: the datasets fit the model"),
    ("--eval", '"task": "validation"'),
    ("--json", r'^{"prompt": "Once", "continuation": .*, "new_tokens": \d+}\n{"prompt": "upon"'),
    ("--predict", r"^======== 1: \d+ new tokens ========\ndef read_lines"),
    ("summarize.py", r"trained: 20 steps[\s\S]* unigram model: [\s\S]* perplexity: [\s\S]* bits per byte: \d"),
    ("tracking.plots", r"^runs/curves\.png\n$"),
    (".py", "^$"),  # training reports on standard error
)
ADDED = {"data/gather_python_sources.py": "--limit_mb 0.3"}
SMALL = {
    "quickstart": {"n_layer": 1, "attention_types": [[["global"], 1]], "n_embd": 24, "train_steps": 20},
    "mlm_small_cpu": {"n_layer": 1, "attention_types": [[["global"], 1]], "n_embd": 24, "train_steps": 4},
    "mine": {"n_layer": 1, "n_embd": 32, "n_ctx": 64, "train_batch_size": 4, "train_steps": 4},
}


def fenced(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Commands of a shell script, one a line, continued lines joined."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


COMMANDS = [command for block in fenced("bash") for command in commands_of(block)]


def handling(command: str) -> str:
    return next((what for shape, what in HANDLING if re.fullmatch(shape, command)), "unhandled")


def json_blocks() -> dict[str, dict[str, Any]]:
    """{path of the file that the README shows: its content}"""
    shown = re.findall(r"`([\w/]+\.json)`:\n\n```json\n(.*?)```", README, re.DOTALL)
    return {path: json.loads(text) for path, text in shown}


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def first_cells(text: str) -> list[str]:
    """The names in the first column of a table."""
    return [name for row in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for name in re.findall("`(.+?)`", row)]


def make(folder: Path, command: str) -> str:
    """What make would do for `[NAME=value ]make TARGET`."""
    *settings, _, target = command.split()
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "DEVICE")}
    environment |= dict(setting.split("=") for setting in settings)
    result = subprocess.run(["make", "-n", target], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_project(folder: Path) -> None:
    """A copy of the code and the Makefile with small configs, and the text and prompts that the README speaks of."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and (path.name == "configs" or any(path.glob("*.py"))) and not path.name.startswith("."):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        elif path.suffix in (".py", ".md", ".txt", ".toml") or path.name == "Makefile":
            shutil.copy(path, folder)
    for name, values in json_blocks().items():
        (folder / name).write_text(json.dumps(values))
    for name, changes in SMALL.items():
        config = folder / "configs" / f"{name}.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    for number, path in enumerate(sorted(ROOT.glob("*.py"))):
        target = folder / "texts" / ("train" if number % 4 else "heldout") / f"{path.stem}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "prompts.txt").write_text("Once\n---\nupon\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy of the project, before any command is run."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    make_project(folder)
    return folder


@pytest.fixture(scope="module")
def results(project: Path) -> dict[str, dict[str, Any]]:
    """{command: its "code", "stdout" and "stderr"}, run one after another as in the README."""
    to_run = [command for command in COMMANDS if handling(command) == "run"]
    (project / "commands.json").write_text(json.dumps(to_run))
    process = subprocess.run(
        [sys.executable, "-m", "tests.test_readme", "commands.json", "results.json"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return dict(zip(to_run, json.loads((project / "results.json").read_text()), strict=True))


def check_make(project: Path, command: str) -> None:
    output = make(project, command)
    if "DEVICE=gpu" in command:
        assert "requirements-gpu.txt" in output


def check_parsed(tmp_path: Path, command: str) -> None:
    _, script, *argv = shlex.split(command)
    if script != "main.py":
        importlib.import_module(script.removesuffix(".py").replace("/", "."))._parser().parse_args(argv)
        return
    args = main.parse_arguments(argv)
    main.check_arguments(args)
    if f"configs/{args.model}.json" not in json_blocks():
        assert main.read_config(args).name == args.model
        return
    dataset = tmp_path / "dataset.json"
    dataset.write_text(json.dumps(json_blocks()[f"configs/dataset_configs/{args.model}.json"]))
    values = json_blocks()[f"configs/{args.model}.json"]
    args.model = str(tmp_path / "model.json")
    Path(args.model).write_text(json.dumps(values | {"datasets": [[str(dataset), *values["datasets"][0][1:]]]}))
    assert main.read_config(args).mesh_shape == args.mesh_shape


@pytest.mark.slow
@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)))
def test_command(command: str, project: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    match handling(command):
        case "target of the Makefile":
            check_make(project, command)
        case "environment of the Makefile":
            assert "-m venv .venv" in make(project, "make runtime-env")
        case "compose file":
            assert (ROOT / "docker-compose.yml").exists() and (ROOT / ".env.example").exists()
        case "viewer":
            request.getfixturevalue("results")
            assert list((project / command.split()[-1]).glob("events.out.tfevents.*"))
            assert importlib.util.find_spec("tensorboard.main")
        case "parsed":
            check_parsed(tmp_path, command)
        case "run":
            result = request.getfixturevalue("results")[command]
            assert result["code"] == 0, result["stderr"][-4000:]
            expected = next(pattern for part, pattern in PRINTED if part in command)
            assert re.search(expected, result["stdout"], re.MULTILINE), result["stdout"]
        case other:
            pytest.fail(f"{command!r} is {other}: add its shape to HANDLING")


def check_record(record: Path, model_path: Path) -> None:
    """That a record in files is that of the run in `model_path`."""
    assert json.loads((record / "run.json").read_text())["status"] == "COMPLETED"
    assert json.loads((record / "config.json").read_text())["model_path"] == "runs/mine_tracked"
    lines = [json.loads(line) for line in (model_path / "metrics.jsonl").read_text().splitlines()]
    for name, metric in json.loads((record / "metrics.json").read_text()).items():
        assert dict(zip(metric["steps"], metric["values"], strict=True)) == {line["step"]: line[name] for line in lines}
    assert (record / "final_config.json").read_bytes() == (model_path / "config.json").read_bytes()
    assert "trained to step 4" in (record / "cout.txt").read_text()


@pytest.mark.slow
def test_what_the_commands_leave_behind(project: Path, results: dict[str, dict[str, Any]]) -> None:
    metrics = [json.loads(line) for line in (project / "runs/quickstart/model/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert set(first_cells(section("Evaluation"))) == set(
        json.loads((project / "runs/quickstart/model/eval_.jsonl").read_text())
    )
    for name in ("mine", "mine_slower", "mine_mesh", "mine_tracked"):
        assert (project / "runs" / name / "model.ckpt-4.index").exists()
    check_record(project / "runs/sacred/1", project / "runs/mine_tracked")
    assert len((project / "runs/mine/continuations.jsonl").read_text().splitlines()) == 2
    shown = fenced("text")[0]
    summary = next(result["stdout"] for command, result in results.items() if "summarize.py" in command)
    assert re.findall(r"^ *[\w ]+(?=:)", shown, re.MULTILINE) == re.findall(r"^ *[\w ]+(?=:)", summary, re.MULTILINE)


def test_the_quickstart_is_what_the_makefile_runs(tmp_path: Path) -> None:
    make_project(tmp_path / "project")
    done = commands_of(make(tmp_path / "project", "make quickstart"))
    made = [shlex.split(command) for command in done if re.match(r"\S+ \w+(/\w+)?\.py", command)]
    shown = [
        shlex.split(command)
        for block in fenced("bash", section("The quickstart, step by step"))
        for command in commands_of(block)
        if command.startswith("python ")
    ]
    assert [command[1:] for command in made] == [command[1:] for command in shown]


def test_every_config_shown_is_accepted(tmp_path: Path) -> None:
    blocks = json_blocks()
    assert len(blocks) == len(fenced("json")) == 2
    check_parsed(tmp_path, "python main.py --model mine")


def test_every_key_is_described() -> None:
    described = first_cells(section("Parameter reference"))
    assert len(described) == len(set(described))
    assert set(described) == set(ModelConfig.model_fields) - {"name"}
    for name in [*ALIASES, *(set(DatasetConfig.model_fields) - {"id"})]:
        assert f"`{name}`" in README


def test_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section("Parameter reference"), re.MULTILINE)
    for key, default in rows:
        field = ModelConfig.model_fields[key]
        if default == "required":
            assert field.is_required() or key == "datasets", key
        elif default.startswith("`") and default.strip("`") not in ModelConfig.model_fields:
            assert json.loads(default.strip("`")) == field.default, key
        else:
            assert field.default in (None, ()) or field.default_factory, key


def test_every_activation_function_is_described() -> None:
    text = (ROOT / "docs/models.md").read_text().split("## Activation functions")[1].split("\n## ")[0]
    described = set(re.findall(r"`(\w+)`", text)) - {"activation_function", "moe_activation"}
    assert described == set(ACTIVATION_NAMES)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        importlib.import_module(command).main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)) - {"--help"}


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    commands = (
        "main",
        "run_experiment",
        "summarize",
        "data.create_tfrecords",
        "data.train_tokenizer",
        "data.gather_python_sources",
        "tracking.plots",
    )
    flags = {command: help_of(command, capsys) for command in commands}
    flag_pattern = r"(?<![\w-])--[a-z][\w-]*"
    mentioned = set(re.findall(flag_pattern, README)) - {"--logdir"}
    assert mentioned <= set().union(*flags.values())
    assert flags["main"] <= mentioned
    described = set(re.findall(flag_pattern, (ROOT / "docs/data.md").read_text()))
    for command in ("data.create_tfrecords", "data.train_tokenizer"):
        for flag in flags[command]:
            assert described & {flag, "--" + flag[2:].replace("-", "_")}
    tracking = (ROOT / "docs/tracking.md").read_text()
    assert set(first_cells(tracking.split("## What is recorded")[0])) == flags["run_experiment"] - flags["main"]


def test_dimensions() -> None:
    from models.dims import layout_sizes

    sizes = layout_sizes(load_model_config("moe_small_cpu"), {"train_batch_size": 16})
    assert sorted(first_cells(section("Meshes and layouts"))) == sorted(sizes)


def test_the_map_names_what_is_there() -> None:
    for path in first_cells(section("Where things are")):
        assert (ROOT / path).exists(), path


def links() -> Iterator[tuple[Path, str]]:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" not in target:
                yield document, target


@pytest.mark.parametrize(("document", "target"), list(links()), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_link(document: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = (document.parent / name).resolve() if name else document
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def run_script(command: str) -> dict[str, Any]:
    """Run `python SCRIPT ...` or `python -m MODULE ...` in this process: its exit code and what it printed."""
    _, script, *argv = shlex.split(command)
    module = argv.pop(0) if script == "-m" else None
    sys.argv = [script, *argv, *ADDED.get(script, "").split()]
    sys.path[0] = os.getcwd() if module else str(Path(script).resolve().parent)
    code: Any = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            if module:
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    commands, output = map(Path, sys.argv[1:])
    output.write_text(json.dumps([run_script(command) for command in json.loads(commands.read_text())]))
