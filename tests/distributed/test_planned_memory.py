"""The planner's peak of every rank, against the most bytes that tensors take in a real step of the training.

Each of these was planted in the planner once and made cases fail: copies of two bytes only where ZeRO 1 reduces in
bf16; its last micro-batch's gradients left out; ZeRO 3's gathered parameters left out; one micro-batch in flight on
every stage; the inputs behind the last losses of a pipeline, autocast's copies of weights, stage 1's teacher or its
feature loss forgotten; sequence parallelism's gathered inputs taken for the shares that they come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_haplovl.config.layout import Workload
from megatron_haplovl.planning.estimate import RankMemory, estimate
from megatron_haplovl.planning.machine import DataSheet
from megatron_haplovl.planning.work import Work
from megatron_haplovl.training.recipe import trained_parts
from tests.distributed.launch import run_ranks
from tests.distributed.live_bytes import LiveBytes, all_tensors
from tests.distributed.memory_cases import BUCKETS, CASES, RANKS, layout_of, memory_config

# Worst measured: 7.2 % (the first of two stages with tensor parallelism; pixels are not counted).
TOLERANCE = 0.1


def test_live_bytes_are_those_of_the_storages_that_are_alive() -> None:
    others = list(all_tensors())
    kept = torch.zeros(1000)
    with LiveBytes(others) as live:
        assert live.now == 4000
        twice = torch.cat([kept, kept])
        gone = twice[:10].add(1.0)
        del gone
    assert (live.now, live.peak) == (12000, 12040) and twice.numel() == 2000


def planned(case: tuple[str, int, str, str, str], rank: dict[str, Any]) -> RankMemory:
    """The memory that the planner predicts for a rank and the fullest of its micro-batches."""
    config = memory_config(case, deepspeed_json=None)
    workload = Workload.of(config)
    plans = (
        estimate(
            workload,
            Work(**work),
            layout_of(config),
            DataSheet().cluster(RANKS),
            trained=trained_parts(config.recipe),
            bf16=config.precision.bf16,
            partition=rank["partition"],
            device="cpu",
            buckets=BUCKETS,
        )
        for work in rank["work"]
    )
    return max((plan.stage_memories[rank["stage"]] for plan in plans), key=lambda memory: memory.peak)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_peak_of_every_rank(tmp_path: Path, case: tuple[str, int, str, str, str]) -> None:
    path = tmp_path / "peaks.json"
    run_ranks("worker_planned_memory.py", RANKS, str(path), str(CASES.index(case)))
    for rank in json.loads(path.read_text()):
        assert planned(case, rank).peak == pytest.approx(rank["peak"], rel=TOLERANCE), rank
