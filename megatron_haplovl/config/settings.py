"""The schema's leaves, one by one: path, flag and type of each setting, and how values are put into a configuration."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

SettingPath = tuple[str, ...]
"""Where a setting lies in the schema, such as ("model", "pre", "num_layers")."""

_Section = TypeVar("_Section")

# Spelt with an underscore by every user of DeepSpeed and of Megatron.
_SPELLING = {
    "deepspeed-config": "deepspeed_config",
    "override-opt-param-scheduler": "override-opt_param-scheduler",
    "use-checkpoint-opt-param-scheduler": "use-checkpoint-opt_param-scheduler",
}


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema: where it is, and the flag that sets it."""

    path: SettingPath
    flag: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def dest(self) -> str:
        """Name of the value in the parsed namespace."""
        return ".".join(self.path)

    @property
    def scalar(self) -> type:
        """The type of one word: `int` for `int | None`, `str` for `tuple[str, ...]`."""
        annotation = self.type
        if self.optional:
            (annotation,) = (t for t in typing.get_args(annotation) if t is not type(None))
        if typing.get_origin(annotation) is tuple:
            annotation = typing.get_args(annotation)[0]
        assert annotation in (int, float, str, bool), annotation
        return typing.cast(type, annotation)

    @property
    def optional(self) -> bool:
        """Whether the value may be None."""
        return typing.get_origin(self.type) in (typing.Union, types.UnionType)

    @property
    def is_list(self) -> bool:
        """Whether the value is a tuple of words."""
        return typing.get_origin(self.type) is tuple

    def value_in(self, section: Any) -> Any:
        """The value in a configuration, or in the section whose settings were iterated."""
        return functools.reduce(getattr, self.path, section)

    def words(self, value: Any) -> list[str]:
        """The flag with a value, as words of a command line."""
        if self.scalar is bool:
            return [self.flag if value else self.flag.replace("--", "--no-", 1)]
        if value is None:
            return ["without", self.flag]
        return [self.flag, *(map(str, value) if self.is_list else [str(value)])]


def iterate_settings(section: type, path: SettingPath = (), prefix: str = "") -> Iterator[Setting]:
    """Yield every leaf field of a (nested) configuration dataclass, in the order in which it is written."""
    types_by_name = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        field_type = types_by_name[f.name]
        if dataclasses.is_dataclass(field_type):
            assert isinstance(field_type, type)
            nested_prefix = f.metadata.get("prefix", "")
            yield from iterate_settings(field_type, (*path, f.name), nested_prefix)
        else:
            name = f"{prefix}-{f.name}" if prefix else f.name
            name = name.replace("_", "-")
            yield Setting((*path, f.name), "--" + _SPELLING.get(name, name), field_type, f)


def with_settings(config: _Section, values: Mapping[SettingPath, Any]) -> _Section:
    """A copy of a configuration (or of a section of it) with some settings replaced."""
    for path, value in values.items():
        config = _replace(config, path, tuple(value) if isinstance(value, list) else value)
    return config


def _replace(section: Any, path: SettingPath, value: Any) -> Any:
    name, *rest = path
    inner = _replace(getattr(section, name), tuple(rest), value) if rest else value
    return dataclasses.replace(section, **{name: inner})
