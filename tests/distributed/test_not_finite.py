"""A loss that is not finite ends the run on every rank, pipelined or not, before a weight has changed."""

from __future__ import annotations

import json

from tests.distributed.launch import run_ranks


def test_every_rank_stops_before_the_update(tmp_path):
    run_ranks("worker_not_finite.py", 2, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 6
        for case, (message, changed) in found.items():
            assert "step 1: a loss is not finite" in message, (case, message)
            assert changed == [], case
