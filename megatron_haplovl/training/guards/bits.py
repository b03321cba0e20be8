"""A fingerprint of a tensor's bits, exact and computed where the tensor is."""

from __future__ import annotations

import torch

_CHUNK = 2**22
"""Elements at a time: the work needs a few int64 numbers for each."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 `[2]`: the sum of the elements' bits read as integers, and the sum of each times its place, modulo 2^64.

    Sums of integers do not depend on their order, so equal tensors have equal fingerprints on any device. A change of
    one element always changes the first number. Several changes that cancel out in it change the second, unless they
    cancel out there, too.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    found = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        found[0] += chunk.sum()
        places = torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=chunk.device)
        found[1] += (chunk * places).sum()
    return found


def fingerprints(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """The fingerprint of each tensor; the host waits for the device once."""
    if not tensors:
        return []
    rows = torch.stack([fingerprint(tensor) for tensor in tensors]).tolist()
    return [(int(first), int(second)) for first, second in rows]
