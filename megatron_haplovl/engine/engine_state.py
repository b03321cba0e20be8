"""Where DeepSpeed's engines keep a rank's part of weights and optimizer state, as views to read from and write to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_haplovl.checkpoint.pieces import MOMENTS, WEIGHT, Piece
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import split_dim


@dataclass(frozen=True)
class LocalPiece:
    """Elements that this rank holds."""

    piece: Piece
    values: torch.Tensor
    """Flat view of the engine's own memory."""
    is_written: bool
    """False if another rank holds the same elements and writes them."""


@dataclass(frozen=True)
class _Place:
    """Where a trained parameter's fp32 values lie."""

    key: torch.Tensor
    """The tensor that the optimizer steps, under which it keeps its state."""
    offset: int
    """First element in that tensor."""
    start: int
    """First element in the parameter."""
    length: int


def local_pieces(engine: Any, model: ShardedModel) -> Iterator[LocalPiece]:
    """All that this rank holds of the model's weights and of the optimizer's moments.

    Trained weights are the fp32 ones that the optimizer steps. The optimizer's state must exist; see
    :func:`make_optimizer_state`.
    """
    tensor, replicas = model.groups.tensor, model.groups.replicas
    state, stage = engine.basic_optimizer.state, engine.zero_optimization_stage()
    for name, parameter in model.own_parameters():
        dim = None if tensor.size == 1 else split_dim(name)
        shared: dict[str, Any] = {"name": name, "dim": dim}
        shared |= {"part": 0, "parts": 1} if dim is None else {"part": tensor.rank, "parts": tensor.size}
        # The first tensor-parallel rank writes what all of them have whole.
        first_of_tensor = dim is not None or tensor.rank == 0
        if not parameter.requires_grad:
            values, start = _frozen(parameter, replicas.rank)
            if values.numel():
                piece = Piece(**shared, kind=WEIGHT, start=start, length=values.numel())
                yield LocalPiece(piece, values, first_of_tensor and (stage == 3 or replicas.rank == 0))
            continue
        place = _place(engine, parameter, replicas.rank)
        if place is None:
            continue
        for kind in (WEIGHT, *MOMENTS):
            source = place.key if kind == WEIGHT else state[place.key][kind]
            values = source.detach().view(-1).narrow(0, place.offset, place.length)
            piece = Piece(**shared, kind=kind, start=place.start, length=place.length)
            yield LocalPiece(piece, values, first_of_tensor and (stage > 0 or replicas.rank == 0))


def gradient_places(engine: Any, model: ShardedModel) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Where the gradients lie that this rank counts: each element of a trained parameter on exactly one rank.

    Yields:
        The tensor that the optimizer steps, whose `grad` it is; the first element there, and the number of elements.
    """
    tensor, replicas = model.groups.tensor, model.groups.replicas
    for name, parameter in model.own_parameters():
        place = _place(engine, parameter, replicas.rank) if parameter.requires_grad else None
        whole_elsewhere = tensor.rank > 0 and split_dim(name) is None
        if place is not None and not whole_elsewhere and (engine.zero_optimization_stage() or replicas.rank == 0):
            yield place.key, place.offset, place.length


HostPiece = tuple[Piece, torch.Tensor]
"""A piece with its values, flat, in the host's memory."""


def pieces_on_host(engine: Any, model: ShardedModel) -> list[HostPiece]:
    """What this rank writes into a checkpoint, copied, because the training goes on."""
    make_optimizer_state(engine, None)
    return [
        (local.piece, local.values.to("cpu", copy=True)) for local in local_pieces(engine, model) if local.is_written
    ]


def dtype_of(engine: Any) -> torch.dtype:
    """Number format that the model computes with."""
    return torch.bfloat16 if engine.bfloat16_enabled() else torch.float32


def make_optimizer_state(engine: Any, step: int | None) -> None:
    """Give AdamW the state that it otherwise makes in its first step: moments of zero, if it has none.

    Works with torch's AdamW, DeepSpeed's CPUAdam and FusedAdam, and apex.

    Args:
        engine: the DeepSpeed engine.
        step: number of steps that AdamW is to count as done; None leaves its number as it is.
    """
    optimizer = engine.basic_optimizer
    for key in _optimizer_keys(engine):
        state = optimizer.state[key]
        for kind in MOMENTS:
            state.setdefault(kind, torch.zeros_like(key, memory_format=torch.preserve_format))
        done = state.get("step", 0) if step is None else step
        is_torch = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.as_tensor(done, dtype=torch.float32, device=key.device) if is_torch else done
    for group in optimizer.param_groups:
        if "step" in group and step is not None:
            group["step"] = step


def _optimizer_keys(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        case 0:
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        case 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        case _:
            return list(_flat_groups(optimizer))


def _flat_groups(optimizer: Any) -> Any:
    """The flat groups of ZeRO 1 and 2; in bf16, ZeRO 1 is another class with other names."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def _place(engine: Any, parameter: Any, replica: int) -> _Place | None:
    """Where this rank's part of the parameter lies; None if ZeRO has given it no part."""
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        case 0:
            return _Place(parameter, 0, 0, parameter.numel())
        case 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = replica * size
            length = min(size, parameter.ds_numel - start)
            return _Place(optimizer.fp32_partitioned_groups_flat[group], offset, start, length) if length > 0 else None
        case _:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            key = _flat_groups(optimizer)[mapping.param_group_index]
            return _Place(key, flat.start, own.start, own.numel)


def _frozen(parameter: Any, replica: int) -> tuple[torch.Tensor, int]:
    """What this rank holds of a frozen parameter, and the place of its first element."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().view(-1), 0
    size = parameter.ds_tensor.numel()
    start = replica * size
    return parameter.ds_tensor.detach().view(-1)[: max(0, parameter.ds_numel - start)], start
