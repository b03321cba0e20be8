"""What the losses are called, and what each is divided by.

A loss function returns sums over this micro-batch's tokens, by name, in fp32. The training loop divides each sum by the
number of such tokens in the whole *global* batch, so that the result does not depend on the micro-batch size, on
accumulation, on the number of ranks or on packing.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_haplovl.config.schema import LossConfig


@dataclass(frozen=True)
class LossTerm:
    """One entry of what a loss function returns."""

    name: str
    """Key in the returned dictionary and in the log."""
    count: str
    """Field of `data.batch.StepCounts` that the sum is divided by."""
    weight: float | None = 1.0
    """Factor in the total; None for a term that is only reported."""


def distillation_terms(weights: LossConfig) -> tuple[LossTerm, ...]:
    """Stage 1 (paper Eq. 2-4), with the weights of the three losses."""
    return (
        LossTerm("vision loss", "patch_tokens", weights.vision_loss_weight),
        LossTerm("feature loss", "text_tokens", weights.feature_loss_weight),
        LossTerm("ctp loss", "text_tokens", weights.ctp_loss_weight),
        LossTerm("ctp accuracy", "text_tokens", weight=None),
    )


DISTILLATION_FIGURES = (
    LossTerm("patch cosine", "patch_tokens", weight=None),
    LossTerm("patch retrieval", "patch_tokens", weight=None),
)
"""What stage 1 also measures on held-out data (`losses.distillation_figures`)."""

BY_SOURCE = ("vision loss", "feature loss", "ctp loss", "lm loss")
"""Terms that a loss function also returns by source (`losses.by_source`)."""

LANGUAGE_MODELING_TERMS = (
    LossTerm("lm loss", "lm_tokens"),
    LossTerm("lm token accuracy", "lm_tokens", weight=None),
)
"""Stage 2 (paper Eq. 1)."""
