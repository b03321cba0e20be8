"""FlashAttention's variable-length operators behind one contract, and the choice among those that a machine has.

Shape letters: R queries and C keys of one call, its sequences end to end; M bounds, one more than sequences; H query
heads and G key/value heads of width K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_haplovl.kernels import capabilities

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Ragged:
    """The sequences of one call: sequence n has queries `[q_bounds[n], q_bounds[n + 1])`, and keys likewise."""

    q_bounds_M: Tensor
    """int32, from 0 to R."""
    k_bounds_M: Tensor
    """int32, from 0 to C. No sequence is empty or has fewer keys than queries."""
    longest_q: int
    longest_k: int
    causal: bool
    """The last query of a sequence sees all its keys, the one before it one key less, and so on; else all see all."""


class Saved(NamedTuple):
    """What a backward call needs of its queries and keys."""

    q_RHK: Tensor
    k_CGK: Tensor
    v_CGK: Tensor
    out_RHK: Tensor
    lse_HR: Tensor


@dataclass(frozen=True)
class VarlenOperator:
    """A variable-length attention operator without autograd; query head h reads key/value head h // (H / G)."""

    name: str
    largest_head: int
    """Largest head width K. All widths are multiples of 8."""
    forward: Callable[[Tensor, Tensor, Tensor, Ragged, float], tuple[Tensor, Tensor]]
    """(q_RHK, k_CGK, v_CGK, ragged, scale) -> out_RHK and, in fp32, lse_HR = log sum exp(scale * score)."""
    backward: Callable[[Tensor, Saved, Ragged, float], Gradients]
    """(dout_RHK, saved, ragged, scale) -> dq_RHK, dk_CGK, dv_CGK. `out` and `lse` are used as given: the probabilities
    are exp(score - lse), and rowsum(dout * out) is subtracted from their gradients. So `out` and `lse` may belong to
    rows that see more keys than the call has."""


@cache
def flash_operator(device: torch.device, version: int = 2) -> VarlenOperator:
    """The operator of a GPU, chosen at the first call.

    Args:
        device: the GPU.
        version: FlashAttention's. 2 is the one in torch, or what `torch.nn.attention.activate_flash_attention_impl`
            put in its place; if torch has none, the flash-attn package. 3 (Hopper) and 4 (Hopper and Blackwell) are
            packages of their own, and are taken only if asked for.

    Raises:
        ValueError: not an NVIDIA GPU, one that is too old, or no such FlashAttention.
    """
    choice = _choice(device, version)
    if isinstance(choice, str):
        raise ValueError(f"no FlashAttention-{version}: {choice}")
    return choice()


def flash_unavailable(device: torch.device, dtype: torch.dtype, head_width: int, version: int = 2) -> str | None:
    """Why FlashAttention does not compute this; None if it does."""
    choice = _choice(device, version)
    if isinstance(choice, str):
        return choice
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16, not in {dtype}"
    operator = flash_operator(device, version)
    if head_width % 8 != 0 or head_width > operator.largest_head:
        return (
            f"{operator.name} has head widths that are multiples of 8 up to {operator.largest_head}, not {head_width}"
        )
    return None


