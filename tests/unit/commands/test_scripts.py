"""The scripts of a checkout start the package's commands, and find the package without an installation."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = {
    "tools/preprocess_data.py": "commands.preprocess",
    "tools/merge_data.py": "commands.merge",
    "tools/convert_checkpoint.py": "commands.convert",
    "tools/evaluate.py": "commands.evaluate",
    "tools/generate.py": "commands.generate",
    "tools/plan_parallelism.py": "commands.plan",
    "tools/verify_data.py": "commands.verify",
    "tools/inspect_data.py": "commands.inspect_data",
    "tools/report_run.py": "commands.report_run",
}


@pytest.mark.parametrize(("script", "module"), SCRIPTS.items())
def test_a_script_starts_the_command(script: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python itself puts the script's own folder in front.
    monkeypatch.setattr(sys, "path", [str((REPOSITORY / script).parent), *sys.path])
    names = runpy.run_path(str(REPOSITORY / script))
    assert names["main"] is resolve_name(f"megatron_haplovl.{module}:main")
    assert sys.path[0] == str(REPOSITORY)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_training_script_listens_to_signals_first(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hands its listener to the command."""
    calls: list[tuple[str, object]] = []

    class Listener:
        def __init__(self, launch: object) -> None:
            calls.append(("listens", self))

    monkeypatch.setattr("megatron_haplovl.operation.signals.StopSignals", Listener)
    monkeypatch.setattr(f"megatron_haplovl.{stage}.main", lambda signals: calls.append(("trains", signals)))
    runpy.run_path(str(REPOSITORY / f"{stage}_haplovl.py"), run_name="__main__")
    assert [name for name, _ in calls] == ["listens", "trains"]
    assert calls[0][1] is calls[1][1]


def test_there_are_no_other_scripts() -> None:
    found = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("tools/*.py")}
    assert found == SCRIPTS.keys()
