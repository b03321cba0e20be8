"""docs/flags.md is what the generator writes now."""

from __future__ import annotations

from pathlib import Path

from megatron_haplovl.config.cli import build_parser
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.reference import flag_reference
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import iterate_settings
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN

PAGE = Path(__file__).parents[3] / "docs" / "flags.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == flag_reference(), (
        "docs/flags.md is older than the flags; run: python -m megatron_haplovl.config.reference > docs/flags.md"
    )


def test_every_flag_has_one_row_with_its_help() -> None:
    rows = [line for line in flag_reference().split("\n## Presets")[0].splitlines() if line.startswith("| `--")]
    for s in iterate_settings(Config):
        (row,) = [row for row in rows if f"`{s.flag}`" in row.split(" | ")[0]]
        assert s.field.metadata["help"].replace("|", "\\|") in row
    of_no_section = [action for action in build_parser("pretrain", "")._actions if "." not in action.dest]
    shown = [action for action in of_no_section if action.dest not in ("help", "local_rank")]
    assert len(rows) == len(list(iterate_settings(Config))) + len(shown)


def test_defaults_of_stages_and_presets() -> None:
    page = flag_reference()
    for flag, name in (("--lr", "optimizer.lr"), ("--train-iters", "schedule.train_iters")):
        first, second = (stage.defaults[name] for stage in (PRETRAIN, FINETUNE))
        assert f"| `{flag}` | " in page and f" | {first} (stage 1), {second} (stage 2) | " in page
    widths = " | ".join(str(model.pre.hidden_size) for model in MODELS.values())
    assert f"| `--pre-hidden-size` | {widths} |" in page
    assert "| `--packing`, `--no-packing` | switch | on |" in page
