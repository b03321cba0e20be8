"""What the guard decides of steps, one after the other; who is to blame is another's business."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_haplovl.config.schema import GuardConfig
from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.engine.steps import StepResult
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.operation.endings import RunEnd
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.training.guards.guard import Guard
from megatron_haplovl.training.guards.spikes import WARM_UP
from megatron_haplovl.training.guards.steps_to_skip import StepsToSkip

COUNTS = StepCounts(1, 1, 1, 1, 1)


class Case:
    """A guard, and steps whose loss and gradient are what the test says."""

    def __init__(self, folder: Path, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
        self.finite, self.asked, self.compared, self.step = True, 0, 0, 0
        diagnosis: Any = SimpleNamespace(
            model=SimpleNamespace(groups=ParallelGroups()),
            terms=(LossTerm("lm loss", "lm_tokens"), LossTerm("lm token accuracy", "lm_tokens", None)),
            steps=SimpleNamespace(gradients_are_finite=self._gradients_are_finite),
            of_loss=lambda *_: "of_loss",
            of_gradient=lambda *_, **__: "of_gradient",
            of_spike=lambda *_: "of_spike",
        )
        replicas: Any = SimpleNamespace(compare=self._compare)
        to_skip = StepsToSkip(config.iterations_to_skip, "plan", str(folder))
        self.guard = Guard(config, diagnosis, replicas, to_skip, state or {}, torch.device("cpu"))

    def _gradients_are_finite(self) -> torch.Tensor:
        self.asked += 1
        return torch.tensor(self.finite)

    def _compare(self) -> None:
        self.compared += 1

    def train(self, loss: float, *, finite: bool = True) -> bool:
        """One step.

        Returns:
            Whether it has updated the weights.
        """
        self.finite, step = finite, self.step
        self.step += 1
        if self.guard.passes_over(step):
            return False
        sums = {"lm loss": torch.tensor(loss), "lm token accuracy": torch.zeros(())}
        verdict = self.guard.judge(step, COUNTS)(sums)
        norm = 1.0 if verdict.update else None
        self.guard.after(step, StepResult(verdict.losses, norm, COUNTS, sums, (sums,)))
        return verdict.update


@pytest.mark.parametrize(
    ("loss", "finite", "cause"), [(math.nan, True, "loss"), (math.inf, False, "loss"), (1.0, False, "gradient")]
)
def test_the_first_one_ends_the_run_as_a_machine_fault(tmp_path: Path, loss: float, finite: bool, cause: str) -> None:
    case = Case(tmp_path, GuardConfig())
    assert case.train(1.0)
    with pytest.raises(RunEnd, match=f"^step 2: of_{cause}; the weights were not updated. Started again, ") as end:
        case.train(loss, finite=finite)
    ending = end.value.ending
    assert (ending.code, ending.cause, ending.step) == (70, f"{cause} not finite", 1)
    assert "--iterations-to-skip 2 passes it over" in ending.sentence


def test_steps_in_a_row_are_counted_through_a_restart_and_reset_by_an_update(tmp_path: Path) -> None:
    config = GuardConfig(max_skipped_steps=2)
    case = Case(tmp_path, config)
    steps = [(1.0, True), (math.nan, True), (1.0, False), (1.0, True), (math.nan, True)]
    assert [case.train(loss, finite=finite) for loss, finite in steps] == [True, False, False, True, False]
    assert (case.guard.skipped, case.guard.not_finite) == (3, 3)
    state = json.loads(json.dumps(case.guard.state()))
    assert state["recent_losses"] == [1.0, 1.0], "only what was trained on"
    again = Case(tmp_path, config, state)
    assert not again.train(math.nan)
    with pytest.raises(RunEnd, match="That is step 3 in a row, and --max-skipped-steps is 2") as end:
        again.train(math.nan)
    assert (end.value.ending.code, end.value.ending.cause) == (1, "too many skipped steps")
    assert again.guard.state() == {**state, "skipped_iterations": 4, "nan_iterations": 4, "skipped_in_a_row": 3}


def test_off_nothing_is_looked_at(tmp_path: Path) -> None:
    case = Case(tmp_path, GuardConfig(check_for_nan_in_loss_and_grad=False))
    assert case.train(math.nan, finite=False)
    assert case.asked == 0
    assert case.guard.state()["recent_losses"] == []
    (words,) = case.guard.describe()
    assert words.startswith("--no-check-for-nan-in-loss-and-grad: losses and gradients are not looked at")
    assert Case(tmp_path, GuardConfig()).guard.describe() == [], "what is usual needs no words"


def test_steps_are_passed_over_as_the_log_counts_them(tmp_path: Path) -> None:
    case = Case(tmp_path, GuardConfig(iterations_to_skip=(2, 3)))
    assert [case.train(1.0) for _ in range(4)] == [True, False, False, True]
    assert (case.guard.skipped, case.guard.not_finite) == (2, 0)


def test_a_spike_is_warned_of_or_put_on_the_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GuardConfig(check_for_spiky_loss=True)
    state = {"recent_losses": [1.0] * WARM_UP}
    # A run that another test has set up in this process keeps records to itself.
    monkeypatch.setattr(logging.getLogger("megatron_haplovl"), "propagate", True)
    case = Case(tmp_path, config, state)
    assert case.train(10.0) and "of_spike" not in caplog.text, "ten times is not more than ten times"
    assert case.train(10.5)
    assert "step 2: of_spike; the step was trained on" in caplog.text
    case = Case(tmp_path, dataclasses.replace(config, spiky_loss_action="return"), state)
    said = r"^step 1: of_spike; the weights were not updated. It is on the list of steps to skip, so started again, "
    with pytest.raises(RunEnd, match=said) as end:
        case.train(10.5)
    assert (end.value.ending.code, end.value.ending.cause) == (70, "loss spike")
    again = Case(tmp_path, config, state)
    assert not again.train(1.0) and again.guard.skipped == 1


def test_replicas_are_compared_when_due_and_before_every_save(tmp_path: Path) -> None:
    case = Case(tmp_path, GuardConfig(check_replicas=3))
    found = []
    for _ in range(6):
        case.train(1.0)
        found.append(case.compared)
    assert found == [0, 0, 1, 1, 1, 2]
    case.guard.before_save(6)
    assert case.compared == 3
    without = Case(tmp_path, GuardConfig())
    without.train(1.0)
    without.guard.before_save(1)
    assert without.compared == 0
