"""What a stage of the training is, in one table: model, losses, and what the head gets to compute them.

`config.stages` has what settings and planning need to know about a stage: its layers, and what its recipes train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_haplovl.config.schema import Config, LossConfig
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.engine.engine import HeadInputs
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.distillation_figures import Candidates, vision_figures
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.losses.terms import (
    DISTILLATION_FIGURES,
    LANGUAGE_MODELING_TERMS,
    LossTerm,
    distillation_terms,
)
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation, LayeredModel
from megatron_haplovl.parallel.context_parallel import share_of_batch
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.teacher import build_teacher, teacher_width

Targets = Callable[[Batch], tuple[Any, ...]]
"""Micro-batch -> what the head gets beside the hidden state, the batch and the loss function."""


@dataclass(frozen=True)
class Stage:
    """One stage of the training."""

    build_model: Callable[[Config], LayeredModel]
    """Makes the serial model; called in a context that puts parameters on the meta device."""
    loss: Callable[..., dict[str, torch.Tensor]]
    """Called by the head: sums over tokens, by the names of the terms. Is told which words this rank holds."""
    terms: Callable[[LossConfig], tuple[LossTerm, ...]]
    """What the sums are divided by, and their weights in the total."""
    build_targets: Callable[[Config, torch.device], Targets]
    """Targets of a micro-batch that are not in the batch itself, such as a teacher's features. A first target that is a
    tensor has one row per patch, because context parallelism takes this rank's rows of it."""
    figures: tuple[LossTerm, ...] = ()
    """What is measured beside the losses on held-out data."""
    build_figures: Callable[[Batch, tuple[Any, ...], Group], Callable[..., dict[str, torch.Tensor]]] | None = None
    """(micro-batch, targets, context-parallel ranks) -> sums of the figures, from the arguments of the loss."""


def _distillation_model(config: Config) -> LayeredModel:
    return HaploVLForDistillation(config.model, teacher_width(config), config.precision.attention_backend)


def _whole_model(config: Config) -> LayeredModel:
    return HaploVL(config.model, config.precision.attention_backend)


def _teacher_features(config: Config, device: torch.device) -> Targets:
    teacher = build_teacher(config, device)
    return lambda batch: (teacher(batch),)


def _nothing(_config: Config, _device: torch.device) -> Targets:
    return lambda _batch: ()


def _vision_figures(batch: Batch, targets: tuple[Any, ...], context: Group) -> Callable[..., dict[str, torch.Tensor]]:
    own_P = torch.ones_like(batch.patch_target_P, dtype=torch.bool)
    if context.size > 1:
        _, own_P = share_of_batch(batch, context)
    sequence_P = batch.patch_target_P // batch.tokens_BS.shape[1]
    candidates = Candidates(targets[0], sequence_P, own_P.nonzero().flatten())
    return lambda student_MD, *_others: vision_figures(student_MD, candidates)


BUILDERS: dict[str, Stage] = {
    PRETRAIN.name: Stage(
        *(_distillation_model, distillation_loss, distillation_terms, _teacher_features),
        figures=DISTILLATION_FIGURES,
        build_figures=_vision_figures,
    ),
    FINETUNE.name: Stage(_whole_model, next_token_loss, lambda _weights: LANGUAGE_MODELING_TERMS, _nothing),
}
"""`StageSpec.name` -> how the stage is built."""


def stage_of(config: Config) -> Stage:
    """The stage of a run."""
    return BUILDERS[config.stage.name]


def head_inputs(stage: Stage, config: Config, model: ShardedModel, device: torch.device) -> HeadInputs:
    """What the head of a stage gets for a micro-batch, behind the hidden state.

    Args:
        stage: the training's stage.
        config: the run's settings.
        model: this rank's part of the model. Only the last stage of a pipeline has the head.
        device: what the model runs on.
    """
    pipeline = model.groups.pipeline
    if pipeline.rank < pipeline.size - 1:
        return _no_head
    loss = partial(stage.loss, **_vocabulary_shard(config.model.vocab_size, model.groups.tensor))
    targets = stage.build_targets(config, device)

    def inputs(batch: Batch) -> tuple[Any, ...]:
        found = targets(batch)
        # Only an evaluation wants no gradient; training must not pay for figures that nobody trains.
        if torch.is_grad_enabled() or stage.build_figures is None:
            return (batch, *found, loss)
        figures = stage.build_figures(batch, found, model.groups.context)
        return (batch, *found, lambda *arguments: {**loss(*arguments), **figures(*arguments)})

    return inputs


def _no_head(_batch: Batch) -> tuple[Any, ...]:
    raise AssertionError("this stage of the pipeline has no head")


def _vocabulary_shard(vocab_size: int, tensor: Group) -> dict[str, Any]:
    """Which words this rank's embedding and head hold, as arguments of the losses."""
    if tensor.size == 1:
        return {}
    words = vocab_size // tensor.size
    return {"group": tensor.process_group, "vocab_start": tensor.rank * words, "vocab_size": vocab_size}
