"""Stage 1's held-out figures against their definition, patch by patch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_haplovl.losses import distillation_figures
from megatron_haplovl.losses.distillation_figures import TIE, Candidates, vision_figures

PATCHES, WIDTH = 41, 3
RANDOM = torch.Generator().manual_seed(0)
TEACHER = torch.randn(PATCHES, WIDTH, generator=RANDOM)
# Close enough that many features find their own, and not all.
STUDENT = TEACHER + 0.4 * torch.randn(PATCHES, WIDTH, generator=RANDOM)
SEQUENCE = torch.tensor([0] * 20 + [2] * 21)


def reference(own: list[int]) -> tuple[float, int]:
    cosine, found = 0.0, 0
    for i in own:
        similar = [float(F.cosine_similarity(STUDENT[i].double(), TEACHER[j].double(), dim=0)) for j in range(PATCHES)]
        cosine += similar[i]
        found += all(similar[i] + TIE >= similar[j] for j in range(PATCHES) if SEQUENCE[j] == SEQUENCE[i])
    return cosine, found


@pytest.mark.parametrize("own", [list(range(PATCHES)), list(range(0, PATCHES, 3)), []], ids=["all", "a share", "none"])
def test_figures(own: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_figures, "_ROWS", 7)
    found = vision_figures(STUDENT[own], Candidates(TEACHER, SEQUENCE, torch.tensor(own, dtype=torch.int64)))
    cosine, number = reference(own)
    assert float(found["patch cosine"]) == pytest.approx(cosine, abs=1e-5)
    assert int(found["patch retrieval"]) == number
    assert number < len(own) or not own


def test_a_student_that_says_the_same_of_every_patch_finds_one_of_a_sequence() -> None:
    alike = torch.ones(PATCHES, WIDTH)
    found = vision_figures(alike, Candidates(TEACHER, SEQUENCE, torch.arange(PATCHES)))
    assert int(found["patch retrieval"]) == 2


def test_a_picture_that_stands_twice_is_found() -> None:
    twice = torch.cat([TEACHER, TEACHER + 1e-7])
    found = vision_figures(TEACHER, Candidates(twice, SEQUENCE.repeat(2), torch.arange(PATCHES)))
    assert int(found["patch retrieval"]) == PATCHES
