"""Every command that README and docs show has only flags that the program knows, with values that go together.

No file is opened but those of `--config`, which lie in the repository or are shown on the same page. Blocks of `shell`
have loops and variables; they are those of docs/own_images_one_evening.md, and its own test expands them.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.common import train_language_model, train_tokenizer, train_vision_teacher
from examples.own_data import recipe as own_data
from megatron_haplovl.commands import (
    convert_arguments,
    evaluate,
    generate,
    inspect_data,
    merge,
    plan_arguments,
    preprocess_arguments,
    report_run,
    verify,
)
from megatron_haplovl.config.cli import build_config, parse_args, parse_command_line
from megatron_haplovl.config.files import read_settings
from megatron_haplovl.config.mixture_file import read_mixture
from tests.fixtures.stand_in_launchers import REPOSITORY, launched

PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
STAGES = {
    **{f"{stage}_haplovl.py": stage for stage in ("pretrain", "finetune")},
    **{f"megatron_haplovl.{stage}": stage for stage in ("pretrain", "finetune")},
}
TOOLS = {
    "tools/convert_checkpoint.py": convert_arguments.build_parser,
    "tools/evaluate.py": evaluate.build_parser,
    "tools/generate.py": generate.build_parser,
    "tools/merge_data.py": merge.build_parser,
    "tools/plan_parallelism.py": plan_arguments.build_parser,
    "tools/inspect_data.py": inspect_data.build_parser,
    "tools/preprocess_data.py": preprocess_arguments.build_parser,
    "tools/report_run.py": report_run.build_parser,
    "tools/verify_data.py": verify.build_parser,
}
SCRIPTS = {
    "haplovl-convert": convert_arguments.build_parser,
    "haplovl-evaluate": evaluate.build_parser,
    "haplovl-generate": generate.build_parser,
    "haplovl-inspect": inspect_data.build_parser,
    "haplovl-merge": merge.build_parser,
    "haplovl-plan": plan_arguments.build_parser,
    "haplovl-preprocess": preprocess_arguments.build_parser,
    "haplovl-report": report_run.build_parser,
    "haplovl-verify": verify.build_parser,
}
MODULES = {
    "examples.common.train_language_model": train_language_model.build_parser,
    "examples.common.train_tokenizer": train_tokenizer.build_parser,
    "examples.common.train_vision_teacher": train_vision_teacher.build_parser,
    "examples.own_data.recipe": own_data.build_parser,
}
# Programs whose commands are checked; a command of anything else (git, pip, make) is not ours.
OURS = ("deepspeed", "torchrun", "python", "bash", "sbatch", *SCRIPTS)


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    words: tuple[str, ...]
    variables: dict[str, str]
    """Those set in front of it."""


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands_of(page: str, text: str) -> list[Command]:
    """Commands of the bash blocks, those behind a prompt in the text blocks, which show what a command prints, and
    those of tools and launch scripts in sentences and tables.
    """
    found, lines = [], []
    for language, block in re.findall(r"^```(bash|text)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if language == "bash" or line.startswith("$ "):
                lines.append(line.removeprefix("$ ") if language == "text" else line)
    for line in [*lines, *_inline(text)]:
        for words in _split(line):
            first = next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))
            variables = dict(word.split("=", 1) for word in words[:first])
            found.append(Command(page, tuple(words[first:]), variables))
    return [command for command in found if command.words and command.words[0] in OURS]


def _inline(text: str) -> list[str]:
    """What stands between backticks, has a tool or launch script among its words, and does not ask for help."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in spans if re.search(r" (?:tools/|examples/\S*ds_)", span) and "--help" not in span]


def _split(line: str) -> list[list[str]]:
    """The commands of one line: split at `&&`, `|` and `;`, without comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


COMMANDS = [command for page in PAGES for command in commands_of(page, text_of(page))]


def check(command: Command, folder: Path) -> None:
    """Put the command through the program's own parser."""
    words = list(command.words)
    for name, stage in STAGES.items():
        if name in words:
            check_training(command.page, stage, words[words.index(name) + 1 :], folder)
            return
    for name, parser in {**TOOLS, **SCRIPTS, **MODULES}.items():
        if name in words:
            arguments = parser().parse_args([word for word in words[words.index(name) + 1 :] if word != "..."])
            if parser is plan_arguments.build_parser:
                plan_arguments.config_from(arguments)
            if parser is preprocess_arguments.build_parser:
                preprocess_arguments.settings_from(arguments)
            return
    if "pytest" in words:
        assert all((REPOSITORY / word).exists() for word in words if word.startswith("tests/"))
        return
    scripts = [word for word in words if word.endswith(".sh")]
    assert scripts, f"{command.page}: no test knows what {' '.join(words)} starts"
    assert (REPOSITORY / scripts[0]).is_file()
    if Path(scripts[0]).name.startswith("ds_"):
        # A hostfile of the reader's own is not there.
        variables = {name: "LICENSE" if name == "HOSTFILE" else value for name, value in command.variables.items()}
        started = launched(folder, Path(scripts[0]).name, variables, *words[words.index(scripts[0]) + 1 :])
        check(Command(command.page, tuple(started), {}), folder)


