"""DeepSpeed's engine around this rank's part of the model, with losses, optimizer and clipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.losses.terms import DISTILLATION_TERMS, LANGUAGE_MODELING_TERMS, LossTerm
from megatron_haplovl.model.haplovl import HaploVLForDistillation
from megatron_haplovl.parallel.groups import DeepSpeedTopology, Group
from megatron_haplovl.parallel.pipeline import MicroBatchSlot, PipelineStage, pipeline_module
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.clipping import GradientClipping
from megatron_haplovl.training.deepspeed_config import deepspeed_config
from megatron_haplovl.training.optimizer import build_optimizer
from megatron_haplovl.training.recipe import is_trained, parameter_groups
from megatron_haplovl.training.steps import DirectSteps, PipelinedSteps, PipelineLoss
from megatron_haplovl.training.teacher import VisionTeacher, load_teacher, random_teacher

HeadInputs = Callable[[Batch], tuple[Any, ...]]
"""Micro-batch -> what the model's head is given besides the hidden state: the batch itself, targets, loss function."""


def build_losses(config: Config, model: ShardedModel, device: torch.device) -> tuple[HeadInputs, tuple[LossTerm, ...]]:
    vocabulary = _vocabulary_shard(config.model.vocab_size, model.groups.tensor)
    if config.recipe.recipe != "distill":
        next_token = partial(next_token_loss, **vocabulary)
        return lambda batch: (batch, next_token), LANGUAGE_MODELING_TERMS
    distillation = partial(distillation_loss, **vocabulary)
    if model.groups.pipeline.rank < model.groups.pipeline.size - 1:
        return lambda batch: (batch, None, distillation), DISTILLATION_TERMS  # Never asked: there is no head here.
    teacher = _build_teacher(config, device)
    return lambda batch: (batch, teacher(batch), distillation), DISTILLATION_TERMS


def _build_teacher(config: Config, device: torch.device) -> VisionTeacher:
    init = config.init
    if init.vision_teacher is None:
        teacher = random_teacher(config.model, init.teacher_layer, config.run.seed)
    else:
        teacher = load_teacher(init.vision_teacher, config.model, init.teacher_layer)
    return teacher.to(device, torch.bfloat16 if config.precision.bf16 else torch.float32)


def build_engine(
    model: ShardedModel, config: Config, device: torch.device, head_inputs: HeadInputs, terms: tuple[LossTerm, ...]
) -> tuple[Any, DirectSteps | PipelinedSteps]:
    """Wrap the model with DeepSpeed: ZeRO, gradient accumulation, clipping, bf16 with fp32 master weights; pipeline."""
    import deepspeed

    groups, zero_stage = model.groups, config.parallel.zero_stage
    settings = deepspeed_config(config, groups.data.size)
    if model.stages is None:
        optimizer_groups = parameter_groups(model.module, config.optimizer)
    else:
        optimizer_groups, placeholders = _groups_of_all_stages(model, config)
    offloaded = config.parallel.offload_optimizer == "cpu"
    optimizer = build_optimizer(optimizer_groups, config.optimizer, device, offloaded=offloaded)
    clipping = None
    if zero_stage == 0:
        clipping = GradientClipping(model, config.optimizer.clip_grad)
        optimizer.register_step_pre_hook(clipping)

    def grad_norm() -> float:
        return float(engine.get_global_grad_norm() if clipping is None else clipping.norm)

    if isinstance(model.module, HaploVLForDistillation) and zero_stage == 3:
        # The head reads the embedding's matrix, so ZeRO-3 must have it whole then, too.
        deepspeed.zero.register_external_parameter(model.module.distillation, model.module.embedding.text.weight)
    initialize = partial(deepspeed.initialize, optimizer=optimizer, config=settings, dist_init_required=False)

    if model.stages is None:
        engine, *_ = initialize(model=model.module, mpu=DeepSpeedTopology(groups) if groups.tensor.size > 1 else None)
        steps: DirectSteps | PipelinedSteps = DirectSteps(
            engine,
            lambda batch: engine(*head_inputs(batch)),
            terms,
            grad_norm,
            replicas=groups.replicas.size,
            device=device,
        )
        return engine, steps

    loss = PipelineLoss(
        lambda hidden_BSD, batch: model.module.losses(hidden_BSD, *head_inputs(batch)),
        terms,
        scale=settings["gradient_accumulation_steps"] * groups.replicas.size,
        device=device,
    )
    slot = MicroBatchSlot()
    stage = PipelineStage(model.module, model.stages.of(groups.pipeline.rank), slot, loss, placeholders)
    engine, *_ = initialize(model=pipeline_module(stage, groups))
    # DeepSpeed would receive gradients in the buffer of activations, whatever their number formats.
    engine._allocate_or_extend_buffers = lambda _index, shape, dtype: torch.zeros(shape, dtype=dtype, device=device)
    reads_data = stage.is_first or stage.is_last
    return engine, PipelinedSteps(engine, slot, loss, grad_norm, optimizer, reads_data=reads_data)


def _groups_of_all_stages(model: ShardedModel, config: Config) -> tuple[list[dict[str, Any]], torch.nn.ParameterList]:
    """The same optimizer groups on every stage, for DeepSpeed adds the gradient norm up group by group over stages.

    A group without parameters here gets a placeholder, which nothing uses.
    """
    trained = {name: len(shape) for name, shape in model.shapes.items() if is_trained(name, config.recipe)}
    groups = parameter_groups(model.module, config.optimizer, trained=trained)
    placeholders = torch.nn.ParameterList()
    for group in groups:
        if not group["params"]:
            placeholders.append(torch.nn.Parameter(torch.zeros(1)))
            # So that no rank has nothing to take the norm of, which DeepSpeed does not expect.
            placeholders[-1].tensor_model_parallel = True
            group["params"].append(placeholders[-1])
    return groups, placeholders


def _vocabulary_shard(vocab_size: int, tensor: Group) -> dict[str, Any]:
    """Which words this rank's embedding and head hold, as the losses want to be told."""
    if tensor.size == 1:
        return {}
    words = vocab_size // tensor.size
    return {"group": tensor.process_group, "vocab_start": tensor.rank * words, "vocab_size": vocab_size}
