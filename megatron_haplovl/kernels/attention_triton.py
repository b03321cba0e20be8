"""Mixed-mask attention by our own Triton kernels: only the tiles that the mask touches, on a GPU.

Imports triton, so it is imported only where `kernels.capabilities.has_triton` says yes. With TRITON_INTERPRET=1 in the
environment before anything imports triton, the same kernels run on a CPU, slowly: that is for tests.

Triton times the tile sizes at the first call with a head width, a dtype and a class of sequence length, and keeps the
choice in its cache on disk. One choice gives the same bits every time, two choices do not: runs that must repeat each
other bit for bit share a TRITON_CACHE_DIR.

Shape letters beside those of `data/batch.py`: T keys of a sequence, P parts of a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from megatron_haplovl.kernels import attention_triton_kernels as kernels
from megatron_haplovl.kernels.mask import MixedMask


def triton_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Attention by Triton kernels; see `kernels.attention.attention`.

    The tensors may be views of any strides if their channels are contiguous (others are copied). Under autocast they
    are cast to its dtype. There may be more keys than queries: one chunk of a prefill, or one decoding step.

    Raises:
        ValueError: a device, dtype or head width that :func:`triton_unavailable` names, tensors of several dtypes, or a
            scale that is not positive.
    """
    if torch.is_autocast_enabled(q_BSHK.device.type):
        dtype = torch.get_autocast_dtype(q_BSHK.device.type)
        q_BSHK, k_BTGK, v_BTGK = q_BSHK.to(dtype), k_BTGK.to(dtype), v_BTGK.to(dtype)
    _check(q_BSHK, k_BTGK, v_BTGK, scale)
    out: torch.Tensor = _TritonAttention.apply(
        _channels_last(q_BSHK), _channels_last(k_BTGK), _channels_last(v_BTGK), mask, scale
    )
    return out