def _choice(device: torch.device, version: int) -> Callable[[], VarlenOperator] | str:
    """What makes the operator of a device, or why there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs, not on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0, {device} has {major}.{minor}"
    if version == 3:
        if major != 9:
            return f"needs compute capability 9, {device} has {major}.{minor}"
        return flash_attention_3 if capabilities.has_flash_attention_3() else "FlashAttention-3 is not installed"
    if version == 4:
        if major not in (9, 10):
            return f"needs compute capability 9 or 10, {device} has {major}.{minor}"
        return flash_attention_4 if capabilities.has_flash_attention_4() else "flash-attn-4 is not installed"
    if torch.backends.cuda.is_flash_attention_available():
        return torch_flash_attention
    if capabilities.has_flash_attention_2():
        return flash_attention_2
    return "torch was built without it, and the flash-attn package is not installed"


def torch_flash_attention() -> VarlenOperator:
    """The operators behind `torch.nn.attention.varlen`, whose autograd knows no merged log-sum-exp."""

    def forward(q_RHK: Tensor, k_CGK: Tensor, v_CGK: Tensor, ragged: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        out_RHK, lse_HR, _, _, _ = torch.ops.aten._flash_attention_forward(
            q_RHK,
            k_CGK,
            v_CGK,
            ragged.q_bounds_M,
            ragged.k_bounds_M,
            ragged.longest_q,
            ragged.longest_k,
            0.0,  # dropout_p
            ragged.causal,
            False,  # return_debug_mask
            scale=scale,
        )
        # Old versions pad it to [N, H, longest_q].
        assert lse_HR.shape == (q_RHK.shape[1], q_RHK.shape[0]), lse_HR.shape
        return out_RHK, lse_HR

    def backward(dout_RHK: Tensor, saved: Saved, ragged: Ragged, scale: float) -> Gradients:
        dq_RHK, dk_CGK, dv_CGK = torch.ops.aten._flash_attention_backward(
            dout_RHK,
            *saved,
            ragged.q_bounds_M,
            ragged.k_bounds_M,
            ragged.longest_q,
            ragged.longest_k,
            0.0,  # dropout_p
            ragged.causal,
            torch.empty(2, dtype=torch.uint64, device=dout_RHK.device),  # rng_state, read for dropout only
            torch.empty(0, device=dout_RHK.device),  # unused
            scale=scale,
        )
        return dq_RHK, dk_CGK, dv_CGK

    activated = torch.nn.attention.current_flash_attention_impl()
    return VarlenOperator(f"torch {activated or 'FA2'}", 128 if activated == "FA4" else 256, forward, backward)


def flash_attention_2() -> VarlenOperator:
    """The flash-attn package."""
    package = import_module("flash_attn.flash_attn_interface")

    def forward(q_RHK: Tensor, k_CGK: Tensor, v_CGK: Tensor, ragged: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        out_RHK, lse_HR, _, _ = package._flash_attn_varlen_forward(
            q_RHK, k_CGK, v_CGK, **_bounds(ragged), dropout_p=0.0, softmax_scale=scale, causal=ragged.causal
        )
        return out_RHK, lse_HR

    def backward(dout_RHK: Tensor, saved: Saved, ragged: Ragged, scale: float) -> Gradients:
        grads = _empty_gradients(saved)
        package._flash_attn_varlen_backward(
            dout_RHK,
            *saved,
            *grads,
            **_bounds(ragged),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=ragged.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    return VarlenOperator("flash-attn FA2", 256, forward, backward)


def flash_attention_3() -> VarlenOperator:
    """FlashAttention-3, by the torch operators that its package registers."""
    import_module("flash_attn_interface")
    operators = torch.ops.flash_attn_3

    def forward(q_RHK: Tensor, k_CGK: Tensor, v_CGK: Tensor, ragged: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        out_RHK, lse_HR, _, _ = operators.fwd(
            q_RHK, k_CGK, v_CGK, **_bounds(ragged), softmax_scale=scale, is_causal=ragged.causal, num_splits=1
        )
        return out_RHK, lse_HR

    def backward(dout_RHK: Tensor, saved: Saved, ragged: Ragged, scale: float) -> Gradients:
        grads = _empty_gradients(saved)
        operators.bwd(
            dout_RHK,
            *saved,
            *grads,
            **_bounds(ragged),
            softmax_scale=scale,
            is_causal=ragged.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    return VarlenOperator("FA3", 256, forward, backward)


def flash_attention_4() -> VarlenOperator:
    """FlashAttention-4, the package flash-attn-4."""
    package = import_module("flash_attn.cute.interface")

    def forward(q_RHK: Tensor, k_CGK: Tensor, v_CGK: Tensor, ragged: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        # Newer versions return more behind these two.
        out_RHK, lse_HR, *_ = package._flash_attn_fwd(
            q_RHK, k_CGK, v_CGK, **_bounds(ragged), softmax_scale=scale, causal=ragged.causal, return_lse=True
        )
        return out_RHK, lse_HR

    def backward(dout_RHK: Tensor, saved: Saved, ragged: Ragged, scale: float) -> Gradients:
        dq_RHK, dk_CGK, dv_CGK = package._flash_attn_bwd(
            saved.q_RHK,
            saved.k_CGK,
            saved.v_CGK,
            saved.out_RHK,
            dout_RHK,
            saved.lse_HR,
            **_bounds(ragged),
            softmax_scale=scale,
            causal=ragged.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq_RHK, dk_CGK, dv_CGK

    return VarlenOperator("FA4", 128, forward, backward)


def _bounds(ragged: Ragged) -> dict[str, Tensor | int]:
    """The bounds, under the names that all packages use."""
    return {
        "cu_seqlens_q": ragged.q_bounds_M,
        "cu_seqlens_k": ragged.k_bounds_M,
        "max_seqlen_q": ragged.longest_q,
        "max_seqlen_k": ragged.longest_k,
    }


def _empty_gradients(saved: Saved) -> Gradients:
    return torch.empty_like(saved.q_RHK), torch.empty_like(saved.k_CGK), torch.empty_like(saved.v_CGK)
