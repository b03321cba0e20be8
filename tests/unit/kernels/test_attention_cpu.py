"""The planner's rectangles against the mask's definition, and the fused CPU backend under every kind of plan."""

import numpy as np
import pytest
import torch

from megatron_haplovl.kernels import attention_cpu, attention_cpu_backward
from megatron_haplovl.kernels.attention import attention
from megatron_haplovl.kernels.attention_plan import hidden_pairs, plan_calls
from megatron_haplovl.kernels.mask import MixedMask
from tests.unit.kernels.test_attention import mixed_mask

PAIRS_PER_CALL = {"segments": 0.0, "some joined": 60.0, "whole documents and more": 1e9}


def random_layout(seed):
    """Several documents of text runs and images, and padding."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(random.integers(1, 5)):
        runs = []
        for _ in range(random.integers(1, 5)):
            runs.append(
                int(random.integers(1, 90 if random.random() < 0.2 else 9)) * (1 if random.random() < 0.5 else -1)
            )
        documents.append(runs)
    return documents, int(random.integers(0, 6))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("plan", PAIRS_PER_CALL)
def test_plans_cover_the_mask_exactly(seed, plan):
    mask, dense = mixed_mask(*random_layout(seed))
    calls = plan_calls(mask, PAIRS_PER_CALL[plan])
    assert [r for c in calls for r in range(c.row_start, c.row_end)] == list(range(len(dense)))
    computed = torch.zeros_like(dense)
    for c in calls:
        rows, keys = slice(c.row_start, c.row_end), slice(c.key_start, c.key_end)
        n, m = c.row_end - c.row_start, c.key_end - c.key_start
        if c.kind == "full":
            computed[rows, keys] = True
        elif c.kind == "causal":
            assert n == m
            computed[rows, keys] = torch.ones(n, m, dtype=torch.bool).tril()
        elif c.kind == "alone":
            computed[rows, keys] = torch.eye(n, dtype=torch.bool)
            others = torch.ones(len(dense), dtype=torch.bool)
            others[rows] = False
            assert not dense[others, keys].any()
        else:
            computed[rows, keys] = ~hidden_pairs(mask, c)
    assert torch.equal(computed, dense)


def test_plan_of_a_document_with_a_long_image_and_long_text():
    """If calls are cheap, the image is one full rectangle and text is cut into row blocks; if dear, one does it all."""
    end = torch.arange(1, 501, dtype=torch.int32)
    end[100:300] = 300
    mask = MixedMask(torch.zeros(1, 500, dtype=torch.int32), end.unsqueeze(0))
    cheap = plan_calls(mask, pairs_per_call=10.0)
    assert [(c.row_start, c.row_end, c.kind) for c in cheap if c.kind == "full"] == [(100, 300, "full")]
    assert len(cheap) > 5
    assert sum(c.pairs for c in cheap) < 1.2 * mask.visible_pairs
    (dear,) = plan_calls(mask, pairs_per_call=1e9)
    assert (dear.key_end, dear.kind) == (500, "masked")


def test_the_plan_is_the_cheapest_cut():
    """Against all 2^k cuts of a small layout."""
    mask, _ = mixed_mask([[3, -4, 2], [-2, 3]], 0)
    start, end = (x[0] for x in mask.host)
    places, rows = [3, 7, 9, 11], len(start)
    for overhead in (0.5, 3.0, 7.0, 20.0, 100.0):
        costs = []
        for chosen in range(16):
            cuts = [0, *[p for i, p in enumerate(places) if chosen >> i & 1], rows]
            costs.append(
                sum(overhead + (b - a) * (end[b - 1] - start[a]) for a, b in zip(cuts, cuts[1:], strict=False))
            )
        assert sum(overhead + c.pairs for c in plan_calls(mask, overhead)) == min(costs)


def output_and_gradients(tensors, weight, mask, backend):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = attention(*tensors, mask, backend=backend)
    return [out, *torch.autograd.grad((out * weight).sum(), tensors)]


def worst_error(results, exact):
    """The worst error of output and gradients, each relative to its largest value."""
    return max(
        float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(results, exact, strict=True)
    )


@pytest.mark.parametrize("plan", PAIRS_PER_CALL)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Relative to the largest entry of each tensor. Measured over 30 layouts: fp64 1.6e-15, fp32 8.8e-7, bf16 6.6e-3.
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)],
)
def test_output_and_gradients_against_fp64(monkeypatch, plan, dtype, tolerance):
    monkeypatch.setattr(attention_cpu, "pairs_per_call", lambda channels: PAIRS_PER_CALL[plan])
    for seed in range(6):
        mask, _ = mixed_mask(*random_layout(seed))
        generator = torch.Generator().manual_seed(seed)
        *tensors, weight = (torch.randn(1, mask.num_keys, h, 16, generator=generator).to(dtype) for h in (4, 2, 2, 4))
        exact = output_and_gradients([t.double() for t in tensors], weight.double(), mask, "reference")
        results = output_and_gradients(tensors, weight, mask, "cpu_segments")
        assert results[0].dtype == dtype
        assert worst_error(results, exact) < tolerance


@pytest.mark.parametrize("plan", PAIRS_PER_CALL)
def test_several_sequences_and_chunks(monkeypatch, plan):
    """Output and gradients of a batch whose sequences have plans of their own, and of a chunk over a longer cache."""
    monkeypatch.setattr(attention_cpu, "pairs_per_call", lambda channels: PAIRS_PER_CALL[plan])
    parts = [mixed_mask([[5, -4, 3], [8]], 0)[0], mixed_mask([[2, -2, 1], [6, -3, 4]], 2)[0]]
    both = MixedMask(torch.cat([m.kv_start_BS for m in parts]), torch.cat([m.kv_end_BS for m in parts]))
    for mask in (both, both.rows(10, 18)):
        rows = mask.kv_start_BS.shape[1]
        tensors = [
            torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((rows, 4), (mask.num_keys, 2), (mask.num_keys, 2))
        ]
        weight = torch.randn(2, rows, 4, 8, dtype=torch.float64)
        exact = output_and_gradients(tensors, weight, mask, "reference")
        assert worst_error(output_and_gradients(tensors, weight, mask, "cpu_segments"), exact) < 1e-14


@pytest.mark.parametrize("plan", PAIRS_PER_CALL)
def test_hidden_keys_do_not_leak(monkeypatch, plan):
    """Bit for bit, whichever rectangles are computed."""
    monkeypatch.setattr(attention_cpu, "pairs_per_call", lambda channels: PAIRS_PER_CALL[plan])
    mask, dense = mixed_mask([[3, -5, 70, -2], [4]], 2)
    n = dense.shape[0]
    q, k, v = (torch.randn(1, n, 2, 8) for _ in range(3))
    out = attention(q, k, v, mask, backend="cpu_segments")
    for j in range(n):
        k2, v2 = k.clone(), v.clone()
        k2[0, j] += 1.0
        v2[0, j] -= 1.0
        changed = (attention(q, k2, v2, mask, backend="cpu_segments") != out).flatten(2).any(dim=2)[0]
        assert torch.equal(changed, dense[:, j])


def test_large_rectangles_are_computed_in_blocks(monkeypatch):
    """Memory and threads decide how rows and heads are divided; a row block takes its part of a rectangle's mask."""
    mask, _ = mixed_mask([[5, -30, 9, -12, 14], [20]], 3)
    monkeypatch.setattr(attention_cpu, "pairs_per_call", lambda channels: 1e9)
    tensors = [torch.randn(1, mask.num_keys, h, 16, dtype=torch.float64) for h in (8, 4, 4)]
    weight = torch.randn(1, mask.num_keys, 8, 16, dtype=torch.float64)
    exact = output_and_gradients(tensors, weight, mask, "reference")
    for most_bytes, at_a_time in ((2**22, 2**20), (7000, 100), (7000, 2**15)):
        monkeypatch.setattr(attention_cpu_backward, "_MOST_SCORE_BYTES", most_bytes)
        monkeypatch.setattr(attention_cpu_backward, "_SCORE_BYTES", at_a_time)
        assert worst_error(output_and_gradients(tensors, weight, mask, "cpu_segments"), exact) < 1e-14