def triton_unavailable(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why the kernels do not run there; None if they do."""
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"runs on a GPU, not on {device}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"computes in bf16, fp16 or fp32, not in {dtype}"
    if head_width % 16 or head_width > 256:
        return f"takes head widths that are multiples of 16 up to 256, not {head_width}"
    return None


def _check(q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, scale: float) -> None:
    reason = triton_unavailable(q_BSHK.device, q_BSHK.dtype, q_BSHK.shape[3])
    if reason is not None:
        raise ValueError(f"attention backend triton: {reason}; use another backend, or auto")
    if not q_BSHK.dtype == k_BTGK.dtype == v_BTGK.dtype:
        raise ValueError(f"q, k and v have several dtypes: {q_BSHK.dtype}, {k_BTGK.dtype} and {v_BTGK.dtype}")
    if scale <= 0:
        raise ValueError(f"attention backend triton: the scale must be positive, not {scale}")


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
    ) -> torch.Tensor:
        batch, num_queries, heads, head = q_BSHK.shape
        out_BSHK = q_BSHK.new_empty(q_BSHK.shape)
        logsumexp_BHS = q_BSHK.new_empty((batch, heads, num_queries), dtype=torch.float32)
        with torch.cuda.device_of(q_BSHK):
            _forward[_grid(batch * heads, num_queries, "BLOCK_M")](
                q_BSHK,
                k_BTGK,
                v_BTGK,
                out_BSHK,
                logsumexp_BHS,
                *_intervals(mask, q_BSHK.device),
                *_strides(q_BSHK, k_BTGK, v_BTGK, out_BSHK),
                heads,
                heads // k_BTGK.shape[2],
                num_queries,
                mask.num_keys,
                _length_class(num_queries),
                scale * math.log2(math.e),
                **_head_sizes(head),
            )
        ctx.save_for_backward(q_BSHK, k_BTGK, v_BTGK, out_BSHK, logsumexp_BHS)
        ctx.mask, ctx.scale = mask, scale
        return out_BSHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BSHK, k_BTGK, v_BTGK, out_BSHK, logsumexp_BHS = ctx.saved_tensors
        mask, scale = ctx.mask, ctx.scale
        dout_BSHK = _channels_last(grads[0])
        batch, num_queries, heads, head = q_BSHK.shape
        kv_heads, num_keys = k_BTGK.shape[2], mask.num_keys
        group = heads // kv_heads
        sizes = (num_queries, num_keys, _length_class(num_queries), scale, scale * math.log2(math.e))
        dq_BSHK, delta_BHS = torch.empty_like(out_BSHK), torch.empty_like(logsumexp_BHS)
        parts = _parts(batch * kv_heads, num_keys, group, q_BSHK.device)
        # Several parts are kept in fp32 until they are added up, in a fixed order.
        kind = torch.float32 if parts > 1 else k_BTGK.dtype
        dk_PBTGK, dv_PBTGK = (k_BTGK.new_empty((parts, *k_BTGK.shape), dtype=kind) for _ in range(2))
        with torch.cuda.device_of(q_BSHK):
            _query_gradient[_grid(batch * heads, num_queries, "BLOCK_M")](
                q_BSHK,
                k_BTGK,
                v_BTGK,
                out_BSHK,
                dout_BSHK,
                logsumexp_BHS,
                delta_BHS,
                dq_BSHK,
                *_intervals(mask, q_BSHK.device),
                *_strides(q_BSHK, k_BTGK, v_BTGK, out_BSHK, dout_BSHK),
                heads,
                group,
                *sizes,
                **_head_sizes(head),
            )
            _key_gradient[_grid(parts * batch * kv_heads, num_keys, "BLOCK_N")](
                q_BSHK,
                k_BTGK,
                v_BTGK,
                dout_BSHK,
                logsumexp_BHS,
                delta_BHS,
                dk_PBTGK,
                dv_PBTGK,
                *mask.inverse(q_BSHK.device),
                *_strides(q_BSHK, k_BTGK, v_BTGK, dout_BSHK),
                *dk_PBTGK.stride()[:4],
                kv_heads,
                group,
                parts,
                *sizes,
                **_head_sizes(head),
            )
        dk_BTGK, dv_BTGK = (grad.sum(0).to(k_BTGK.dtype) if parts > 1 else grad[0] for grad in (dk_PBTGK, dv_PBTGK))
        return dq_BSHK, dk_BTGK, dv_BTGK, None, None


def _parts(programs_per_tile: int, num_keys: int, group: int, device: torch.device) -> int:
    """Number of parts into which the gradient of the keys divides the query heads of a group.

    One part where that gives every multiprocessor several tiles of keys (their work differs a lot); otherwise as many
    parts as that takes, at the price of an fp32 buffer for each.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(group, triton.cdiv(4 * processors, programs_per_tile * triton.cdiv(num_keys, 128)))


def _intervals(mask: MixedMask, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(kv_start, kv_end), made contiguous, because a chunk's vectors are views of the whole sequence's."""
    start_BS, end_BS = mask.vectors(device)
    return mask.derive(("contiguous", device), lambda: (start_BS.contiguous(), end_BS.contiguous()))


def _channels_last(x_BSHK: torch.Tensor) -> torch.Tensor:
    return x_BSHK if x_BSHK.stride(3) == 1 else x_BSHK.contiguous()


def _strides(*tensors_BSHK: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors_BSHK for stride in tensor.stride()[:3]]


def _grid(programs: int, length: int, block: str) -> Any:
    return lambda chosen: (programs, triton.cdiv(length, chosen[block]))


def _head_sizes(head: int) -> dict[str, int]:
    return {"HEAD": head, "HEAD_TILE": triton.next_power_of_2(head)}


def _length_class(num_queries: int) -> int:
    """A power of two: the best tile sizes hardly depend on the length, and timing them for each would take minutes."""
    return min(max(triton.next_power_of_2(num_queries), 1024), 16384)


def _that_fit(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Small tiles for wide elements and heads, where large tiles spill registers; large tiles for all else."""
    wide = arguments["q"].dtype == torch.float32 or constants["HEAD_TILE"] > 128
    return [c for c in configs if (c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] < 64 * 64) == wide]


def _tuned(kernel: Any, *sizes: tuple[int, int, int, int]) -> Any:
    """The kernel with the (BLOCK_M, BLOCK_N, warps, stages) to choose from; one choice, and no timing, on a CPU."""
    if triton.knobs.runtime.interpret:
        sizes = ((32, 16, 1, 1),)
    return triton.autotune(
        [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in sizes],
        key=["HEAD", "length_class"],
        prune_configs_by={"early_config_prune": _that_fit},
        cache_results=True,
    )(kernel)


# Compiled for sm_90, these keep (nearly) everything in registers at some head width. The second rows are the small ones
# of `_that_fit`.
_forward = _tuned(
    kernels.forward_kernel,
    *((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)),
    *((64, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
)
_query_gradient = _tuned(
    kernels.query_gradient_kernel,
    *((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2)),
    *((64, 32, 8, 2), (32, 32, 4, 2)),
)
_key_gradient = _tuned(
    kernels.key_gradient_kernel,
    *((64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2)),
    *((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2)),
)
