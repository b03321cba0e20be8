"""One entry to attention under the mixed mask; the backend is chosen by name.

Every backend computes softmax(scale * q k^T + mask) v with grouped-query attention: query head h reads key/value head
h // (heads / kv_heads). Shapes as in `data/batch.py`, with H query heads, G key/value heads of width K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_haplovl.kernels.attention_cpu import cpu_segments_attention
from megatron_haplovl.kernels.mask import MixedMask


def reference_attention(
    q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Dense softmax attention in (at least) fp32: the oracle that every other backend is compared with."""
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    group = q_BSHK.shape[2] // k_BSGK.shape[2]
    k_BSHK = k_BSGK.to(wide).repeat_interleave(group, dim=2)
    v_BSHK = v_BSGK.to(wide).repeat_interleave(group, dim=2)
    scores_BHSS = torch.einsum("bqhk,bshk->bhqs", q_BSHK.to(wide), k_BSHK) * scale
    scores_BHSS = scores_BHSS.masked_fill(~mask.dense_BSS.unsqueeze(1), float("-inf"))
    out_BSHK = torch.einsum("bhqs,bshk->bqhk", scores_BHSS.softmax(dim=-1), v_BSHK)
    return out_BSHK.to(q_BSHK.dtype)


def sdpa_attention(
    q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention with the dense mask."""
    group = q_BSHK.shape[2] // k_BSGK.shape[2]
    # `enable_gqa` leaves the fused CPU kernel for the unfused one, so the key/value heads are repeated here.
    q_BHSK, k_BHSK, v_BHSK = (
        q_BSHK.transpose(1, 2),
        k_BSGK.repeat_interleave(group, dim=2).transpose(1, 2),
        v_BSGK.repeat_interleave(group, dim=2).transpose(1, 2),
    )
    out_BHSK = F.scaled_dot_product_attention(
        q_BHSK, k_BHSK, v_BHSK, attn_mask=mask.dense_BSS.unsqueeze(1), scale=scale
    )
    return out_BHSK.transpose(1, 2)


_BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "reference": reference_attention,
    "cpu_segments": cpu_segments_attention,
    "sdpa": sdpa_attention,
}


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that `auto` stands for on a device; any other name is checked and stays as it is.

    Raises:
        ValueError: an unknown name, or a backend that does not run on this device.
    """
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        return "cpu_segments" if on_cpu else "sdpa"
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose from {sorted(_BACKENDS)} or auto")
    if name == "cpu_segments" and not on_cpu:
        raise ValueError(f"attention backend cpu_segments runs on a CPU, not on {device}; use auto")
    return name


def attention(
    q_BSHK: torch.Tensor,
    k_BSGK: torch.Tensor,
    v_BSGK: torch.Tensor,
    mask: MixedMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention under the mixed mask (paper Sec. 3.1).

    Args:
        q_BSHK: queries, H heads.
        k_BSGK: keys, G heads; G divides H.
        v_BSGK: values, G heads.
        mask: which keys each query sees.
        scale: factor on the scores; default 1 / sqrt(K).
        backend: a name of :func:`resolve_backend`.

    Returns:
        [B, S, H, K] in the dtype of the queries.
    """
    if scale is None:
        scale = q_BSHK.shape[-1] ** -0.5
    return _BACKENDS[resolve_backend(backend, q_BSHK.device)](q_BSHK, k_BSGK, v_BSGK, mask, scale)
