"""Context parallelism: each rank holds a share of every sequence's tokens, and inside attention a share of the heads.

The exchange is Ulysses' (Jacobs et al., 2023, "DeepSpeed Ulysses"): an all-to-all before attention turns [tokens of
this rank, all heads] into [all tokens, heads of this rank], and one after it turns it back. So attention sees whole
sequences and the mixed mask needs no change. Applied from outside, like tensor parallelism.

Every rank embeds the whole sequence, which is cheap, and goes on with its share of it. Gradients of weights are then
terms of a sum over the context ranks, and are added up together with those of the data-parallel ranks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.kernels.mask import MixedMask
from megatron_haplovl.model.attention_inputs import Attend, AttentionInputs
from megatron_haplovl.model.haplovl import LayeredModel
from megatron_haplovl.parallel.collectives import conjugate, part
from megatron_haplovl.parallel.groups import Group

SEQUENCE, HEADS = 1, 2


def apply_context_parallel(model: LayeredModel, group: Group) -> None:
    """Let each rank of the group compute its share of every sequence.

    Args:
        model: the model, whose heads then get this rank's share of the batch.
        group: the context-parallel ranks, which are given the same batches.
    """
    if group.size == 1:
        return
    model.embedding.register_forward_hook(lambda _module, _arguments, x_BSD: part(x_BSD, group, SEQUENCE))

    def share_inputs(inputs: AttentionInputs) -> AttentionInputs:
        return dataclasses.replace(
            inputs,
            position_ids_BS=part(inputs.position_ids_BS, group, SEQUENCE),
            attend=exchange_heads(inputs.attend, group),
        )

    model.adapt_inputs = share_inputs
    model.get_submodule(model.HEAD).register_forward_pre_hook(_share_batch_hook(group))


def exchange_heads(attend: Attend, group: Group) -> Attend:
    """Attention over whole sequences for callers that hold a share of the tokens each."""

    def exchanged(
        q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, mask: MixedMask, **settings: Any
    ) -> torch.Tensor:
        whole = (_exchange(x, group, HEADS, SEQUENCE) for x in (q_BSHK, k_BSGK, v_BSGK))
        return _exchange(attend(*whole, mask, **settings), group, SEQUENCE, HEADS)

    return exchanged


def share_of_batch(batch: Batch, group: Group) -> tuple[Batch, torch.Tensor]:
    """The part of a batch that the heads need for this rank's tokens, and which patches belong to it.

    Returns:
        The batch with tokens, labels, text mask, sources and patch targets of this rank's share (and all images), and
        bool [P], True at the patches of the share.
    """
    rows, length = batch.tokens_BS.shape
    share = length // group.size
    row_P, column_P = batch.patch_target_P // length, batch.patch_target_P % length
    mine_P = column_P // share == group.rank
    local_P = row_P * share + column_P - group.rank * share
    return (
        dataclasses.replace(
            batch,
            tokens_BS=part(batch.tokens_BS, group, SEQUENCE),
            labels_BS=part(batch.labels_BS, group, SEQUENCE),
            text_mask_BS=part(batch.text_mask_BS, group, SEQUENCE),
            patch_target_P=local_P[mine_P],
            source_BS=None if batch.source_BS is None else part(batch.source_BS, group, SEQUENCE),
        ),
        mine_P,
    )


def _share_batch_hook(group: Group) -> Any:
    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, batch, *others = arguments
        mine, patches_P = share_of_batch(batch, group)
        if others and isinstance(others[0], torch.Tensor):
            # The teacher's features, one row per patch.
            others[0] = others[0][patches_P]
        return (x, mine, *others)

    return hook


def _exchange(x: torch.Tensor, group: Group, split: int, join: int) -> torch.Tensor:
    """Split along one dimension, concatenate along another; backward the other way round."""
    return conjugate(
        x,
        group,
        partial(_all_to_all, group=group, split=split, join=join),
        partial(_all_to_all, group=group, split=join, join=split),
    )


def _all_to_all(x: torch.Tensor, group: Group, split: int, join: int) -> torch.Tensor:
    sent = torch.stack(x.chunk(group.size, split))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.process_group)
    return torch.cat(received.unbind(), join)
