"""A run that is killed thirty times while it saves always goes on from a complete checkpoint, with the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(Path(__file__).parent / "worker_killed.py"), str(tmp_path)]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    log = (tmp_path / "killed.log").read_text() if (tmp_path / "killed.log").is_file() else ""
    assert result.returncode == 0, result.stdout[-3000:] + log[-3000:]

    def read(name):
        lines = [
            json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines() if line.endswith("}")
        ]
        return [(line["iteration"], line["loss"], line["grad norm"]) for line in lines]

    whole = dict.fromkeys(read("whole"))
    assert len(whole) == 100
    # Steps after the last complete checkpoint are done again, with the same result.
    killed = read("killed")
    assert set(killed) == set(whole) and len(killed) > len(whole)
