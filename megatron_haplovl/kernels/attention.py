"""One entry to attention under the mixed mask; the backend is chosen by name.

Every backend computes softmax(scale * q k^T + mask) v with grouped-query attention: query head h reads key/value head
h // (heads / kv_heads). Shapes as in `data/batch.py`, with H query heads, G key/value heads of width K, S queries and T
keys; T equals S except in decoding, where a chunk of queries meets a cache of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F

from megatron_haplovl.kernels.attention_cpu import cpu_segments_attention
from megatron_haplovl.kernels.capabilities import has_flex, has_triton
from megatron_haplovl.kernels.flash_operators import flash_operator, flash_unavailable
from megatron_haplovl.kernels.mask import MixedMask

BACKENDS = ("reference", "cpu_segments", "flash", "flash3", "flash4", "flash_merged", "triton", "flex", "sdpa")
"""Names that `--attention-backend` takes, beside auto."""

_GPU_ORDER = ("flash", "triton", "flex", "sdpa")
_FLASH_VERSIONS = {"flash": 2, "flash3": 3, "flash4": 4, "flash_merged": 2}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    q_BSHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: MixedMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention under the mixed mask (paper Sec. 3.1).

    Args:
        q_BSHK: queries, H heads.
        k_BTGK: keys, G heads; G divides H.
        v_BTGK: values, G heads.
        mask: which keys each query sees.
        scale: factor on the scores; default 1 / sqrt(K).
        backend: a name of :data:`BACKENDS`, or auto.

    Returns:
        [B, S, H, K] in the dtype of the queries.

    Raises:
        ValueError: the backend does not run on this device, with this dtype or head width; or the shapes contradict the
            mask or each other.
    """
    _check_shapes(q_BSHK, k_BTGK, v_BTGK, mask)
    if scale is None:
        scale = q_BSHK.shape[-1] ** -0.5
    name = resolve_backend(backend, q_BSHK.device, q_BSHK.dtype, q_BSHK.shape[-1])
    return _implementation(name)(q_BSHK, k_BTGK, v_BTGK, mask, scale)


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_width: int) -> str:
    """The backend that `auto` stands for; any other name is checked and stays as it is.

    `auto` is cpu_segments on a CPU; on a GPU the first of flash, triton, flex and sdpa that runs there.

    Raises:
        ValueError: an unknown name, or a backend that does not run on this device, with this dtype or head width.
    """
    device = torch.device(device)
    if name == "auto":
        if device.type == "cpu":
            return "cpu_segments"
        return next(choice for choice in _GPU_ORDER if _unavailable(choice, device, dtype, head_width) is None)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose from {', '.join(BACKENDS)} or auto")
    reason = _unavailable(name, device, dtype, head_width)
    if reason is not None:
        raise ValueError(f"attention backend {name}: {reason}; use auto")
    return name


