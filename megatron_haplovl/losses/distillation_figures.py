"""How well stage 1 has learnt its vision teacher, on held-out data: figures that one can read, beside the losses.

Sums over patch tokens, as the losses are (`losses.terms`). P is the number of all patches of a micro-batch, M of those
whose student features this rank has, D the width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Rows of the similarities that exist at once.
_ROWS = 1024
TIE = 1e-5
"""Cosines that differ by less are equal: a picture may stand twice in a pack, and rounding must not choose."""


@dataclass(frozen=True)
class Candidates:
    """The patches of a micro-batch, among which each student feature has to find its own."""

    teacher_PD: torch.Tensor
    """The teacher's features of all patches, whatever share of them this rank has."""
    sequence_P: torch.Tensor
    """Number of the packed sequence that each patch stands in."""
    own_M: torch.Tensor
    """Places, among these, of the patches whose student features this rank has."""


def vision_figures(student_MD: torch.Tensor, candidates: Candidates) -> dict[str, torch.Tensor]:
    """Figures of `losses.terms.DISTILLATION_FIGURES`.

    Args:
        student_MD: the vision head's output.
        candidates: what the teacher says of the same patches and of the others.

    Returns:
        "patch cosine": sum of the cosines between a student feature and the teacher's of the same patch.
        "patch retrieval": how many student features are at least as near (by the cosine) to the teacher's feature of
        their own patch as to that of any other patch of the same packed sequence. Packs are the same in every layout,
        so the number is, too.
    """
    student = F.normalize(student_MD.float(), dim=-1)
    teacher = F.normalize(candidates.teacher_PD.float(), dim=-1)
    own_M = candidates.own_M
    cosine = student.new_zeros(())
    found = student.new_zeros(())
    for first in range(0, len(own_M), _ROWS):
        own = own_M[first : first + _ROWS]
        similar = student[first : first + _ROWS] @ teacher.T
        itself = similar.gather(1, own.unsqueeze(1))
        elsewhere = candidates.sequence_P[own].unsqueeze(1) != candidates.sequence_P.unsqueeze(0)
        cosine += itself.sum()
        found += (itself + TIE >= similar.masked_fill(elsewhere, -torch.inf)).all(dim=1).sum()
    return {"patch cosine": cosine, "patch retrieval": found}
