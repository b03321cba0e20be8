"""Losses by source against plain torch in fp64, each source's tokens by themselves; and the totals stay as they are.

Planted once to see it fail: the patches' losses in another order, one chunk's losses written over another's, the
current-token losses as feature losses.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_haplovl.kernels import linear_cross_entropy
from megatron_haplovl.losses.by_source import TokenSources, by_source
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.losses.terms import BY_SOURCE

TOKENS, PATCHES, WIDTH, VOCAB, SOURCES = 23, 17, 6, 31, 4
RANDOM = torch.Generator().manual_seed(0)
# The third source has no token at all.
TEXT_SOURCE = torch.tensor([0, 1, 3])[torch.randint(0, 3, (TOKENS,), generator=RANDOM)].to(torch.int32)
PATCH_SOURCE = torch.tensor([0, 3])[torch.randint(0, 2, (PATCHES,), generator=RANDOM)].to(torch.int32)
HIDDEN, WEIGHT = torch.randn(TOKENS, WIDTH, generator=RANDOM), torch.randn(VOCAB, WIDTH, generator=RANDOM)
TARGET = torch.randint(0, VOCAB, (TOKENS,), generator=RANDOM)
STUDENT, TEACHER = torch.randn(PATCHES, 5, generator=RANDOM), torch.randn(PATCHES, 5, generator=RANDOM)
SCALE = torch.tensor([0.3])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 5 * 4 * VOCAB)


def reference() -> dict[str, torch.Tensor]:
    """Every loss of every source, from its definition."""
    hidden, weight = HIDDEN.double(), WEIGHT.double()
    words = weight[TARGET]
    ctp = F.cross_entropy(hidden * SCALE.double().exp() @ weight.T, TARGET, reduction="none")
    each = {
        "lm loss": F.cross_entropy(hidden @ weight.T, TARGET, reduction="none"),
        "ctp loss": ctp,
        "feature loss": 1 + (hidden - words).norm(dim=1) - F.cosine_similarity(hidden, words),
        "vision loss": 1 - F.cosine_similarity(STUDENT.double(), TEACHER.double()),
    }
    return {
        name: torch.stack(
            [values[(PATCH_SOURCE if name == "vision loss" else TEXT_SOURCE) == s].sum() for s in range(SOURCES)]
        )
        for name, values in each.items()
    }


def losses(with_sources: bool, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    text, patch = TokenSources(TEXT_SOURCE, SOURCES), TokenSources(PATCH_SOURCE, SOURCES)
    frozen = weight.detach()
    return {
        **next_token_loss(HIDDEN, weight, TARGET, text if with_sources else None),
        **distillation_loss(
            *(STUDENT, TEACHER, HIDDEN, TARGET, frozen, SCALE), *((patch, text) if with_sources else (None, None))
        ),
    }


def test_each_source_has_the_sum_of_its_own_tokens() -> None:
    found = losses(True, WEIGHT)
    expected = reference()
    assert set(expected) == set(BY_SOURCE)
    for name, values in expected.items():
        assert found[by_source(name)].dtype == torch.float32
        # Measured worst case 2.1e-7, relative to the largest.
        torch.testing.assert_close(found[by_source(name)].double(), values, rtol=1e-6, atol=1e-6)
        assert found[by_source(name)][2] == 0


def test_totals_and_gradients_are_the_same_bits() -> None:
    results = []
    for with_sources in (False, True):
        weight = WEIGHT.clone().requires_grad_()
        found = losses(with_sources, weight)
        found["lm loss"].backward()
        results.append(({name: value for name, value in found.items() if value.dim() == 0}, weight.grad))
    (without, gradient), (with_them, same_gradient) = results
    assert without.keys() == with_them.keys()
    assert all(torch.equal(without[name], with_them[name]) for name in without)
    assert gradient is not None and same_gradient is not None and torch.equal(gradient, same_gradient)


def test_no_tokens() -> None:
    none = TokenSources(torch.zeros(0, dtype=torch.int32), SOURCES)
    found = next_token_loss(HIDDEN[:0], WEIGHT, TARGET[:0], none)
    assert torch.equal(found[by_source("lm loss")], torch.zeros(SOURCES))
