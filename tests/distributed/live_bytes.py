"""Counts the bytes of all live tensors of a process, operation by operation; on a CPU there is no allocator to ask."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, `peak` is the most bytes that tensors have taken together, each storage once.

    Memory that an operation takes and gives back itself is not seen.

    Args:
        others: tensors that belong to something else; they must stay alive, and are not counted.
    """

    def __init__(self, others: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(tensor.untyped_storage()) for tensor in others}
        for tensor in all_tensors():
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for item in tree_leaves((args, kwargs, out)):
            if isinstance(item, torch.Tensor):
                self._count(item)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def all_tensors() -> Iterator[torch.Tensor]:
    """Every tensor that Python knows, and its gradient."""
    gc.collect()
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and not item.is_meta:
            yield item
            if item.is_leaf and item.grad is not None:
                yield item.grad
