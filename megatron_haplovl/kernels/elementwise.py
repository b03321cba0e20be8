"""The blocks' elementwise operations, with fewer passes over memory and fewer saved tensors than plain ones need.

A training step spends little arithmetic here and much memory traffic: composed of plain operations, RoPE makes five
temporaries, quick-GELU saves two tensors of the MLP's width and SwiGLU three, and torch's RMSNorm on a CPU a normalised
copy. Each function here saves its inputs only. `benchmarks/elementwise.py` compares the two forms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_QUICK_GELU = 1.702
_silu_backward = torch.ops.aten.silu_backward


def rotate(x_BSHK: torch.Tensor, cos_BS1K: torch.Tensor, sin_BS1K: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin, the rotary embedding in the half-split convention."""
    out: torch.Tensor = _Rotate.apply(x_BSHK, cos_BS1K, sin_BS1K)
    return out


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI CLIP's approximation x * sigmoid(1.702 x) of GELU."""
    out: torch.Tensor = _QuickGELU.apply(x)
    return out


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the middle of SwiGLU."""
    out: torch.Tensor = _SiluProduct.apply(gate, up)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    On a GPU these are torch's own kernels, which are fused forward and backward; on a CPU torch has no fused form.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Both halves of the tables hold the same angles, so the gradient is turned back by them.
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * _QUICK_GELU).div_(_QUICK_GELU)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return _silu_backward(grads[0], x * _QUICK_GELU)


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return _silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_x, wide_grad = x.to(wide), grads[0].to(wide)
        mean_square = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(ctx.eps).rsqrt_()
        normal = wide_x * inverse
        dweight = (wide_grad * normal).flatten(0, -2).sum(dim=0)
        dnormal = wide_grad * weight
        # The norm itself removes the part of the gradient along x.
        along = torch.linalg.vecdot(dnormal, normal).unsqueeze(-1).div_(x.shape[-1])
        dx = dnormal.sub_(normal.mul_(along)).mul_(inverse)
        return dx.to(x.dtype), dweight.to(weight.dtype), None
