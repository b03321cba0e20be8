"""Triton kernels of the mixed-mask attention: forward, gradient of the queries, gradients of the keys and values.

A tile of queries (or of keys) needs four numbers to know its work, because the visible interval's two ends are both
non-decreasing: rows [a, b) see, together, the keys [kv_start[a], kv_end[b - 1]), and each of them sees all of
[kv_start[b - 1], kv_end[a]). Tiles of keys are laid from the start of that common part. Those inside it run without a
mask, those left and right of it (edges of documents, the causal diagonal, the end of an image) with one, and all others
are never visited. With (q_start, q_end) in place of (kv_start, kv_end) the same holds for a tile of keys.

Shape letters: M a tile of queries, N a tile of keys, K the channels of a head, padded to a power of two with zeros.
Offsets inside a tile are 32-bit, the place of a tile is 64-bit. Scores are in base 2: `scale_log2` is scale * log2(e).
The method is that of FlashAttention-2 (arXiv:2307.08691); no atomics, so every result is deterministic.
"""

# Triton takes the types of all arguments but constants from the launch, and would read annotations as its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)
"""Start of the running maximum. Finite, so that a row that is hidden in all tiles so far gives exp2(-inf), not NaN."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, sum):
    """sum + a b, in fp32. fp32 operands are not rounded to TF32."""
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bf16.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _load_rows(
    pointer, first, limit, stride,
    MAY_LEAVE: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, HEAD_TILE: tl.constexpr
):  # fmt: skip
    """Rows [first, first + ROWS) of one head; with MAY_LEAVE, zeros in place of rows outside [0, limit)."""
    row_R = tl.arange(0, ROWS)
    channel_K = tl.arange(0, HEAD_TILE)
    pointers_RK = pointer + first.to(tl.int64) * stride + row_R[:, None] * stride + channel_K[None, :]
    inside_K = channel_K < HEAD
    if MAY_LEAVE:
        inside_R = (first + row_R >= 0) & (first + row_R < limit)
        rows_RK = tl.load(pointers_RK, mask=inside_R[:, None] & inside_K[None, :], other=0.0)
    elif HEAD < HEAD_TILE:
        rows_RK = tl.load(pointers_RK, mask=inside_K[None, :], other=0.0)
    else:
        rows_RK = tl.load(pointers_RK)
    return rows_RK


@triton.jit
def _store_rows(
    pointer, rows_RK, first, limit, stride, ROWS: tl.constexpr, HEAD: tl.constexpr, HEAD_TILE: tl.constexpr
):  # fmt: skip
    row_R = tl.arange(0, ROWS)
    channel_K = tl.arange(0, HEAD_TILE)
    pointers_RK = pointer + first.to(tl.int64) * stride + row_R[:, None] * stride + channel_K[None, :]
    inside_RK = (first + row_R < limit)[:, None] & (channel_K < HEAD)[None, :]
    tl.store(pointers_RK, rows_RK.to(pointer.dtype.element_ty), mask=inside_RK)


@triton.jit
def _ranges(start, end, first, last, STEP: tl.constexpr):
    """What the entries first..last of an interval vector pair see together, in steps of STEP from `origin`.

    Returns (origin, left, full, right): tiles -left..-1 and full..full + right - 1 need the mask, 0..full - 1 do not.
    """
    any_start, any_end = tl.load(start + first), tl.load(end + last)
    origin, full_end = tl.load(start + last), tl.load(end + first)
    left = tl.cdiv(origin - any_start, STEP)
    full = tl.maximum(full_end - origin, 0) // STEP
    right = tl.cdiv(tl.maximum(any_end - origin - full * STEP, 0), STEP)
    return origin, left, full, right


@triton.jit
def _forward_tiles(
    out_MK, top_M, sum_M, q_MK, k, v, k_stride, v_stride,
    start_M, end_M, origin, left, full, count, num_keys, scale_log2,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_TILE: tl.constexpr
):  # fmt: skip
    """Take `count` tiles of keys, all masked or all full, into the running output, maximum and sum."""
    for i in range(count):
        first = origin + i * BLOCK_N
        if MASKED:
            first = origin + tl.where(i < left, i - left, i - left + full) * BLOCK_N
        k_NK = _load_rows(k, first, num_keys, k_stride, MASKED, BLOCK_N, HEAD, HEAD_TILE)
        v_NK = _load_rows(v, first, num_keys, v_stride, MASKED, BLOCK_N, HEAD, HEAD_TILE)
        score_MN = _dot(q_MK, tl.trans(k_NK), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if MASKED:
            key_N = first + tl.arange(0, BLOCK_N)
            visible_MN = (key_N[None, :] >= start_M[:, None]) & (key_N[None, :] < end_M[:, None])
            score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MN, 1) * scale_log2)
        p_MN = tl.exp2(score_MN * scale_log2 - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        out_MK = _dot(p_MN.to(v_NK.dtype), v_NK, out_MK * shrink_M[:, None])
        top_M = new_top_M
    return out_MK, top_M, sum_M


@triton.jit(do_not_specialize=["num_queries", "num_keys", "length_class"])
def forward_kernel(
    q, k, v, out, logsumexp, kv_start, kv_end,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head,
    heads, group, num_queries, num_keys, length_class, scale_log2,
    HEAD: tl.constexpr, HEAD_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Output and base-2 log-sum-exp [B, H, S] of one tile of queries of one head.

    Grid: (B * H, tiles). Heads run fastest, so that those of a group share keys and values in the L2 cache; the last
    tile comes first, because later rows of a document see more. `length_class` is for the choice of the tile sizes.
    """
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row_M = first_row + tl.arange(0, BLOCK_M)
    # Rows past the end stand for the last one: they see something, and are not stored.
    last = num_queries - 1
    kv_start += batch * num_queries
    kv_end += batch * num_queries
    start_M = tl.load(kv_start + tl.minimum(row_M, last))
    end_M = tl.load(kv_end + tl.minimum(row_M, last))
    origin, left, full, right = _ranges(kv_start, kv_end, first_row, tl.minimum(first_row + BLOCK_M - 1, last), BLOCK_N)

    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    q_MK = _load_rows(
        q + batch * q_batch + head * q_head, first_row, num_queries, q_row, True, BLOCK_M, HEAD, HEAD_TILE
    )
    out_MK = tl.zeros([BLOCK_M, HEAD_TILE], tl.float32)
    top_M = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    out_MK, top_M, sum_M = _forward_tiles(
        out_MK, top_M, sum_M, q_MK, k, v, k_row, v_row, start_M, end_M, origin, left, full,
        full, num_keys, scale_log2, False, BLOCK_M, BLOCK_N, HEAD, HEAD_TILE
    )  # fmt: skip
    out_MK, top_M, sum_M = _forward_tiles(
        out_MK, top_M, sum_M, q_MK, k, v, k_row, v_row, start_M, end_M, origin, left, full,
        left + right, num_keys, scale_log2, True, BLOCK_M, BLOCK_N, HEAD, HEAD_TILE
    )  # fmt: skip

    out += batch * out_batch + head * out_head
    _store_rows(out, out_MK / sum_M[:, None], first_row, num_queries, out_row, BLOCK_M, HEAD, HEAD_TILE)
    logsumexp += (batch * heads + head) * num_queries
    tl.store(logsumexp + row_M, top_M + tl.log2(sum_M), mask=row_M < num_queries)


