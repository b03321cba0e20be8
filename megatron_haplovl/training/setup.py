"""Builds everything that a run needs, in order: processes, data, model, weights, losses, engine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_haplovl.checkpoint.find import check_save_folder, find_resumable
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.data.mixture_sources import open_run_sources
from megatron_haplovl.engine.checkpointing import CheckpointWriter, load_checkpoint
from megatron_haplovl.engine.engine import build_engine
from megatron_haplovl.engine.norms import GradientZeros
from megatron_haplovl.engine.processes import initialize_processes
from megatron_haplovl.engine.steps import DirectSteps, PipelinedSteps
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.operation.leaving import Leaving
from megatron_haplovl.operation.operation import Operation
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.planning.estimate import RankMemory
from megatron_haplovl.planning.machine import peak_operations
from megatron_haplovl.training.collection import GarbageCollection
from megatron_haplovl.training.live_display import LiveDisplay
from megatron_haplovl.training.logging import configure_logging
from megatron_haplovl.training.memory import free_bytes
from megatron_haplovl.training.memory_report import describe_memory, does_not_fit, expected_memory
from megatron_haplovl.training.model_setup import cut_pipeline, ready_model
from megatron_haplovl.training.profiling import Profiler
from megatron_haplovl.training.rank_figures import ForwardTime
from megatron_haplovl.training.recipe import optimizer_groups
from megatron_haplovl.training.sinks.sinks import Sinks, check_packages
from megatron_haplovl.training.source_report import describe_sources
from megatron_haplovl.training.stages import head_inputs, stage_of
from megatron_haplovl.training.startup_report import describe_batches, describe_run

logger = logging.getLogger(__name__)


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
    operation: Operation
    """Who watches this rank."""
    leaving: Leaving
    forward_time: ForwardTime
    zeros: GradientZeros | None
    """None without --log-num-zeros-in-grad."""
    peak_operations: float | None
    """Per second, as the device's data sheet says; None for a device that is not known."""
    display: LiveDisplay
    profiler: Profiler
    collection: GarbageCollection

    @property
    def groups(self) -> ParallelGroups:
        """Every process group."""
        return self.model.groups

    def close(self) -> None:
        """Close the logs and leave the process group."""
        self.profiler.close()
        self.collection.close()
        self.display.close()
        self.sinks.close()
        torch.distributed.destroy_process_group()


def setup(config: Config, differences: str | None = None, operation: Operation | None = None) -> Run:
    """Build a run from its configuration. Called by every rank.

    Args:
        config: the run.
        differences: for the log, what in it differs from the model preset.
        operation: see `operation.supervise`; without it, nobody watches.

    Raises:
        ValueError: something in files or flags keeps the run from starting.
    """
    operation = operation or Operation()
    device, groups = initialize_processes(config)
    handler = configure_logging(groups.world.rank)
    operation.meet(groups.control)
    check_packages(config.logging)
    logger.info(describe_run(config, groups, device))
    if differences is not None:
        logger.info(differences)

    train_data, valid_data = _build_loaders(config, groups)
    stages = cut_pipeline(config, groups, device, train_data)
    if stages is not None:
        logger.info(f"pipeline stages: --pipeline-partition {stages.partition}")
    logger.info(describe_batches(config, train_data, groups))
    _report_memory(expected_memory(config, groups, device, train_data, stages), groups, device)

    resumed = _checkpoint_to_resume(config, groups)
    model = ready_model(config, groups, device, stages, resumed)
    stage = stage_of(config)
    profiler = _profiler(config, model, device)
    operation.clock.listeners.append(profiler.enter)
    forward_time = ForwardTime(operation.clock.enter, device)
    terms = stage.terms(config.loss)
    engine, steps = build_engine(
        model,
        config,
        device,
        head_inputs(stage, config, model, device),
        terms,
        optimizer_groups(model, config.optimizer, config.recipe),
        train_data.sequences,
        forward_time.enter,
    )
    zeros = GradientZeros(engine, model) if config.logging.log_num_zeros_in_grad else None
    first_step = 0
    if resumed is not None:
        first_step = load_checkpoint(engine, model, resumed, config, train_data.plan_key)
    writer = None if config.checkpoint.save is None else CheckpointWriter(engine, model, config)
    return Run(
        config=config,
        model=model,
        engine=engine,
        steps=steps,
        terms=terms,
        train_data=train_data,
        valid_data=valid_data,
        first_step=first_step,
        writer=writer,
        device=device,
        sinks=Sinks(config, first_step, enabled=groups.world.rank == 0),
        operation=operation,
        leaving=Leaving(config.checkpoint, groups.control),
        forward_time=forward_time,
        zeros=zeros,
        peak_operations=_peak_operations(config, device),
        display=LiveDisplay(
            config.schedule.train_iters, handler, wanted=config.logging.live_display and groups.world.rank == 0
        ),
        profiler=profiler,
        collection=GarbageCollection(config.run),
    )


