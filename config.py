"""Load configurations: JSON files and overrides in, frozen validated objects out, every mistake in one message.

Imports no TensorFlow, so that a mistake is reported at once; only paths with a scheme (gs://...) need it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from config_fields import listed, nearest
from config_schema import DatasetConfig, DatasetSource, ModelConfig
from errors import UserError

__all__ = [
    "CONFIG_DIR",
    "DATASET_CONFIG_DIR",
    "DatasetConfig",
    "DatasetSource",
    "ModelConfig",
    "config_to_json",
    "load_dataset_config",
    "load_model_config",
    "make_model_config",
    "parse_overrides",
    "read_text",
]

CONFIG_DIR = Path(__file__).resolve().parent / "configs"
DATASET_CONFIG_DIR = CONFIG_DIR / "dataset_configs"

# Second spelling -> the attribute's name.
ALIASES = {"n_heads": "n_head", "activation_fn": "activation_function", "axial_pos_emb_": "axial_pos_emb"}


def load_model_config(name_or_path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read a model's configuration.

    Args:
        name_or_path: NAME or NAME.json (configs/NAME.json), or any path, local or gs://.
        overrides: key -> JSON value, replacing what the file says before anything is checked; None removes a key.

    Raises:
        UserError: one line for each mistake, naming the file, the key, its value and what would work.
    """
    path = _find(str(name_or_path), CONFIG_DIR, "config")
    return make_model_config(_read_json_object(path), _stem(path), overrides, origin=_shown(path))


def make_model_config(
    values: Mapping[str, Any],
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    origin: str | None = None,
) -> ModelConfig:
    """`load_model_config` for a dict of JSON values; `origin` is what messages call it (the name by default)."""
    problems: list[str] = []
    spelling: dict[str, str] = {}
    given = _canonical(values, spelling, problems) | _canonical(overrides or {}, spelling, problems)
    if "name" in given:  # an attribute, but no key: the file's stem gives it
        problems.append(_unknown("name", given.pop("name"), ModelConfig))

    resolved = dict(given)
    bad: set[str] = set()
    if given.get("datasets") is not None:
        resolved["datasets"], mistakes = _resolve_datasets(given["datasets"])
        problems += mistakes
        bad |= {"datasets"} if mistakes else set()

    config, mistakes = _validated(ModelConfig, resolved | {"name": name}, spelling, bad)
    problems += mistakes
    if problems or config is None:
        raise UserError("\n".join(f"{origin or name}: {problem}" for problem in problems))
    return config


def load_dataset_config(dataset_id: str) -> DatasetConfig:
    """Read configs/dataset_configs/<dataset_id>.json (or a path that ends in .json); UserError as above."""
    path = _find(dataset_id, DATASET_CONFIG_DIR, "dataset config")
    values = _read_json_object(path)
    problems = [_unknown("id", values.pop("id"), DatasetConfig)] if "id" in values else []
    config, mistakes = _validated(DatasetConfig, values | {"id": _stem(path)}, {}, set())
    problems += mistakes
    if problems or config is None:
        raise UserError("\n".join(f"{_shown(path)}: {problem}" for problem in problems))
    return config


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """["lr=1e-3", "layout=batch:x"] -> {"lr": 0.001, "layout": "batch:x"}: JSON where it parses, a string elsewhere."""
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f'--set {setting}: it must be key=value, for example "lr=0.0001"')
        try:
            overrides[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key.strip()] = text
    return overrides


def config_to_json(config: ModelConfig) -> str:
    """The whole config as JSON, its datasets spelled out: it loads back to an equal config wherever it is taken."""
    values = config.model_dump(mode="json", exclude={"name", "datasets"})
    datasets = [
        [source.dataset.model_dump(mode="json"), source.stitch, source.sampling_mode, source.weight]
        for source in config.datasets
    ]
    return json.dumps(values | {"datasets": datasets}, indent=2) + "\n"


def read_text(path: str | os.PathLike[str]) -> str:
    """The file's text (UTF-8), local or behind a scheme that tf.io.gfile knows; UserError if it can't be read."""
    name = os.fspath(path)
    try:
        if "://" not in name:
            with open(name, encoding="utf-8") as file:
                return file.read()
        import tensorflow as tf  # here, because it takes seconds and local files do not need it

        try:
            with tf.io.gfile.GFile(name, "r") as file:
                return str(file.read())
        except tf.errors.OpError as error:
            reason = " ".join(error.message.split()) or type(error).__name__
            raise UserError(f"{name} can't be read ({reason}); give the path of an existing file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_shown(name)} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{_shown(name)} can't be read ({reason}); give the path of an existing file") from error


def _find(name: str, directory: Path, kind: str) -> str:
    """The path of a named file of `directory`, or of the file that `name` itself is the path of."""
    if "://" in name:
        return name
    is_path = name.endswith(".json") or os.sep in name
    named = directory / (name if name.endswith(".json") else f"{name}.json")
    candidates = [Path(name), Path(f"{name}.json"), named] if is_path else [named, Path(name)]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    available = sorted(path.stem for path in directory.glob("*.json"))
    near = nearest(Path(name).stem, available)
    guess = f'did you mean "{near}"? ' if near else ""
    holds = f"{_shown(directory)} holds {listed(available) or 'none'}"
    raise UserError(f'there is no {kind} "{name}"; {guess}{holds}')


