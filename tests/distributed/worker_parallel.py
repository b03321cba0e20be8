"""Rank program: trains in every layout and leaves losses, gradient norms, first gradients and weights behind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_haplovl.checkpoint.save_load import full_weights
from megatron_haplovl.parallel.collectives import all_gather
from megatron_haplovl.parallel.plan import split_dim
from megatron_haplovl.training.loop import train_step
from megatron_haplovl.training.setup import Run, setup
from tests.distributed.cases import STEPS, parallel_config


def gradients_before_step(run: Run) -> dict[str, torch.Tensor]:
    """Is filled with every whole gradient, already summed over ranks, when the engine is about to step."""
    found: dict[str, torch.Tensor] = {}
    step = run.engine.step

    def capture(*arguments: Any) -> None:
        if run.engine.is_gradient_accumulation_boundary() and not found:
            for name, parameter in run.engine.module.named_parameters():
                if parameter.requires_grad:
                    mine = deepspeed.utils.safe_get_full_grad(parameter)
                    dim = split_dim(name)
                    if dim is not None and run.groups.tensor.size > 1:
                        mine = all_gather(mine, run.groups.tensor, dim)
                    found[name] = mine.clone()
        step(*arguments)

    run.engine.step = capture
    return found


def on_the_host(engine: Any) -> dict[str, bool]:
    """What DeepSpeed itself says that it offloads."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return {"optimizer": optimizer.offload_optimizer, "parameters": optimizer.offload_param}
    return {"optimizer": getattr(optimizer, "cpu_offload", False), "parameters": False}


def main(folder: Path, adamw: str, layouts: Sequence[str]) -> None:
    for layout in layouts:
        for recipe in ("distill", "full"):
            # DeepSpeed keeps the last engine's topology in a global.
            deepspeed.utils.groups.mpu = None
            run = setup(parallel_config(recipe, layout, adamw))
            gradients = gradients_before_step(run)
            batches = run.train_data.micro_batches()
            metrics = [train_step(run, step, batches)[0] for step in range(STEPS)]
            weights = dict(full_weights(run.engine, run.groups.tensor))
            if dist.get_rank() == 0:
                name = f"{layout} {recipe}.pt".replace(" ", "_")
                result = {"metrics": metrics, "gradients": gradients, "weights": weights}
                inner = type(run.engine.basic_optimizer).__name__
                torch.save({**result, "on the host": on_the_host(run.engine), "optimizer": inner}, folder / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
