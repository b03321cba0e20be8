"""Builds everything that a run needs, in order: processes, data, model, weights, losses, engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_haplovl.checkpoint.find import check_save_folder, find_resumable
from megatron_haplovl.checkpoint.folders import read_iteration
from megatron_haplovl.checkpoint.state import STATE_FILE
from megatron_haplovl.config.files import read_json
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.data.mixture_sources import open_run_sources
from megatron_haplovl.engine.checkpointing import CheckpointWriter, Saving, load_checkpoint
from megatron_haplovl.engine.engine import build_engine
from megatron_haplovl.engine.local_copies import LocalCopies
from megatron_haplovl.engine.norms import GradientZeros
from megatron_haplovl.engine.processes import initialize_processes
from megatron_haplovl.engine.steps import DirectSteps, PipelinedSteps
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.operation.leaving import Leaving
from megatron_haplovl.operation.operation import Operation
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.timeouts import set_timeouts
from megatron_haplovl.planning.machine import peak_operations
from megatron_haplovl.training.bad_samples import BadSamples
from megatron_haplovl.training.collection import GarbageCollection
from megatron_haplovl.training.guards.build import build_guard
from megatron_haplovl.training.guards.guard import Guard
from megatron_haplovl.training.live_display import LiveDisplay
from megatron_haplovl.training.logging import configure_logging
from megatron_haplovl.training.memory_report import expected_memory, report_memory
from megatron_haplovl.training.model_setup import cut_pipeline, ready_model
from megatron_haplovl.training.profiling import Profiler
from megatron_haplovl.training.rank_figures import ForwardTime
from megatron_haplovl.training.recipe import optimizer_groups
from megatron_haplovl.training.resumed_schedule import resumed_schedule
from megatron_haplovl.training.sample_answers import SampleQuestions, open_sample_questions
from megatron_haplovl.training.saving_report import bytes_to_save, report_saving
from megatron_haplovl.training.sinks.json_lines import ThisStart
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
    copies: LocalCopies | None
    """None without --non-persistent-save-interval."""
    device: torch.device
    sinks: Sinks
    questions: SampleQuestions | None
    """None without --sample-questions."""
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
    bad_samples: BadSamples
    """What could not be read."""
    guard: Guard
    """Decides of every step whether it may update the weights."""

    @property
    def groups(self) -> ParallelGroups:
        """Every process group."""
        return self.model.groups

    def settle(self) -> None:
        """The first step is done: compilers and lazily made connections are behind us, so ranks may wait less long."""
        seconds, flag = self.config.parallel.timeout_of_steps
        set_timeouts(seconds)
        if self.operation.watch is not None:
            self.operation.watch.settle(seconds, flag)

    def after_step(self, step: int, seconds: float) -> None:
        """Tell what goes along with the steps.

        Args:
            step: optimizer steps done.
            seconds: that the last one took.
        """
        self.display.step(step, seconds)
        self.profiler.after_step(step)
        self.collection.after_step(step)

    def close(self) -> None:
        """Close the logs, give the --save folder free and leave the process group. Called by every rank."""
        self.profiler.close()
        self.collection.close()
        self.display.close()
        self.sinks.close()
        # What the ranks have to say is said before one of them says how the run ended.
        self.groups.control.barrier()
        self.operation.release()
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
    if config.checkpoint.save is not None:
        operation.lock_folder(config.checkpoint.save, groups.control)
    check_packages(config.logging)
    logger.info(describe_run(config, groups, device))
    if differences is not None:
        logger.info(differences)

    train_data, valid_data = _build_loaders(config, groups)
    stages = cut_pipeline(config, groups, device, train_data)
    if stages is not None:
        logger.info(f"pipeline stages: --pipeline-partition {stages.partition}")
    logger.info(describe_batches(config, train_data, groups))
    try:
        report_memory(expected_memory(config, groups, device, train_data, stages), groups, device)
    except ValueError as error:  # A stage of one's own may have layers that the planner does not know.
        logger.info(f"expected memory: unknown ({error})")

    resumed, copies = _checkpoint_to_resume(config, groups, operation.run_id)
    if resumed is not None:
        config = _resumed_settings(config, resumed, groups)
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
    set_timeouts(60.0 * config.parallel.distributed_timeout_minutes)
    first_step, bad_samples = 0, BadSamples(config, groups.control)
    state: dict[str, Any] = {}
    if resumed is not None:
        first_step = load_checkpoint(engine, model, resumed, config, train_data.plan_key)
        state = read_json(resumed / STATE_FILE)
        bad_samples.resume(state, train_data, resumed)
    guard = build_guard(
        config,
        engine,
        model,
        steps,
        terms,
        train_data,
        device,
        run_id=operation.run_id,
        state=state,
    )
    if copies is not None:
        copies.keep_only(resumed)
    writer = None
    if config.checkpoint.save is not None:
        size = bytes_to_save(config, model)
        if groups.world.rank == 0:
            report_saving(config, size, first_step)
        saving = Saving(
            operation.run_id,
            size,
            operation.require_lock,
            lambda: {**bad_samples.state(train_data), **guard.state()},
        )
        writer = CheckpointWriter(engine, model, config, saving)
    start = ThisStart(operation.run_id, operation.ending_before)
    sinks = Sinks(config, first_step, enabled=groups.world.rank == 0, start=start)
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
        copies=copies,
        device=device,
        sinks=sinks,
        questions=open_sample_questions(config, groups, sinks, first_step),
        operation=operation,
        forward_time=forward_time,
        zeros=zeros,
        peak_operations=_peak_operations(config, device),
        display=LiveDisplay(
            config.schedule.train_iters, handler, wanted=config.logging.live_display and groups.world.rank == 0
        ),
        profiler=profiler,
        collection=GarbageCollection(config.run),
        leaving=Leaving(config.checkpoint, groups.control, operation.signals, time.time() - operation.began),
        bad_samples=bad_samples,
        guard=guard,
    )


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


def _checkpoint_to_resume(
    config: Config, groups: ParallelGroups, run_id: str
) -> tuple[Path | None, LocalCopies | None]:
    """What the run goes on from, if anything; whether its own checkpoints can be written; and the local copies."""
    resumed, settings = None, config.checkpoint
    if config.resume_from is not None:
        resumed = find_resumable(
            config.resume_from, groups.world, allow_fallback=settings.allow_fallback, is_ours=_is_ours(config)
        )
    if settings.save is None:
        logger.info("no --save: nothing of this run is kept")
    else:
        check_save_folder(settings.save, resumed, groups.world)
    copies = None
    if settings.non_persistent_local_ckpt_dir is not None and settings.save is not None:
        copies = LocalCopies(config, groups.control, run_id)
        if _is_ours(config):
            done = -1 if resumed is None else groups.world.together(partial(read_iteration, resumed))
            resumed = copies.newest(newer_than=done) or resumed
    if config.resume_from is not None:
        logger.info(f"{config.resume_from}: {'no checkpoint yet' if resumed is None else f'resuming {resumed}'}")
    return resumed, copies


def _is_ours(config: Config) -> bool:
    """Whether the run goes on from its own --save folder, which it has locked."""
    load, save = config.resume_from, config.checkpoint.save
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def _resumed_settings(config: Config, resumed: Path, groups: ParallelGroups) -> Config:
    """The settings with the learning rates that the run goes on with."""
    found = groups.world.together(lambda: resumed_schedule(config, resumed, read_iteration(resumed)))
    if found.remark:
        logger.log(logging.WARNING if found.is_jump else logging.INFO, found.remark)
    return found.config
