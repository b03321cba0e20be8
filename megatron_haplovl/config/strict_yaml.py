"""YAML as a person reads it: YAML 1.2's core schema, of which no key may be given twice.

PyYAML follows YAML 1.1, where `1e-4` is a string, `010` is 8, `1:30` is 90 and `no` is false. Here `1e-4` is a number,
`true` and `false` are the only switches, and whatever is not plainly a number is a string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True)
class Located:
    """A value and where it stands."""

    value: Any
    """A scalar, a `dict[str, Located]` or a `list[Located]`."""
    line: int
    """From 1."""


def load_yaml(text: str) -> Any:
    """What one YAML document holds.

    Raises:
        ValueError: it is not YAML, asks for a Python object, or has a key twice; with the line.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def load_located(text: str) -> Located:
    """As :func:`load_yaml`, every value with its line.

    Raises:
        ValueError: as :func:`load_yaml`, or a key that is no string.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        return Located(None, 1) if node is None else _located(loader, node, ())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _located(loader: _StrictLoader, node: yaml.Node, outer: tuple[yaml.Node, ...]) -> Located:
    line = node.start_mark.line + 1
    if node in outer:
        raise ValueError(f"line {line}: a value that holds itself")
    outer = (*outer, node)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Located] = {}
        for key, value in node.value:
            name, where = loader.construct_object(key), key.start_mark.line + 1
            if not isinstance(name, str):
                raise ValueError(f"line {where}: the key {name!r} is no string")
            if name in found:
                raise ValueError(f"line {where}: {name} is given twice")
            found[name] = _located(loader, value, outer)
        return Located(found, line)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(loader, item, outer) for item in node.value], line)
    return Located(loader.construct_object(node), line)
