"""Mixed-mask attention on NVIDIA GPUs by FlashAttention's variable-length operator.

The operator computes many sequences in one call, each unmasked or bottom-right causal (the last query sees all keys,
the one before it one key less, and so on). Two plans compose the mixed mask from such calls. Both compute every pair of
a query and a key that it sees once, and no other pair:

* `flash`: one call for all text segments, each causal over its document's keys so far, and one for all images, each
  unmasked over the keys up to its end. Every query is in one call; keys are copied once per segment that sees them.
* `flash_merged`: one causal call over whole documents, where nothing is copied, and one for the pairs of an image's
  token and a later token of the same image. That strict upper triangle has queries 0..n-2 and keys 1..n-1, and is
  causal when both are reversed. Queries in images are in both calls; their results are merged by log-sum-exp.

The backward operator recomputes probabilities as exp(score - lse) and subtracts rowsum(dout * out), where `lse` and
`out` are those of the whole row. So both calls are given the *merged* output and log-sum-exp: with its own, each call
would give wrong gradients.

Shape letters beside those of `data/batch.py`: S queries and T keys of a sequence, N queries and U keys of the whole
micro-batch end to end, R queries and C keys of one call, A queries that see only themselves; H query heads, I for each
of G key/value heads, all of width K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_haplovl.kernels.flash_operators import Ragged, Saved, VarlenOperator, flash_operator
from megatron_haplovl.kernels.mask import MixedMask

_IntArray = npt.NDArray[np.int64]


def flash_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float, version: int = 2
) -> torch.Tensor:
    """Attention by one call for text segments and one for images; see `kernels.attention.attention`.

    `version` is that of FlashAttention; see :func:`flash_operators.flash_operator`.

    Raises:
        ValueError: no FlashAttention on this device.
    """
    return varlen_attention(q_BSHK, k_BTGK, v_BTGK, mask, scale, "segments", flash_operator(q_BSHK.device, version))


def flash_merged_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Attention by one causal call and one for the later tokens of each image; see `kernels.attention.attention`.

    Raises:
        ValueError: no FlashAttention on this device, or rows that do not see themselves.
    """
    return varlen_attention(q_BSHK, k_BTGK, v_BTGK, mask, scale, "merged", flash_operator(q_BSHK.device))


def varlen_attention(
    q_BSHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: MixedMask,
    scale: float,
    plan: str,
    operator: VarlenOperator,
) -> torch.Tensor:
    """Attention under the mixed mask by a variable-length operator; `plan` is `segments` or `merged`.

    Raises:
        ValueError: plan `merged`, and rows that do not see themselves.
    """
    assert q_BSHK.shape[:2] == mask.kv_start_BS.shape and k_BTGK.shape[1] == mask.num_keys, (q_BSHK.shape, k_BTGK.shape)
    device = q_BSHK.device
    ready = mask.derive(("flash", plan, device), lambda: _ready(_PLANS[plan](mask), mask, device))
    q_NHK, k_UGK, v_UGK = (
        # The operators take any strides but for the last dimension.
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (q_BSHK.flatten(0, 1), k_BTGK.flatten(0, 1), v_BTGK.flatten(0, 1))
    )
    out_NHK: torch.Tensor = _VarlenAttention.apply(q_NHK, k_UGK, v_UGK, ready, operator, scale)
    return out_NHK.unflatten(0, q_BSHK.shape[:2])


# --- Plans, on the host -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequences:
    """What one call computes: the queries and keys of each sequence, by their number in the micro-batch."""

    rows: list[_IntArray]
    keys: list[_IntArray]
    causal: bool
    merged: bool = False
    """Whether an earlier call has these queries, too."""


def _plan_segments(mask: MixedMask) -> list[_Sequences]:
    calls = []
    for kind in ("text", "image"):
        segments = [s for s in mask.segments if s.kind == kind]
        calls.append(
            _Sequences(
                [_rows(mask, s.sequence, s.start, s.end) for s in segments],
                [_keys(mask, s.sequence, s.key_start, s.key_end) for s in segments],
                causal=kind == "text",
            )
        )
    return [call for call in calls if call.rows]