@triton.jit
def _query_gradient_tiles(
    dq_MK, q_MK, dout_MK, logsumexp_M, delta_M, k, v, k_stride, v_stride,
    start_M, end_M, origin, left, full, count, num_keys, scale_log2,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_TILE: tl.constexpr
):  # fmt: skip
    for i in range(count):
        first = origin + i * BLOCK_N
        if MASKED:
            first = origin + tl.where(i < left, i - left, i - left + full) * BLOCK_N
        k_NK = _load_rows(k, first, num_keys, k_stride, MASKED, BLOCK_N, HEAD, HEAD_TILE)
        v_NK = _load_rows(v, first, num_keys, v_stride, MASKED, BLOCK_N, HEAD, HEAD_TILE)
        score_MN = _dot(q_MK, tl.trans(k_NK), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if MASKED:
            key_N = first + tl.arange(0, BLOCK_N)
            visible_MN = (key_N[None, :] >= start_M[:, None]) & (key_N[None, :] < end_M[:, None])
            score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        p_MN = tl.exp2(score_MN * scale_log2 - logsumexp_M[:, None])
        dp_MN = _dot(dout_MK, tl.trans(v_NK), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        dscore_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MK = _dot(dscore_MN.to(k_NK.dtype), k_NK, dq_MK)
    return dq_MK


@triton.jit(do_not_specialize=["num_queries", "num_keys", "length_class"])
def query_gradient_kernel(
    q, k, v, out, dout, logsumexp, delta, dq, kv_start, kv_end,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
    heads, group, num_queries, num_keys, length_class, scale, scale_log2,
    HEAD: tl.constexpr, HEAD_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Gradient of one tile of queries, and delta [B, H, S] = sum over channels of out * dout. Grid as the forward's.

    `dq` has the strides of `out`.
    """
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row_M = first_row + tl.arange(0, BLOCK_M)
    last = num_queries - 1
    kv_start += batch * num_queries
    kv_end += batch * num_queries
    start_M = tl.load(kv_start + tl.minimum(row_M, last))
    end_M = tl.load(kv_end + tl.minimum(row_M, last))
    origin, left, full, right = _ranges(kv_start, kv_end, first_row, tl.minimum(first_row + BLOCK_M - 1, last), BLOCK_N)

    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    out += batch * out_batch + head * out_head
    dq += batch * out_batch + head * out_head
    dout += batch * dout_batch + head * dout_head
    logsumexp += (batch * heads + head) * num_queries
    delta += (batch * heads + head) * num_queries
    out_MK = _load_rows(out, first_row, num_queries, out_row, True, BLOCK_M, HEAD, HEAD_TILE)
    dout_MK = _load_rows(dout, first_row, num_queries, dout_row, True, BLOCK_M, HEAD, HEAD_TILE)
    delta_M = tl.sum(out_MK.to(tl.float32) * dout_MK.to(tl.float32), 1)
    tl.store(delta + row_M, delta_M, mask=row_M < num_queries)

    q_MK = _load_rows(
        q + batch * q_batch + head * q_head, first_row, num_queries, q_row, True, BLOCK_M, HEAD, HEAD_TILE
    )
    logsumexp_M = tl.load(logsumexp + row_M, mask=row_M < num_queries, other=0.0)
    dq_MK = tl.zeros([BLOCK_M, HEAD_TILE], tl.float32)
    dq_MK = _query_gradient_tiles(
        dq_MK, q_MK, dout_MK, logsumexp_M, delta_M, k, v, k_row, v_row, start_M, end_M, origin, left, full,
        full, num_keys, scale_log2, False, BLOCK_M, BLOCK_N, HEAD, HEAD_TILE
    )  # fmt: skip
    dq_MK = _query_gradient_tiles(
        dq_MK, q_MK, dout_MK, logsumexp_M, delta_M, k, v, k_row, v_row, start_M, end_M, origin, left, full,
        left + right, num_keys, scale_log2, True, BLOCK_M, BLOCK_N, HEAD, HEAD_TILE
    )  # fmt: skip
    _store_rows(dq, dq_MK * scale, first_row, num_queries, out_row, BLOCK_M, HEAD, HEAD_TILE)


@triton.jit
def _key_gradient_tiles(
    dk_NK, dv_NK, k_NK, v_NK, q, dout, logsumexp, delta,
    q_stride, q_head, dout_stride, dout_head, first_head, num_heads,
    start_N, end_N, origin, left, full, count, num_queries, scale_log2,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_TILE: tl.constexpr
):  # fmt: skip
    # One loop over (head, tile), not two nested ones, keeps the loads of the next head in flight.
    for i in range(count * num_heads):
        head = first_head + i // count
        tile = i % count
        first = origin + tile * BLOCK_M
        if MASKED:
            first = origin + tl.where(tile < left, tile - left, tile - left + full) * BLOCK_M
        q_MK = _load_rows(q + head * q_head, first, num_queries, q_stride, MASKED, BLOCK_M, HEAD, HEAD_TILE)
        dout_MK = _load_rows(dout + head * dout_head, first, num_queries, dout_stride, MASKED, BLOCK_M, HEAD, HEAD_TILE)
        row_M = first + tl.arange(0, BLOCK_M)
        if MASKED:
            inside_M = (row_M >= 0) & (row_M < num_queries)
            logsumexp_M = tl.load(logsumexp + head * num_queries + row_M, mask=inside_M, other=0.0)
            delta_M = tl.load(delta + head * num_queries + row_M, mask=inside_M, other=0.0)
        else:
            logsumexp_M = tl.load(logsumexp + head * num_queries + row_M)
            delta_M = tl.load(delta + head * num_queries + row_M)
        score_NM = _dot(k_NK, tl.trans(q_MK), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        if MASKED:
            visible_NM = (row_M[None, :] >= start_N[:, None]) & (row_M[None, :] < end_N[:, None])
            score_NM = tl.where(visible_NM, score_NM, float("-inf"))
        p_NM = tl.exp2(score_NM * scale_log2 - logsumexp_M[None, :])
        dv_NK = _dot(p_NM.to(dout_MK.dtype), dout_MK, dv_NK)
        dp_NM = _dot(v_NK, tl.trans(dout_MK), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        dscore_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NK = _dot(dscore_NM.to(q_MK.dtype), q_MK, dk_NK)
    return dk_NK, dv_NK


@triton.jit(do_not_specialize=["num_queries", "num_keys", "length_class"])
def key_gradient_kernel(
    q, k, v, dout, logsumexp, delta, dk, dv, q_start, q_end,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dout_batch, dout_row, dout_head, dk_part, dk_batch, dk_row, dk_head,
    kv_heads, group, parts, num_queries, num_keys, length_class, scale, scale_log2,
    HEAD: tl.constexpr, HEAD_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Gradients of one tile of keys and values of one head, over one part of its query heads.

    Grid: (parts * B * G, tiles). `dk` and `dv` are [parts, B, T, G, K] and have the same strides.
    """
    part = (tl.program_id(0) % parts).to(tl.int64)
    kv_head = ((tl.program_id(0) // parts) % kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // parts // kv_heads).to(tl.int64)
    first_key = tl.program_id(1) * BLOCK_N
    key_N = first_key + tl.arange(0, BLOCK_N)
    last = num_keys - 1
    q_start += batch * num_keys
    q_end += batch * num_keys
    start_N = tl.load(q_start + tl.minimum(key_N, last))
    end_N = tl.load(q_end + tl.minimum(key_N, last))
    origin, left, full, right = _ranges(q_start, q_end, first_key, tl.minimum(first_key + BLOCK_N - 1, last), BLOCK_M)

    k_NK = _load_rows(
        k + batch * k_batch + kv_head * k_head, first_key, num_keys, k_row, True, BLOCK_N, HEAD, HEAD_TILE
    )
    v_NK = _load_rows(
        v + batch * v_batch + kv_head * v_head, first_key, num_keys, v_row, True, BLOCK_N, HEAD, HEAD_TILE
    )
    first_head = kv_head * group + part * group // parts
    num_heads = ((part + 1) * group // parts - part * group // parts).to(tl.int32)
    q += batch * q_batch
    dout += batch * dout_batch
    logsumexp += batch * kv_heads * group * num_queries
    delta += batch * kv_heads * group * num_queries
    dk_NK = tl.zeros([BLOCK_N, HEAD_TILE], tl.float32)
    dv_NK = tl.zeros([BLOCK_N, HEAD_TILE], tl.float32)
    dk_NK, dv_NK = _key_gradient_tiles(
        dk_NK, dv_NK, k_NK, v_NK, q, dout, logsumexp, delta, q_row, q_head, dout_row, dout_head, first_head, num_heads,
        start_N, end_N, origin, left, full, full, num_queries,
        scale_log2, False, BLOCK_M, BLOCK_N, HEAD, HEAD_TILE
    )  # fmt: skip
    dk_NK, dv_NK = _key_gradient_tiles(
        dk_NK, dv_NK, k_NK, v_NK, q, dout, logsumexp, delta, q_row, q_head, dout_row, dout_head, first_head, num_heads,
        start_N, end_N, origin, left, full, left + right, num_queries,
        scale_log2, True, BLOCK_M, BLOCK_N, HEAD, HEAD_TILE
    )  # fmt: skip
    offset = part * dk_part + batch * dk_batch + kv_head * dk_head
    _store_rows(dk + offset, dk_NK * scale, first_key, num_keys, dk_row, BLOCK_N, HEAD, HEAD_TILE)
    _store_rows(dv + offset, dv_NK, first_key, num_keys, dk_row, BLOCK_N, HEAD, HEAD_TILE)
