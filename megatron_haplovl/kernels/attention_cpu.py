"""Mixed-mask attention on the CPU: torch's own flash-attention operators, called on the rectangles that matter.

The operators know dense, causal and additively masked rectangles and grouped-query attention. Each row of the output
comes from exactly one call, so nothing has to be merged; the gradients of keys and values are added up in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_haplovl.kernels.attention_plan import Call
from megatron_haplovl.kernels.mask import MixedMask

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Measured on one core: a call takes about 60 us forward and backward beside its arithmetic, which runs at some 90
# GFLOP/s in fp32 and, where it matters, not much faster in bf16. Forward and backward are 14 operations per pair and
# channel.
_CALL_SECONDS = 60e-6
_FLOPS_PER_SECOND = 90e9
_FLOPS_PER_PAIR = 14


def pairs_per_call(channels: int) -> float:
    """Pairs that could be computed in the time a call takes, for heads x head width channels."""
    return _CALL_SECONDS * _FLOPS_PER_SECOND / (_FLOPS_PER_PAIR * channels)


def cpu_segments_attention(
    q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Attention by one fused call per planned rectangle; see `kernels.attention.attention`."""
    calls = mask.calls(pairs_per_call(q_BSHK.shape[2] * q_BSHK.shape[3]))
    out: torch.Tensor = _SegmentedAttention.apply(q_BSHK, k_BSGK, v_BSGK, mask, calls, scale)
    return out


class _SegmentedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHK: torch.Tensor,
        k_BSGK: torch.Tensor,
        v_BSGK: torch.Tensor,
        mask: MixedMask,
        calls: tuple[Call, ...],
        scale: float,
    ) -> torch.Tensor:
        group = q_BSHK.shape[2] // k_BSGK.shape[2]
        out_BSHK = torch.empty_like(q_BSHK)
        logsumexps = []
        for call in calls:
            rows = (slice(call.sequence, call.sequence + 1), slice(call.row_start, call.row_end))
            keys = (slice(call.sequence, call.sequence + 1), slice(call.key_start, call.key_end))
            if call.kind == "alone":
                out_BSHK[rows] = v_BSGK[rows].repeat_interleave(group, dim=2)
                continue
            out, logsumexp = _forward(
                q_BSHK[rows].transpose(1, 2),
                k_BSGK[keys].transpose(1, 2),
                v_BSGK[keys].transpose(1, 2),
                0.0,
                call.kind == "causal",
                attn_mask=mask.additive(call, q_BSHK.dtype),
                scale=scale,
            )
            out_BSHK[rows] = out.transpose(1, 2)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(q_BSHK, k_BSGK, v_BSGK, out_BSHK, *logsumexps)
        ctx.mask, ctx.calls, ctx.scale = mask, calls, scale
        return out_BSHK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        dtype, kv_shape = saved[0].dtype, saved[1].shape
        # In bf16 the backward operator is several times slower than in fp32, so it runs in (at least) fp32.
        wide = torch.promote_types(dtype, torch.float32)
        q_BSHK, k_BSGK, v_BSGK, out_BSHK = (tensor.to(wide) for tensor in saved[:4])
        dout_BSHK = grads[0].to(wide)
        logsumexps = iter(saved[4:])
        dq_BSHK = torch.zeros_like(q_BSHK)
        dk_BSGK, dv_BSGK = torch.zeros_like(k_BSGK), torch.zeros_like(v_BSGK)
        for call in ctx.calls:
            rows = (slice(call.sequence, call.sequence + 1), slice(call.row_start, call.row_end))
            keys = (slice(call.sequence, call.sequence + 1), slice(call.key_start, call.key_end))
            if call.kind == "alone":
                dv_BSGK[rows] = dout_BSHK[rows].unflatten(2, (kv_shape[2], -1)).sum(dim=3)
                continue
            dq, dk, dv = _backward(
                dout_BSHK[rows].transpose(1, 2),
                q_BSHK[rows].transpose(1, 2),
                k_BSGK[keys].transpose(1, 2),
                v_BSGK[keys].transpose(1, 2),
                out_BSHK[rows].transpose(1, 2),
                next(logsumexps),
                0.0,
                call.kind == "causal",
                attn_mask=ctx.mask.additive(call, wide),
                scale=ctx.scale,
            )
            dq_BSHK[rows] = dq.transpose(1, 2)
            dk_BSGK[keys] += dk.transpose(1, 2)
            dv_BSGK[keys] += dv.transpose(1, 2)
        return dq_BSHK.to(dtype), dk_BSGK.to(dtype), dv_BSGK.to(dtype), None, None, None
