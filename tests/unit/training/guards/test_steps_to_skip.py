"""Steps that are passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_haplovl.training.guards.steps_to_skip import LIST, StepsToSkip


def test_flags_and_the_list_of_the_run(tmp_path: Path) -> None:
    steps = StepsToSkip((13, 14), "plan", str(tmp_path))
    assert [step for step in range(20) if steps.reason(step) is not None] == [13, 14]
    steps.add(17, "the loss was high")
    assert steps.reason(17) is None, "this step is over"
    again = StepsToSkip((13,), "plan", str(tmp_path))
    assert [step for step in range(20) if again.reason(step) is not None] == [13, 17]
    assert again.reason(17) == f"the loss was high ({tmp_path / LIST})"
    assert again.words is not None and "13, --iterations-to-skip" in again.words
    again.add(19, "the loss was high")
    assert [entry["step"] for entry in json.loads((tmp_path / LIST).read_text())] == [17, 19]


def test_the_same_step_of_other_data_is_not_passed_over(tmp_path: Path) -> None:
    StepsToSkip((), "plan", str(tmp_path)).add(17, "the loss was high")
    assert StepsToSkip((), "another plan", str(tmp_path)).reason(17) is None
    assert StepsToSkip((), "plan", None).words is None


@pytest.mark.parametrize("text", ["[", "{}x", "[1]", '[{"step": "x", "plan_key": "", "why": ""}]', '[{"step": 1}]'])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LIST).write_text(text)
    with pytest.raises(ValueError, match=r"steps_to_skip\.json: not a list of steps to skip; mend it, or delete it"):
        StepsToSkip((), "plan", str(tmp_path))