def _plan_merged(mask: MixedMask) -> list[_Sequences]:
    """The causal part by documents, and the triangle above it by images.

    Raises:
        ValueError: a segment whose last row does not see exactly the keys up to itself.
    """
    documents = _Sequences([], [], causal=True)
    triangles = _Sequences([], [], causal=True, merged=True)
    first_position = mask.num_keys - mask.kv_start_BS.shape[1]
    last = (-1, -1)
    for s in mask.segments:
        if s.kind == "alone":
            continue
        if s.key_end != first_position + s.end:
            raise ValueError(
                f"backend flash_merged needs segments that see exactly the keys up to their own last token; rows "
                f"{s.start} to {s.end} of sequence {s.sequence} see those before {s.key_end}; use backend flash"
            )
        rows = _rows(mask, s.sequence, s.start, s.end)
        if (s.sequence, s.key_start) == last:
            documents.rows[-1] = np.concatenate([documents.rows[-1], rows])
            documents.keys[-1] = _keys(mask, s.sequence, s.key_start, s.key_end)
        else:
            documents.rows.append(rows)
            documents.keys.append(_keys(mask, s.sequence, s.key_start, s.key_end))
        last = (s.sequence, s.key_start)
        if s.kind == "image":
            triangles.rows.append(rows[-2::-1])
            triangles.keys.append(_keys(mask, s.sequence, s.key_end - len(rows) + 1, s.key_end)[::-1])
    return [call for call in (documents, triangles) if call.rows]


_PLANS: dict[str, Callable[[MixedMask], list[_Sequences]]] = {"segments": _plan_segments, "merged": _plan_merged}


def _rows(mask: MixedMask, sequence: int, start: int, end: int) -> _IntArray:
    return np.arange(start, end) + sequence * mask.kv_start_BS.shape[1]


def _keys(mask: MixedMask, sequence: int, start: int, end: int) -> _IntArray:
    return np.arange(start, end) + sequence * mask.num_keys


# --- Plans, on the device ---------------------------------------------------------------------------------------------


# Numbers of rows: a slice where they follow each other, so that nothing is copied; otherwise int64.
_Index = slice | torch.Tensor


@dataclass(frozen=True)
class _Call:
    rows: _Index
    keys: _Index
    ragged: Ragged
    merged: bool


@dataclass(frozen=True)
class _Bags:
    """Which rows of the calls' results, laid end to end, add up to each row of the whole."""

    sources: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True)
class _Plan:
    calls: tuple[_Call, ...]
    q_bags: _Bags | None
    """None if the calls' queries, end to end, are all queries in order."""
    k_bags: _Bags | None
    alone_rows: _Index | None
    """Queries that see only themselves (padding). In a call, each would take a tile and its scratch memory."""
    alone_keys: _Index | None


