"""Builds everything that a run needs, in order: processes, data, model, weights, losses, engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_haplovl.checkpoint.find import check_save_folder, find_resumable
from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import Config, ParallelConfig, RecipeConfig
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.engine.checkpointing import CheckpointWriter, load_checkpoint
from megatron_haplovl.engine.engine import build_engine
from megatron_haplovl.engine.optimizer import ADAMW_NAMES, adamw_implementation
from megatron_haplovl.engine.processes import initialize_processes
from megatron_haplovl.engine.steps import DirectSteps, PipelinedSteps
from megatron_haplovl.kernels.attention import describe_backend, resolve_backend
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.model.block import Block
from megatron_haplovl.model.haplovl import LayeredModel
from megatron_haplovl.parallel.context_parallel import apply_context_parallel
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.pipeline import Stages, keep_stage
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import apply_tensor_parallel, finish_tensor_parallel
from megatron_haplovl.planning.stage_cut import stage_cut
from megatron_haplovl.planning.work import Work, work_of_batch
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.logging import Sinks, configure_logging
from megatron_haplovl.training.recipe import apply_recipe, is_trained, parameter_groups, trained_parts
from megatron_haplovl.training.stages import head_inputs, stage_of

logger = logging.getLogger(__name__)

# Packs of the training data that a pipeline's cut is computed from.
_PACKS_FOR_CUT = 16


@dataclass(frozen=True)
class Run:
    """A run that is ready for its first step."""

    config: Config
    model: ShardedModel
    engine: Any
    """The DeepSpeed engine."""
    steps: DirectSteps | PipelinedSteps
    """How micro-batches go through the engine."""
    terms: tuple[LossTerm, ...]
    train_data: BatchLoader
    valid_data: BatchLoader | None
    first_step: int
    """Optimizer steps already done when the run was resumed."""
    writer: CheckpointWriter | None
    """None without --save."""
    device: torch.device
    sinks: Sinks

    @property
    def groups(self) -> ParallelGroups:
        """Every process group."""
        return self.model.groups

    def close(self) -> None:
        """Close the logs and leave the process group."""
        self.sinks.close()
        torch.distributed.destroy_process_group()


def setup(config: Config, differences: str | None = None) -> Run:
    """Build a run from its configuration. Called by every rank.

    Args:
        config: the run.
        differences: for the log, what in it differs from the model preset.

    Raises:
        ValueError: something in files or flags keeps the run from starting.
    """
    device, groups = initialize_processes(config)
    configure_logging(groups.world.rank)
    sinks = Sinks(config.logging, config.to_dict(), enabled=groups.world.rank == 0)
    adamw = adamw_implementation(config.optimizer, device, offloaded=config.parallel.offload_optimizer == "cpu")
    logger.info(
        f"ranks: {groups.world.size}{_mesh(groups)} | device: {device} | "
        f"precision: {'bf16' if config.precision.bf16 else 'fp32'} | ZeRO stage: {config.parallel.zero_stage} | "
        f"offloaded: {_offloaded(config.parallel)} | attention backend: {_attention_backends(config, device)} | "
        f"AdamW: {ADAMW_NAMES[adamw]}"
    )
    if differences is not None:
        logger.info(differences)

    train_data, valid_data = _build_loaders(config, groups)
    stages = _plan_stages(config, groups, device, train_data)
    if stages is not None:
        logger.info(f"pipeline stages: --pipeline-partition {stages.partition}")

    resumed = None
    if config.resume_from is not None:
        fallback = config.checkpoint.allow_fallback
        resumed = find_resumable(config.resume_from, groups.world, allow_fallback=fallback)
        logger.info(f"{config.resume_from}: {'no checkpoint yet' if resumed is None else f'resuming {resumed}'}")
    if config.checkpoint.save is None:
        logger.info("no --save: nothing of this run is kept")
    else:
        check_save_folder(config.checkpoint.save, resumed, groups.world)
    model = build_model(config, groups, stages)
    logger.info(fill_weights(model, config, resumed))
    apply_recipe(model.module, config.recipe)
    for module in model.module.modules():
        if isinstance(module, Block):
            module.recompute = config.parallel.recompute_granularity
    if config.precision.compile:
        compile_blocks(model.module)
    logger.info(_count_parameters(model, config.recipe))
    finish_tensor_parallel(model.module, groups.tensor, sequence_parallel=config.parallel.sequence_parallel)

    stage = stage_of(config)
    terms = stage.terms(config.loss)
    groups_of_stages = None
    if stages is not None:
        groups_of_stages = {n: len(shape) for n, shape in model.shapes.items() if is_trained(n, config.recipe)}
    optimizer_groups = parameter_groups(model.module, config.optimizer, trained=groups_of_stages)
    engine, steps = build_engine(
        model, config, device, head_inputs(stage, config, model, device), terms, optimizer_groups
    )

    first_step = 0
    if resumed is not None:
        first_step = load_checkpoint(engine, model, resumed, config, train_data.plan_key)
    writer = None if config.checkpoint.save is None else CheckpointWriter(engine, model, config)
    return Run(config, model, engine, steps, terms, train_data, valid_data, first_step, writer, device, sinks)


def _build_loaders(config: Config, groups: ParallelGroups) -> tuple[BatchLoader, BatchLoader | None]:
    build = partial(
        build_loader,
        config=config,
        dp_rank=groups.data.rank,
        dp_size=groups.data.size,
        barrier=groups.world.barrier,
        is_builder=groups.world.rank == 0,
    )
    train_data = build(
        config.data.data_path, num_steps=config.schedule.train_iters, aux_paths=config.data.aux_data_path
    )
    if not config.data.valid_data_path:
        return train_data, None
    return train_data, build(config.data.valid_data_path, num_steps=config.logging.eval_iters, shuffle=False)


def _plan_stages(config: Config, groups: ParallelGroups, device: torch.device, data: BatchLoader) -> Stages | None:
    """Cut the layers by what they cost on the first packs of the training data."""
    parallel, schedule = config.parallel, config.schedule
    if groups.pipeline.size == 1:
        return None

    def first_packs() -> Work | None:
        if groups.world.rank != 0:
            return None
        number = min(schedule.global_batch_size, _PACKS_FOR_CUT)
        batch = data.packs(range(number))
        return work_of_batch(batch, config.stage) * (schedule.micro_batch_size / number)

    # The packs are read on one rank, so that all ranks take the same of two cuts that are nearly equal.
    work = groups.world.gather_objects(groups.world.together(first_packs))[0]
    layers, first = stage_cut(
        config.model,
        work,
        Layout.of(config, data=groups.data.size),
        device=device.type,
        bf16=config.precision.bf16,
        trained=trained_parts(config.recipe),
        stage=config.stage,
        method=parallel.pipeline_partition,
        micro_batches=schedule.global_batch_size // (schedule.micro_batch_size * groups.data.size),
    )
    return Stages(tuple(layers), first)


def build_model(config: Config, groups: ParallelGroups, stages: Stages | None = None) -> ShardedModel:
    """This rank's part of the module that the recipe trains (stage 1's, or the whole model), not yet filled.

    The model is split before anything is allocated.

    Raises:
        ValueError: a stage of the pipeline would train nothing.
    """
    with torch.device("meta"):
        module = stage_of(config).build_model(config)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    # Context parallelism first: a rank has a share of each sequence, and tensor ranks have parts of that share.
    apply_context_parallel(module, groups.context)
    apply_tensor_parallel(module, groups.tensor, sequence_parallel=config.parallel.sequence_parallel)
    if stages is not None:
        _check_every_stage_trains(stages, shapes, config.recipe)
        keep_stage(module, stages.of(groups.pipeline.rank))
    return ShardedModel(module.to_empty(device="cpu"), shapes, groups, stages)


def _check_every_stage_trains(stages: Stages, parameters: Iterable[str], recipe: RecipeConfig) -> None:
    training = {stages.of_parameter(name) for name in parameters if is_trained(name, recipe)}
    for stage in range(len(stages.first)):
        if stage not in training:
            raise ValueError(
                f"pipeline stage {stage} ({stages.of(stage)[0]} ... {stages.of(stage)[-1]}) would train nothing with "
                f"--recipe {recipe.recipe} and these freeze flags; choose another --pipeline-partition, fewer stages "
                "or no pipeline"
            )


def compile_blocks(model: LayeredModel) -> None:
    """Compile every block in place; parameters keep their names. Attention, already fused, breaks the graph."""
    # Otherwise a block that is compiled too often would go on uncompiled, with no more than a warning.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def _mesh(groups: ParallelGroups) -> str:
    """The layout in words, if the ranks are not all data-parallel."""
    if groups.data.size == groups.world.size:
        return ""
    return (
        f" (pipeline {groups.pipeline.size} x data {groups.data.size} x context {groups.context.size} x tensor "
        f"{groups.tensor.size})"
    )


def _offloaded(parallel: ParallelConfig) -> str:
    """What lies in the host's memory instead of the device's, in words."""
    moved = {"optimizer": parallel.offload_optimizer, "parameters": parallel.offload_param}
    return " and ".join(name for name, place in moved.items() if place == "cpu") or "none"


def _attention_backends(config: Config, device: torch.device) -> str:
    """What each decoder's attention runs on."""
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    names = []
    for part in (config.model.pre, config.model.post):
        width = part.hidden_size // part.num_attention_heads
        name = resolve_backend(config.precision.attention_backend, device, dtype, width)
        names.append(describe_backend(name, device, dtype, width))
    return names[0] if names[0] == names[1] else f"{names[0]} (pre-decoder), {names[1]} (post-decoder)"


def _count_parameters(model: ShardedModel, recipe: RecipeConfig) -> str:
    sizes = {name: shape.numel() for name, shape in model.shapes.items()}
    trained = sum(size for name, size in sizes.items() if is_trained(name, recipe))
    return f"parameters: {sum(sizes.values()):,}, of which {trained:,} are trained"
