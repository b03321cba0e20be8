"""Rank program: a bit of one weight flips on one rank, in several layouts; reports what --check-replicas finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.operation.endings import RunEnd
from megatron_haplovl.training.setup import Run, setup
from megatron_haplovl.training.step import train_step
from tests.distributed.cases import config
from tests.distributed.topology import forget_topology

TENSOR = {"parallel__tensor_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{
        f"DP 2, ZeRO {z}, {'bf16' if bf16 else 'fp32'}": {"parallel__zero_stage": z, "precision__bf16": bf16}
        for z in (0, 1, 2, 3)
        for bf16 in (False, True)
    },
    "DP 2, ZeRO 2, bf16, offloaded": {
        "parallel__zero_stage": 2,
        "precision__bf16": True,
        "parallel__offload_optimizer": "cpu",
    },
    "TP 2, ZeRO 0, fp32": {**TENSOR, "parallel__zero_stage": 0},
    "TP 2 + SP, ZeRO 1, bf16": {**TENSOR, "parallel__sequence_parallel": True, "precision__bf16": True},
    "TP 2, ZeRO 3, fp32": {**TENSOR, "parallel__zero_stage": 3},
    "PP 2, ZeRO 1, bf16": {"parallel__pipeline_model_parallel_size": 2, "precision__bf16": True},
}
"""Two ranks each, by name."""
WHOLE, SPLIT = "final_norm.weight", "post_decoder.0.mlp.up_proj.weight"


def flip(run: Run, parameter: str, rank: int) -> None:
    """Flip the lowest bit of the last element that a rank holds."""
    held = dict(run.model.module.named_parameters()).get(parameter)
    if dist.get_rank() != rank or held is None:
        return
    values = getattr(held, "ds_tensor", held).data.view(-1)
    values.view(torch.int16 if values.element_size() == 2 else torch.int32)[-1] ^= 1


def attempt(run: Run, parameter: str, rank: int, *, saving: bool) -> str:
    flip(run, parameter, rank)
    step = 1
    try:
        if saving:
            run.guard.before_save(step)
        else:
            train_step(run, step, map(run.train_data.packs, run.train_data.numbers(step)))
        found = "nothing was raised"
    except RunEnd as end:
        assert (end.ending.code, end.ending.cause) == (70, "replicas differ")
        found = str(end)
    flip(run, parameter, rank)
    return found


def main(folder: Path, *chosen: str) -> None:
    found: dict[str, list[str]] = {}
    for name in chosen or LAYOUTS:
        forget_topology()
        sizes = {"schedule__global_batch_size": 2, "schedule__train_iters": 4, "guard__check_replicas": 2}
        run = setup(config("full", **LAYOUTS[name], **sizes))
        # The first step is not due, and the second one is.
        train_step(run, 0, map(run.train_data.packs, run.train_data.numbers(0)))
        words = run.guard.describe()[0]
        found[name] = [words]
        for parameter in (WHOLE, SPLIT):
            for rank in (0, 1):
                found[name].append(attempt(run, parameter, rank, saving=rank == 0))
        print(f"{name}: done", flush=True)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
