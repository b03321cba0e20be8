"""Stage 1: the three losses that teach the pre-decoder images and text at once (paper Sec. 3.2, Eq. 2-4).

All are sums over tokens, in fp32. M is the number of text tokens, P of patch tokens, L the language model's width.
Eq. 3 and 4 are computed together, chunk by chunk, in `kernels/linear_cross_entropy.py`. In names, ctp is current-token
prediction, the loss of Eq. 4.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_haplovl.kernels.linear_cross_entropy import distill_tokens
from megatron_haplovl.losses.by_source import TokenSources, by_source


def vision_losses(student_PD: torch.Tensor, teacher_PD: torch.Tensor) -> torch.Tensor:
    """1 - cos(student, teacher) of each patch token, `[P]` (Eq. 2)."""
    return 1.0 - F.cosine_similarity(student_PD.float(), teacher_PD.float(), dim=-1)


def scale_logits(student_ML: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """The student divided by the learned temperature, so that x W^T is Eq. 4's logits.

    `log_scale` is -log tau, as in CLIP. The product is in fp32, because the scale's rounding would be in every logit.
    """
    wide = torch.promote_types(student_ML.dtype, torch.float32)
    return (student_ML.to(wide) * log_scale.to(wide).exp()).to(student_ML.dtype)


def distillation_loss(
    student_visual_PD: torch.Tensor,
    teacher_visual_PD: torch.Tensor,
    student_text_ML: torch.Tensor,
    tokens_M: torch.Tensor,
    embedding_VL: torch.Tensor,
    log_scale: torch.Tensor,
    patch_sources: TokenSources | None = None,
    text_sources: TokenSources | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """The three losses of stage 1.

    Args:
        student_visual_PD: vision head's output at the patch tokens.
        teacher_visual_PD: vision teacher's features of the same patches.
        student_text_ML: text head's output at the text tokens.
        tokens_M: the *current* token of each text position.
        embedding_VL: the language model's embedding matrix W, frozen; or this rank's words of it.
        log_scale: one element, logarithm of the logit scale.
        patch_sources: whose the patch tokens are, if there are several sources.
        text_sources: whose the text tokens are; given together with `patch_sources`.
        group: ranks that share the vocabulary; see `kernels.linear_cross_entropy`.
        vocab_start: first word of this rank.
        vocab_size: words of all ranks together.

    Returns:
        By name, as in `losses.terms.distillation_terms`: the three losses, summed over tokens, and how many current
        tokens have the largest logit ("ctp accuracy"). With sources, the three losses by source, too.
    """
    each = {} if text_sources is None else {name: text_sources.empty() for name in ("losses_M", "features_M")}
    ctp, correct, feature = distill_tokens(
        student_text_ML,
        scale_logits(student_text_ML, log_scale),
        embedding_VL,
        tokens_M,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        **each,
    )
    vision_P = vision_losses(student_visual_PD, teacher_visual_PD)
    found = {
        "vision loss": vision_P.sum(),
        "feature loss": feature,
        "ctp loss": ctp,
        "ctp accuracy": correct,
    }
    if patch_sources is not None and text_sources is not None:
        found[by_source("vision loss")] = patch_sources.sums(vision_P)
        found[by_source("feature loss")] = text_sources.sums(each["features_M"])
        found[by_source("ctp loss")] = text_sources.sums(each["losses_M"])
    return found
