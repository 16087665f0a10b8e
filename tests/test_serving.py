"""An exported model, run by plain TensorFlow in a process of its own, against the numpy model and --predict."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import serving
from tests.reference_model import ReferenceModel
from tests.workspace import Workspace, save_tokenizer
from training.model_dir import delete_model

ROWS = [[3, 4, 5], [7]]
README = Path(__file__).resolve().parent.parent / "README.md"
CLIENT = """
import sys
import numpy as np

found = {f"with_lengths/{key}": value.numpy() for key, value in answer.items()}

def ask(name, **inputs):
    answer = model.signatures[name](**{key: tf.constant(value) for key, value in inputs.items()})
    found.update({f"{name}/{key}": value.numpy() for key, value in answer.items()})

ask("serving_default", tokens=[[3, 4, 5]])
np.savez(sys.argv[1], **found)
for name, inputs in [
    ("serving_default", {"tokens": [[1]] * 3}),
    ("serving_default", {"tokens": [[1] * 9]}),
    ("with_lengths", {"tokens": [[1, 2]], "length": [3]}),
    ("with_lengths", {"tokens": [[1, 2]], "length": [1, 1]}),
]:
    try:
        ask(name, **inputs)
    except tf.errors.InvalidArgumentError as error:
        print(error.message)
assert not {"mesh_tensorflow", "config", "model_fns"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A model with every kind of attention, random weights as of step 30, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("serving")
    dataset = {"id": "mine", "path": str(folder / "train_*"), "tokenizer_path": save_tokenizer(folder)}
    workspace = Workspace(
        folder,
        n_layer=3,
        attention_types=[[["global", "local", "linear"], 1]],
        local_attention_radius=2,
        predict_batch_size=2,
        datasets=[[dataset, 1, "chunks", 1.0]],
    )
    workspace.save_random_weights(step=30)
    return workspace


def predicted(run: Workspace, *flags: str) -> list[list[int]]:
    """The tokens that --predict adds to ROWS."""
    prompts, output = run.directory / "prompts", run.directory / "predictions"
    prompts.write_text("".join(" ".join(f"w{token}" for token in row) + "\n" for row in ROWS))
    flags += ("--prompt", str(prompts), "--prompt_per_line", "--json", "--output", str(output))
    assert run.main("--predict", *flags) == 0
    texts = [json.loads(line)["continuation"] for line in output.read_text().splitlines()]
    return [[int(word[1:]) for word in text.split()] for text in texts]


@pytest.mark.slow
def test_an_exported_model_answers_as_the_model_does(run: Workspace, tmp_path: Path) -> None:
    flags = ("--temperature", "0", "--max_new_tokens", "4")
    exports = run.model_path / "export"
    (exports / "30.tmp").mkdir(parents=True)  # as an export that was killed leaves it
    assert run.main("--export", *flags) == 0
    assert [path.name for path in exports.iterdir()] == ["30"]
    moved = (exports / "30").rename(tmp_path / "moved")
    shown = README.read_text().split("```python\n")[1].split("```")[0].replace("runs/mine/export/2000", str(moved))
    command = [sys.executable, "-I", "-c", shown + CLIENT, "found.npz"]
    client = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert client.returncode == 0, client.stderr[-4000:]
    found = dict(np.load(tmp_path / "found.npz"))

    model = ReferenceModel(run.config(), run.weights())
    several, one = found["with_lengths/logits"], found["serving_default/logits"]
    assert several.shape == (2, 4, 32)
    for row, tokens in enumerate(([3, 4, 5, 9], [7, 1, 1, 1])):
        np.testing.assert_allclose(several[row], model.logits(np.array(tokens)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(one, several[:1, :3], rtol=0, atol=1e-5)
    texts = [prompt + new for prompt, new in zip(ROWS, predicted(run, *flags), strict=True)]
    assert [len(text) for text in texts] == [7, 5]
    padded = [text + [0] * (7 - len(text)) for text in texts]  # with the id that ends a text
    assert found["with_lengths/samples"].tolist() == padded
    assert found["with_lengths/sample_length"].tolist() == [7, 5]
    assert found["serving_default/samples"].tolist() == padded[:1]
    assert client.stdout.count("for 1 to 2 rows (predict_batch_size) of 1 to 8 tokens (n_ctx)") == 2
    assert "each must be from 1" in client.stdout and "length must hold a number for each row" in client.stdout


def test_an_export_is_whole_or_not_there_and_new_removes_it(run: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    exports = run.model_path / "export"
    with monkeypatch.context() as patched:
        patched.setattr(serving, "serving_signatures", fail)
        assert run.main("--export") == 130
    assert not exports.exists() or not list(exports.iterdir())
    (exports / "30").mkdir(parents=True)
    (exports / "30" / "saved_model.pb").write_text("as it was")
    assert run.main("--export") == 0
    assert (exports / "30" / "saved_model.pb").read_text() == "as it was"
    (exports / "31.tmp").mkdir()
    (exports / "2024-notes").write_text("of the user")
    delete_model(str(run.model_path), yes=True)
    assert [path.name for path in exports.iterdir()] == ["2024-notes"]
