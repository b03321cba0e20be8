"""Mask and attention against loops over the definition, in fp64."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_haplovl.config.schema import PrecisionConfig
from megatron_haplovl.kernels import attention as dispatch
from megatron_haplovl.kernels.attention import (
    BACKENDS,
    attention,
    attention_probabilities,
    describe_backend,
    resolve_backend,
)
from megatron_haplovl.kernels.mask import MixedMask


def mixed_mask(documents, padding):
    """Mask of documents (run lengths, positive for text, negative for an image), and the same by its definition."""
    image_of: list[tuple[int, int] | None] = []
    document_of: list[int | str] = []
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


def test_shapes_that_contradict_the_mask_are_refused():
    mask, _ = mixed_mask([[5]], 1)
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    for wrong in ((q[:, :5], k, k), (q, k[:, :5], k), (q, k, k[..., :4]), (q[:0], k, k)):
        with pytest.raises(ValueError, match=r"a mask of \(1, 6\) queries over 6 keys does not fit q"):
            attention(*wrong, mask)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, torch.randn(1, 6, 3, 8), torch.randn(1, 6, 3, 8), mask)


@pytest.mark.parametrize("backend", ["reference", "cpu_segments", "sdpa"])
def test_inputs_of_any_strides(backend):
    mask, _ = mixed_mask([[2, -3, 2]], 1)
    q, k, v = (torch.randn(1, 8, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    torch.testing.assert_close(attention(*strided, mask, backend=backend), attention(q, k, v, mask), rtol=0, atol=1e-14)


def test_the_reference_keeps_its_precision_under_autocast():
    mask, _ = mixed_mask([[2, -3, 2]], 1)
    q, k, v = (torch.randn(1, 8, heads, 8) for heads in (4, 2, 2))
    plain = attention(q, k, v, mask, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, mask, backend="reference"), plain)


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
    for name in ("flash", "flash3", "flash4", "flash_merged", "triton"):
        with pytest.raises(ValueError, match=f"{name}: runs on a GPU, not on cpu; use auto"):
            resolve(name)
    with pytest.raises(ValueError, match="flex: has no backward on a CPU; use auto"):
        resolve("flex")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"flash", "triton", "flex"}, "flash (FA)"),
        ({"triton", "flex"}, "triton [flash: not there]"),
        ({"flex"}, "flex [flash: not there; triton: not there]"),
        (set(), "sdpa [flash: not there; triton: not there; flex: not there]"),
    ],
)
def test_auto_takes_the_first_that_runs_and_the_log_says_why(monkeypatch, there, expected):
    def unavailable(name, device, dtype, head_width):
        return None if name in {*there, "sdpa"} else "not there"

    monkeypatch.setattr(dispatch, "_unavailable", unavailable)
    monkeypatch.setattr(dispatch, "flash_operator", lambda device, version: SimpleNamespace(name="FA"))
    name = resolve_backend("auto", "cuda", torch.bfloat16, 64)
    assert describe_backend(name, torch.device("cuda"), torch.bfloat16, 64) == expected


def test_the_flag_knows_every_backend():
    fields = {field.name: field for field in dataclasses.fields(PrecisionConfig)}
    assert set(fields["attention_backend"].metadata["choices"]) == {"auto", *BACKENDS}
