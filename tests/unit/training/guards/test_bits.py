"""Fingerprints of tensors."""

from __future__ import annotations

import pytest
import torch

from megatron_haplovl.training.guards import bits
from megatron_haplovl.training.guards.bits import fingerprint, fingerprints

_INTEGER = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
    torch.int32: torch.int32,
}


def flipped(tensor: torch.Tensor, element: int, bit: int) -> torch.Tensor:
    copy = tensor.clone()
    words = copy.view(-1).view(_INTEGER[tensor.dtype])
    # Shifted as a Python number, because the highest bit is the sign.
    mask = torch.tensor(1 << bit, dtype=torch.int64).to(words.dtype)
    words[element] ^= mask
    return copy


def reference(tensor: torch.Tensor) -> tuple[int, int]:
    """With Python's integers, which never overflow, and bytes."""
    width = tensor.element_size()
    raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    end = len(raw) // 8 * 8
    words = [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, end, 8)]
    words += [int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(end, len(raw), width)]
    sums = sum(words), sum(word * place for place, word in enumerate(words, 1))
    return tuple((s + 2**63) % 2**64 - 2**63 for s in sums)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 7, 37])
@pytest.mark.parametrize("dtype", _INTEGER)
def test_it_is_the_sum_of_the_words_whatever_the_chunks_are(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = (torch.randn(size, 5, generator=torch.Generator().manual_seed(1)) * 1e6).to(dtype)
    before = tensor.clone()
    # The same values as a part of a buffer, at any place in it.
    buffer = torch.zeros(5 * size + 5, dtype=dtype)
    for chunk in (2**22, 64, 8):
        monkeypatch.setattr(bits, "_CHUNK", chunk)
        assert tuple(fingerprint(tensor).tolist()) == reference(tensor)
        for start in range(5):
            part = buffer[start : start + 5 * size]
            part.copy_(tensor.view(-1))
            assert tuple(fingerprint(part).tolist()) == reference(tensor)
    assert torch.equal(tensor, before)
    assert fingerprints([tensor, tensor[:0]]) == [reference(tensor), (0, 0)]
    assert fingerprints([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = fingerprints([tensor])[0]
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            assert fingerprints([flipped(tensor, element, bit)])[0][0] != before[0]


def test_changes_that_cancel_out_and_values_that_compare_equal_are_seen() -> None:
    tensor = torch.tensor([1.0, 2.0, 3.0, float("nan"), 0.0])
    # Whole words change places.
    swapped = tensor[[2, 3, 0, 1, 4]]
    assert fingerprint(tensor)[0] == fingerprint(swapped)[0]
    assert fingerprint(tensor)[1] != fingerprint(swapped)[1]
    assert fingerprints([tensor]) == fingerprints([tensor.clone()]), "NaN is a pattern of bits like others"
    assert fingerprints([torch.tensor([0.0])]) != fingerprints([torch.tensor([-0.0])])
