"""Mask and attention against loops over the definition, in fp64."""

import pytest
import torch

from megatron_haplovl.kernels.attention import attention, attention_probabilities, resolve_backend
from megatron_haplovl.kernels.mask import MixedMask


def mixed_mask(documents, padding):
    """Documents as lists of run lengths, positive for text, negative for an image; and the mask by its definition."""
    image_of, document_of = [], []
    for d, runs in enumerate(documents):
        for r, run in enumerate(runs):
            image_of += [(d, r) if run < 0 else None] * abs(run)
            document_of += [d] * abs(run)
    for p in range(padding):
        image_of.append(None)
        document_of.append(f"padding {p}")
    n = len(image_of)
    dense = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            same_image = image_of[i] is not None and image_of[i] == image_of[j]
            dense[i, j] = document_of[i] == document_of[j] and (j <= i or same_image)
    # An interval: first visible key, one past the last.
    start = dense.int().argmax(dim=1)
    end = start + dense.sum(dim=1)
    return MixedMask(start.int().unsqueeze(0), end.int().unsqueeze(0)), dense


LAYOUTS = {
    "text only": ([[7]], 0),
    "image only": ([[-5]], 0),
    "adjacent images": ([[2, -3, -4, 1]], 2),
    "one-token image": ([[1, -1, 3], [-1, 2]], 0),
    "several documents": ([[3, -4, 2], [5], [-6, 1, -2, 2]], 3),
}


@pytest.mark.parametrize("backend", ["reference", "cpu_segments", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_backends_against_loops(backend, layout, kv_heads):
    mask, dense = mixed_mask(*LAYOUTS[layout])
    n, heads, width, scale = dense.shape[0], 4, 6, 0.3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, h, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    expected = torch.zeros(1, n, heads, width, dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // kv_heads)
        for i in range(n):
            keys = dense[i].nonzero().squeeze(1)
            weights = torch.softmax(scale * (k[0, keys, g] @ q[0, i, h]), dim=0)
            expected[0, i, h] = weights @ v[0, keys, g]
    out = attention(q, k, v, mask, scale=scale, backend=backend)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    # Measured worst case 4.4e-16 forward, 2.2e-15 backward.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpu_segments", "sdpa"])
def test_hidden_keys_do_not_leak_and_later_tokens_of_the_same_image_do(backend):
    mask, dense = mixed_mask([[2, -3, 2], [3]], 1)
    n = dense.shape[0]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for _ in range(3))
    out = attention(q, k, v, mask, backend=backend)
    for j in range(n):
        k2, v2 = k.clone(), v.clone()
        k2[0, j] += 1.0
        v2[0, j] -= 1.0
        changed = (attention(q, k2, v2, mask, backend=backend) != out).flatten(2).any(dim=2)[0]
        assert torch.equal(changed, dense[:, j])


@pytest.mark.parametrize("backend", ["reference", "cpu_segments", "sdpa"])
@pytest.mark.parametrize("padding", [0, 3])
def test_decoding_equals_the_full_forward(backend, padding):
    """Prefill in chunks that end where images end, then token by token, over a growing cache; padding on the left."""
    mask, dense = mixed_mask([[1]] * padding + [[3, -4, 2, -1, 5]], 0)
    n = dense.shape[0]
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, n, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    full = attention(q, k, v, mask, backend=backend)
    chunks = [padding + 2, padding + 7, *range(padding + 8, n + 1)]
    for start, end in zip([0, *chunks], chunks, strict=False):
        out = attention(q[:, start:end], k[:, :end], v[:, :end], mask.rows(start, end), backend=backend)
        torch.testing.assert_close(out, full[:, start:end], rtol=0, atol=1e-14)


def test_packed_equals_each_document_alone():
    documents = [[3, -4, 2], [5], [-6, 1, -2, 2]]
    mask, dense = mixed_mask(documents, 2)
    n, start = dense.shape[0], 0
    q, k, v = (torch.randn(1, n, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    packed = attention(q, k, v, mask)
    for runs in documents:
        here = slice(start, start + sum(map(abs, runs)))
        alone = attention(q[:, here], k[:, here], v[:, here], mixed_mask([runs], 0)[0])
        torch.testing.assert_close(packed[:, here], alone, rtol=0, atol=1e-14)
        start = here.stop
    assert torch.equal(packed[:, start:], v[:, start:].repeat_interleave(2, dim=2))


def test_probabilities_are_what_the_output_is_weighted_with():
    mask, dense = mixed_mask([[2, -3, 1]], 1)
    q, k, v = (torch.randn(1, 7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    weights = attention_probabilities(q, k, mask)
    assert weights.shape == (1, 4, 7, 7)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 4, 7, dtype=torch.float64))
    assert torch.equal(weights[0, 0] > 0, dense)
    out = torch.stack([weights[0, h] @ v[0, :, h // 2] for h in range(4)], dim=1)
    torch.testing.assert_close(attention(q, k, v, mask, backend="cpu_segments")[0], out, rtol=0, atol=1e-14)


def test_backend_names():
    def resolve(name, device="cpu", dtype=torch.float32):
        return resolve_backend(name, device, dtype, 64)

    assert resolve("auto") == "cpu_segments"
    assert resolve("reference") == "reference"
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        resolve("magic")
    with pytest.raises(ValueError, match="cpu_segments: runs on a CPU, not on cuda"):
        resolve("cpu_segments", "cuda")
    for name in ("flash", "flash_merged", "triton", "flex"):
        with pytest.raises(ValueError, match=f"{name}: runs on a GPU, not on cpu; use auto"):
            resolve(name)
