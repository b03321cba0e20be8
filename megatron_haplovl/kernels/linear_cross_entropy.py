"""Cross-entropy of a linear head over a large vocabulary, without the logits of all tokens in memory.

Tokens are taken in chunks. While a chunk's logits are at hand they are turned, in place, into their own gradient
(softmax minus one-hot), and from that the gradients of hidden states and head are formed at once: the loss is a sum, so
all that backward still has to do is to multiply by one number. Recomputing the logits in backward instead would cost a
fourth matrix product on top of the three that the plain form needs.

Shapes, beyond the legend in `data/batch.py`: M trained tokens, L width of the head's input, V words of the vocabulary
(with a group: this rank's words), C tokens of a chunk, R tokens of a block of a chunk, K ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes of one chunk's logits, in the dtype of the matrix product. Measured on a CPU at V = 128,256 and L = 512: the
# three products run at full speed from 64 rows in fp32 (32 MiB) and 256 rows in bf16 (64 MiB) on. A GPU wants about a
# thousand rows, so that reading and writing the head's gradient once per chunk hides behind the arithmetic.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
# Bytes of the fp32 logits that softmax works on at a time: they fit a cache, and calls cost little beside the work.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
# The head's gradient is added up in the head's dtype, which rounds once per chunk.
MOST_ROUNDINGS = 16
# Word ids travel as fp32 beside the logits.
_MOST_WORDS = 2**24


@dataclass(frozen=True)
class _Settings:
    """What the autograd function needs besides tensors."""

    group: dist.ProcessGroup | None
    vocab_start: int
    vocab_size: int
    dtype: torch.dtype
    """Number format of the matrix products."""
    grad_enabled: bool
    losses_M: torch.Tensor | None
    """Gets the loss of each token, if it is given."""
    features_M: torch.Tensor | None
    """Gets the feature loss of each token, if it is given."""


def linear_cross_entropy(
    hidden_ML: torch.Tensor,
    weight_VL: torch.Tensor,
    target_M: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    losses_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `softmax(hidden weight^T)`, summed over tokens (paper Eq. 1).

    Works under autocast as `F.linear` does. The logits are rounded to the dtype of the matrix product, everything after
    that is fp32. The head's gradient is handed over, not copied, so backward can run only once if the head is trained.

    Args:
        hidden_ML: inputs of the head. M = 0 gives losses and gradients of zero.
        weight_VL: the head; with a group this rank's words, in the order of the ranks. Gets a gradient if it wants one.
        target_M: int64 word of each token, an index into the whole vocabulary; there is no ignored index.
        group: ranks that share the vocabulary. Each gets the same `hidden_ML` and `target_M`, the same results, and the
            *whole* gradient of `hidden_ML`, already summed over the group.
        vocab_start: word of this rank's first row.
        vocab_size: words of all ranks together; required with a group, because all its ranks must cut the same chunks.
        losses_M: if given, gets the loss of each token, for reports; autograd does not see it.

    Returns:
        The sum of the losses, and how many targets have the largest logit (among equals the first counts); scalars in
        fp32.

    Raises:
        ValueError: tensors or settings that do not fit, or (on a CPU) a target outside the vocabulary. On a GPU such a
            target fails an assertion on the device, because looking at it from here would wait for the device.
    """
    loss, correct, _ = _apply(hidden_ML, weight_VL, target_M, None, group, vocab_start, vocab_size, (losses_M, None))
    return loss, correct


