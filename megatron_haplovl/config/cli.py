"""Command-line flags, generated from the schema, and files with the same settings; nothing is written down twice."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_haplovl.config.files import SettingsFile, read_settings
from megatron_haplovl.config.presets import MODELS, SEQ_LENGTHS
from megatron_haplovl.config.run_length import with_length_in_steps
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.config.settings import Setting, SettingPath, iterate_settings, with_settings
from megatron_haplovl.config.stages import STAGES, recipes_of
from megatron_haplovl.config.validate import validate

_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class CommandLine:
    """A run's configuration, and what in it is not the model preset's."""

    config: Config
    base: str
    """The model preset's name, or the checkpoint's configuration file that stands in its place."""
    differences: str
    """What differs from the base, as flags, with the file or the command line that says so; for the log."""


class RefusedCommandLine(SystemExit):  # noqa: N818 (it ends the process, as argparse does)
    """A malformed, unknown or contradictory setting; status 2.

    Args:
        sentence: which, and what to change.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(2)
        self.sentence = sentence


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise RefusedCommandLine(message)


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
    kind = s.scalar
    common: dict[str, Any] = {"dest": s.dest, "default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(s.flag, action=argparse.BooleanOptionalAction, **common)
        return
    if s.is_list:
        common["nargs"] = "+"
    common["metavar"] = s.field.metadata["metavar"]
    if s.field.metadata["choices"] is None and common["metavar"] is None:
        common["metavar"] = {int: "N", float: "X", str: "PATH" if s.optional else "NAME"}[kind]
    group.add_argument(s.flag, type=kind, choices=s.field.metadata["choices"], **common)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add --model and --config, which all other settings start from."""
    parser.add_argument(
        "--model",
        choices=sorted(MODELS),
        help="model preset, of which any flag overrides a part; needed unless a file of --config names it",
    )
    parser.add_argument(
        "--config",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="settings in YAML or JSON under the names of the flags, or a checkpoint's config.json; a later file wins "
        "over an earlier one, and a flag over all files. Paths in a file start from the working directory",
    )


def build_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The parser of an entry script.

    Args:
        stage: "pretrain" or "finetune"; selects the defaults named in `--help`.
        description: first lines of `--help`.
    """
    parser = _Parser(
        usage=f"deepspeed {_started(stage)} [--config FILE ...] [--model NAME] [flags]",
        description=description,
        epilog=f"What no flag or file sets has the model preset's value, then the default of this stage: "
        f"{_stage_summary(stage)}.",
        allow_abbrev=False,
    )
    add_sources(parser)
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
        f"--{setting.partition('.')[2].replace('_', '-')} {value}" for setting, value in STAGES[stage].defaults.items()
    )


def parse_args(stage: str, description: str = "", argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line; see :func:`parse_command_line`."""
    return parse_command_line(stage, description, argv).config


def parse_command_line(stage: str, description: str = "", argv: Sequence[str] | None = None) -> CommandLine:
    """Parse and check a command line, and read the files that it names.

    Args:
        stage: "pretrain" (stage 1) or "finetune" (stage 2).
        description: first lines of `--help`.
        argv: the words; default `sys.argv[1:]`.

    Raises:
        RefusedCommandLine: a malformed, unknown or contradictory setting, with a sentence that says which.
        SystemExit: for `--help`.
    """
    parser = build_parser(stage, description)
    given = vars(parser.parse_args(argv))
    model, files = given.pop("model"), given.pop("config")
    given.pop("local_rank")
    try:
        flags = {tuple(name.split(".")): value for name, value in given.items()}
        combined = combine(stage, model, [read_settings(path) for path in files], flags)
        validate(combined.config)
    except ValueError as error:
        parser.error(str(error))
    return combined


def build_config(stage: str, model: str, overrides: Mapping[SettingPath, Any]) -> Config:
    """Combine defaults, stage, preset and overrides (path in the schema -> value) into one configuration.

    Raises:
        ValueError: an unknown stage or model, or a recipe of another stage.
    """
    return combine(stage, model, (), overrides).config


def combine(
    stage: str, model: str | None, files: Sequence[SettingsFile], flags: Mapping[SettingPath, Any]
) -> CommandLine:
    """Combine, each winning over those before: defaults, stage, model preset, files in their order, flags.

    Args:
        stage: "pretrain" or "finetune".
        model: preset; None where a file names it, or is a checkpoint's configuration.
        files: what --config names.
        flags: path in the schema -> value.

    Raises:
        ValueError: an unknown stage or model, none at all or two, or a recipe of another stage.
    """
    base, start, rest = _base(stage, model, files)
    layers = [*((file.path, file.values) for file in rest), (_COMMAND_LINE, flags)]
    config, said_by = start, dict[SettingPath, str]()
    for where, values in layers:
        config = with_settings(config, values)
        said_by |= dict.fromkeys(values, where)
    # A stage's other defaults would not fit another stage's recipe.
    recipes = recipes_of(STAGES[stage])
    if config.recipe.recipe not in recipes:
        raise ValueError(f"{stage}_haplovl.py trains --recipe {' or '.join(recipes)}, not {config.recipe.recipe}")
    said = {where: _words(start, config, [path for path in said_by if said_by[path] == where]) for where, _ in layers}
    given = {path: where for where, values in layers for path, value in values.items() if value is not None}
    config = with_length_in_steps(config, given)
    lines = [f"  {shlex.join(words)} ({where})" for where, words in said.items() if words]
    return CommandLine(config, base, "\n".join([f"settings that differ from {base}:", *(lines or ["  none"])]))


def _base(stage: str, model: str | None, files: Sequence[SettingsFile]) -> tuple[str, Config, Sequence[SettingsFile]]:
    """What all else is compared with, by name and in full, and the files that are left to be put on top of it."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; choose from {sorted(STAGES)}")
    defaults = {tuple(setting.split(".")): value for setting, value in STAGES[stage].defaults.items()}
    config = with_settings(Config(), defaults)
    named = [*(file.preset for file in files if file.preset is not None), *([] if model is None else [model])]
    for file in (file for file in files if file.whole_model):
        if named:
            raise ValueError(
                f"{file.path} holds a whole model, so the preset {named[-1]} would change nothing; leave it out"
            )
        if file is not files[0]:
            raise ValueError(
                f"{file.path} holds every setting, so nothing of {files[0].path} would be left; give it first and alone"
            )
    if files and files[0].whole_model:
        return files[0].path, with_settings(config, files[0].values), files[1:]
    if not named:
        raise ValueError("no model is named: give --model NAME, or a --config FILE that says model: NAME")
    preset = named[-1]
    if preset not in MODELS:
        raise ValueError(f"unknown model preset {preset!r}; choose from {sorted(MODELS)}")
    config = dataclasses.replace(config, model=MODELS[preset])
    return preset, with_settings(config, {("data", "seq_length"): SEQ_LENGTHS[preset]}), files


def _words(start: Config, config: Config, among: Collection[SettingPath]) -> list[str]:
    """Flags of those settings that differ."""
    changed = (s for s in iterate_settings(Config) if s.path in among and s.value_in(config) != s.value_in(start))
    return [word for s in changed for word in s.words(s.value_in(config))]


def flags_to_reach(model: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The model flags, with their values, that turn one model into another."""
    words: list[str] = []
    for s in iterate_settings(ModelConfig):
        value = s.value_in(wanted)
        if value != s.value_in(model):
            words += s.words(value)
    return words
