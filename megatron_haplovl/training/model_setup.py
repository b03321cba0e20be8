"""This rank's part of the model: cut, filled, frozen where the recipe says so, and marked for DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import Config, RecipeConfig
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.model.block import Block
from megatron_haplovl.model.haplovl import LayeredModel
from megatron_haplovl.parallel.context_parallel import apply_context_parallel
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.pipeline import PipelineCut, keep_stage
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import apply_tensor_parallel, finish_tensor_parallel
from megatron_haplovl.planning.stage_cut import stage_cut
from megatron_haplovl.planning.work import Work, work_of_batch
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.recipe import apply_recipe, is_trained, trained_parts
from megatron_haplovl.training.stages import stage_of
from megatron_haplovl.training.startup_report import describe_parameters

logger = logging.getLogger(__name__)

# Packs of the training data that a pipeline's cut is computed from.
_PACKS_FOR_CUT = 16


def ready_model(
    config: Config, groups: ParallelGroups, device: torch.device, stages: PipelineCut | None, resumed: Path | None
) -> ShardedModel:
    """This rank's part of the model, ready for the engine. Called by every rank.

    Args:
        config: the run's settings.
        groups: its process groups.
        device: what it will run on.
        stages: of the pipeline, if there is one.
        resumed: the checkpoint that the run goes on from, if there is one.

    Raises:
        ValueError: weights that are missing or do not fit, or nothing would be trained.
    """
    model = build_model(config, groups, stages)
    logger.info(fill_weights(model, config, resumed))
    apply_recipe(model.module, config.recipe)
    for module in model.module.modules():
        if isinstance(module, Block):
            module.recompute = config.parallel.recompute_granularity
    if config.precision.compile:
        compile_blocks(model.module, device)
    logger.info(describe_parameters(model, config.recipe))
    finish_tensor_parallel(model.module, groups.tensor, sequence_parallel=config.parallel.sequence_parallel)
    return model


def cut_pipeline(config: Config, groups: ParallelGroups, device: torch.device, data: BatchLoader) -> PipelineCut | None:
    """Cut the layers by what they cost on the first packs of the training data. Called by every rank.

    Args:
        config: the run's settings.
        groups: its process groups.
        device: what it runs on.
        data: the training data.

    Returns:
        None without a pipeline.

    Raises:
        ValueError: a pack that cannot be read, or a --pipeline-partition that does not fit.
    """
    parallel, schedule = config.parallel, config.schedule
    if groups.pipeline.size == 1:
        return None

    def first_packs() -> Work | None:
        if groups.world.rank != 0:
            return None
        number = min(data.sequences, _PACKS_FOR_CUT)
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
        micro_batches=data.most_micro_batches,
    )
    return PipelineCut(tuple(layers), first)


def build_model(config: Config, groups: ParallelGroups, stages: PipelineCut | None = None) -> ShardedModel:
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


def _check_every_stage_trains(stages: PipelineCut, parameters: Iterable[str], recipe: RecipeConfig) -> None:
    training = {stages.of_parameter(name) for name in parameters if is_trained(name, recipe)}
    for stage in range(len(stages.first)):
        if stage not in training:
            raise ValueError(
                f"pipeline stage {stage} ({stages.of(stage)[0]} ... {stages.of(stage)[-1]}) would train nothing with "
                f"--recipe {recipe.recipe} and these freeze flags; choose another --pipeline-partition, fewer stages "
                "or no pipeline"
            )


def compile_blocks(model: LayeredModel, device: torch.device) -> None:
    """Compile every block in place; parameters keep their names. Attention, already fused, breaks the graph.

    Raises:
        ValueError: on a CPU, a torch whose compiled blocks have wrong gradients.
    """
    if device.type == "cpu" and torch_version() < (2, 12):
        raise ValueError(
            f"--compile computes wrong gradients on a CPU with torch {torch.__version__}; use 2.12 or later"
        )
    # Otherwise a block that is compiled too often would go on uncompiled, with no more than a warning.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def torch_version() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
