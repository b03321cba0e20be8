"""The soak in short: three faults in sixty steps, and the undisturbed run's losses."""

from __future__ import annotations

import json
import sys

import pytest

from tests.faults.run import environment
from tests.processes import output_of


@pytest.mark.slow
def test_a_run_that_nobody_watches(tmp_path):
    words = ["benchmarks/soak.py", "--steps", "60", "--every", "20"]
    files = ["--folder", str(tmp_path / "soak"), "--json", str(tmp_path / "soak.json")]
    code, output = output_of([sys.executable, *words, *files], environment=environment(), timeout=900)
    assert code == 0, output[-4000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["same_losses"] and found["code"] == 0
    assert [fault["inflicted"] is not None for fault in found["records"]] == [True, True, True]