def check_training(page: str, stage: str, words: list[str], folder: Path) -> None:
    """Where the page leaves something out (`...`), what a run cannot do without is filled in."""
    if "..." in words:
        words = [word for word in words if word != "..."]
        words += [] if {"--model", "--config"} & set(words) else ["--model", "haplovl-8b"]
        words += [] if {"--data-path", "--mock-data"} & set(words) else ["--mock-data"]
    if "--config" in words:
        first = words.index("--config") + 1
        last = next((i for i in range(first, len(words)) if words[i].startswith("--")), len(words))
        words[first:last] = [settings_file(page, name, folder) for name in words[first:last]]
    parse_args(stage, argv=words)


def settings_file(page: str, name: str, folder: Path) -> str:
    """A file of the repository; or one that the page shows, its name in a comment; or a checkpoint's."""
    if (REPOSITORY / name).is_file():
        return str(REPOSITORY / name)
    path = folder / Path(name).name
    if path.name == "config.json":
        config = build_config("finetune", "haplovl-7b", {("data", "data_path"): ("data",)})
        path.write_text(json.dumps({**config.to_dict(), "iteration": 1}))
    else:
        blocks = re.findall(rf"^```yaml\n# {re.escape(name)}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
        assert blocks, f"{page} gives --config {name}, which is neither in the repository nor shown"
        path.write_text(blocks[0])
    return str(path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {shlex.join(command.words)[:60]}")
def test_a_command_that_is_shown_is_valid(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    try:
        check(command, tmp_path)
    except (SystemExit, ValueError) as error:
        pytest.fail(f"{command.page}: {shlex.join(command.words)}\n{error} {capsys.readouterr().err[-600:]}")


def test_there_are_commands_of_every_kind():
    shown = {word for command in COMMANDS for word in command.words}
    assert {
        "pretrain_haplovl.py",
        "finetune_haplovl.py",
        *TOOLS,
        "examples/slurm/train.sbatch",
        "examples/ds_try_launch.sh",
    } <= shown
    assert "examples/ds_finetune_haplovl.sh" in shown
    assert len(COMMANDS) > 20


def test_the_log_that_a_page_shows_is_what_the_command_logs(tmp_path, monkeypatch):
    """The page's first command, with its file in the working directory."""
    page = "docs/settings.md"
    shown = re.findall(r"^```text\n(settings that differ.*?)\n```", text_of(page), re.DOTALL | re.MULTILINE)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    settings_file(page, "mine.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    words = next(command.words for command in COMMANDS if command.page == page)
    assert [parse_command_line("finetune", argv=words[2:]).differences] == shown


def test_every_yaml_block_is_a_file_of_settings_or_a_mixture(tmp_path):
    for page in PAGES:
        for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)):
            path = tmp_path / f"{number}.yaml"
            path.write_text(block)
            if re.search(r"^(train|datasets):", block, re.MULTILINE):
                assert read_mixture(str(path), (), {}).train
            else:
                read_settings(str(path))


@pytest.mark.parametrize(
    "line",
    [
        "deepspeed finetune_haplovl.py --model haplovl-7b --data-path x --no-such-flag",
        "deepspeed finetune_haplovl.py --model haplovl-7b ... --no-such-flag",
        "torchrun --nproc_per_node 2 pretrain_haplovl.py --model haplovl-7b --mock-data --recipe full",
        "deepspeed finetune_haplovl.py --config examples/recipes/haplovl-7b/stage1.yaml --data-path x",
        "SAVE=s RECIPE=examples/recipes/haplovl-7b/align.yaml TOKENIZER_MODEL=t bash examples/ds_finetune_haplovl.sh "
        "--data-path x --x",
        "sbatch examples/slurm/train.sbatch examples/ds_try_launch.sh --seq-length many  # a comment",
        "python tools/plan_parallelism.py --model haplovl-7b \\\n  --gpus 8 --recipe half",
        "python tools/preprocess_data.py --input a && python tools/evaluate.py --modle x",
        "bash examples/no_such.sh",
        "torchrun other.py",
        "`python tools/plan_parallelism.py\n--model haplovl-7b --gpu 8`",
        "| one | `HOSTFILE=hosts bash examples/ds_try_launch.sh --seq-length many` |",
    ],
)
def test_a_wrong_command_would_be_noticed(line, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    found = commands_of("README.md", line if "`" in line else f"```bash\n{line}\n```\n")
    assert found
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        for command in found:
            check(command, tmp_path)
