"""Rank program: trains in one layout and leaves losses, gradient norms, first gradients and weights behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import OptimizerStep

from megatron_haplovl.parallel.collectives import all_gather
from megatron_haplovl.parallel.tensor_parallel import split_dim
from megatron_haplovl.training.setup import Run, setup
from megatron_haplovl.training.step import train_step
from tests.distributed.cases import STEPS, parallel_config
from tests.distributed.gather import full_weights


def gradients_before_step(run: Run) -> dict[str, torch.Tensor]:
    """A dictionary that gets every whole gradient of this stage, summed over ranks, just before the engine's step."""
    found: dict[str, torch.Tensor] = {}

    def capture() -> None:
        for name, parameter in run.model.own_parameters():
            if parameter.requires_grad and run.engine.global_steps == 0:
                mine = deepspeed.utils.safe_get_full_grad(parameter)
                dim = split_dim(name)
                if dim is not None and run.groups.tensor.size > 1:
                    mine = all_gather(mine, run.groups.tensor, dim)
                found[name] = mine.clone()

    if run.model.stages is None:
        step = run.engine.step

        def capture_and_step() -> None:
            if run.engine.is_gradient_accumulation_boundary():
                capture()
            step()

        run.engine.step = capture_and_step
        return found

    # The pipeline's schedule looks its instructions up here.
    def capture_and_update(engine: Any) -> None:
        capture()
        type(engine)._exec_optimizer_step(engine)

    run.engine._INSTRUCTION_MAP = {**run.engine._INSTRUCTION_MAP, OptimizerStep: capture_and_update}
    return found


def of_all_stages(run: Run, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of all stages together."""
    if run.model.stages is None:
        return found
    stages: list[dict[str, torch.Tensor]] = [{}] * run.groups.pipeline.size
    dist.all_gather_object(stages, found, group=run.groups.pipeline.process_group)
    return {name: gradient for stage in stages for name, gradient in stage.items()}


def on_the_host(engine: Any) -> dict[str, bool]:
    """What DeepSpeed itself says that it offloads."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return {"optimizer": optimizer.offload_optimizer, "parameters": optimizer.offload_param}
    return {"optimizer": getattr(optimizer, "cpu_offload", False), "parameters": False}


def main(folder: Path, adamw: str, case: str) -> None:
    run = setup(parallel_config(case, adamw))
    gradients = gradients_before_step(run)
    batches = run.train_data.micro_batches()
    results = [train_step(run, step, batches) for step in range(STEPS)]
    metrics = [{**result.losses, "grad norm": result.grad_norm} for result in results]
    weights = dict(full_weights(run.model))
    gradients = of_all_stages(run, gradients)
    if dist.get_rank() == 0:
        result = {"metrics": metrics, "gradients": gradients, "weights": weights}
        inner = type(run.engine.basic_optimizer).__name__
        torch.save({**result, "on the host": on_the_host(run.engine), "optimizer": inner}, folder / f"{case}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
