"""Settings in files: JSON objects, and the configuration that lies in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_haplovl.config.schema import Config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ValueError: the file is missing, or does not hold one object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
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
    values = read_json(path)
    if "model_type" in values:
        raise ValueError(
            f"{path}: is that of a Hugging Face model; give its folder as --language-model or --vision-teacher, or "
            "convert it (haplovl-convert import)"
        )
    values.pop("iteration", None)
    config = _build(Config, values, str(path))
    assert isinstance(config, Config)
    return config


def _build(section: Any, values: Mapping[str, Any], where: str) -> Any:
    """Rebuild one (nested) dataclass from what `dataclasses.asdict` and JSON made of it."""
    types = typing.get_type_hints(section)
    known = {f.name for f in dataclasses.fields(section)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown settings in {section.__name__}: {', '.join(unknown)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} holds {value!r}, not an object")
            arguments[name] = _build(types[name], value, where)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return section(**arguments)