def distill_tokens(
    student_ML: torch.Tensor,
    scaled_ML: torch.Tensor,
    embedding_VL: torch.Tensor,
    target_M: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    losses_M: torch.Tensor | None = None,
    features_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Current-token and feature loss of stage 1 over the same chunks (paper Eq. 3 and 4), summed over tokens.

    Args:
        student_ML: text head's outputs, compared with `embedding_VL[target_M]`.
        scaled_ML: the same times the learned logit scale, so that autograd has the scale's gradient.
        embedding_VL: the language model's embedding matrix, frozen.
        target_M: the current token of each position.
        group, vocab_start, vocab_size: as in :func:`linear_cross_entropy`.
        losses_M, features_M: if given, get each token's current-token loss and feature loss, for reports.

    Returns:
        Current-token loss, number of tokens found, feature loss; scalars in fp32.

    Raises:
        ValueError: as :func:`linear_cross_entropy`, and for an embedding that is trained.
    """
    if embedding_VL.requires_grad:
        raise ValueError("the embedding that stage 1 distils must be frozen, but it requires a gradient")
    each = (losses_M, features_M)
    return _apply(scaled_ML, embedding_VL, target_M, student_ML, group, vocab_start, vocab_size, each)


def feature_losses(student_ML: torch.Tensor, teacher_ML: torch.Tensor) -> torch.Tensor:
    """1 + ||student - teacher||_2 - cos(student, teacher) of each token (paper Eq. 3); the norm is not squared."""
    distance_M = torch.linalg.vector_norm(student_ML - teacher_ML, dim=-1)
    return 1.0 + distance_M - F.cosine_similarity(student_ML, teacher_ML, dim=-1)


def _apply(
    hidden_ML: torch.Tensor,
    weight_VL: torch.Tensor,
    target_M: torch.Tensor,
    student_ML: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
    each: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = hidden_ML.device.type
    autocast = torch.is_autocast_enabled(device)
    if target_M.dim() != 1 or hidden_ML.shape != (*target_M.shape, weight_VL.shape[1]):
        raise ValueError(f"hidden {hidden_ML.shape}, weight {weight_VL.shape} and target {target_M.shape} do not fit")
    if hidden_ML.dtype != weight_VL.dtype and not autocast:
        raise ValueError(f"hidden is {hidden_ML.dtype} and weight {weight_VL.dtype}; outside autocast they must agree")
    if (group is None) != (vocab_size is None):
        raise ValueError(f"vocab_size goes with a group, but it is {vocab_size} and the group {group}")
    size = len(weight_VL) if vocab_size is None else vocab_size
    if not 0 <= vocab_start <= vocab_start + len(weight_VL) <= size:
        raise ValueError(f"{len(weight_VL)} words from {vocab_start} on are not part of {size} words")
    if size > _MOST_WORDS:
        raise ValueError(f"a vocabulary of {size} words, more than {_MOST_WORDS}")
    _check_targets(target_M, size)
    dtype = torch.get_autocast_dtype(device) if autocast else weight_VL.dtype
    settings = _Settings(group, vocab_start, size, dtype, torch.is_grad_enabled(), *each)
    with torch.autocast(device, enabled=False):
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ChunkedCrossEntropy.apply(
            hidden_ML, weight_VL, target_M, student_ML, settings
        )
    return out


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ML: torch.Tensor,
        weight_VL: torch.Tensor,
        target_M: torch.Tensor,
        student_ML: torch.Tensor | None,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        want_dhidden, want_dweight, _, want_dstudent, _ = (
            needed and settings.grad_enabled for needed in ctx.needs_input_grad
        )
        ctx.dtypes = (hidden_ML.dtype, weight_VL.dtype)
        hidden_ML, head_VL = hidden_ML.to(settings.dtype), weight_VL.to(settings.dtype)
        wide = torch.promote_types(settings.dtype, torch.float32)
        dhidden_ML = torch.empty_like(hidden_ML) if want_dhidden else None
        dhead_VL = torch.empty_like(head_VL) if want_dweight else None
        dstudent_ML = torch.empty_like(student_ML) if want_dstudent and student_ML is not None else None
        loss, correct, feature = (torch.zeros((), dtype=wide, device=hidden_ML.device) for _ in range(3))

        ranks = 1 if settings.group is None else dist.get_world_size(settings.group)
        row_bytes = math.ceil(settings.vocab_size / ranks) * head_VL.element_size()
        chunk = _chunk_rows(len(hidden_ML), row_bytes, head_VL, trained=want_dweight)
        buffer_CV = torch.empty(chunk, len(head_VL), dtype=settings.dtype, device=hidden_ML.device)
        for rows in _slices(len(hidden_ML), chunk):
            hidden_CL, target_C = hidden_ML[rows], target_M[rows]
            logits_CV = torch.mm(hidden_CL, head_VL.t(), out=buffer_CV[: len(hidden_CL)])
            logsumexp_C, target_logit_C, best_word_C = _row_statistics(logits_CV, target_C, wide, settings)
            loss_C = logsumexp_C - target_logit_C
            loss += loss_C.sum()
            if settings.losses_M is not None:
                settings.losses_M[rows] = loss_C
            correct += (best_word_C == target_C).sum()
            if want_dhidden or want_dweight:
                dlogits_CV = _logits_to_gradient(logits_CV, target_C, logsumexp_C, settings.vocab_start)
                if dhidden_ML is not None:
                    torch.mm(dlogits_CV, head_VL, out=dhidden_ML[rows])
                if dhead_VL is not None:
                    # With beta = 0 what the memory held is ignored.
                    dhead_VL.addmm_(dlogits_CV.t(), hidden_CL, beta=int(rows.start > 0))
            if student_ML is not None:
                teacher_CL = _embed(target_C, weight_VL, settings).to(wide)
                feature_C = _feature_step(student_ML[rows], teacher_CL, dstudent_ML, rows)
                feature += feature_C.sum()
                if settings.features_M is not None:
                    settings.features_M[rows] = feature_C

        if dhead_VL is not None and len(hidden_ML) == 0:
            dhead_VL.zero_()  # No chunk has filled it.
        if dhidden_ML is not None and settings.group is not None:
            dist.all_reduce(dhidden_ML, group=settings.group)
        ctx.save_for_backward(dhidden_ML, dstudent_ML)
        # Not a saved tensor, so that backward may scale it in place and give away its only reference: the head's
        # gradient is as large as the head and must not be there twice.
        ctx.dhead_VL, ctx.want_dweight = dhead_VL, want_dweight
        ctx.mark_non_differentiable(correct)
        return loss, correct, feature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dloss, _, dfeature = grads
        dhidden_ML, dstudent_ML = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        dhead_VL, ctx.dhead_VL = ctx.dhead_VL, None
        if ctx.want_dweight and dhead_VL is None:
            raise RuntimeError("the gradient of a trained head is handed over by the first backward and then gone")
        return (
            None if dhidden_ML is None else (dhidden_ML * dloss).to(hidden_dtype),
            None if dhead_VL is None else dhead_VL.mul_(dloss).to(weight_dtype),
            None,
            None if dstudent_ML is None else dstudent_ML * dfeature,
            None,
        )


def _chunk_rows(tokens: int, row_bytes: int, head_VL: torch.Tensor, trained: bool) -> int:
    """Tokens per chunk: what the memory allows, in chunks of equal size, and not too many of them."""
    chunks = math.ceil(tokens * row_bytes / CHUNK_BYTES[head_VL.device.type])
    if trained and head_VL.element_size() < 4:
        chunks = min(chunks, MOST_ROUNDINGS)
    return math.ceil(tokens / max(1, chunks))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, max(1, step)))


def _blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    """The rows of a chunk in blocks that fit a cache in fp32."""
    return _slices(len(logits_CV), max(1, BLOCK_BYTES[logits_CV.device.type] // (4 * logits_CV.shape[1])))


def _row_statistics(
    logits_CV: torch.Tensor, target_C: torch.Tensor, wide: torch.dtype, settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, target's logit and best word of each token, over the words of all ranks."""
    mine_C, column_C = _columns(target_C, logits_CV.shape[1], settings.vocab_start)
    table_C4 = torch.empty(len(logits_CV), 4, dtype=wide, device=logits_CV.device)
    for rows in _blocks(logits_CV):
        logits_RV = logits_CV[rows].to(wide)
        largest_R, best_R = logits_RV.max(dim=1)
        target_R = logits_RV.gather(1, column_C[rows].unsqueeze(1)).squeeze(1)
        # As torch.logsumexp, less its own search for the largest.
        table_C4[rows, 0] = largest_R + (logits_RV - largest_R.unsqueeze(1)).exp_().sum(dim=1).log_()
        table_C4[rows, 1] = target_R.masked_fill(~mine_C[rows], float("-inf"))
        table_C4[rows, 2] = largest_R
        table_C4[rows, 3] = (best_R + settings.vocab_start).to(wide)
    table_KC4 = table_C4.unsqueeze(0)
    if settings.group is not None:
        table_KC4 = table_C4.new_empty(dist.get_world_size(settings.group), *table_C4.shape)
        dist.all_gather(list(table_KC4.unbind()), table_C4, group=settings.group)
    logsumexp_KC, target_KC, largest_KC, best_KC = table_KC4.unbind(dim=-1)
    # Among equal logits the first word counts: `max` names the first rank, and that rank has named its first word.
    winner_C = largest_KC.max(dim=0).indices
    best_C = best_KC.gather(0, winner_C.unsqueeze(0)).squeeze(0)
    return logsumexp_KC.logsumexp(dim=0), target_KC.amax(dim=0), best_C


def _logits_to_gradient(
    logits_CV: torch.Tensor, target_C: torch.Tensor, logsumexp_C: torch.Tensor, vocab_start: int
) -> torch.Tensor:
    """Overwrite a chunk's logits with softmax minus one-hot."""
    mine_C, column_C = _columns(target_C, logits_CV.shape[1], vocab_start)
    minus_one_C1 = -mine_C.to(logsumexp_C.dtype).unsqueeze(1)
    for rows in _blocks(logits_CV):
        block_RV = logits_CV[rows]
        wide_RV = block_RV.to(logsumexp_C.dtype)  # In fp32 the block itself.
        wide_RV.sub_(logsumexp_C[rows].unsqueeze(1)).exp_()
        wide_RV.scatter_add_(1, column_C[rows].unsqueeze(1), minus_one_C1[rows])
        block_RV.copy_(wide_RV)
    return logits_CV


def _columns(target_C: torch.Tensor, words: int, vocab_start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is among this rank's words, and its column there (any column, if it is not)."""
    local_C = target_C - vocab_start
    return (local_C >= 0) & (local_C < words), local_C.clamp(0, words - 1)


def _check_targets(target_M: torch.Tensor, vocab_size: int) -> None:
    inside_M = (target_M >= 0) & (target_M < vocab_size)
    if target_M.device.type != "cpu":
        torch._assert_async(inside_M.all(), "a target is outside the vocabulary")
    elif not bool(inside_M.all()):
        outside = target_M[~inside_M].unique().tolist()
        raise ValueError(f"targets outside the vocabulary of {vocab_size} words: {outside[:8]}")


def _embed(target_C: torch.Tensor, weight_VL: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """Rows of the embedding, whichever rank has them."""
    mine_C, row_C = _columns(target_C, len(weight_VL), settings.vocab_start)
    rows_CL = weight_VL.index_select(0, row_C)
    if settings.group is not None:
        rows_CL.masked_fill_(~mine_C.unsqueeze(1), 0.0)
        dist.all_reduce(rows_CL, group=settings.group)
    return rows_CL


def _feature_step(
    student_CL: torch.Tensor, teacher_CL: torch.Tensor, dstudent_ML: torch.Tensor | None, rows: slice
) -> torch.Tensor:
    """The feature losses of a chunk's tokens; the gradient of their sum goes to these rows of `dstudent_ML`."""
    wide_CL = student_CL.to(teacher_CL.dtype)
    if dstudent_ML is None:
        return feature_losses(wide_CL, teacher_CL)
    with torch.enable_grad():
        leaf_CL = wide_CL.detach().requires_grad_()
        loss_C = feature_losses(leaf_CL, teacher_CL)
        loss = loss_C.sum()
    dstudent_ML[rows] = torch.autograd.grad(loss, leaf_CL)[0]
    return loss_C.detach()
