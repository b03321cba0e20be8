"""Puts the guard of a run together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.engine.steps import DirectSteps, PipelinedSteps
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.operation.stacks import debug_folder
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.guards.diagnosis import Diagnosis
from megatron_haplovl.training.guards.guard import Guard
from megatron_haplovl.training.guards.micro_batch import StepData
from megatron_haplovl.training.guards.replicas import Replicas
from megatron_haplovl.training.guards.steps_to_skip import StepsToSkip

logger = logging.getLogger(__name__)


def build_guard(
    config: Config,
    engine: Any,
    model: ShardedModel,
    steps: DirectSteps | PipelinedSteps,
    terms: tuple[LossTerm, ...],
    data: BatchLoader,
    device: torch.device,
    *,
    run_id: str,
    state: Mapping[str, Any],
) -> Guard:
    """The guard of a run. Called by every rank; the log says what it does beside the usual.

    Args:
        config: the run's settings.
        engine: the DeepSpeed engine.
        model: what it trains.
        steps: how micro-batches go through it.
        terms: the losses.
        data: the training data.
        device: what the model runs on.
        run_id: of this launch.
        state: `training_state.json` of the checkpoint that is resumed, or nothing.

    Raises:
        ValueError: the list of steps to skip in --save is damaged.
    """
    groups, checkpoint = model.groups, config.checkpoint

    def read() -> StepsToSkip | None:
        # One rank reads, so that all pass over the same steps.
        if groups.world.rank:
            return None
        return StepsToSkip(config.guard.iterations_to_skip, data.plan_key, checkpoint.save)

    to_skip = groups.control.gather_objects(groups.control.together(read))[0]
    step_data = StepData(data, groups, reads_data=steps.reads_data)
    diagnosis = Diagnosis(config, model, steps, terms, step_data, debug_folder(checkpoint.save, run_id))
    guard = Guard(config.guard, diagnosis, Replicas(engine, model), to_skip, state, device)
    for line in guard.describe():
        logger.info(line)
    return guard
