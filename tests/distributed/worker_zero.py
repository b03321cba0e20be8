"""Rank program: trains every recipe under every ZeRO stage and leaves losses, gradient norms and weights behind."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_haplovl.checkpoint.save_load import full_weights
from megatron_haplovl.training.loop import train_step
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import STEPS, config, result_file


def main(folder: Path) -> None:
    for recipe in ("distill", "align", "full"):
        for zero_stage in (0, 1, 2, 3):
            for bf16 in (False, True):
                run = setup(config(recipe, parallel__zero_stage=zero_stage, precision__bf16=bf16))
                batches = run.train_data.micro_batches()
                metrics = [train_step(run, step, batches)[0] for step in range(STEPS)]
                weights = dict(full_weights(run.model))
                if dist.get_rank() == 0:
                    path = result_file(folder, recipe, zero_stage, "bf16" if bf16 else "fp32")
                    torch.save({"metrics": metrics, "weights": weights}, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
