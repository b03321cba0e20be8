"""A file of the data becomes shorter while ranks read it: the run ends with its name, and so does a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.prefixes import words
from tests.faults.run import run_to_end
from tests.fixtures.small_prefix import write_small_prefix


@pytest.mark.parametrize(("suffix", "workers"), [(".bin", "2"), ("_images.bin", "0")])
def test_the_file_is_named(tmp_path: Path, suffix: str, workers: str) -> None:
    prefix = write_small_prefix(tmp_path)
    start = words("deepspeed", prefix, "--num-workers", workers, "--train-iters", "24", "--skip-bad-samples", "3")
    ended = run_to_end(start, tmp_path / "log", HAPLOVL_FAULT="truncate@5:1", HAPLOVL_FAULT_FILE=prefix + suffix)
    assert ended.code == 1, ended.output[-3000:]
    assert f"error: {prefix}{suffix} is truncated: it has 0 bytes, it had " in ended.output
    assert not any(word in ended.output for word in ("Bus error", "shared memory", "Traceback"))
    again = run_to_end(start, tmp_path / "again")
    assert again.code == 1 and f"error: {prefix}{suffix} is truncated: it has 0 bytes, " in again.output