def _read_json_object(path: str) -> dict[str, Any]:
    shown = _shown(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f"{shown}: {key} is given twice, {_value(seen[key])} and {_value(value)}; keep one")
            seen[key] = value
        return seen

    try:
        # Windows editors may start a file with a byte-order mark.
        values = json.loads(read_text(path).removeprefix("\ufeff"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{shown}, line {error.lineno}, column {error.colno}: this is not JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise UserError(f'{shown} holds {_value(values)}; it must hold an object, {{"key": value, ...}}')
    return values


def _canonical(values: Mapping[str, Any], spelling: dict[str, str], problems: list[str]) -> dict[str, Any]:
    """`values` under their attributes' names; `spelling` learns how each was written."""
    canonical: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        earlier = canonical.get(name)
        if name in canonical and value is None:
            continue
        if earlier is not None and earlier != value:
            problems.append(
                f"{spelling[name]} is {_value(earlier)} and {key} is {_value(value)}, but they are two names of one "
                "setting; keep one of them"
            )
            continue
        canonical[name] = value
        spelling[name] = key
    return canonical


_DATASET_FORMS = (
    'each entry must be [dataset id, stitch, sampling mode, weight], a bare "dataset id", or '
    "[train glob, eval glob, stitch, sampling mode, weight] (note the double list)"
)


def _resolve_datasets(entries: Any) -> tuple[tuple[DatasetSource, ...], list[str]]:
    """The sources that `datasets` names, and a sentence for each mistake."""
    if entries is False:
        return (), []
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return (), [f"datasets is {_value(entries)}; it must be a list: {_DATASET_FORMS}"]
    sources, problems = [], []
    for index, entry in enumerate(entries):
        source, mistakes = _resolve_dataset(entry, f"datasets[{index}]")
        problems += mistakes
        if source is not None:
            sources.append(source)
    return tuple(sources), problems


def _resolve_dataset(entry: Any, where: str) -> tuple[DatasetSource | None, list[str]]:
    if isinstance(entry, DatasetSource):
        return entry, []
    parts = [entry] if isinstance(entry, str) else entry
    if not isinstance(parts, Sequence) or len(parts) not in (1, 4, 5) or not isinstance(parts[0], str | dict):
        return None, [f"{where} is {_value(entry)}; {_DATASET_FORMS}"]
    dataset, problems = _dataset_of(parts, where)
    sampling = dict(zip(("stitch", "sampling_mode", "weight"), parts[-3:], strict=True)) if len(parts) > 1 else {}
    # A stand-in lets the rest of the entry be checked although its dataset could not be.
    stand_in = dataset or DatasetConfig(id="unknown", path="unknown")
    source, mistakes = _validated(DatasetSource, {"dataset": stand_in, **sampling}, {}, set())
    problems += [f"{where}: {mistake}" for mistake in mistakes]
    return (source if dataset else None), problems


def _dataset_of(parts: Sequence[Any], where: str) -> tuple[DatasetConfig | None, list[str]]:
    """The dataset of an entry: named by id, spelled out (as config_to_json writes it), or two inline globs."""
    first = parts[0]
    spelling = {}
    if len(parts) == 5:
        values = {"id": str(first) or "inline", "path": first, "eval_path": parts[1]}
        spelling = {"path": "the train glob", "eval_path": "the eval glob"}
    elif isinstance(first, dict):
        values = first
    else:
        try:
            return load_dataset_config(first), []
        except UserError as error:
            return None, [f"{where}: {line}" for line in str(error).splitlines()]
    config, mistakes = _validated(DatasetConfig, values, spelling, set())
    return config, [f"{where}: {mistake}" for mistake in mistakes]


_Model = TypeVar("_Model", bound=BaseModel)


def _validated(
    schema: type[_Model], values: Mapping[str, Any], spelling: Mapping[str, str], bad: set[str]
) -> tuple[_Model | None, list[str]]:
    """The object, or a sentence for each mistake; `bad` holds keys already complained of and learns the others."""
    try:
        return schema.model_validate(dict(values)), []
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            if key in bad or detail["type"] == "default_factory_not_called":
                continue
            bad.add(key)
            problems.append(_sentence(schema, key, spelling.get(key, key), detail))
        return None, problems


def _sentence(schema: type[BaseModel], key: str, written: str, detail: Mapping[str, Any]) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown(key, detail["input"], schema)
    if detail["type"] == "missing":
        return f"{written} is missing; give {schema.model_fields[key].description}"
    reason = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
    return f"{written} is {_value(detail['input'])}; {reason}"


def _unknown(key: str, value: Any, schema: type[BaseModel]) -> str:
    model_keys = {*ModelConfig.model_fields, *ALIASES} - {"name"}
    dataset_keys = set(DatasetConfig.model_fields) - {"id"}
    known, others = (model_keys, dataset_keys) if schema is ModelConfig else (dataset_keys, model_keys)
    near = nearest(key, sorted(known))
    hint = f'did you mean "{near}"?' if near else "no known key resembles it, so remove it"
    if key in others:
        hint = f"it belongs in the config of a {'dataset' if schema is ModelConfig else 'model'}"
    return f'there is no key "{key}" (its value is {_value(value)}); {hint}'


def _value(value: Any) -> str:
    """A JSON value as its file shows it, cut where it is long."""
    text = json.dumps(value, default=lambda other: other.model_dump() if isinstance(other, BaseModel) else repr(other))
    return text if len(text) <= 120 else text[:117] + "..."


def _stem(path: str) -> str:
    return Path(path.rsplit("/", 1)[-1]).stem


def _shown(path: str | os.PathLike[str]) -> str:
    """The path as a user would type it from here."""
    name = os.fspath(path)
    if "://" in name:
        return name
    relative = os.path.relpath(name)
    return name if relative.startswith("..") else relative
