"""Rank program: the most bytes that tensors take in one optimizer step, in one layout, on every rank."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from megatron_haplovl.engine.processes import use_no_shared_memory_collectives
from megatron_haplovl.planning.work import work_of_batch
from megatron_haplovl.training.setup import Run, setup
from megatron_haplovl.training.step import train_step
from tests.distributed.live_bytes import LiveBytes, all_tensors
from tests.distributed.memory_cases import BUCKETS, CASES, MEASURED_STEP, RANKS, memory_config


def main(path: Path, case: tuple[str, int, str, str, str]) -> None:
    use_no_shared_memory_collectives()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    settings = path.with_suffix(f".deepspeed{dist.get_rank()}.json")
    settings.write_text(json.dumps({"zero_optimization": vars(BUCKETS)}))
    others = list(all_tensors())
    run = setup(memory_config(case, str(settings)))
    ranks: list[Any] = [None] * RANKS
    dist.all_gather_object(ranks, measure(run, others))
    if dist.get_rank() == 0:
        path.write_text(json.dumps(ranks))
    dist.destroy_process_group()


def measure(run: Run, others: list[Any]) -> dict[str, Any]:
    """Peak of a step when the optimizer's state exists already, and the work in its micro-batches."""
    accumulated = run.engine.gradient_accumulation_steps()
    stages = run.model.stages
    work = [
        vars(work_of_batch(batch, run.config.stage))
        for batch in islice(run.train_data.micro_batches(MEASURED_STEP), accumulated)
    ]
    batches = run.train_data.micro_batches()
    for step in range(MEASURED_STEP):
        train_step(run, step, batches)
    with LiveBytes(others) as live:
        train_step(run, MEASURED_STEP, batches)
    return {
        "stage": run.groups.pipeline.rank,
        "partition": "auto" if stages is None else ",".join(stages.layers[first] for first in stages.first[1:]),
        "peak": live.peak,
        "work": work,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), CASES[int(sys.argv[2])])
