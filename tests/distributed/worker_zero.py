"""Rank program: trains a recipe under a ZeRO stage and leaves losses, gradient norms and weights behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.training.setup import setup
from megatron_haplovl.training.step import train_step
from tests.distributed.cases import STEPS, config, result_file
from tests.distributed.gather import full_weights

MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision__bf16": True},
    "bf16-offload": {"precision__bf16": True, "parallel__offload_optimizer": "cpu"},
}


def main(folder: Path, recipe: str, zero_stage: int, mode: str) -> None:
    run = setup(config(recipe, parallel__zero_stage=zero_stage, **MODES[mode]))
    batches = run.train_data.micro_batches()
    results = [train_step(run, step, batches) for step in range(STEPS)]
    metrics = [{**result.losses, "grad norm": result.grad_norm} for result in results]
    weights = dict(full_weights(run.model))
    if dist.get_rank() == 0:
        torch.save({"metrics": metrics, "weights": weights}, result_file(folder, recipe, zero_stage, mode))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
