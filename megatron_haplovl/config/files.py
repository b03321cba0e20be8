"""Settings in files: JSON objects, recipes (`--config`), and the configuration that lies in a checkpoint."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import Setting, SettingPath, iterate_settings, with_settings
from megatron_haplovl.config.strict_yaml import load_yaml

_LARGEST = 1e300
"""No setting is larger; a number that no float can hold is not even compared with anything."""


@dataclass(frozen=True)
class SettingsFile:
    """What a file sets."""

    path: str
    preset: str | None
    """The model preset that the file names."""
    values: Mapping[SettingPath, Any]
    whole_model: bool
    """Whether the file is a checkpoint's configuration, which holds a model of its own instead of a preset's name."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ValueError: the file is missing, or does not hold one object.
    """
    value = _read(path, json.loads, "JSON")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_config(checkpoint: str | Path) -> Config:
    """The configuration with which a training checkpoint was saved.

    Args:
        checkpoint: a `global_stepN` folder.

    Raises:
        ValueError: config.json is missing, malformed, or holds a setting that this version does not know.
    """
    path = Path(checkpoint) / "config.json"
    content = read_json(path)
    _refuse_hugging_face(content, path)
    return with_settings(Config(), _nested_values(content, str(path)))


def read_settings(path: str) -> SettingsFile:
    """A file of settings: YAML, or JSON where its name ends in `.json`.

    Its keys are the names of the flags (`global-batch-size` or `global_batch_size`; `model` names a preset), or it is a
    checkpoint's `config.json`. A switch is true or false; `null` is the value of a flag that is not given.

    Raises:
        ValueError: there is no such file; or it holds anything but known settings, once each, of the right type.
    """
    is_json = path.endswith(".json")
    content = _read(Path(path), _load_json if is_json else load_yaml, "JSON" if is_json else "YAML")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {_kind(content)}, not settings (NAME: VALUE, one a line)")
    _refuse_hugging_face(content, path)
    if any(isinstance(content.get(section), dict) for section in vars(Config())):
        values = _nested_values(content, path)
        return SettingsFile(path, None, values, whole_model="model" in content)
    return _flat(content, path)


def _read(path: Path, load: Any, language: str) -> Any:
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        return load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid {language} ({error})") from error


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def _refuse_hugging_face(content: Mapping[str, Any], path: str | Path) -> None:
    if "model_type" in content:
        raise ValueError(
            f"{path}: is that of a Hugging Face model; give its folder as --language-model or --vision-teacher, or "
            "convert it (haplovl-convert import)"
        )


def _flat(content: Mapping[Any, Any], path: str) -> SettingsFile:
    known = {_key(s.flag.removeprefix("--")): s for s in iterate_settings(Config)}
    preset: str | None = None
    values: dict[SettingPath, Any] = {}
    for name, value in content.items():
        key = _key(str(name))
        if key == "model":
            if value not in list(MODELS):
                raise ValueError(f"{path}: {name}: {value!r} is not one of {', '.join(sorted(MODELS))}")
            preset = value
            continue
        if key not in known:
            raise ValueError(f"{path}: unknown setting {name}{_meant(key, known)}")
        if known[key].path in values:
            raise ValueError(f"{path}: {name} is given twice, once with - and once with _")
        values[known[key].path] = _checked(known[key], value, f"{path}: {name}")
    return SettingsFile(path, preset, values, whole_model=False)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _meant(key: str, known: Mapping[str, Setting]) -> str:
    if key.removeprefix("no-") in known:
        return f"; write {key.removeprefix('no-')}: false"
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _nested_values(content: Mapping[str, Any], path: str) -> dict[SettingPath, Any]:
    """The settings of a checkpoint's configuration, which `dataclasses.asdict` has nested, beside its iteration."""
    known = {s.path: s for s in iterate_settings(Config)}
    values: dict[SettingPath, Any] = {}
    for at, value in _leaves(content):
        if at == ("iteration",):
            continue
        if at not in known:
            raise ValueError(f"{path}: unknown setting {'.'.join(at)}")
        values[at] = _checked(known[at], value, f"{path}: {'.'.join(at)}")
    return values


def _leaves(content: Mapping[str, Any], at: SettingPath = ()) -> Iterator[tuple[SettingPath, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, str(name)))
        else:
            yield (*at, str(name)), value


def _checked(s: Setting, value: Any, where: str) -> Any:
    """The value as the schema has it."""
    if value is None and s.optional:
        return None
    if s.is_list and s.scalar is int:
        return _checked_numbers(value, where)
    if s.is_list:
        return _checked_list(value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
    fits, expected = {
        bool: (isinstance(value, bool), "true or false"),
        int: (number and isinstance(value, int), "a whole number"),
        float: (number and math.isfinite(value), "a number"),
        str: (isinstance(value, str), "a string"),
    }[s.scalar]
    if not fits:
        raise ValueError(f"{where}: {value!r} is {_kind(value)}, not {expected}{' or null' * s.optional}")
    choices = s.field.metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}")
    return float(value) if s.scalar is float else value


def _checked_numbers(value: Any, where: str) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or abs(item) >= _LARGEST:
            raise ValueError(f"{where}: {item!r} is {_kind(item)}, not a whole number")
    return tuple(items)


def _checked_list(value: Any, where: str) -> tuple[str, ...]:
    """Words; the weights of a blend may be written as numbers."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise ValueError(f"{where}: {value!r} is {_kind(value)}, not a list of strings")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ValueError(f"{where}: {item!r} is {_kind(item)}, not a string")
    return tuple(str(item) for item in items)


def _kind(value: Any) -> str:
    names = {
        str: "a string",
        bool: "a switch",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")
