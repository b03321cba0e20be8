"""Both losses over a vocabulary split among two and four ranks, against plain torch in fp64 on the whole vocabulary.

Planted once to see these tests fail: the hidden state's gradient not summed; each rank's own log-sum-exp; the target's
logit of the first rank; the first word left out of the best word and of the target's column; the one-hot subtracted on
every rank; embedded rows not summed, or not masked; the last rank wins among equals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_haplovl.kernels import linear_cross_entropy
from tests.distributed.launch import run_ranks

VOCAB, WIDTH = 61, 12
# First word of each rank, and the end; uneven, and one rank with a single word.
BOUNDS = {2: (0, 40, VOCAB), 4: (0, 13, 14, 50, VOCAB)}
DTYPES = (torch.float32, torch.float64)
TOKENS = (0, 3, 23)

# Measured worst cases, relative to the largest entry: 1.7e-6 in fp32 and 3.3e-15 in fp64.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-14}


@dataclass
class Inputs:
    hidden_ML: torch.Tensor
    weight_VL: torch.Tensor
    target_M: torch.Tensor
    visual_PD: torch.Tensor
    log_scale: torch.Tensor


def inputs(dtype: torch.dtype, tokens: int) -> Inputs:
    """Inputs that are the same on every rank and in every dtype.

    They are eighths and the scale is two, so that every logit is exact: equal words tie on any machine, though a matrix
    of another size is multiplied in another order.
    """
    random = torch.Generator().manual_seed(tokens)
    weight_VL = _eighths(VOCAB, WIDTH, random)
    # The largest logits occur twice, both on different ranks and on one rank.
    weight_VL[[5, 7, 55]] = 4 * weight_VL[5]
    hidden_ML = _eighths(tokens, WIDTH, random)
    # The targets include words of every rank, those with equals, and one that is embedded exactly (distance zero).
    target_M = torch.randint(0, VOCAB, (tokens,), generator=random)
    target_M[: tokens // 2] = torch.tensor([5, 7, 55, 13] * tokens)[: tokens // 2]
    hidden_ML[-1:] = weight_VL[target_M[-1:]]
    return Inputs(
        hidden_ML.to(dtype).requires_grad_(),
        weight_VL.to(dtype),
        target_M,
        torch.randn(2, 5, generator=random).to(dtype).requires_grad_(),
        torch.tensor([2.0], dtype=dtype).log().requires_grad_(),
    )


def _eighths(rows: int, width: int, random: torch.Generator) -> torch.Tensor:
    return (8 * torch.randn(rows, width, generator=random)).round() / 8


def set_chunks() -> None:
    """A few tokens per chunk and fewer per block."""
    linear_cross_entropy.CHUNK_BYTES["cpu"] = 8 * 5 * VOCAB // 2
    linear_cross_entropy.BLOCK_BYTES["cpu"] = 4 * 3 * VOCAB // 4


def result_file(folder: Path, ranks: int, rank: int, dtype: torch.dtype, tokens: int) -> Path:
    return folder / f"{ranks}-{rank}-{dtype}-{tokens}.pt"


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def reference(tokens: int) -> dict[str, torch.Tensor]:
    x = inputs(torch.float64, tokens)
    weight_VL = x.weight_VL.requires_grad_()
    logits_MV = F.linear(x.hidden_ML, weight_VL)
    loss = F.cross_entropy(logits_MV, x.target_M, reduction="sum")
    (0.37 * loss).backward()
    result = {
        "lm loss": loss,
        "lm token accuracy": (logits_MV.argmax(dim=1) == x.target_M).sum(),
        "dhidden": gradient(x.hidden_ML),
        "dweight": gradient(weight_VL),
    }
    x, teacher_ML = inputs(torch.float64, tokens), weight_VL.detach()[x.target_M]
    logits_MV = F.linear(x.hidden_ML * x.log_scale.exp(), weight_VL.detach())
    ctp = F.cross_entropy(logits_MV, x.target_M, reduction="sum")
    distance_M = (x.hidden_ML - teacher_ML).norm(dim=1)
    feature = (1 + distance_M - F.cosine_similarity(x.hidden_ML, teacher_ML)).sum()
    (0.37 * ctp + 1.9 * feature).backward()
    return result | {
        "ctp loss": ctp,
        "feature loss": feature,
        "ctp accuracy": (logits_MV.argmax(dim=1) == x.target_M).sum(),
        "dstudent": gradient(x.hidden_ML),
        "dlog_scale": gradient(x.log_scale),
    }


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    return folder, run_ranks("worker_vocab_parallel_loss.py", 4, str(folder))


@pytest.mark.parametrize("ranks", BOUNDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_one_process_with_the_whole_vocabulary(launched, ranks, tokens, dtype):
    expected = reference(tokens)
    results = [torch.load(result_file(launched[0], ranks, rank, dtype, tokens)) for rank in range(ranks)]
    dweight_VL = torch.cat([result.pop("dweight") for result in results])
    for result in results:
        result["dweight"] = dweight_VL
        for name, value in expected.items():
            assert result[name].dtype == dtype and result[name].shape == value.shape, name
            if tokens == 0:
                assert not result[name].any(), name
            elif "accuracy" in name:
                assert result[name] == value, name
            else:
                worst = float((result[name] - value).detach().abs().max() / value.detach().abs().max())
                assert worst < TOLERANCE[dtype], name


def test_every_rank_gets_the_same_bits(launched):
    for ranks in BOUNDS:
        first, *others = (torch.load(result_file(launched[0], ranks, r, torch.float32, 23)) for r in range(ranks))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first.keys() - {"dweight"})


def test_every_rank_refuses_a_target_that_none_has(launched):
    for ranks in BOUNDS:
        words = f"targets outside the vocabulary of {VOCAB} words: [{VOCAB}]"
        assert launched[1].count(f"refused on {ranks} ranks: {words}") == ranks
