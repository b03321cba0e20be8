"""What the section "guard" refuses."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_haplovl.config.cli import build_config, parse_args
from megatron_haplovl.config.validate import validate

WORDS = ["--model", "haplovl-debug", "--mock-data"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"iterations_to_skip": (3, 0)}, "--iterations-to-skip counts steps from 1, as the log does; 0 is none"),
        ({"max_skipped_steps": -1}, "--max-skipped-steps must be at least 0, got -1"),
        (
            {"max_skipped_steps": 2, "check_for_nan_in_loss_and_grad": False},
            "--max-skipped-steps 2 leaves out what --no-check-for-nan-in-loss-and-grad does not look for",
        ),
        ({"check_replicas": 0}, "--check-replicas must be at least 1, got 0"),
        ({"spiky_loss_factor": 5.0}, "--spiky-loss-factor 5.0 is for --check-for-spiky-loss; give that, too"),
        ({"spiky_loss_action": "return"}, "--spiky-loss-action return is for --check-for-spiky-loss; give that, too"),
        ({"check_for_spiky_loss": True, "spiky_loss_factor": 1.0}, "--spiky-loss-factor must be above 1, got 1.0"),
        (
            {"check_for_spiky_loss": True, "spiky_loss_action": "return"},
            "--spiky-loss-action return goes back to the run's last checkpoint; give --save, and --load with the same",
        ),
    ],
)
def test_contradictions(settings: dict[str, Any], said: str) -> None:
    values: dict[tuple[str, ...], Any] = {("guard", name): value for name, value in settings.items()}
    with pytest.raises(ValueError) as error:
        validate(build_config("finetune", "haplovl-debug", {("data", "mock_data"): True, **values}))
    assert str(error.value).startswith(said)


def test_steps_are_numbers_on_the_command_line() -> None:
    config = parse_args("finetune", argv=[*WORDS, "--iterations-to-skip", "13", "14"])
    assert config.guard.iterations_to_skip == (13, 14)
    assert config.guard.check_for_nan_in_loss_and_grad
    config = parse_args("finetune", argv=[*WORDS, "--no-check-for-nan-in-loss-and-grad"])
    assert not config.guard.check_for_nan_in_loss_and_grad


def test_a_return_needs_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--check-for-spiky-loss", "--spiky-loss-action", "return", "--save", "run"]
    with pytest.raises(SystemExit):
        parse_args("finetune", argv=[*words, "--load", "elsewhere"])
    assert "--load with the same folder" in capsys.readouterr().err
    assert parse_args("finetune", argv=[*words, "--load", "run"]).guard.spiky_loss_action == "return"
