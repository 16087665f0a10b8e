"""Loading configurations: files, names, datasets, overrides, and the sentences that refuse them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import config as config_module
from config import (
    CONFIG_DIR,
    DatasetConfig,
    DatasetSource,
    config_to_json,
    load_dataset_config,
    load_model_config,
    make_model_config,
    parse_overrides,
    read_text,
)
from errors import UserError
from tests.config_values import BASE, make, refusal


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages show paths as they are typed from the current directory."""
    monkeypatch.chdir(CONFIG_DIR.parent)


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        ("n_head", "n_heads", (2, 4)),
        ("activation_function", "activation_fn", ("gelu", "relu")),
        ("axial_pos_emb", "axial_pos_emb_", ([8, 16], True)),
    ],
)
def test_alias_pairs(first: str, second: str, values: tuple[Any, Any]) -> None:
    base = {key: value for key, value in BASE.items() if key != "n_head"} | ({"n_head": 2} if first != "n_head" else {})
    one, other = values
    alone = [make_model_config(base | {key: one}, "test") for key in (first, second)]
    both = make_model_config(base | {first: one, second: one}, "test")
    null = make_model_config(base | {first: None, second: one}, "test")
    assert alone[0] == alone[1] == both == null
    assert refusal(base | {first: one, second: other}) == [
        f"{first} is {json.dumps(one)} and {second} is {json.dumps(other)}, but they are two names of one setting; "
        "keep one of them"
    ]


def test_a_mistake_is_named_as_it_was_written() -> None:
    values = {key: value for key, value in BASE.items() if key != "n_head"}
    assert refusal(values | {"n_heads": 0}) == ["n_heads is 0; it must be a whole number of at least 1"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("n_hed", 'did you mean "n_head"?'),
        ("N_LAYER", 'did you mean "n_layer"?'),
        ("batch_size", 'did you mean "eval_batch_size"?'),
        ("zebra", "no known key resembles it, so remove it"),
        ("tokenizer_path", "it belongs in the config of a dataset"),
        ("name", "no known key resembles it, so remove it"),
    ],
)
def test_unknown_key(key: str, hint: str) -> None:
    assert refusal(BASE | {key: 3}) == [f'there is no key "{key}" (its value is 3); {hint}']


def test_all_mistakes_are_reported_together() -> None:
    wrong = {
        "n_head": 3,
        "n_heads": 5,
        "lr": 0,
        "n_hed": 1,
        "train_batch_size": 0,
        "rotary_emb": "on",
        "datasets": [["quikstart", 0, "chunkz", 0], ["bare"]],
    }
    ids = (
        'configs/dataset_configs holds "example", "openwebtext-documents", "openwebtext2_new_inputs", "pile", "quickst'
    )
    assert refusal(BASE | wrong) == [
        "n_head is 3 and n_heads is 5, but they are two names of one setting; keep one of them",
        f'datasets[0]: there is no dataset config "quikstart"; did you mean "quickstart"? {ids}art"',
        "datasets[0]: stitch is 0; it must be a whole number of at least 1",
        'datasets[0]: sampling_mode is "chunkz"; did you mean "chunks"? It must be one of "chunks", "documents_fixed", '
        '"documents_random", "random_sample"',
        "datasets[0]: weight is 0; it must be a number above 0",
        f'datasets[1]: there is no dataset config "bare"; {ids}art"',
        "n_embd is 8; it must be divisible by n_head 3; 6 or 9 would work",
        'rotary_emb is "on"; it must be true or false',
        "lr is 0; it must be a number above 0",
        "train_batch_size is 0; it must be a whole number of at least 1",
        'there is no key "n_hed" (its value is 1); did you mean "n_head"?',
    ]


INLINE = DatasetConfig(id="a_*.tfrecords", path="a_*.tfrecords", eval_path="b_*.tfrecords")


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("quickstart", ("quickstart", 1, "chunks", 1.0)),
        (["quickstart"], ("quickstart", 1, "chunks", 1.0)),
        (["quickstart", 25, "documents_random", 0.5], ("quickstart", 25, "documents_random", 0.5)),
        (["quickstart", 25, "random_sample", 2], ("quickstart", 25, "documents_random", 2.0)),
        (["quickstart", 25, "documents_fixed", 2], ("quickstart", 25, "documents_fixed", 2.0)),
        (["a_*.tfrecords", "b_*.tfrecords", 10, "random_sample", 1.0], (INLINE, 10, "documents_random", 1.0)),
    ],
)
def test_forms_of_datasets(entry: Any, source: tuple[Any, ...]) -> None:
    dataset = load_dataset_config(source[0]) if isinstance(source[0], str) else source[0]
    [found] = make(datasets=[entry], n_vocab=4096).datasets
    assert found == DatasetSource(dataset=dataset, stitch=source[1], sampling_mode=source[2], weight=source[3])


