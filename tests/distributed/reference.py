"""One plain torch process, which distributed runs are compared with.

It knows nothing of DeepSpeed, of ranks or of accumulation: it sees the global batch as one tensor, divides by counts
that it takes from the labels itself, and steps torch's AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.parallel.groups import build_groups
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.model_setup import build_model
from megatron_haplovl.training.recipe import apply_recipe, parameter_groups
from megatron_haplovl.training.teacher import random_teacher
from tests.distributed.cases import STEPS

ONE_RANK = build_groups()


def whole_batches(c: Config) -> Iterator[Batch]:
    """The global batches of the first steps, each as one tensor, from a loader without ranks."""
    schedule = dataclasses.replace(c.schedule, micro_batch_size=c.schedule.global_batch_size)
    c = dataclasses.replace(c, schedule=schedule)
    return build_loader((), c, num_steps=STEPS, dp_rank=0, dp_size=1).micro_batches()


def train_serially(c: Config) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(losses and norms per step, gradients of the first step, weights) of one plain process."""
    stage1 = c.recipe.recipe == "distill"
    teacher = random_teacher(c.model, c.init.teacher_layer, c.run.seed) if stage1 else None
    whole = build_model(c, ONE_RANK)
    fill_weights(whole, c)
    model = whole.module
    apply_recipe(model, c.recipe)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, c.optimizer),
        lr=c.optimizer.lr,
        betas=(c.optimizer.adam_beta1, c.optimizer.adam_beta2),
        eps=c.optimizer.adam_eps,
    )
    metrics: list[dict[str, float]] = []
    gradients: dict[str, torch.Tensor] = {}
    batches = whole_batches(c)
    for _ in range(STEPS):
        batch = next(batches)
        if teacher is None:
            sums = model(batch, next_token_loss)
            losses = {"lm loss": sums["lm loss"] / int((batch.labels_BS != IGNORE_INDEX).sum())}
        else:
            sums = model(batch, teacher(batch), distillation_loss)
            text = int(batch.text_mask_BS.sum())
            losses = {
                "vision loss": sums["vision loss"] / batch.patch_target_P.numel(),
                "feature loss": sums["feature loss"] / text,
                "ctp loss": sums["ctp loss"] / text,
            }
        sum(losses.values()).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not gradients:
            gradients = {name: _gradient(p) for name, p in model.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(trained, c.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({**{name: loss.item() for name, loss in losses.items()}, "grad norm": norm.item()})
    return metrics, gradients, {name: p.detach().clone() for name, p in model.named_parameters()}


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()
