"""A run that is killed thirty times while it saves always goes on from a complete checkpoint, with the same losses."""

from __future__ import annotations

import pytest

from tests.forks import run_copies
from tests.metrics_files import logged


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path):
    codes, output = run_copies("tests/distributed/worker_killed.py", [str(tmp_path)], timeout=1200)
    log = (tmp_path / "killed.log").read_text() if (tmp_path / "killed.log").is_file() else ""
    assert codes == [0], output[-3000:] + log[-3000:]

    def read(name):
        lines = logged(tmp_path / f"{name}.jsonl")
        return [(line["iteration"], line["loss"], line["grad norm"]) for line in lines]

    whole = read("whole")
    assert len(whole) == 100
    # Steps after the last complete checkpoint are done again, with the same result, and are once in the file.
    assert read("killed") == whole