FORMS = (
    'each entry must be [dataset id, stitch, sampling mode, weight], a bare "dataset id", or '
    "[train glob, eval glob, stitch, sampling mode, weight] (note the double list)"
)


@pytest.mark.parametrize(
    ("datasets", "lines"),
    [
        ("quickstart", [f'datasets is "quickstart"; it must be a list: {FORMS}']),
        ([["quickstart", 25]], [f'datasets[0] is ["quickstart", 25]; {FORMS}']),
        (["pile", 25, "chunks", 1.0], [f"datasets[{i}] is {value}; {FORMS}" for i, value in ((1, "25"), (3, "1.0"))]),
        ([[3, 1, "chunks", 1]], [f'datasets[0] is [3, 1, "chunks", 1]; {FORMS}']),
        ([["", "", 1, "chunks", 1]], ['datasets[0]: the train glob is ""; it must be a non-empty string']),
        ([["a", 5, 1, "chunks", 1]], ["datasets[0]: the eval glob is 5; it must be a string"]),
    ],
)
def test_refused_datasets(datasets: Any, lines: list[str]) -> None:
    found = refusal(BASE | {"datasets": datasets, "n_vocab": 50257})
    assert [line for line in found if "there is no dataset config" not in line] == lines


def test_no_dataset() -> None:
    values = {key: value for key, value in BASE.items() if key != "datasets"}
    assert make_model_config(values | {"no_dataset": True}, "test").datasets == ()
    assert make_model_config(values | {"no_dataset": True, "datasets": []}, "test").datasets == ()
    [line] = refusal(values)
    assert line.startswith("datasets is []; it must hold at least one ")


def test_vocabulary_smaller_than_a_dataset() -> None:
    assert refusal(BASE | {"datasets": ["quickstart", "pile"], "n_vocab": 4096}) == [
        'n_vocab is 4096; dataset "pile" (n_vocab 50257) needs at least 50257'
    ]


def write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_dataset_config_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "DATASET_CONFIG_DIR", tmp_path)
    values = {"n_vocab": 64, "path": "x_*.tfrecords", "tokenizer_path": "gpt2", "tokenizer_is_pretrained": True}
    write(tmp_path, "good.json", json.dumps(values))
    assert load_dataset_config("good") == DatasetConfig(
        id="good", n_vocab=64, path="x_*.tfrecords", eval_path="", tokenizer_path="gpt2", tokenizer_is_pretrained=True
    )
    path = write(
        tmp_path,
        "bad.json",
        json.dumps({"n_vocab": 0, "pth": "x", "tokenizer_is_pretrained": True, "id": "b", "lr": 1, "eos_id": True}),
    )
    lines = [
        'there is no key "id" (its value is "b"); no known key resembles it, so remove it',
        "n_vocab is 0; it must be a whole number of at least 1, or null for none",
        'path is missing; give the glob of the training files, for example "datasets/mine/train_*.tfrecords"',
        "tokenizer_is_pretrained is true; it needs the name of the pretrained tokenizer in tokenizer_path, for "
        'example "gpt2"',
        "eos_id is true; it must be a whole number of at least 0, or null for none",
        'there is no key "pth" (its value is "x"); did you mean "path"?',
        'there is no key "lr" (its value is 1); it belongs in the config of a model',
    ]
    with pytest.raises(UserError) as caught:
        load_dataset_config("bad")
    assert str(caught.value).splitlines() == [f"{path}: {line}" for line in lines]
    assert refusal(BASE | {"datasets": ["bad"]}) == [f"datasets[0]: {path}: {line}" for line in lines]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{\n  "lr": 1,\n}', ", line 3, column 1: this is not JSON: Expecting property name enclosed in double quotes"),
        ("", ", line 1, column 1: this is not JSON: Expecting value"),
        ("[1]", ' holds [1]; it must hold an object, {"key": value, ...}'),
        ('{"lr": 1, "lr": 2}', ": lr is given twice, 1 and 2; keep one"),
    ],
)
def test_files_that_are_no_json_object(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, "broken.json", text)
    with pytest.raises(UserError) as caught:
        load_model_config(path)
    assert str(caught.value) == f"{path}{sentence}"


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"model_path": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.json is not UTF-8 text \(byte 16\); save it as UTF-8"):
        load_model_config(tmp_path / "latin.json")
    with pytest.raises(UserError, match=r"can't be read \(Is a directory\); give the path of an existing file"):
        read_text(tmp_path)


