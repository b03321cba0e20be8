"""Command-line flags, generated from the schema; nothing about a setting is written down twice."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_haplovl.config.presets import MODELS, SEQ_LENGTHS, STAGE_DEFAULTS
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.config.stages import STAGES, recipes_of
from megatron_haplovl.config.validate import validate

# Spelt with an underscore by every DeepSpeed user.
_SPELLING = {"deepspeed-config": "deepspeed_config"}


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema: where it is, and the flag that sets it."""

    path: tuple[str, ...]
    flag: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def dest(self) -> str:
        """Name of the value in the parsed namespace."""
        return ".".join(self.path)


def iterate_settings(section: type, path: tuple[str, ...] = (), prefix: str = "") -> Iterator[Setting]:
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


def add_settings(parser: argparse.ArgumentParser, section: type, path: tuple[str, ...], prefix: str = "") -> None:
    """Add a flag for every setting of one section. No flag has a default: what is absent was not given."""
    title = (section.__doc__ or section.__name__).split("\n")[0]
    groups: dict[tuple[str, ...], Any] = {}
    for s in iterate_settings(section, path, prefix):
        owner = s.path[:-1]
        if owner not in groups:
            groups[owner] = parser.add_argument_group(" ".join(owner), title if owner == path else None)
        _add_flag(groups[owner], s)


def _add_flag(group: Any, s: Setting) -> None:
    help_text = s.field.metadata["help"]
    default = s.field.default
    if s.path[0] == "model":
        help_text += " (from --model)"
    elif default not in (None, False, ()):
        help_text += f" (default: {default})"
    kind = _scalar_type(s.type)
    common: dict[str, Any] = {"dest": s.dest, "default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(s.flag, action=argparse.BooleanOptionalAction, **common)
        return
    if typing.get_origin(s.type) is tuple:
        common["nargs"] = "+"
    common["metavar"] = s.field.metadata["metavar"]
    if s.field.metadata["choices"] is None and common["metavar"] is None:
        common["metavar"] = {int: "N", float: "X", str: "PATH" if s.type == (str | None) else "NAME"}[kind]
    group.add_argument(s.flag, type=kind, choices=s.field.metadata["choices"], **common)


def _scalar_type(annotation: Any) -> type:
    """The type one command-line word has: `int` for `int | None`, `str` for `tuple[str, ...]`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (t for t in typing.get_args(annotation) if t is not type(None))
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    assert annotation in (int, float, str, bool), annotation
    return typing.cast(type, annotation)


def build_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The parser of an entry script.

    Args:
        stage: "pretrain" or "finetune"; selects the defaults named in `--help`.
        description: first lines of `--help`.
    """
    parser = argparse.ArgumentParser(
        usage=f"deepspeed {_started(stage)} --model NAME [flags]",
        description=description,
        epilog=f"Unset flags take the model preset's value, then the default of this stage: {_stage_summary(stage)}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", choices=sorted(MODELS), help="model preset; any flag below overrides a part of it", required=True
    )
    # The `deepspeed` launcher passes this. The environment says the same, and we read it there.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        section = typing.get_type_hints(Config)[f.name]
        add_settings(parser, section, (f.name,))
    return parser


def _started(stage: str) -> str:
    """The script, or the module if that was started, because a wheel has no scripts."""
    module, main = f"megatron_haplovl.{stage}", sys.modules["__main__"].__spec__
    return f"--module {module}" if main is not None and main.name == module else f"{stage}_haplovl.py"


def _stage_summary(stage: str) -> str:
    return ", ".join(
        f"--{name.replace('_', '-')} {value}"
        for section in STAGE_DEFAULTS[stage].values()
        for name, value in section.items()
    )


def parse_args(stage: str, description: str = "", argv: Sequence[str] | None = None) -> Config:
    """Parse and check a command line.

    Args:
        stage: "pretrain" (stage 1) or "finetune" (stage 2).
        description: first lines of `--help`.
        argv: the words; default `sys.argv[1:]`.

    Raises:
        SystemExit: for a malformed, unknown or contradictory flag, with a sentence that says which.
    """
    parser = build_parser(stage, description)
    given = vars(parser.parse_args(argv))
    model = given.pop("model")
    given.pop("local_rank")
    try:
        config = build_config(stage, model, {tuple(name.split(".")): value for name, value in given.items()})
        validate(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def build_config(stage: str, model: str, overrides: dict[tuple[str, ...], Any]) -> Config:
    """Combine defaults, stage, preset and overrides (path in the schema -> value) into one configuration.

    Raises:
        ValueError: an unknown stage or model, or a recipe of the other stage.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; choose from {sorted(STAGES)}")
    if model not in MODELS:
        raise ValueError(f"unknown model preset {model!r}; choose from {sorted(MODELS)}")
    config = Config(model=MODELS[model])
    settings: dict[tuple[str, ...], Any] = {
        (section, name): value for section, values in STAGE_DEFAULTS[stage].items() for name, value in values.items()
    }
    settings["data", "seq_length"] = SEQ_LENGTHS[model]
    for path, value in {**settings, **overrides}.items():
        config = _replace(config, path, tuple(value) if isinstance(value, list) else value)
    # A stage's other defaults would not fit another stage's recipe.
    recipes = recipes_of(STAGES[stage])
    if config.recipe.recipe not in recipes:
        raise ValueError(f"{stage}_haplovl.py trains --recipe {' or '.join(recipes)}, not {config.recipe.recipe}")
    return config


def flags_to_reach(model: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The model flags, with their values, that turn one model into another."""
    words: list[str] = []
    for s in iterate_settings(ModelConfig):
        value = functools.reduce(getattr, s.path, wanted)
        if value == functools.reduce(getattr, s.path, model):
            continue
        if s.type is bool:
            words.append(s.flag if value else s.flag.replace("--", "--no-", 1))
        else:
            words += [s.flag, str(value)]
    return words


def _replace(section: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    inner = _replace(getattr(section, name), tuple(rest), value) if rest else value
    return dataclasses.replace(section, **{name: inner})
