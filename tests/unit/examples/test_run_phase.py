"""A phase runs once, again when anything it depends on changes, and counts as done only when it ended well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.common.run_phase import shorten

REPOSITORY = Path(__file__).parents[3]


def phase(run: Path, *flags: str, code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.common.run_phase", "--run", str(run), *flags, "--"]
    return subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


APPEND = "open({!r}, 'a').write('x')"


def test_runs_once_and_again_after_a_change(tmp_path):
    run, source, trace = tmp_path / "run", tmp_path / "source.py", tmp_path / "trace"
    source.write_text("1")
    flags = ("--name", "first", "--inputs", str(tmp_path))
    code = APPEND.format(str(trace))
    assert phase(run, *flags, code=code).returncode == 0
    again = phase(run, *flags, code=code)
    assert "done before" in again.stdout
    assert trace.read_text() == "x"
    source.write_text("2")
    phase(run, *flags, code=code)
    assert trace.read_text() == "xx"
    phase(run, *flags, code=code + "  # other words")
    assert trace.read_text() == "xxx"


def test_a_phase_depends_on_earlier_ones(tmp_path):
    trace = tmp_path / "trace"
    later = ("--name", "second", "--after", "first")
    early = phase(tmp_path, *later, code="pass")
    assert early.returncode != 0
    assert "the earlier phase 'first' is not done" in early.stderr
    for version in ("1", "1", "2"):
        phase(tmp_path, "--name", "first", code=f"version = {version}")
        phase(tmp_path, *later, code=APPEND.format(str(trace)))
    assert trace.read_text() == "xx"


def test_a_failed_phase_is_not_done_and_starts_from_scratch(tmp_path):
    output = tmp_path / "out" / "half"
    code = f"import os; os.makedirs({str(output)!r}); print('the reason'); raise SystemExit(3)"
    flags = ("--name", "bad", "--output", str(tmp_path / "out"))
    for _ in range(2):  # makedirs would fail the second time, were the folder still there
        result = phase(tmp_path, *flags, code=code)
        assert result.returncode == 3
        assert "the reason" in result.stderr
    assert not (tmp_path / "phases" / "bad.json").exists()
    assert "the reason" in (tmp_path / "phases" / "bad.log").read_text()


@pytest.mark.parametrize("where", [".", "..", "../elsewhere"])
def test_removes_nothing_outside_its_run(tmp_path, where):
    run, precious = tmp_path / "run", tmp_path / "elsewhere" / "precious"
    precious.mkdir(parents=True)
    result = phase(run, "--name", "p", "--output", str(run / where), code="pass")
    assert result.returncode != 0
    assert "is not inside the run folder" in result.stderr
    assert precious.exists()


def test_shows_losses_of_a_training_line():
    line = "iteration       10/     100 | consumed samples: 80 | learning rate: 1.0E-3 | lm loss: 2.5E+00 |"
    assert shorten(line) == "iteration       10/     100 | lm loss: 2.5E+00"
    assert len(shorten("x" * 500)) == 150
