"""The last layers: the language model's output head, and stage 1's three throw-away parts.

A head takes its loss as an argument, so that a fused or vocabulary-parallel loss can read the weight where it lies and
logits need never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.losses.by_source import TokenSources

LossT = TypeVar("LossT")


def sources_at(batch: Batch, where: torch.Tensor) -> TokenSources | None:
    """Whose some tokens of a batch are; None if there is one source only.

    Args:
        batch: a micro-batch.
        where: bool `[B, S]`, or indices into the flattened positions.
    """
    if batch.source_BS is None:
        return None
    source_Z = batch.source_BS.flatten()
    return TokenSources(source_Z[where.flatten()], batch.num_sources)


class OutputHead(nn.Module):
    """The language model's output projection, `[V, L]`, without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.post.hidden_size))

    def forward(self, hidden_BSL: torch.Tensor, batch: Batch, loss_fn: Callable[..., LossT]) -> LossT:
        """`loss_fn(hidden_ML, weight_VL, labels_M, sources)` over the positions that have a label."""
        trained_BS = batch.labels_BS != IGNORE_INDEX
        sources = sources_at(batch, trained_BS)
        return loss_fn(hidden_BSL[trained_BS], self.weight, batch.labels_BS[trained_BS], sources)

    def logits(self, hidden_BSL: torch.Tensor) -> torch.Tensor:
        """[B, S, L] -> [B, S, V]."""
        return F.linear(hidden_BSL, self.weight)


class DistillationHeads(nn.Module):
    """Vision head, text head and learned temperature (paper Sec. 3.2); dropped after stage 1.

    Args:
        config: sizes.
        teacher_width: width of the vision teacher's features.
    """

    def __init__(self, config: ModelConfig, teacher_width: int) -> None:
        super().__init__()
        self.vision_head = nn.Linear(config.pre.hidden_size, teacher_width)
        self.text_head = nn.Linear(config.pre.hidden_size, config.post.hidden_size)
        # -log(temperature), as in CLIP. One element and not zero dimensions, which DeepSpeed cannot broadcast.
        self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        batch: Batch,
        teacher_PD: torch.Tensor,
        embedding_VL: torch.Tensor,
        loss_fn: Callable[..., LossT],
    ) -> LossT:
        """`loss_fn` over all patch tokens and all text tokens; see `losses.distillation.distillation_loss`."""
        visual_PD = hidden_BSD.flatten(0, 1).index_select(0, batch.patch_target_P)
        text_MD = hidden_BSD[batch.text_mask_BS]
        return loss_fn(
            self.vision_head(visual_PD),
            teacher_PD,
            self.text_head(text_MD),
            batch.tokens_BS[batch.text_mask_BS],
            embedding_VL,
            self.logit_scale,
            sources_at(batch, batch.patch_target_P),
            sources_at(batch, batch.text_mask_BS),
        )
