"""DeepSpeed's engine around this rank's part of the model, with losses, optimizer and clipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.engine.clipping import GradientClipping
from megatron_haplovl.engine.deepspeed_config import deepspeed_config
from megatron_haplovl.engine.optimizer import build_optimizer
from megatron_haplovl.engine.pipeline import MicroBatchSlot, PipelineStage, pipeline_module, separate_buffers
from megatron_haplovl.engine.steps import DirectSteps, EnterPhase, PipelinedSteps, PipelineLoss
from megatron_haplovl.engine.topology import DeepSpeedTopology
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.parallel.sharded_model import ShardedModel

HeadInputs = Callable[[Batch], tuple[Any, ...]]
"""Micro-batch -> what the model's head gets behind the hidden state: the batch itself, targets, loss function."""


def _nobody_watches(_phase: str) -> None:
    return None


def build_engine(
    model: ShardedModel,
    config: Config,
    device: torch.device,
    head_inputs: HeadInputs,
    terms: tuple[LossTerm, ...],
    optimizer_groups: list[dict[str, Any]],
    sequences: int,
    enter_phase: EnterPhase = _nobody_watches,
) -> tuple[Any, DirectSteps | PipelinedSteps]:
    """Wrap the model with DeepSpeed: ZeRO, gradient accumulation, clipping, bf16 with fp32 master weights, pipeline.

    Args:
        model: this rank's part of the model, on the host.
        config: the run's settings.
        device: what it will run on.
        head_inputs: what the model's head gets besides the hidden state.
        terms: the losses, and what each is divided by.
        optimizer_groups: torch's parameter groups. Every stage of a pipeline has every group; one that is empty gets a
            placeholder.
        sequences: of the largest step over all ranks, empty ones included.
        enter_phase: is told what begins: forward, backward or reduce.

    Returns:
        DeepSpeed's engine, and how micro-batches go through it.

    Raises:
        ValueError: an optimizer that is not there, or a DeepSpeed JSON that contradicts the flags.
    """
    import deepspeed

    settings = deepspeed_config(config, model.groups.data.size, sequences)
    placeholders = _fill_empty_groups(optimizer_groups)
    offloaded = config.parallel.offload_optimizer == "cpu"
    optimizer = build_optimizer(optimizer_groups, config.optimizer, device, offloaded=offloaded)
    clipping = None
    if config.parallel.zero_stage == 0:
        clipping = GradientClipping(model, config.optimizer.clip_grad)
        optimizer.register_step_pre_hook(clipping)
    if config.parallel.zero_stage == 3:
        # ZeRO-3 must also gather a parameter for every other module that reads it.
        for reader, parameter in model.module.parameters_read_elsewhere():
            deepspeed.zero.register_external_parameter(reader, parameter)
    initialize = partial(deepspeed.initialize, optimizer=optimizer, config=settings, dist_init_required=False)

    def grad_norm() -> float:
        return float(engine.get_global_grad_norm() if clipping is None else clipping.norm)

    replicas = model.groups.replicas.size
    if model.stages is None:
        topology = DeepSpeedTopology(model.groups) if model.groups.tensor.size > 1 else None
        engine, *_ = initialize(model=model.module, mpu=topology)
        direct = DirectSteps(
            engine,
            lambda batch: engine(*head_inputs(batch)),
            terms,
            grad_norm,
            enter_phase,
            replicas=replicas,
            device=device,
        )
        return engine, direct
    loss = PipelineLoss(
        lambda hidden_BSD, batch: model.module.losses(hidden_BSD, *head_inputs(batch)),
        terms,
        replicas=replicas,
        device=device,
    )
    stage = PipelineStage(
        model.module, model.stages.of(model.groups.pipeline.rank), MicroBatchSlot(), loss, placeholders
    )
    engine, *_ = initialize(model=pipeline_module(stage, model.groups))
    separate_buffers(engine, device)
    reads_data = stage.is_first or stage.is_last
    pipelined = PipelinedSteps(engine, stage.slot, loss, grad_norm, enter_phase, device=device, reads_data=reads_data)
    return engine, pipelined


def _fill_empty_groups(groups: list[dict[str, Any]]) -> torch.nn.ParameterList:
    """Give a placeholder, which nothing uses, to every group that has no parameter on this stage.

    DeepSpeed adds up the gradient norm group by group over the stages, so every stage must have the same groups.
    """
    placeholders = torch.nn.ParameterList()
    for group in groups:
        if not group["params"]:
            placeholders.append(torch.nn.Parameter(torch.zeros(1)))
            # DeepSpeed expects that every rank has something to take the norm of.
            placeholders[-1].tensor_model_parallel = True
            group["params"].append(placeholders[-1])
    return placeholders
