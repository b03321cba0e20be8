"""Stage 2: next-token prediction on the answer tokens (paper Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def next_token_loss(
    hidden_ML: torch.Tensor, weight_VL: torch.Tensor, labels_M: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Cross-entropy of the output head's logits, summed over the M trained positions;
    keys as in `losses.terms.LANGUAGE_MODELING_TERMS`.

    Args:
        hidden_ML: normalised hidden states of the trained positions only.
        weight_VL: the output head.
        labels_M: the next token of each position.
    """
    logits_MV = F.linear(hidden_ML, weight_VL).float()
    correct = (logits_MV.detach().argmax(dim=-1) == labels_M).sum()
    return {
        "lm loss": F.cross_entropy(logits_MV, labels_M, reduction="sum"),
        "lm token accuracy": correct.float(),
    }
