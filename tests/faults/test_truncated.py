"""A file of the data becomes shorter while ranks read it: the run ends with its name, and so does a restart.

When the file has been restored, the same command goes on as if nothing had been."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.prefixes import words
from tests.faults.run import ends_as_undisturbed, last_words, run_to_end
from tests.fixtures.small_prefix import write_small_prefix


@pytest.mark.parametrize(("suffix", "workers"), [(".bin", "2"), ("_images.bin", "0")])
def test_the_file_is_named(tmp_path: Path, suffix: str, workers: str) -> None:
    prefix = write_small_prefix(tmp_path)
    whole, run = Path(prefix + suffix).read_bytes(), str(tmp_path / "run")
    flags = ["--num-workers", workers, "--train-iters", "24", "--skip-bad-samples", "3", "--save-interval", "2"]
    flags += ["--save", run, "--load", run, "--metrics-file", str(tmp_path / "metrics.jsonl")]
    start = words("torchrun", prefix, *flags)
    ended = run_to_end(start, tmp_path / "log", HAPLOVL_FAULT="truncate@5:1", HAPLOVL_FAULT_FILE=prefix + suffix)
    assert ended.code == 1, ended.output[-3000:]
    assert f"error: {prefix}{suffix} is truncated: it has 0 bytes, it had " in ended.output
    assert not any(word in ended.output for word in ("Bus error", "shared memory"))
    assert not re.search(r'File ".*/megatron_haplovl/', ended.output), "the only traceback is torchrun's own"
    again = run_to_end(start, tmp_path / "again")
    assert (
        again.code == 1
        and last_words(Path(run))["code"] == 1
        and f"error: {prefix}{suffix} is truncated: it has 0 bytes, " in again.output
    )
    Path(prefix + suffix).write_bytes(whole)
    ends_as_undisturbed(start, tmp_path)