REAL_SIZES = {
    # Documents, padding; heads, key/value heads, width.
    "GQA 28:4": ([[60, -324, 128], [-200, -100], [300]], 12, (28, 4, 64)),
    "tail of small documents": ([[9, -16, 7]] * 20 + [[400]], 3, (8, 8, 80)),
    "6,144 tokens, any resolution": ([[60, -2304, 180], [80, -1152, -576, 212], [40, -1296, 200]], 44, (2, 1, 64)),
}


@pytest.mark.parametrize("case", REAL_SIZES)
def test_at_real_sizes(case):
    """fp32 against fp64; bf16 is at most twice as far off as dense SDPA in bf16."""
    documents, padding, (heads, kv_heads, width) = REAL_SIZES[case]
    mask = interval_mask(documents, padding)
    generator = torch.Generator().manual_seed(0)
    *tensors, weight = (
        torch.randn(1, mask.num_keys, h, width, generator=generator) for h in (heads, kv_heads, kv_heads, heads)
    )
    exact = output_and_gradients([t.double() for t in tensors], weight.double(), mask, "reference")
    # Measured over three seeds: at most 9.9e-7.
    assert worst_error(output_and_gradients(tensors, weight, mask, "cpu_segments"), exact) < 2e-6
    low, low_weight = [t.bfloat16() for t in tensors], weight.bfloat16()
    exact = output_and_gradients([t.double() for t in low], low_weight.double(), mask, "reference")
    ours, theirs = (
        worst_error(output_and_gradients(low, low_weight, mask, backend), exact) for backend in ("cpu_segments", "sdpa")
    )
    # Measured over three seeds: at most 6.3e-3, and 1.23 times the error of SDPA.
    assert ours < 1e-2
    assert ours < 2 * theirs


def interval_mask(documents, padding):
    """As `mixed_mask` of test_attention.py, without its loop over all pairs."""
    start: list[int] = []
    end: list[int] = []
    position = 0
    for runs in [*documents, *[[1]] * padding]:
        first = position
        for run in runs:
            start += [first] * abs(run)
            end += range(position + 1, position + run + 1) if run > 0 else [position - run] * -run
            position += abs(run)
    return MixedMask(torch.tensor([start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32))


def test_gradcheck():
    mask, _ = mixed_mask([[2, -3, 2], [1, -2]], 2)
    q, k, v = (torch.randn(1, 12, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask, backend="cpu_segments"), (q, k, v))
