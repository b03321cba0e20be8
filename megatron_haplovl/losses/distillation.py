"""Stage 1: the three losses that teach the pre-decoder images and text at once (paper Sec. 3.2, Eq. 2-4).

All are sums over tokens, in fp32; M is the number of text tokens, P of visual tokens, L the language model's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def vision_loss(student_PD: torch.Tensor, teacher_PD: torch.Tensor) -> torch.Tensor:
    """Sum over visual tokens of 1 - cos(student, teacher) (Eq. 2)."""
    return (1.0 - F.cosine_similarity(student_PD.float(), teacher_PD.float(), dim=-1)).sum()


def feature_loss(student_ML: torch.Tensor, teacher_ML: torch.Tensor) -> torch.Tensor:
    """Sum over text tokens of 1 + ||student - teacher||_2 - cos(student, teacher) (Eq. 3).

    The norm is not squared.
    """
    student_ML, teacher_ML = student_ML.float(), teacher_ML.float()
    distance_M = torch.linalg.vector_norm(student_ML - teacher_ML, dim=-1)
    return (1.0 + distance_M - F.cosine_similarity(student_ML, teacher_ML, dim=-1)).sum()


def current_token_logits(student_ML: torch.Tensor, embedding_VL: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Logits of Eq. 4: x = student W^T, divided by the learned temperature (log_scale = -log tau, as in CLIP).

    Returns:
        [M, V], fp32.
    """
    return F.linear(student_ML, embedding_VL).float() * log_scale.float().exp()


def distillation_loss(
    student_visual_PD: torch.Tensor,
    teacher_visual_PD: torch.Tensor,
    student_text_ML: torch.Tensor,
    tokens_M: torch.Tensor,
    embedding_VL: torch.Tensor,
    log_scale: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The three losses of stage 1, summed over tokens; keys as in `losses.terms.DISTILLATION_TERMS`.

    Args:
        student_visual_PD: vision head's output at the visual tokens.
        teacher_visual_PD: vision teacher's features of the same patches.
        student_text_ML: text head's output at the text tokens.
        tokens_M: the *current* token of each text position.
        embedding_VL: the language model's embedding matrix W, frozen.
        log_scale: scalar, logarithm of the logit scale.
    """
    teacher_text_ML = F.embedding(tokens_M, embedding_VL)
    logits_MV = current_token_logits(student_text_ML, embedding_VL, log_scale)
    correct = (logits_MV.detach().argmax(dim=-1) == tokens_M).sum()
    return {
        "vision loss": vision_loss(student_visual_PD, teacher_visual_PD),
        "feature loss": feature_loss(student_text_ML, teacher_text_ML),
        "ctp loss": F.cross_entropy(logits_MV, tokens_M, reduction="sum"),
        "ctp accuracy": correct.float(),
    }
