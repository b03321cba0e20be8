"""What only reports fails, and the run ends with the losses of an undisturbed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.run import command, losses, run_to_end

FLAGS = ["--train-iters", "5"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    words = command("torchrun", 1, "finetune", [*FLAGS, "--metrics-file", str(folder / "metrics.jsonl")])
    assert run_to_end(words, folder / "log").code == 0
    return losses(folder / "metrics.jsonl")


@pytest.mark.parametrize("fault", ["sinks on a full disk", "output on a full disk", "output closed"])
def test_a_run_outlives_what_reports(tmp_path: Path, undisturbed: dict[int, float], fault: str) -> None:
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events"
    flags = [*FLAGS, "--metrics-file", str(metrics), "--tensorboard-dir", str(events)]
    words = alone(flags)
    log = tmp_path / "log"
    if fault == "sinks on a full disk":
        # The first lines fit. What the run prints is not limited.
        words = ["bash", "-c", 'set -o pipefail; (ulimit -f 3; exec "$@" 2>&1) | cat', "bash", *words]
    elif fault == "output on a full disk":
        words = ["bash", "-c", 'exec "$@" > /dev/full', "bash", *words]
    else:
        words = ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *words]
    ended = run_to_end(words, log)
    assert ended.code == 0, ended.output[-3000:]
    if fault == "sinks on a full disk":
        written = losses(metrics)
        assert 0 < len(written) < 5 and written == {step: undisturbed[step] for step in written}
        assert metrics.read_bytes().endswith(b"\n")
        assert ended.output.count(f"metrics file {metrics}: OSError: [Errno 27] File too large") == 1
        assert "iteration        5/       5" in ended.output
    else:
        assert losses(metrics) == undisturbed
        assert ended.output.count("warning: standard output: ") == 1


def alone(flags: list[str]) -> list[str]:
    """The words of a run of one process, without a launcher, whose own output would break, too."""
    words = command("torchrun", 1, "finetune", flags)
    script = next(index for index, word in enumerate(words) if word.endswith("faulty_run.py"))
    return [sys.executable, *words[script:]]