def _report_memory(memory: RankMemory, groups: ParallelGroups, device: torch.device) -> None:
    """What is expected beside what is free. Ranks other than 0 say only that it does not fit."""
    free, host_free = free_bytes(device), free_bytes(torch.device("cpu"))
    logger.info(describe_memory(memory, device, free, host_free))
    warning = does_not_fit(memory, device, free, host_free)
    # All ranks of a host are alike; the first of each tells.
    if warning is not None and (groups.world.rank == 0 or os.environ.get("LOCAL_RANK") == "0"):
        logger.warning(warning)


def _profiler(config: Config, model: ShardedModel, device: torch.device) -> Profiler:
    folder = config.profile.profile_dir or f"{config.checkpoint.save}/profile"
    return Profiler(config.profile, Path(folder), model.groups.world.rank, model.module, device)


def _peak_operations(config: Config, device: torch.device) -> float | None:
    if config.logging.device_peak_tflops is not None:
        return 1e12 * config.logging.device_peak_tflops
    if device.type == "cuda" and config.precision.bf16:
        return peak_operations(torch.cuda.get_device_name(device))
    return None


def _build_loaders(config: Config, groups: ParallelGroups) -> tuple[BatchLoader, BatchLoader | None]:
    build = partial(
        build_loader,
        config=config,
        dp_rank=groups.data.rank,
        dp_size=groups.data.size,
        barrier=groups.world.barrier,
        is_builder=groups.world.rank == 0,
    )
    if config.data.mock_data:
        return build((), num_steps=config.schedule.train_iters), None
    sources = open_run_sources(config)
    train_data = build((), num_steps=config.schedule.train_iters, shares=(sources.train, sources.aux))
    if len(train_data.source_names) > 1 or config.data.data_config is not None or config.data.split is not None:
        logger.info(describe_sources(sources.train + sources.aux, train_data, config.schedule.train_iters))
    if not sources.valid:
        if config.logging.eval_interval is not None:
            raise ValueError(f"--eval-interval needs data that is held out, and {config.data.data_config} has none")
        return train_data, None
    return train_data, build((), num_steps=config.logging.eval_iters, shares=(sources.valid, []), shuffle=False)


def _checkpoint_to_resume(config: Config, groups: ParallelGroups) -> Path | None:
    """What the run goes on from, if anything; and whether its own checkpoints can be written."""
    resumed = None
    if config.resume_from is not None:
        fallback = config.checkpoint.allow_fallback
        resumed = find_resumable(config.resume_from, groups.world, allow_fallback=fallback)
        logger.info(f"{config.resume_from}: {'no checkpoint yet' if resumed is None else f'resuming {resumed}'}")
    if config.checkpoint.save is None:
        logger.info("no --save: nothing of this run is kept")
    else:
        check_save_folder(config.checkpoint.save, resumed, groups.world)
    return resumed