def describe_backend(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """A text for the log: what a resolved backend runs on, and why those that `auto` tries before it do not run."""
    detail = f" ({flash_operator(device, _FLASH_VERSIONS[name]).name})" if name in _FLASH_VERSIONS else ""
    reasons = []
    if device.type == "cuda" and name in _GPU_ORDER:
        for choice in _GPU_ORDER[: _GPU_ORDER.index(name)]:
            reason = _unavailable(choice, device, dtype, head_width)
            reasons += [] if reason is None else [f"{choice}: {reason}"]
    return name + detail + (f" [{'; '.join(reasons)}]" if reasons else "")


def reference_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Dense softmax attention in (at least) fp32: the oracle that every other backend is compared with."""
    weights_BHST = attention_probabilities(q_BSHK, k_BTGK, mask, scale)
    v_BTHK = v_BTGK.to(weights_BHST.dtype).repeat_interleave(q_BSHK.shape[2] // v_BTGK.shape[2], dim=2)
    with torch.autocast(q_BSHK.device.type, enabled=False):
        return torch.einsum("bhst,bthk->bshk", weights_BHST, v_BTHK).to(q_BSHK.dtype)


def attention_probabilities(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, mask: MixedMask, scale: float | None = None
) -> torch.Tensor:
    """Attention weights, [B, H, S, T], in (at least) fp32: the reference needs them, and a user may look at them."""
    if scale is None:
        scale = q_BSHK.shape[-1] ** -0.5
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    k_BTHK = k_BTGK.to(wide).repeat_interleave(q_BSHK.shape[2] // k_BTGK.shape[2], dim=2)
    with torch.autocast(q_BSHK.device.type, enabled=False):
        scores_BHST = torch.einsum("bshk,bthk->bhst", q_BSHK.to(wide), k_BTHK) * scale
    return scores_BHST.masked_fill(~mask.dense(q_BSHK.device).unsqueeze(1), float("-inf")).softmax(dim=-1)


def sdpa_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention with the dense mask."""
    group = q_BSHK.shape[2] // k_BTGK.shape[2]
    # With `enable_gqa` torch takes the unfused kernel, so the key/value heads are repeated here instead.
    q_BHSK, k_BHTK, v_BHTK = (
        q_BSHK.transpose(1, 2),
        k_BTGK.repeat_interleave(group, dim=2).transpose(1, 2),
        v_BTGK.repeat_interleave(group, dim=2).transpose(1, 2),
    )
    visible_B1ST = mask.dense(q_BSHK.device).unsqueeze(1)
    return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=visible_B1ST, scale=scale).transpose(1, 2)


@cache
def _implementation(name: str) -> Callable[..., torch.Tensor]:
    """The function behind a name. Triton and FlexAttention are imported at their first use, and may be absent."""
    if name == "triton":
        from megatron_haplovl.kernels.attention_triton import triton_attention

        return triton_attention
    if name == "flex":
        from megatron_haplovl.kernels.attention_flex import flex_attention

        return flex_attention
    if name.startswith("flash"):
        from megatron_haplovl.kernels.attention_flash import flash_attention, flash_merged_attention

        if name == "flash_merged":
            return flash_merged_attention
        return partial(flash_attention, version=_FLASH_VERSIONS[name])
    return {"reference": reference_attention, "cpu_segments": cpu_segments_attention, "sdpa": sdpa_attention}[name]


@cache
def _unavailable(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a backend does not run here; None if it does."""
    if name in ("reference", "sdpa"):
        return None
    if name == "cpu_segments":
        return None if device.type == "cpu" else f"runs on a CPU, not on {device}"
    if name == "flex" and device.type == "cpu":
        return "has no backward on a CPU"
    if device.type != "cuda":
        return f"runs on a GPU, not on {device}"
    if name == "triton":
        if not has_triton():
            return "the triton package is not installed"
        from megatron_haplovl.kernels.attention_triton import triton_unavailable

        return triton_unavailable(device, dtype, head_width)
    if name == "flex":
        if not has_flex():
            return "FlexAttention needs the triton package, which is not installed"
        return None if head_width >= 16 else f"takes head widths of 16 and more, not {head_width}"
    return flash_unavailable(device, dtype, head_width, _FLASH_VERSIONS[name])


def _check_shapes(q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask) -> None:
    rows = tuple(mask.kv_start_BS.shape)
    keys = (q_BSHK.shape[0], mask.num_keys, k_BTGK.shape[2], q_BSHK.shape[3])
    if tuple(q_BSHK.shape[:2]) != rows or tuple(k_BTGK.shape) != keys or tuple(v_BTGK.shape) != keys:
        raise ValueError(
            f"a mask of {rows} queries over {mask.num_keys} keys does not fit q {tuple(q_BSHK.shape)}, "
            f"k {tuple(k_BTGK.shape)} and v {tuple(v_BTGK.shape)}"
        )
    if q_BSHK.shape[2] % k_BTGK.shape[2]:
        raise ValueError(f"{q_BSHK.shape[2]} query heads are not a multiple of {k_BTGK.shape[2]} key/value heads")