def _ready(calls: list[_Sequences], mask: MixedMask, device: torch.device) -> _Plan:
    """A plan's indices, on the device: built once per micro-batch, without waiting for the device."""
    batch, queries = mask.kv_start_BS.shape

    def move(array: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    def index(arrays: list[_IntArray]) -> _Index:
        joined = np.concatenate(arrays)
        first, end = int(joined[0]), int(joined[0]) + len(joined)
        return slice(first, end) if np.array_equal(joined, np.arange(first, end)) else move(joined)

    def bounds(arrays: list[_IntArray]) -> torch.Tensor:
        return move(np.cumsum([0, *map(len, arrays)]).astype(np.int32))

    def bags(arrays: list[_IntArray], total: int) -> _Bags | None:
        targets = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
        if np.array_equal(targets, np.arange(total)):
            return None
        offsets = np.append(0, np.bincount(targets, minlength=total).cumsum())
        return _Bags(move(np.argsort(targets, kind="stable")), move(offsets))

    alone = [s for s in mask.segments if s.kind == "alone"]
    return _Plan(
        tuple(
            _Call(
                index(call.rows),
                index(call.keys),
                Ragged(
                    bounds(call.rows),
                    bounds(call.keys),
                    max(map(len, call.rows)),
                    max(map(len, call.keys)),
                    call.causal,
                ),
                call.merged,
            )
            for call in calls
        ),
        bags([rows for call in calls for rows in call.rows], batch * queries),
        bags([keys for call in calls for keys in call.keys], batch * mask.num_keys),
        index([_rows(mask, s.sequence, s.start, s.end) for s in alone]) if alone else None,
        index([_keys(mask, s.sequence, s.key_start, s.key_end) for s in alone]) if alone else None,
    )


# --- The computation --------------------------------------------------------------------------------------------------


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NHK: torch.Tensor,
        k_UGK: torch.Tensor,
        v_UGK: torch.Tensor,
        plan: _Plan,
        operator: VarlenOperator,
        scale: float,
    ) -> torch.Tensor:
        heads = q_NHK.shape[1]
        out_NHK = q_NHK.new_empty(q_NHK.shape)
        lse_HN = q_NHK.new_empty((heads, len(q_NHK)), dtype=torch.promote_types(q_NHK.dtype, torch.float32))
        for call in plan.calls:
            k_CGK, v_CGK = _take(k_UGK, call.keys), _take(v_UGK, call.keys)
            out_RHK, lse_HR = operator.forward(_take(q_NHK, call.rows), k_CGK, v_CGK, call.ragged, scale)
            if call.merged:
                _merge(out_NHK, lse_HN, call.rows, out_RHK, lse_HR)
            elif isinstance(call.rows, slice) and len(out_RHK) == len(q_NHK):
                out_NHK, lse_HN = out_RHK, lse_HR
            else:
                _put(out_NHK, call.rows, out_RHK)
                _put(lse_HN, call.rows, lse_HR, dim=1)
        if plan.alone_rows is not None and plan.alone_keys is not None:
            v_AGK = _take(v_UGK, plan.alone_keys)
            _put(out_NHK, plan.alone_rows, v_AGK.repeat_interleave(heads // v_UGK.shape[1], dim=1))
        ctx.save_for_backward(q_NHK, k_UGK, v_UGK, out_NHK, lse_HN)
        ctx.plan, ctx.operator, ctx.scale = plan, operator, scale
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_NHK, k_UGK, v_UGK, out_NHK, lse_HN = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dout_NHK = grads[0].contiguous()
        results = []
        for call in plan.calls:
            saved = Saved(
                _take(q_NHK, call.rows),
                _take(k_UGK, call.keys),
                _take(v_UGK, call.keys),
                _take(out_NHK, call.rows),
                _take(lse_HN, call.rows, dim=1).contiguous(),
            )
            results.append(ctx.operator.backward(_take(dout_NHK, call.rows), saved, call.ragged, ctx.scale))
        dq_NHK = _add_up([dq for dq, _, _ in results], plan.q_bags, q_NHK)
        dk_UGK = _add_up([dk for _, dk, _ in results], plan.k_bags, k_UGK)
        dv_UGK = _add_up([dv for _, _, dv in results], plan.k_bags, v_UGK)
        if plan.alone_rows is not None and plan.alone_keys is not None:
            dout_AGIK = _take(dout_NHK, plan.alone_rows).unflatten(1, (v_UGK.shape[1], -1))
            _put(dv_UGK, plan.alone_keys, dout_AGIK.sum(dim=2))
        return dq_NHK, dk_UGK, dv_UGK, None, None, None


def _take(tensor: torch.Tensor, rows: _Index, dim: int = 0) -> torch.Tensor:
    if isinstance(rows, slice):
        return tensor.narrow(dim, rows.start, rows.stop - rows.start)
    return tensor.index_select(dim, rows)


def _put(tensor: torch.Tensor, rows: _Index, values: torch.Tensor, dim: int = 0) -> None:
    if isinstance(rows, slice):
        _take(tensor, rows, dim).copy_(values)
    else:
        tensor.index_copy_(dim, rows, values)


def _merge(
    out_NHK: torch.Tensor, lse_HN: torch.Tensor, rows: _Index, out_RHK: torch.Tensor, lse_HR: torch.Tensor
) -> None:
    """Add more keys to rows that have a result: out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i)."""
    before_RHK, before_HR = _take(out_NHK, rows), _take(lse_HN, rows, dim=1)
    share_RH1 = torch.sigmoid(lse_HR - before_HR).transpose(0, 1).unsqueeze(-1)
    merged_RHK = torch.lerp(before_RHK.to(share_RH1.dtype), out_RHK.to(share_RH1.dtype), share_RH1)
    _put(out_NHK, rows, merged_RHK.to(out_NHK.dtype))
    _put(lse_HN, rows, torch.logaddexp(before_HR, lse_HR), dim=1)


def _add_up(results: list[torch.Tensor], bags: _Bags | None, like: torch.Tensor) -> torch.Tensor:
    """The gradient of every row, from the gradients of its copies in the calls.

    An embedding bag is that sum: one kernel that adds in fp32, in a fixed order without atomics, and rounds once.
    `index_add_` would take an fp32 copy of everything that is added, and add it in any order.
    """
    if not results:
        return torch.zeros_like(like)
    joined = results[0] if len(results) == 1 else torch.cat(results)
    if bags is None:
        return joined
    added = F.embedding_bag(bags.sources, joined.flatten(1), bags.offsets, mode="sum", include_last_offset=True)
    return added.view(like.shape)
