"""What a user can do wrong: it ends in one sentence that names it, with exit code 1 or 2, and loses nothing on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

import config
import summarize
from data import create_tfrecords, gather_python_sources, train_tokenizer
from errors import UserError
from tests.mistakes import Case, cut, foreign, records, remove, text
from tests.record_files import damage
from tests.workspace import Workspace, save_tokenizer
from training.failures import explained
from training.model_dir import warn_of_changes

SMALL = {"n_layer": 1, "attention_types": []}
CPU_2 = "--gpu_ids cpu:0 cpu:1"
SHARD = "model/model.ckpt-2.data-00001-of-00002"
CHUNKS = [[2] * 9] * 63  # valid records, to be followed by one that is not


CONFIG = {
    "wrong key": Case("", 'there is no key "n_heds" (its value is 4); did you mean "n_heads"?', {"n_heds": 4}),
    "wrong type": Case("", 'n_layer is "two"; it must be a whole number of at least 1', {"n_layer": "two"}),
    "wrong override": Case("--set lr=high", 'lr is "high"; it must be a number above 0'),
    "no config": Case("--model {dir}/nowhere.json", 'there is no config "{dir}/nowhere.json"'),
    "no dataset config": Case("", 'no dataset config "nowhere"', {"datasets": [["nowhere", 1, "chunks", 1.0]]}),
    "no JSON": Case("", "line 1, column 14: this is not JSON", before=text("config.json", '{"n_head": 4,')),
    "no dataset": Case("", "datasets is empty; training needs at", {"datasets": [], "no_dataset": True}),
    "dataset larger than the model": Case("", 'dataset "mine" (n_vocab 50) needs at least 50', dataset={"n_vocab": 50}),
    "mesh string": Case("--mesh_shape x=2", 'mesh_shape is "x=2"; it must be axes and their sizes'),
}
DEVICES = {
    "mesh and devices": Case("--mesh_shape x:4", "mesh_shape 'x:4' has 4 processors but there is 1 CPU device"),
    "layout dimension": Case("--mesh_shape x:1 --layout head:x", "names dimension 'head', which this model does not"),
    "layout axis": Case("--mesh_shape x:1 --layout heads:y", "over axis 'y', which mesh_shape 'x:1' does not have"),
    "heads": Case(f"{CPU_2} cpu:2 --mesh_shape x:3 --layout heads:x", "'heads:x' splits n_head = 4 into 3 parts"),
    "train_batch_size": Case(f"{CPU_2} cpu:2", "all 3 devices, and train_batch_size = 4 is no multiple of 3"),
    "eval_batch_size": Case(
        f"--eval {CPU_2}", "all 2 devices, and eval_batch_size = 3 is no multiple of 2", {"eval_batch_size": 3}
    ),
    "one axis twice": Case(
        f"{CPU_2} --mesh_shape x:2 --layout batch:x,heads:x", "'batch' and 'heads' over the same axis"
    ),
    "GPU": Case("--gpu_ids gpu:7", "--gpu_ids 'gpu:7' names a GPU that is not there; "),
    "device": Case("--gpu_ids 0", "--gpu_ids '0' is not a device; write it like device:GPU:0"),
    "device twice": Case("--gpu_ids cpu:0 /device:CPU:0", "--gpu_ids names '/device:CPU:0' twice"),
    "mixed devices": Case("--gpu_ids cpu:0 gpu:0", "--gpu_ids 'cpu:0 gpu:0' mixes GPUs and CPUs"),
    "TPU": Case("--tpu nowhere", "--tpu 'nowhere' cannot be found"),
    "TPU of Colab": Case("--tpu colab", "--tpu 'colab': COLAB_TPU_ADDR is not set"),
    "TPU address": Case("--tpu grpc://127.0.0.1:9", "--tpu 'grpc://127.0.0.1:9': nothing answers at 127.0.0.1:9"),
    "TPU and GPU": Case("--tpu me --gpu_ids gpu:0", "--tpu 'me' and --gpu_ids 'gpu:0' exclude each other"),
}
DATA = {
    "empty glob": Case("", 'path "/nowhere/*" of dataset "mine" matches no file', dataset={"path": "/nowhere/*"}),
    "eval_path": Case("--eval", 'eval_path of dataset "mine" is empty', dataset={"eval_path": ""}, trained=True),
    "eval_path of training": Case("", 'eval_path of dataset "mine" is empty', {"eval_steps": 1}, {"eval_path": ""}),
    "cut file": Case(
        "", "train_0_64.tfrecords can't be read: it is cut short", before=cut("train_0_64.tfrecords", 0.7)
    ),
    "damaged file": Case(
        "--eval",
        "{dir}/eval_0_10.tfrecords can't be read: corrupted record at",
        before=lambda folder: damage(str(folder / "eval_0_10.tfrecords"), -20),
        trained=True,
    ),
    "damaged file, audited": Case(
        "--check_dataset", "", before=cut("eval_0_10.tfrecords", 0.75), code=1, prints="the datasets do NOT fit"
    ),
    "records without text": Case("", "has no int64 feature `text` (it has ['ids'])", before=foreign),
    "short records": Case("", "the first record holds 8 tokens, and sampling", before=records(*[[2] * 8] * 64)),
    "stitch": Case(
        "",
        "set stitch (now 2) so that stitch * (tokens of the shortest document + 1) >= n_ctx + 1",
        sampling=(2, "documents_random"),
        before=records(*[[2] * 9] * 16, *[[3] * 2] * 48),
    ),
    "vocabulary": Case("", "first record holds token id 40, outside the vocab", before=records([40] * 9, *CHUNKS)),
    "task": Case(
        "",
        'eval_tasks is ["lamdba"]; it must be a list of evaluation tasks, from "lambada"',
        {"eval_tasks": ["lamdba"]},
    ),
    "no file of a task": Case(
        "", "no dataset config of datasets gives both lambada_path and", {"eval_tasks": ["lambada"]}
    ),
    "task past n_vocab": Case(
        "--eval",
        "its texts have token id 39 but n_vocab is 32",
        {"eval_tasks": ["lambada"]},
        {"lambada_path": "{dir}/l"},
        before=text("l", '{"text": "w3 w39"}'),
        trained=True,
    ),
    "no task to download": Case("--download_tasks", "--download_tasks has nothing to do: eval_tasks is empty"),
    "vocabulary, later": Case(
        "", "token id 40 in a record of path is outside", {"train_steps": 20}, before=records(*CHUNKS, [40] * 9)
    ),
}
MODEL_PATH = {
    "below a file": Case("", "model_path '{dir}/f/model' cannot be written", {"model_path": "{dir}/f/model"}),
    "a file": Case("--eval", "model_path '{dir}/f' is a file; give the path of a folder", {"model_path": "{dir}/f"}),
    "somebody's config.json": Case("", "holds a config.json that no run wrote", before=text("model/config.json", "{}")),
    "--eval untrained": Case("--eval", "model_path '{dir}/model' holds no checkpoint"),
    "--predict untrained": Case("--predict", "model_path '{dir}/model' holds no checkpoint"),
    "--export untrained": Case("--export", "model_path '{dir}/model' holds no checkpoint"),
    "--new --export": Case("--new --export --yes", "--new deletes the model that --export needs", trained=True),
    "export is a file": Case(
        "--export", "'{dir}/model/export/2' cannot be written (", before=text("model/export", ""), trained=True
    ),
    "--new, no model": Case("--new --yes", "no model was trained there (it", before=text("model/thesis", "")),
    "--new, nobody to ask": Case("--new", "--new would delete the model in '{dir}/model' and nobody is", trained=True),
    "--new, bad mesh": Case("--new --yes --mesh_shape x:3", "mesh_shape 'x:3' has 3 processors", trained=True),
    "--new, bad data": Case("--new --yes", "can't be read", before=cut("train_0_64.tfrecords", 0.7), trained=True),
    "--new --eval": Case("--new --eval --yes", "--new deletes the model that --eval needs", trained=True),
    "other shape": Case(
        "--set n_embd=32",
        "model.ckpt-2' holds 'gpt2/wte' of shape [32, 16] but the config makes it [32, 32]",
        trained=True,
    ),
    "cut index": Case("", "model.ckpt-2' cannot be read", before=cut("model/model.ckpt-2.index", 0.5), trained=True),
    "cut shard": Case("--eval", "model.ckpt-2' cannot be read", before=cut(SHARD, 0.5), trained=True),
    "no index": Case(
        "", "names 'model.ckpt-2', but '{dir}/model/model.ckpt-2.index' is not there",
        before=remove("model/model.ckpt-2.index"), trained=True,
    ),
    "no shard": Case(
        "", "but '{dir}/model/model.ckpt-2.data-00001-of-00002' is not there; copy it again, or let",
        before=remove(SHARD), trained=True,
    ),
    "garbled checkpoint file": Case(
        "", "'{dir}/model/checkpoint' names no checkpoint; write", before=text("model/checkpoint", "?"), trained=True
    ),
    "empty checkpoint file": Case(
        "", "'{dir}/model/checkpoint' names no checkpoint; write", before=text("model/checkpoint", ""), trained=True
    ),
    "no checkpoint file": Case(
        "--eval",
        "holds model.ckpt-2 but no file '{dir}/model/checkpoint' that names it as the newest; write the line "
        "'model_checkpoint_path: \"model.ckpt-2\"' into it",
        before=remove("model/checkpoint"),
        trained=True,
    ),
    "NaN": Case(
        "--set lr=1e30 --steps_per_checkpoint 5",
        "; lr 1e+30 may be too high or",
        {"train_steps": 40, "precision": "bfloat16"},
    ),
}  # fmt: skip
SAMPLING = {
    "no prompt file": Case("--predict --prompt {dir}/nowhere", "--prompt: {dir}/nowhere can't be read", trained=True),
    "empty prompt": Case(
        "--predict --prompt {dir}/p", "--prompt '{dir}/p' is empty", before=text("p", "\n"), trained=True
    ),
    "prompt of separators": Case(
        "--predict --prompt {dir}/p", "--prompt '{dir}/p' holds separators", before=text("p", "---\n"), trained=True
    ),
    "prompt past n_vocab": Case(
        "--predict --prompt {dir}/p", "has token id 39 but n_vocab is 32", before=text("p", "w3 w39"), trained=True
    ),
    "prompt of training": Case("--prompt {dir}/nowhere", "--prompt: {dir}/nowhere can't", {"predict_steps": 1}),
    "no tokenizer": Case("--predict", "the tokenizer {dir}/tok.json does not", before=remove("tok.json"), trained=True),
    "tokenizer": Case(
        "--predict", "{dir}/tok.json is not a tokenizers JSON", before=text("tok.json", "{}"), trained=True
    ),
    "sample": Case("--eval --sample 3", "--sample 3 goes with --check_dataset"),
    "temperature": Case("--predict --temperature -1", "--temperature -1.0 is not a number from 0"),
    "temperature that is no number": Case("--predict --temperature nan", "--temperature nan is not a number from 0"),
    "top_p": Case("--predict --top_p 2", "--top_p 2.0 is not a probability above 0 and up to 1"),
    "output": Case(
        "--predict --output {dir}/f/o",
        "--output '{dir}/f/o' cannot be written",
        trained=True,
        prints="Once upon a time ",
    ),
}
FLAGS = {
    "--device": Case("--plan --device v3-5", "--device 'v3-5' is not known; known are t4-16, "),
    "--device without a name": Case("--plan --device=", "--device '' is not known"),
    "--device and --gpu_ids": Case(
        f"--plan {CPU_2} --device v3-8", "names 2 devices and --device 'v3-8' is a TPU of 8"
    ),
    "--plan of no device": Case("--plan --gpu_ids banana", "--gpu_ids 'banana' is not a device"),
    "--plan of an absent TPU": Case("--plan --tpu nowhere", "is not there, leave --tpu out and use --device v3-8"),
    "--auto_layout of one device": Case("--auto_layout --mesh_shape x:1", "one device splits nothing"),
    "--device alone": Case("--device v3-8", "--device 'v3-8' goes with --plan"),
    "--plan of an evaluation": Case(
        "--plan --eval", "--plan only looks at what training would do; run it without --eval"
    ),
    "--auto_layout for other devices": Case(
        f"--auto_layout {CPU_2} --mesh_shape x:4", "has 4 processors but there are 2 devices named"
    ),
    "--auto_layout of what cannot be split": Case(
        "--auto_layout --mesh_shape x:11", "no dimension of the model can be split over 11 devices; use fewer"
    ),
    "--plan of what cannot be trained": Case(
        "--plan --mesh_shape x:3 --layout heads:x", "", code=1, prints="problem: layout rule 'heads:x' splits n_head"
    ),
    "unknown flag": Case("--stepz 3", "unrecognized arguments: --stepz 3"),
    "--set": Case("--set lr", '--set lr: it must be key=value, for example "lr=0.0001"'),
    "--steps_per_checkpoint": Case("--steps_per_checkpoint 0", "'0' is not a whole number above 0"),
    "--sacred_id": Case("--sacred_id a/b", "--sacred_id 'a/b' names files; use letters"),
}
SET = "--name set --input_dir {dir}/text --output_dir {dir}/out "
BPE = "--base_dir {dir}/text "


def tfrecords(flags: str, says: str, **settings: Any) -> Case:
    return Case(f"{SET} --encoder_path {{dir}}/tok.json {flags}", says, main=create_tfrecords.main, **settings)


def other_options(folder: Path) -> None:
    arguments = f"{SET} --encoder_path {{dir}}/tok.json --processes 1".format(dir=folder).split()
    assert create_tfrecords.main(arguments) == 0


COMMANDS = {
    "input_dir": tfrecords("--input_dir {dir}/nowhere", "the input {dir}/nowhere does not exist"),
    "empty input_dir": tfrecords("--input_dir {dir}/empty", "the input {dir}/empty has no file to read (it is empty)"),
    "separator": tfrecords("--mode chunks --separator end", '--separator "end" must be token ids in list form'),
    "separator past the vocabulary": tfrecords("--mode chunks --separator [99]", "--separator [99]: 99 is no id below"),
    "encoder": tfrecords("--encoder_path {dir}/no.json", "the tokenizer {dir}/no.json does not exist"),
    "no encoder": Case(SET, "give one of --encoder_path, --use_gpt2_tokenizer", main=create_tfrecords.main),
    "chunk_size": tfrecords("--mode chunks --chunk_size 9999 --processes 1", "--chunk_size 9999 + 1; give a smaller"),
    "other options": tfrecords("--minimum_size 2", "minimum_size 0 there, 2 now", before=other_options),
    "output_dir": tfrecords("--output_dir {dir}/f/o", "the folder {dir}/f/o can't be made (Not a directory)"),
    "vocab_size": Case(BPE + "--output_dir {dir} --vocab_size 9", "--vocab_size 9 must be", main=train_tokenizer.main),
    "tokenizer's output_dir": Case(BPE + "--output_dir {dir}/f", "{dir}/f can't be made", main=train_tokenizer.main),
    "sources' output_dir": Case("--output_dir {dir}/f/o", "{dir}/f/o can't be", main=gather_python_sources.main),
    "limit_mb": Case("--output_dir {dir}/o --limit_mb nan", "--limit_mb nan must be", main=gather_python_sources.main),
    "untrained": Case("--model {dir}/config.json", "metrics.jsonl cannot be read", main=summarize.main),
}  # fmt: skip
CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "config": CONFIG, "devices": DEVICES, "data": DATA, "model_path": MODEL_PATH, "sampling": SAMPLING,
        "flags": FLAGS, "commands": COMMANDS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


def make_workspace(
    folder: Path, changes: dict[str, Any], dataset: dict[str, Any], sampling: tuple[int, str]
) -> Workspace:
    """A workspace with a tokenizer of 40 words (n_vocab is 32), a file `f`, a folder of text and an empty one."""
    save_tokenizer(folder, words=40)
    (folder / "f").write_text("not a folder")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("w3 w4 w5 w6")
    changes, dataset = json.loads(json.dumps([changes, dataset]).replace("{dir}", str(folder)))
    values = {
        "id": "mine",
        "path": str(folder / "train_*"),
        "eval_path": str(folder / "eval_*"),
        "tokenizer_path": str(folder / "tok.json"),
        **dataset,
    }
    return Workspace(folder, **{"datasets": [[values, *sampling, 1.0]], **SMALL, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model_path of two steps of training."""
    run = make_workspace(tmp_path_factory.mktemp("trained"), {"train_steps": 2}, {}, (1, "chunks"))
    assert run.main() == 0
    return run.model_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_a_sentence_and_loses_nothing(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # where nobody answers, as anywhere but at Google
    monkeypatch.delenv("COLAB_TPU_ADDR", raising=False)
    monkeypatch.setattr("mesh.devices._TPU_PATIENCE", 1.0)
    run = make_workspace(tmp_path, case.changes, case.dataset, case.sampling)
    if case.trained:
        shutil.copytree(trained, run.model_path)
    case.before(tmp_path)
    kept = contents(tmp_path)
    capsys.readouterr()

    flags = case.flags.format(dir=tmp_path).split()
    try:
        code = case.main(flags) if case.main else run.main(*flags)
    except SystemExit as exit_:  # argparse's
        code = int(exit_.code or 0)

    output = capsys.readouterr()
    assert code == case.code, output.err
    assert case.says.format(dir=tmp_path) in output.err
    assert case.prints in output.out
    assert "Traceback" not in output.err
    assert output.err.count("error: ") == (case.code == 2)
    assert {path: path.read_bytes() for path in kept} == kept


def test_errors_of_the_disk_and_of_the_memory_are_told_apart(tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {}, {}, (1, "chunks"))
    loaded = config.load_model_config(run.config_path)
    full = "/m/model.ckpt-7.meta.tmp1; No space left on device"
    for message, sentence in ((full, f"cannot be written ({full})"), ("OOM when", "memory; lower eval_batch_size 4")):
        with pytest.raises(UserError) as caught, explained(loaded, "eval_batch_size"):
            raise tf.errors.ResourceExhaustedError(None, None, message)
        assert sentence in str(caught.value)
    with pytest.raises(tf.errors.InvalidArgumentError), explained(loaded, "eval_batch_size"):
        raise tf.errors.InvalidArgumentError(None, None, "a defect of ours keeps its traceback")


def test_a_model_that_was_trained_as_another_one_is_told(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_workspace(tmp_path, {"n_head": 2, "local_attention_radius": 3}, {}, (1, "chunks"))
    shutil.copytree(trained, run.model_path)
    loaded = config.load_model_config(run.config_path)
    warn_of_changes(loaded)
    assert caplog.messages == [f"n_head is 2, but the model in {run.model_path} was trained with 4"]


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    run = make_workspace(tmp_path, {}, {}, (1, "chunks"))
    command = f"{sys.executable} main.py --model {run.config_path} --check_dataset; echo $? >&2"
    done = subprocess.run(f"({command}) | true", shell=True, cwd=config.CONFIG_DIR.parent, stderr=subprocess.PIPE)
    assert done.stderr.decode().endswith("\n141\n") and b"Traceback" not in done.stderr
