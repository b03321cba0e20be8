"""A damaged sample: it ends a run that may skip none, and a run that may goes on as if it had never been there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.prefixes import words
from tests.faults.run import losses, run_to_end
from tests.fixtures.small_prefix import damage_image, write_small_prefix
from tests.metrics_files import logged

STEPS = 6


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A prefix whose sample 3 cannot be read."""
    prefix = write_small_prefix(tmp_path)
    damage_image(prefix, 3)
    return prefix


def test_it_ends_a_run_that_may_skip_none(prefix: str, tmp_path: Path) -> None:
    """With workers: the sentence of another process, not its traceback."""
    start = words("deepspeed", prefix, "--train-iters", "6", "--num-workers", "2")
    ended = run_to_end(start, tmp_path / "log")
    assert ended.code == 1, ended.output[-3000:]
    assert f"error: {prefix} sample 3: " in ended.output
    assert "Traceback" not in ended.output


def test_a_run_that_may_goes_on(prefix: str, tmp_path: Path) -> None:
    """Named and counted once; a resumed run knows it, and has the losses of one that was never stopped."""
    flags = ["--skip-bad-samples", "1", "--num-workers", "2", "--train-iters", str(STEPS)]
    whole = run_to_end(
        words("torchrun", prefix, *flags, "--metrics-file", str(tmp_path / "whole.jsonl")), tmp_path / "whole.log"
    )
    assert whole.code == 0, whole.output[-3000:]
    assert whole.output.count(f"skipped {prefix} sample 3 after step") == 1
    assert logged(tmp_path / "whole.jsonl")[-1]["number of skipped samples"] == 1
    saved = [*flags, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--exit-interval", "3"]
    metrics = ["--metrics-file", str(tmp_path / "parts.jsonl")]
    for part in range(2):
        ended = run_to_end(words("deepspeed", prefix, *saved, *metrics), tmp_path / f"{part}.log")
        assert ended.code == (0, 75)[part == 0], ended.output[-3000:]
    assert losses(tmp_path / "parts.jsonl") == losses(tmp_path / "whole.jsonl")
    last = [path[-1] for path in (logged(tmp_path / "parts.jsonl"), logged(tmp_path / "whole.jsonl"))]
    assert last[0]["consumed tokens"] == last[1]["consumed tokens"]
    (line,) = (tmp_path / "run/debug/bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == 3
    # After a restart, too, one more is too many.
    damage_image(prefix, 0)
    more = [*saved, "--train-iters", "12", "--exit-interval", "12"]
    ended = run_to_end(words("deepspeed", prefix, *more), tmp_path / "more.log")
    assert ended.code == 1, ended.output[-3000:]
    assert "3 samples cannot be read, more than --skip-bad-samples 1: " in ended.output
    assert all(f" sample {sample} (" in ended.output for sample in (0, 2, 3))
