"""What the losses are called, and what each is divided by.

A loss function returns sums over this micro-batch's tokens, by name, in fp32. The training loop divides each sum by the
number of such tokens in the whole *global* batch, so that the result does not depend on the micro-batch size, on
accumulation, on the number of ranks or on packing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossTerm:
    """One entry of what a loss function returns."""

    name: str
    """Key in the returned dictionary and in the log."""
    count: str
    """Field of `data.batch.StepCounts` that the sum is divided by."""
    trained: bool = True
    """Whether it is part of the total; False for what is only reported."""


DISTILLATION_TERMS = (
    LossTerm("vision loss", "patch_tokens"),
    LossTerm("feature loss", "text_tokens"),
    LossTerm("ctp loss", "text_tokens"),
    LossTerm("ctp accuracy", "text_tokens", trained=False),
)
"""Stage 1 (paper Eq. 2-4)."""

LANGUAGE_MODELING_TERMS = (
    LossTerm("lm loss", "lm_tokens"),
    LossTerm("lm token accuracy", "lm_tokens", trained=False),
)
"""Stage 2 (paper Eq. 1)."""
