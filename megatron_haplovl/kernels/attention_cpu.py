"""Mixed-mask attention on the CPU: torch's own flash-attention operator, called on the rectangles that matter.

The operator knows dense, causal and additively masked rectangles and grouped-query attention. Each row of the output
comes from exactly one call, so nothing has to be merged. The gradients are in `kernels/attention_cpu_backward.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_haplovl.kernels.attention_cpu_backward import segmented_backward
from megatron_haplovl.kernels.attention_plan import Call, hidden_pairs, plan_calls
from megatron_haplovl.kernels.mask import MixedMask

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Measured on one core by timing plans from one call per segment to one call for everything: a call takes about 150 us
# (bf16: 250) forward and backward beside its arithmetic, which runs at some 70 GFLOP/s (bf16: 90). Around the best plan
# the time is flat. Forward and backward are 14 operations per pair and channel.
_CALL_SECONDS = 150e-6
_FLOPS_PER_SECOND = 70e9
_FLOPS_PER_PAIR = 14


def pairs_per_call(channels: int) -> float:
    """Pairs that could be computed in the time of a call's overhead; `channels` is heads x head width."""
    return _CALL_SECONDS * _FLOPS_PER_SECOND * torch.get_num_threads() / (_FLOPS_PER_PAIR * channels)


def cpu_segments_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Attention by one fused call per planned rectangle; see `kernels.attention.attention`."""
    # The operator takes any strides, but the channels must be contiguous.
    q_BSHK = q_BSHK if q_BSHK.stride(-1) == 1 else q_BSHK.contiguous()
    overhead = pairs_per_call(q_BSHK.shape[2] * q_BSHK.shape[3])
    calls = mask.derive(("cpu_segments", overhead), lambda: plan_calls(mask, overhead))
    out: torch.Tensor = _SegmentedAttention.apply(q_BSHK, k_BTGK, v_BTGK, mask, calls, scale)
    return out


def _additive(mask: MixedMask, call: Call, dtype: torch.dtype) -> torch.Tensor | None:
    """Mask `[1, 1, rows, keys]` of a call of kind "masked": 0 where visible, -inf elsewhere; else None."""
    if call.kind != "masked":
        return None

    def build() -> torch.Tensor:
        hidden = hidden_pairs(mask, call)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]

    return mask.derive((call, dtype), build)


class _SegmentedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        mask: MixedMask,
        calls: tuple[Call, ...],
        scale: float,
    ) -> torch.Tensor:
        batch, rows, heads, _ = q_BSHK.shape
        out_BSHK = torch.empty_like(q_BSHK)
        wide = torch.promote_types(q_BSHK.dtype, torch.float32)
        logsumexp_BHS = torch.empty(batch, heads, rows, dtype=wide)
        # The keys of one head lie side by side, because the operator is slow on rows that lie a power of two apart.
        k_BGTK, v_BGTK = (x_BTGK.transpose(1, 2).contiguous() for x_BTGK in (k_BTGK, v_BTGK))
        for call in calls:
            b, row, key = call.sequence, slice(call.row_start, call.row_end), slice(call.key_start, call.key_end)
            if call.kind == "alone":
                out_BSHK[b, row] = v_BTGK[b, key].repeat_interleave(heads // v_BTGK.shape[2], dim=1)
                continue
            out_1HRK, logsumexp_1HR = _forward(
                q_BSHK[b : b + 1, row].transpose(1, 2),
                k_BGTK[b : b + 1, :, key],
                v_BGTK[b : b + 1, :, key],
                0.0,
                call.kind == "causal",
                attn_mask=_additive(mask, call, q_BSHK.dtype),
                scale=scale,
            )
            out_BSHK[b, row] = out_1HRK[0].transpose(0, 1)
            logsumexp_BHS[b, :, row] = logsumexp_1HR[0]
        ctx.save_for_backward(q_BSHK, k_BGTK, v_BGTK, out_BSHK, logsumexp_BHS)
        ctx.mask, ctx.calls, ctx.scale = mask, calls, scale
        return out_BSHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BSHK, k_BGTK, v_BGTK, out_BSHK, logsumexp_BHS = ctx.saved_tensors
        dq_BSHK, dk_BTGK, dv_BTGK = segmented_backward(
            grads[0], q_BSHK, k_BGTK, v_BGTK, out_BSHK, logsumexp_BHS, ctx.mask, ctx.calls, ctx.scale
        )
        return dq_BSHK, dk_BTGK, dv_BTGK, None, None, None
