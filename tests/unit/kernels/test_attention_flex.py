"""The block mask against the mask's definition, and FlexAttention under it; on a GPU with gradients, compiled."""

import pytest
import torch

from megatron_haplovl.kernels import attention_flex
from megatron_haplovl.kernels.attention import reference_attention
from megatron_haplovl.kernels.attention_flex import BLOCK_SIZE, build_block_mask, flex_attention
from megatron_haplovl.kernels.mask import MixedMask
from tests.unit.kernels.test_attention import mixed_mask

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Documents and images begin and end inside blocks of 128 and at their edges; the last block is cut short, or is not.
LAYOUTS = {
    "one document and padding": ([[30, -300, 60]], 122),
    "image-only document, adjacent images": ([[-260, -1, -40], [100, -90]], 21),
    "edges of blocks": ([[128], [-128], [1, -127, 128]], 0),
    "short documents and padding": ([[3], [-1], [1, -2], [90]], 200),
    "less than a block": ([[3, -4, 2]], 1),
    "whole blocks of padding": ([[5]], 270),
    "a document that starts inside a block": ([[60], [-300]], 0),
    "a last block of one row": ([[129]], 0),
}


def check_blocks(block_mask, b, dense):
    """Every block of one sequence: full and partial ones are disjoint and what they say, all others are empty."""
    visited = torch.zeros_like(dense)
    for kind, counts, indices in (
        ("partial", block_mask.kv_num_blocks, block_mask.kv_indices),
        ("full", block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.min() >= 0 and indices.max() * BLOCK_SIZE < dense.shape[1]
        for r, count in enumerate(counts[b, 0].tolist()):
            for c in indices[b, 0, r, :count].tolist():
                rows, keys = (slice(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE) for i in (r, c))
                assert not visited[rows, keys].any()
                visited[rows, keys] = True
                # FlexAttention looks for the end of the keys in partial blocks only.
                full = bool(dense[rows, keys].all()) and keys.stop <= dense.shape[1]
                assert full == (kind == "full") and dense[rows, keys].any()
    assert not dense[~visited].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_the_mask(layout):
    mask, dense = mixed_mask(*LAYOUTS[layout])
    block_mask = build_block_mask(mask, torch.device("cpu"))
    n = len(dense)
    assert block_mask.shape == (1, 1, n, n)
    check_blocks(block_mask, 0, dense)
    row, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
    assert torch.equal(block_mask.mask_mod(torch.tensor(0), torch.tensor(0), row, key), dense)


def test_blocks_of_a_batch_and_of_a_chunk():
    (first, first_dense), (second, second_dense) = (mixed_mask(*LAYOUTS[name]) for name in list(LAYOUTS)[0:3:2])
    both = MixedMask(torch.cat([first.kv_start_BS, second.kv_start_BS]), torch.cat([first.kv_end_BS, second.kv_end_BS]))
    block_mask = build_block_mask(both, torch.device("cpu"))
    check_blocks(block_mask, 0, first_dense)
    check_blocks(block_mask, 1, second_dense)
    check_blocks(build_block_mask(first.rows(350, 390), torch.device("cpu")), 0, first_dense[350:390, :390])


def inputs(mask, heads, kv_heads, width, dtype, device):
    generator = torch.Generator().manual_seed(0)
    shape_q = (*mask.kv_start_BS.shape, heads, width)
    shape_k = (shape_q[0], mask.num_keys, kv_heads, width)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in (shape_q, shape_k, shape_k, shape_q)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", ["one document and padding", "short documents and padding"])
def test_forward_on_a_cpu(layout, monkeypatch):
    whole, _ = mixed_mask(*LAYOUTS[layout])
    for mask in (whole, whole.rows(whole.num_keys - 3, whole.num_keys)):
        q, k, v, _ = inputs(mask, 7, 1, 16, torch.float32, "cpu")
        out = flex_attention(q, k, v, mask, 0.25)
        # Measured worst case 4.1e-7.
        expected = reference_attention(q.double(), k.double(), v.double(), mask, 0.25)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    # The next layer takes the block mask that is there.
    monkeypatch.setattr(attention_flex, "build_block_mask", None)
    assert torch.equal(flex_attention(q, k, v, mask, 0.25), out)


def test_refuses_gradients_on_a_cpu():
    mask, _ = mixed_mask([[3, -2]], 0)
    q, k, v, _ = inputs(mask, 2, 1, 16, torch.float32, "cpu")
    k.requires_grad_()
    with pytest.raises(ValueError, match="flex has no backward on a CPU; use cpu_segments or sdpa"):
        flex_attention(q, k, v, mask, 0.25)


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_compiled(layout, dtype, tolerance):
    """Errors in units of the largest expected value."""
    mask, _ = mixed_mask(*LAYOUTS[layout])
    q, k, v, weight = inputs(mask, 7, 1, 64, dtype, "cuda")
    results: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for found, function, wide in ((results, flex_attention, dtype), (expected, reference_attention, torch.float64)):
        a, b, c = (x.to(wide).requires_grad_() for x in (q, k, v))
        out = function(a, b, c, mask, 0.125)
        found += [out.detach(), *torch.autograd.grad((out * weight).sum(), (a, b, c))]
    for result, wanted in zip(results, expected, strict=True):
        assert (result - wanted).abs().max() < tolerance * wanted.abs().max()
