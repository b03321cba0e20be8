"""The plain optimisation loop that trains both small teachers. HaploVL itself is trained by the entry scripts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import nn


def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train(
    model: nn.Module,
    loss_of_step: Callable[[], torch.Tensor],
    *,
    steps: int,
    lr: float,
    name: str,
    warmup: int = 30,
    log_interval: int = 50,
) -> None:
    """Minimise a loss with AdamW.

    Args:
        model: what is trained.
        loss_of_step: draws a batch and returns its loss, a scalar.
        steps: optimizer steps.
        lr: peak learning rate.
        name: shown in front of every progress line.
        warmup: steps of linear warm-up.
        log_interval: steps between progress lines.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    started, total = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, lr, warmup)
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % log_interval == 0:
            seconds = time.monotonic() - started
            remaining = seconds / (step + 1) * (steps - step - 1)
            print(
                f"{name}: step {step + 1}/{steps}, loss {total / log_interval:.4f}, {seconds:.0f} s, "
                f"{remaining:.0f} s to go",
                flush=True,
            )
            total = 0.0
    model.eval()
