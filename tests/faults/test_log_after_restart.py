"""Restarts and logs: each step once in every sink, and what is there is what an undisturbed run writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.run import command, run_to_end
from tests.metrics_files import logged, starts

FLAGS = ["--train-iters", "8", "--log-interval", "2"]


def losses(path: Path) -> list[tuple[int, float]]:
    return [(row["iteration"], row["loss"]) for row in logged(path)]


@pytest.mark.parametrize("saved", [True, False])
def test_each_step_is_once_in_every_sink(tmp_path: Path, saved: bool) -> None:
    """A rank dies in step 6 after the line of step 4; with --save the run goes on from step 3, without it from 0."""
    whole = tmp_path / "whole.jsonl"
    run_to_end(command("torchrun", 1, "finetune", [*FLAGS, "--metrics-file", str(whole)]), tmp_path / "log")
    sinks = ["--metrics-file", str(tmp_path / "metrics.jsonl"), "--tensorboard-dir", str(tmp_path / "events")]
    folder = str(tmp_path / "run")
    save = ["--save", folder, "--load", folder, "--save-interval", "3"] if saved else []
    words = command("torchrun", 2, "finetune", [*FLAGS, *sinks, *save])
    words.insert(words.index("--nproc_per_node=2"), "--max-restarts=1")
    run_to_end(words, tmp_path / "log", HAPLOVL_FAULT="kill@6:1")
    log = (tmp_path / "log").read_text()
    assert list(Path("/dev/shm").glob("deepspeed*")) == []  # Nothing of the killed rank stays in memory.
    got = losses(tmp_path / "metrics.jsonl")
    assert [step for step, _ in got] == [2, 4, 6, 8], log[-3000:]
    assert dict(got) == pytest.approx(dict(losses(whole)), rel=1e-5)
    shown = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")
    assert [event.step for event in shown] == [2, 4, 6, 8]
    assert {event.step: event.value for event in shown} == pytest.approx(dict(got), rel=1e-6)
    metrics, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.1"
    began = [(start["iteration"], start["repeated steps"], start["set aside"]) for start in starts(metrics)]
    if saved:
        assert "cut back to step 3; 1 lines of later steps are dropped" in log and not aside.exists()
        assert began == [(0, 0, None), (3, 1, None)]
        said = starts(metrics)[1]["ending before"]
        assert said and said in log
    else:
        assert [step for step, _ in losses(aside)] == [2, 4]
        assert began == [(0, 0, aside.name)] and len(starts(aside)) == 1
