"""`samples.jsonl`: each step once after a restart, and a disk that is full ends nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_haplovl.evaluation.answers_file import AnswersFile, SampleAnswer


def answer(step: int, question: str = "q") -> SampleAnswer:
    return SampleAnswer(step, question, "What?", (), f"after {step}", (3, 2), True, None)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_steps_that_are_done_again_stand_once(tmp_path: Path, log_lines: list[str]) -> None:
    file = AnswersFile(tmp_path / "new", 0)
    for step in (10, 20, 30):
        file.append([answer(step), answer(step, "other")])
    path = tmp_path / "new" / "samples.jsonl"
    with path.open("a") as opened:
        opened.write('{"step": 40, "quest')
    resumed = AnswersFile(tmp_path / "new", 20)
    assert steps(tmp_path / "new") == [10, 10, 20, 20]
    assert "3 lines are half or of steps after 20" in log_lines[-1]
    resumed.append([answer(30)])
    assert steps(tmp_path / "new") == [10, 10, 20, 20, 30]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.jsonl"]
    AnswersFile(tmp_path / "new", 30)
    assert len(log_lines) == 1


@pytest.mark.parametrize("line", ["[]\n", "{}\n", "no json\n", '{"step": "20"}\n', "\n"])
def test_lines_of_something_else_are_taken_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "samples.jsonl").write_text(line)
    AnswersFile(tmp_path, 5).append([answer(6)])
    assert steps(tmp_path) == [6]


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, log_lines: list[str]) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    file = AnswersFile(tmp_path, 0)
    file.append([answer(1)])
    file.append([answer(2)])
    assert len(log_lines) == 1
    assert "cannot be written" in log_lines[0]
