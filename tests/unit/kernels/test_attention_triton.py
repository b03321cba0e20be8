"""The Triton kernels against dense attention in fp64: by Triton's interpreter on a CPU, compiled on a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_haplovl.kernels.attention import reference_attention, sdpa_attention
from megatron_haplovl.kernels.mask import MixedMask
from tests.unit.kernels.test_attention import mixed_mask
from tests.unit.kernels.test_attention_cpu import random_layout

pytest.importorskip("triton", reason="Triton has no package for this platform")
from megatron_haplovl.kernels import attention_triton  # noqa: E402
from megatron_haplovl.kernels.attention_triton import triton_attention  # noqa: E402

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(ON_GPU, reason="the kernels are compiled for the CUDA device here")),
    pytest.param("cuda", marks=needs_gpu),
]

# The interpreter's tiles have 32 queries and 16 keys: images, documents and padding begin and end inside them, one tile
# holds several documents, and there are full tiles. Lists of lists are documents, negative numbers images.
LAYOUTS = {
    "full tiles": ([[2, 45, -20, 3]], 0),
    "adjacent images, one-token image, image-only document": ([[5, -18, -1, 6], [-19], [8, -3, -2]], 8),
    "short documents and padding": ([[3], [-1], [1, -2], [4, -4, 1], [-3]], 16),
}


def stacked(*layouts):
    """One mask of several sequences of the same length."""
    masks = [mixed_mask(*layout)[0] for layout in layouts]
    return MixedMask(torch.cat([m.kv_start_BS for m in masks]), torch.cat([m.kv_end_BS for m in masks]))


def random_inputs(
    mask, heads, kv_heads, width, dtype, device, seed=0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as views of one tensor, as a fused projection makes them, and a weight of the output's shape."""
    batch, num_queries = mask.kv_start_BS.shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, mask.num_keys, heads + 2 * kv_heads, width, generator=generator)
    q, k, v = qkv.to(device, dtype).requires_grad_().split([heads, kv_heads, kv_heads], dim=2)
    weight = torch.randn(batch, num_queries, heads, width, generator=generator).to(device, dtype)
    return q[:, mask.num_keys - num_queries :], k, v, weight


def run(function, q, k, v, weight, mask):
    """Output and the three gradients."""
    out = function(q, k, v, mask, q.shape[-1] ** -0.5)
    return out, *torch.autograd.grad((out * weight).sum(), (q, k, v))


def errors(results, expected):
    """Largest absolute difference of each result, in units of the largest expected value."""
    return [
        float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(results, expected, strict=True)
    ]


def expected_results(q, k, v, weight, mask):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    return run(reference_attention, q, k, v, weight.double(), mask)


# Measured worst cases of output and gradients, interpreted: 7.4e-7, 6.7e-4 and 7.8e-3. Where fp32 becomes bf16 the
# interpreter cuts digits off and a GPU rounds, so that bf16 is about half as far off on a GPU.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# How far fp32 results may be off whatever torch's own are, because its products round otherwise on each processor.
# Measured in short sequences: 2.9e-7 where torch's had 1.2e-7 (AVX2), and less than twice torch's (AVX-512).
FEW_ROUNDINGS = 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients(layout, dtype, device):
    mask, _ = mixed_mask(*LAYOUTS[layout])
    inputs = random_inputs(mask, 2, 1, 64, dtype, device)
    results, expected = run(triton_attention, *inputs, mask), expected_results(*inputs, mask)
    assert [x.dtype for x in results] == [dtype] * 4
    found = errors(results, expected)
    assert max(found) < TOLERANCE[dtype]
    if dtype != torch.bfloat16 or device == "cuda":
        for error, sdpa_error in zip(found, errors(run(sdpa_attention, *inputs, mask), expected), strict=True):
            assert error <= max(2 * sdpa_error, FEW_ROUNDINGS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(80, 7, 1), (96, 4, 2), (128, 1, 1), (16, 2, 2)])
