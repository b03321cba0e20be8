"""Gradients of the segmented CPU attention, as batched matrix products over the planned rectangles.

The scores of a rectangle are computed again, a few heads at a time so that they stay in the core's cache. On small
rectangles that is faster than torch's backward operator, and in bf16 several times faster, because that operator leaves
the matrix units idle; on large ones the two are equal.

Shapes beside those of `data/batch.py`: G key/value heads, each read by N query heads; R rows and T keys of a rectangle;
X = R * N, the rows of all query heads that read one key/value head; C a chunk of key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_haplovl.kernels.attention_plan import Call, hidden_pairs
from megatron_haplovl.kernels.mask import MixedMask

# Bytes of scores that one core works on at a time, and that one matrix may hold before its rows are divided, too.
# Both were measured on cores with 2 MiB of cache each; half or twice as much makes little difference.
_SCORE_BYTES = 2**21
_MOST_SCORE_BYTES = 2**22


class _Hidden(NamedTuple):
    """The part of a rectangle where something is hidden: bool [X, columns], and where its columns stand."""

    first: int
    last: int
    flags_XT: torch.Tensor


def segmented_backward(
    dout_BSHK: torch.Tensor,
    q_BSHK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    out_BSHK: torch.Tensor,
    logsumexp_BHS: torch.Tensor,
    mask: MixedMask,
    calls: tuple[Call, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [B, S, H, K], dk and dv [B, T, G, K]) in the dtype of q; sums over rectangles in (at least) fp32.

    Keys and values come as [B, G, T, K], contiguous, because the matrix products are slow on rows that lie a power of
    two apart. Scores and their gradients are formed in (at least) fp32. The three products whose factors P and dS are
    rounded in any fused kernel run in the dtype of q.
    """
    dtype, wide = q_BSHK.dtype, logsumexp_BHS.dtype
    kv_heads = k_BGTK.shape[1]
    group = q_BSHK.shape[2] // kv_heads
    q_BGSNK, dout_BGSNK, out_BGSNK = (_by_kv_head(x, kv_heads) for x in (q_BSHK, dout_BSHK, out_BSHK))
    logsumexp_BGSN1 = _by_kv_head(logsumexp_BHS.transpose(1, 2).unsqueeze(-1), kv_heads)
    wide_k_BGTK, wide_v_BGTK = k_BGTK.to(wide), v_BGTK.to(wide)
    batch, _, keys, width = k_BGTK.shape
    dk_BTGK, dv_BTGK = (torch.zeros(batch, keys, kv_heads, width, dtype=wide) for _ in range(2))
    dk_BGTK, dv_BGTK = dk_BTGK.transpose(1, 2), dv_BTGK.transpose(1, 2)
    dq_BSHK = torch.empty_like(q_BSHK)
    dq_BGSNK = _by_kv_head(dq_BSHK, kv_heads)
    largest = _largest_block(calls, kv_heads, group)
    scores, dscores = (torch.empty(largest, dtype=wide) for _ in range(2))
    # Room for P, and then dS, in the dtype of the products.
    rounded = torch.empty(largest if dtype != wide else 0, dtype=dtype)

    for call in calls:
        b, key = call.sequence, slice(call.key_start, call.key_end)
        if call.kind == "alone":
            row = slice(call.row_start, call.row_end)
            dv_BGTK[b, :, key] = dout_BGSNK[b, :, row].sum(dim=2, dtype=wide)
            dq_BSHK[b, row] = 0.0
            continue
        hidden = _hidden(mask, call, group)
        for head, first, last in _blocks(call, kv_heads, group):
            q_CXK, dout_CXK, out_CXK, logsumexp_CX1 = (
                x_BGSNK[b, head, first:last].contiguous().flatten(1, 2)
                for x_BGSNK in (q_BGSNK, dout_BGSNK, out_BGSNK, logsumexp_BGSN1)
            )
            wide_dout_CXK = dout_CXK.to(wide)
            # The softmax's gradient needs rowsum(dP * P), which is rowsum(dout * out).
            delta_CX1 = (wide_dout_CXK * out_CXK).sum(dim=-1, keepdim=True)
            shape = (*q_CXK.shape[:2], call.key_end - call.key_start)
            size = shape[0] * shape[1] * shape[2]
            p_CXT, ds_CXT = scores[:size].view(shape), dscores[:size].view(shape)

            k_CKT, v_CKT = wide_k_BGTK[b, head, key].transpose(1, 2), wide_v_BGTK[b, head, key].transpose(1, 2)
            torch.baddbmm(p_CXT, q_CXK.to(wide), k_CKT, beta=0.0, alpha=scale, out=p_CXT)
            if hidden is not None:
                flags_XT = hidden.flags_XT[(first - call.row_start) * group : (last - call.row_start) * group]
                p_CXT[:, :, hidden.first : hidden.last].masked_fill_(flags_XT, float("-inf"))
            p_CXT.sub_(logsumexp_CX1).exp_()
            low_CXT = p_CXT if dtype == wide else rounded[:size].view(shape).copy_(p_CXT)
            dv_BGTK[b, head, key] += torch.bmm(low_CXT.transpose(1, 2), dout_CXK)
            torch.bmm(wide_dout_CXK, v_CKT, out=ds_CXT).sub_(delta_CX1).mul_(p_CXT)
            low_CXT = ds_CXT if dtype == wide else low_CXT.copy_(ds_CXT)
            dk_BGTK[b, head, key].add_(torch.bmm(low_CXT.transpose(1, 2), q_CXK), alpha=scale)
            dq_CXK = torch.bmm(low_CXT, k_BGTK[b, head, key])
            dq_BGSNK[b, head, first:last] = dq_CXK.mul_(scale).unflatten(1, (-1, group))
    return dq_BSHK, dk_BTGK.to(dtype), dv_BTGK.to(dtype)


