"""Stage 2: next-token prediction on the answer tokens (paper Eq. 1)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_haplovl.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_haplovl.losses.by_source import TokenSources, by_source


def next_token_loss(
    hidden_ML: torch.Tensor,
    weight_VL: torch.Tensor,
    labels_M: torch.Tensor,
    sources: TokenSources | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Cross-entropy of the output head's logits.

    Args:
        hidden_ML: normalised hidden states of the trained positions only.
        weight_VL: the output head, or this rank's words of it.
        labels_M: the next token of each position.
        sources: whose the positions are, if there are several sources.
        group: ranks that share the vocabulary; see `kernels.linear_cross_entropy`.
        vocab_start: first word of this rank.
        vocab_size: words of all ranks together.

    Returns:
        By name, as in `losses.terms.LANGUAGE_MODELING_TERMS`: the loss, summed over the M trained positions, and how
        many of their labels have the largest logit ("lm token accuracy"). With sources, the loss by source, too.
    """
    losses_M = None if sources is None else sources.empty()
    loss, correct = linear_cross_entropy(
        hidden_ML,
        weight_VL,
        labels_M,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        losses_M=losses_M,
    )
    found = {"lm loss": loss, "lm token accuracy": correct}
    if sources is not None and losses_M is not None:
        found[by_source("lm loss")] = sources.sums(losses_M)
    return found