def test_head_widths_and_groups(width, heads, kv_heads, device):
    """The gradient of the keys divides seven heads on one into parts of unequal size, but not four on two."""
    layouts = [([[4, -9, 5], [-13]], 3), ([[-1, 15], [2, -3, 4]], 9)]
    mask = stacked(*layouts[: 1 if heads == 7 else 2])
    inputs = random_inputs(mask, heads, kv_heads, width, torch.float32, device)
    found = errors(run(triton_attention, *inputs, mask), expected_results(*inputs, mask))
    assert max(found) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_a_chunk_of_queries_over_a_cache_of_keys(device):
    """The last queries of two sequences, with gradients, and one decoding step. No query sees some of the keys."""
    whole = stacked(([[2, -30, 9], [3, -4, 10]], 0), ([[7, -36, 15]], 0))
    inputs = random_inputs(whole, 1, 1, 64, torch.float32, device)
    full = reference_attention(*inputs[:3], whole, 0.125)
    for start in (43, 57):
        mask = whole.rows(start, 58)
        q, k, v, weight = inputs[0][:, start:], *inputs[1:3], inputs[3][:, start:]
        results = run(triton_attention, q, k, v, weight, mask)
        # Measured worst case 6.9e-7.
        torch.testing.assert_close(results[0], full[:, start:], rtol=0, atol=2e-6)
        assert max(errors(results, expected_results(q, k, v, weight, mask))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_hidden_keys_do_not_leak_and_later_tokens_of_the_same_image_do(device):
    mask, dense = mixed_mask([[3, -18, 2], [-1, 17]], 5)
    q, k, v, _ = (x.detach() for x in random_inputs(mask, 1, 1, 16, torch.float32, device))
    out = triton_attention(q, k, v, mask, 0.25)
    # Text, first and last token of the image, last token of the document, one-token image, padding.
    for j in (1, 3, 20, 22, 23, 43):
        k2, v2 = k.clone(), v.clone()
        k2[0, j] += 1.0
        v2[0, j] -= 1.0
        changed = (triton_attention(q, k2, v2, mask, 0.25) != out).flatten(2).any(dim=2)[0]
        assert torch.equal(changed.cpu(), dense[:, j])


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bit_for_bit_and_under_checkpointing_and_no_grad(device):
    mask, _ = mixed_mask([[3, -18, 2]], 0)
    inputs = random_inputs(mask, 3, 1, 16, torch.float32, device)
    first = run(triton_attention, *inputs, mask)

    def checkpointed(*arguments):
        return checkpoint(triton_attention, *arguments, use_reentrant=False)

    for function in (triton_attention, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(run(function, *inputs, mask), first, strict=True))
    with torch.no_grad():
        assert torch.equal(triton_attention(*inputs[:3], mask, 0.25), first[0])


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_and_channels_that_are_not_contiguous(device):
    mask, _ = mixed_mask([[3, -18, 2]], 0)
    q, k, v, weight = random_inputs(mask, 1, 1, 16, torch.float32, device)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.autocast(device, torch.float16):
        out = triton_attention(q, k, v.half(), mask, 0.25)
    assert out.dtype == torch.float16
    # A gradient that is the same everywhere comes as a tensor without strides.
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    q, k, v = (x.detach().half().double().requires_grad_() for x in (q, k, v))
    expected = reference_attention(q, k, v, mask, 0.25)
    expected_grads = torch.autograd.grad(expected.sum(), (q, k, v))
    assert [x.dtype for x in grads] == [torch.float32] * 3
    assert max(errors([out, *grads], [expected, *expected_grads])) < TOLERANCE[torch.float16]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (8, 8)])
def test_a_long_pack(heads, kv_heads, dtype):
    """6,144 tokens with images of up to 2,304, as in training."""
    documents = [[40, -2304, 300], [7, -576, -576, 200], [-1, 900], [64, -1152], *[[1]] * 24]
    starts: list[int] = []
    ends: list[int] = []
    for runs in documents:
        first = len(ends)
        for run_length in runs:
            n = len(ends)
            ends += range(n + 1, n + run_length + 1) if run_length > 0 else [n - run_length] * -run_length
        starts += [first] * (len(ends) - first)
    mask = MixedMask(torch.tensor([starts], dtype=torch.int32), torch.tensor([ends], dtype=torch.int32))
    assert mask.num_keys == 6144
    inputs = random_inputs(mask, heads, kv_heads, 128, dtype, "cuda")
    results, expected = run(triton_attention, *inputs, mask), expected_results(*inputs, mask)
    found = errors(results, expected)
    assert max(found) < TOLERANCE[dtype]
    for error, sdpa_error in zip(found, errors(run(sdpa_attention, *inputs, mask), expected), strict=True):
        assert error <= 2 * sdpa_error
    assert all(torch.equal(a, b) for a, b in zip(run(triton_attention, *inputs, mask), results, strict=True))


@needs_gpu
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("seed", range(4))
def test_random_layouts_compiled(seed, width):
    mask, _ = mixed_mask(*random_layout(seed))
    for dtype in TOLERANCE:
        inputs = random_inputs(mask, 4, 2, width, dtype, "cuda", seed)
        assert max(errors(run(triton_attention, *inputs, mask), expected_results(*inputs, mask))) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "computes in bf16, fp16 or fp32, not in torch.float64"),
        ({"width": 72}, "multiples of 16 up to 256, not 72"),
        ({"width": 272}, "multiples of 16 up to 256, not 272"),
        ({"scale": 0.0}, "must be positive, not 0.0"),
    ],
)
def test_refusals(changes, message):
    mask, _ = mixed_mask([[5]], 0)
    width, device = changes.get("width", 16), "cuda" if ON_GPU else "cpu"
    q, k, v = (torch.randn(1, 5, 2, width, device=device, dtype=changes.get("dtype")) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        triton_attention(q, k, v, mask, changes.get("scale", 1.0))


def test_refuses_several_dtypes_and_a_cpu(monkeypatch):
    mask, _ = mixed_mask([[5]], 0)
    device = "cuda" if ON_GPU else "cpu"
    q, k, v = (torch.randn(1, 5, 1, 16, device=device, dtype=d) for d in (torch.float32, torch.float32, torch.float16))
    with pytest.raises(ValueError, match="several dtypes: torch.float32, torch.float32 and torch.float16"):
        triton_attention(q, k, v, mask, 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="runs on a GPU, not on cpu"):
        triton_attention(q.cpu(), k.cpu(), k.cpu(), mask, 1.0)


def test_the_length_class_is_a_bounded_power_of_two():
    classes = [attention_triton._length_class(n) for n in (1, 1024, 1025, 6144, 1 << 20)]
    assert classes == [1024, 1024, 2048, 8192, 16384]
