"""What a stage of the training is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.engine.engine import HeadInputs
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.losses.terms import DISTILLATION_TERMS, LANGUAGE_MODELING_TERMS, LossTerm
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.teacher import VisionTeacher, load_teacher, random_teacher


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


def _vocabulary_shard(vocab_size: int, tensor: Group) -> dict[str, Any]:
    """Which words this rank's embedding and head hold, as arguments of the losses."""
    if tensor.size == 1:
        return {}
    words = vocab_size // tensor.size
    return {"group": tensor.process_group, "vocab_start": tensor.rank * words, "vocab_size": vocab_size}