def _by_kv_head(x_BSHK: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """View [B, S, G * N, K] as [B, G, S, N, K]."""
    return x_BSHK.unflatten(2, (kv_heads, -1)).transpose(1, 2)


def _hidden(mask: MixedMask, call: Call, group: int) -> _Hidden | None:
    """Where the mask cuts into a call's rectangle; None if it does not."""
    if call.kind == "full":
        return None

    def build() -> _Hidden:
        flags_RT = hidden_pairs(mask, call)
        columns = flags_RT.any(dim=0).nonzero().squeeze(1)
        first, last = int(columns[0]), int(columns[-1]) + 1
        return _Hidden(first, last, flags_RT[:, first:last].repeat_interleave(group, dim=0))

    return mask.derive(("hidden", call, group), build)


def _block_shape(call: Call, kv_heads: int, group: int) -> tuple[int, int]:
    """(key/value heads, rows) that are computed at a time."""
    bytes_per_row = 4 * group * (call.key_end - call.key_start)
    rows = min(call.row_end - call.row_start, max(1, _MOST_SCORE_BYTES // bytes_per_row))
    threads = torch.get_num_threads()
    return min(kv_heads, max(threads, threads * _SCORE_BYTES // (rows * bytes_per_row))), rows


def _blocks(call: Call, kv_heads: int, group: int) -> Iterator[tuple[slice, int, int]]:
    """(heads, first row, one past the last row) of every block of a call."""
    chunk, rows = _block_shape(call, kv_heads, group)
    for first in range(call.row_start, call.row_end, rows):
        for head in range(0, kv_heads, chunk):
            yield slice(head, min(head + chunk, kv_heads)), first, min(first + rows, call.row_end)


def _largest_block(calls: tuple[Call, ...], kv_heads: int, group: int) -> int:
    """Elements of the largest block's scores."""
    sizes = [0]
    for call in calls:
        if call.kind != "alone":
            chunk, rows = _block_shape(call, kv_heads, group)
            sizes.append(chunk * rows * group * (call.key_end - call.key_start))
    return max(sizes)