def test_paths_with_a_scheme() -> None:
    tf = pytest.importorskip("tensorflow")
    with tf.io.gfile.GFile("ram://runs/remote.json", "w") as file:
        file.write(json.dumps(BASE))
    assert load_model_config("ram://runs/remote.json") == make_model_config(BASE, "remote")
    for path, reason in (
        ("ram://runs/none.json", "NotFoundError"),
        ("zip://a.json", ".* scheme 'zip' .*"),
    ):
        with pytest.raises(UserError, match=rf"^{path} can't be read \({reason}\); give the path of an existing file$"):
            load_model_config(path)


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = load_model_config("quickstart")
    assert by_name.name == "quickstart"
    assert load_model_config("quickstart.json") == by_name
    assert load_model_config(CONFIG_DIR / "quickstart.json") == by_name
    path = write(tmp_path, "mine.json", "\ufeff" + json.dumps(BASE))
    assert load_model_config(path).name == "mine"
    monkeypatch.chdir(tmp_path)
    assert load_model_config("mine.json") == load_model_config("mine.json", {}) == load_model_config("./mine")
    with pytest.raises(UserError) as caught:
        load_model_config("mine.json", {"lr": 0})
    assert str(caught.value) == "mine.json: lr is 0; it must be a number above 0"


def test_missing_config_lists_those_that_exist() -> None:
    names = ", ".join(f'"{path.stem}"' for path in sorted(CONFIG_DIR.glob("*.json")))
    with pytest.raises(UserError) as caught:
        load_model_config("quikstart")
    assert str(caught.value) == f'there is no config "quikstart"; did you mean "quickstart"? configs holds {names}'
    with pytest.raises(UserError, match='there is no config "runs/zzz.json"; .*configs holds '):
        load_model_config("runs/zzz.json")


def test_parse_overrides() -> None:
    settings_given = [
        "lr=1e-3",
        "layout=batch:x",
        "rotary_emb=false",
        "lr_decay_end=null",
        'model_path="3"',
        "layout =",
    ]
    assert parse_overrides(settings_given) == {
        "lr": 0.001,
        "layout": "",
        "rotary_emb": False,
        "lr_decay_end": None,
        "model_path": "3",
    }
    assert parse_overrides(["model_path=runs/a=b", 'datasets=[["pile"]]']) == {
        "model_path": "runs/a=b",
        "datasets": [["pile"]],
    }
    for wrong in ("lr", "=3"):
        with pytest.raises(UserError, match=f'--set {wrong}: it must be key=value, for example "lr=0.0001"'):
            parse_overrides([wrong])


def test_overrides_replace_before_anything_is_checked() -> None:
    broken = BASE | {"n_head": 3, "lr": "high", "gradient_clipping": 1.0}
    config = make_model_config(broken, "test", {"n_heads": 4, "lr": 0.5, "gradient_clipping": None})
    assert (config.n_head, config.lr, config.gradient_clipping) == (4, 0.5, None)
    assert refusal(BASE, overrides={"n_heads": 3, "lrr": 1, "layout": "batch"}) == [
        "n_embd is 8; it must be divisible by n_head 3; 6 or 9 would work",
        'layout is "batch"; it must be dimensions and their mesh axes, each dimension once, for example '
        '"batch:x,embd:y"',
        'there is no key "lrr" (its value is 1); did you mean "lr"?',
    ]
    assert load_model_config("quickstart", {"mesh_shape": "x:2,y:2", "layout": ""}).mesh_shape == "x:2,y:2"


ROUND_TRIPS = [
    {},
    {"axial_pos_emb": True, "attention_types": [[["global", "local"], 2]], "z_loss": False, "layout": ""},
    {"moe_layers": [1], "moe_params": {"moe_dropout_rate": 0.5}, "moe_activation": "gelu", "lr_decay_end": 5},
    {"datasets": ["quickstart", ["a", "b", 3, "random_sample", 2]], "n_vocab": 4096, "eos_id": 3, "padding_id": 4096},
    {"no_dataset": True, "datasets": [], "eval_tasks": ["lambada"], "mlm_mask_ignore_ids": [1], "iterations": 7},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS)
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    config = make(**changes)
    path = write(tmp_path, "config.json", config_to_json(config))
    monkeypatch.setattr(config_module, "DATASET_CONFIG_DIR", tmp_path)  # a run's copy needs no other file
    again = load_model_config(path)
    assert again == config
    assert hash(again) == hash(config)
    assert (again.name, config.name) == ("config", "test")
    assert config_to_json(again) == config_to_json(config)
    assert "name" not in json.loads(config_to_json(config))


def test_a_built_config_comes_back_without_refusals() -> None:
    config = load_model_config("quickstart")
    assert make_model_config(json.loads(config_to_json(config)), "again") == config


def test_config_imports_no_tensorflow() -> None:
    script = "import sys, config; config.load_model_config('quickstart'); print('tensorflow' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=CONFIG_DIR.parent
    )
    assert run.stdout == "False\n"
