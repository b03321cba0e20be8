"""Writes docs/flags.md, the reference of all training flags, from the schema and the presets.

python -m megatron_haplovl.config.reference > docs/flags.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from typing import Any

from megatron_haplovl.config.cli import build_config, build_parser
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import Setting, iterate_settings
from megatron_haplovl.config.stages import STAGES

_HEAD = """# Flags

All flags of `pretrain_haplovl.py` (stage 1) and `finetune_haplovl.py` (stage 2). This page is generated from
`megatron_haplovl/config/schema.py` by `python -m megatron_haplovl.config.reference > docs/flags.md`.

A flag that is not given takes the value of the preset (`--model`), then the default of the stage. A default that
differs between the stages is given for both; "preset" means that the presets differ, and the last table has their
values. An unknown or contradictory flag ends the program with a sentence; an abbreviation is an unknown flag.
"""


def flag_reference() -> str:
    """The whole page, in Markdown."""
    stages = list(STAGES)
    parser = build_parser(stages[0], "")
    actions = {action.dest: action for action in parser._actions}
    configs = {(stage, model): build_config(stage, model, {}) for stage in stages for model in MODELS}
    parts = [_HEAD, *_without_section(actions)]
    of_preset: list[Setting] = []
    for path, section in _sections(Config):
        settings = [s for s in iterate_settings(Config) if s.path[:-1] == path]
        if not settings:
            continue
        parts.append(f"\n## {'.'.join(path)}\n\n{_first_paragraph(section)}\n\n{_ROW_HEAD}")
        for s in settings:
            default = _default(s, configs)
            if default == _PRESET:
                of_preset.append(s)
            parts.append(_row(s, actions[s.dest], default))
    parts.append(f"\n## Presets\n\n| flag | {' | '.join(MODELS)} |\n|{'---|' * (1 + len(MODELS))}")
    for s in of_preset:
        assert len({s.value_in(configs[stage, "haplovl-debug"]) for stage in stages}) == 1, s.flag
        values = (_shown(s.value_in(configs[stages[0], model])) for model in MODELS)
        parts.append(f"| `{s.flag}` | {' | '.join(values)} |")
    return "\n".join(parts) + "\n"


_ROW_HEAD = "| flag | values | default | what it sets |\n|---|---|---|---|"
_PRESET = "preset"


def _sections(section: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """Every dataclass of the schema with its place in it, in the order in which they are written."""
    hints = typing.get_type_hints(section)
    yield path, section
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _sections(hints[f.name], (*path, f.name))


def _without_section(actions: dict[str, argparse.Action]) -> list[str]:
    """Flags that are no field of the schema: they choose or read what the others begin with."""
    own = [action for dest, action in actions.items() if "." not in dest and action.help != argparse.SUPPRESS]
    rows = [f"| {_spellings(a)} | {_values(a)} | {_escape(a.help or '')} |" for a in own if a.dest != "help"]
    return ["| flag | values | what it does |\n|---|---|---|", *rows]


def _row(s: Setting, action: argparse.Action, default: str) -> str:
    return f"| {_spellings(action)} | {_values(action)} | {default} | {_escape(s.field.metadata['help'])} |"


def _spellings(action: argparse.Action) -> str:
    return ", ".join(f"`{spelling}`" for spelling in action.option_strings)


def _values(action: argparse.Action) -> str:
    """Choices, or a placeholder; nothing for a switch."""
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.metavar is None:
        return "switch"
    more = " ..." if action.nargs == "+" else ""
    return f"`{action.metavar}{more}`".replace("|", "\\|")


def _default(s: Setting, configs: dict[tuple[str, str], Config]) -> str:
    """One value where stages and presets agree, one for each stage where presets agree, else "preset"."""
    found = {key: s.value_in(config) for key, config in configs.items()}
    by_stage = {stage: _shown(value) for (stage, _), value in found.items()}
    if any(_shown(value) != by_stage[stage] for (stage, _), value in found.items()):
        return _PRESET
    if len(set(by_stage.values())) == 1:
        return next(iter(by_stage.values()))
    return ", ".join(f"{value} (stage {number})" for number, value in enumerate(by_stage.values(), start=1))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, ()) else f"{value}"


def _first_paragraph(section: type) -> str:
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%")


if __name__ == "__main__":
    sys.stdout.write(flag_reference())
