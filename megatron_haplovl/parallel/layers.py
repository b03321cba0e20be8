"""How a module of the serial model becomes one rank's part of it.

Each function takes a module on the meta device, where nothing has been allocated yet, cuts its parameters to this
rank's share and adds the collectives that its new role needs. Names of parameters do not change, and the modules' own
code notices nothing, because it reads its sizes from its weights. The table in `parallel/tensor_parallel.py` says which
module gets which role.

A region is a computation that is split over the ranks; `parallel/collectives.py` has the ways in and out. With
sequence parallelism the hidden state outside the regions is sharded along the sequence (dimension 1). A region is then
entered by an all-gather and left by a reduce-scatter; without it, entering costs nothing and leaving is an all-reduce.
Backward, the two change places.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_haplovl.parallel.collectives import (
    copy_to_region,
    gather_replicated,
    gather_to_region,
    part,
    reduce_from_region,
    reduce_scatter_from_region,
    scatter,
)
from megatron_haplovl.parallel.groups import Group

SEQUENCE = 1
"""Dimension of the tokens in [B, S, D]."""


def cut(module: nn.Module, name: str, group: Group, dim: int) -> None:
    """Replace a parameter (on the meta device) by this rank's share of it.

    Raises:
        ValueError: its size is not a multiple of the number of ranks.
    """
    whole = getattr(module, name)
    assert whole.is_meta
    setattr(module, name, nn.Parameter(part(whole, group, dim).detach().clone(), whole.requires_grad))


def column(module: nn.Linear, group: Group) -> None:
    """Each rank computes some of the outputs. The caller gives the input to all ranks first, by :func:`enter`."""
    cut(module, "weight", group, 0)
    if module.bias is not None:
        cut(module, "bias", group, 0)


def row(module: nn.Linear, group: Group, sequence_parallel: bool) -> None:
    """Each rank holds some of the inputs and one term of the output. The terms are added up here, the bias last."""
    cut(module, "weight", group, 1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        term = F.linear(x, module.weight)
        if sequence_parallel:
            total = reduce_scatter_from_region(term, group, SEQUENCE)
        else:
            total = reduce_from_region(term, group)
        return total if module.bias is None else total + module.bias

    module.forward = forward  # type: ignore[method-assign, assignment]


def enter(module: nn.Module, group: Group, sequence_parallel: bool) -> None:
    """Give the module's first argument, the whole hidden state, to every rank's part of the computation inside."""

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        x = gather_to_region(x, group, SEQUENCE) if sequence_parallel else copy_to_region(x, group)
        return (x, *others)

    module.register_forward_pre_hook(hook)


def gathered_column(module: nn.Linear, group: Group, sequence_parallel: bool) -> None:
    """Each rank computes some of the outputs, and all ranks then hold all of them."""
    column(module, group)
    enter(module, group, sequence_parallel)

    def hook(_module: nn.Module, _arguments: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        whole = gather_replicated(x, group, -1)
        return scatter(whole, group, SEQUENCE) if sequence_parallel else whole

    module.register_forward_hook(hook)


def vocabulary(module: nn.Embedding, group: Group) -> None:
    """Each rank holds some of the words; a word of another rank is zero here, and the ranks' results are added up."""
    words = module.num_embeddings
    cut(module, "weight", group, 0)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        local = tokens - group.rank * (words // group.size)
        elsewhere = (local < 0) | (local >= words // group.size)
        mine = F.embedding(local.masked_fill(elsewhere, 0), module.weight)
        return reduce_from_region(mine.masked_fill(elsewhere.unsqueeze(-1), 0.0), group)

    module.forward = forward  # type: ignore[method-assign, assignment]


def gather_sequence(module: nn.Module, group: Group) -> None:
    """Gather the module's first argument, which comes sharded along the sequence; all ranks do the same with it."""

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        return (gather_replicated(x, group, SEQUENCE), *others)

    module.register_forward_pre_hook(hook)


def scatter_sequence(module: nn.Module, group: Group) -> None:
    """Each rank goes on with its share of the sequence in the module's output."""
    module.register_forward_hook(lambda _module, _arguments, x: scatter(x, group, SEQUENCE))


def sum_gradient(parameter: nn.Parameter, group: Group) -> None:
    """Add up a whole parameter's gradient, because every rank has one term of it (sequence parallelism)."""

    def hook(grad: torch.Tensor) -> torch.Tensor:
        return group.sum(grad.clone(memory_format=torch.contiguous_format))

    parameter.register_hook(hook)
