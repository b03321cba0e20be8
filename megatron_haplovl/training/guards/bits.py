"""A fingerprint of a tensor's bits, exact and computed where the tensor is."""

from __future__ import annotations

import torch

_CHUNK = 2**22
"""Elements at a time, because the work needs as much memory again; a multiple of eight."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Width of an element in bytes -> integers of that width."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 `[2]`: the sum of the tensor's 64-bit words, and the sum of each times its place, modulo 2^64.

    What does not fill a word at the end counts element by element. Sums of integers do not depend on their order, so
    equal tensors have equal fingerprints on any device. A change of one word always changes the first number. Several
    changes that cancel out in it change the second, unless they cancel out there, too.
    """
    flat = tensor.detach().contiguous().view(-1)
    per_word = 8 // flat.element_size()
    whole = flat.numel() // per_word * per_word
    places = torch.arange(1, min(whole, _CHUNK) // per_word + 1, dtype=torch.int64, device=flat.device)
    found = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, whole, _CHUNK):
        chunk = flat[start : min(start + _CHUNK, whole)]
        # A part of a larger buffer may begin inside a word of that buffer.
        words = (chunk.clone() if chunk.storage_offset() % per_word else chunk).view(torch.int64)
        _add(found, words, places, start // per_word)
    rest = flat[whole:].view(_INTEGERS[flat.element_size()]).long()
    _add(found, rest, torch.arange(1, rest.numel() + 1, device=flat.device), whole // per_word)
    return found


def _add(found: torch.Tensor, words: torch.Tensor, places: torch.Tensor, before: int) -> None:
    total = words.sum()
    found[0] += total
    found[1] += total * before + (words * places[: words.numel()]).sum()


def fingerprints(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """The fingerprint of each tensor; the host waits for the device once."""
    if not tensors:
        return []
    rows = torch.stack([fingerprint(tensor) for tensor in tensors]).tolist()
    return [(int(first), int(second)) for first, second in rows]
