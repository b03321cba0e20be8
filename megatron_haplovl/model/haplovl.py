"""The model: embedding, pre-decoder, connector, post-decoder, norm, head (paper Sec. 3.1 and Fig. 3).

Two classes share the first half, with the same parameter names: :class:`HaploVLForDistillation` is what stage 1 trains,
:class:`HaploVL` the whole model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.kernels.mask import MixedMask, causal
from megatron_haplovl.model.block import post_decoder_block, pre_decoder_block
from megatron_haplovl.model.context import SequenceContext
from megatron_haplovl.model.embeddings import MultimodalEmbedding
from megatron_haplovl.model.heads import DistillationHeads, LossT, OutputHead
from megatron_haplovl.model.norm import RMSNorm


def attention_mask(batch: Batch, image_attention: str) -> MixedMask:
    """The mask of a batch; `image_attention` is `bidirectional` (the paper) or `causal`."""
    mask = MixedMask(batch.kv_start_BS, batch.kv_end_BS)
    return causal(mask) if image_attention == "causal" else mask


def _unchanged(context: SequenceContext) -> SequenceContext:
    return context


class _PreDecoder(nn.Module):
    """What both stages have: the embedding and the pre-decoder's blocks."""

    def __init__(self, config: ModelConfig, attention_backend: str) -> None:
        super().__init__()
        self.attention_backend = attention_backend
        # Context parallelism, which is applied from outside, changes what the blocks are told here.
        self.adapt_context: Callable[[SequenceContext], SequenceContext] = _unchanged
        self.image_attention = config.image_attention
        self.embedding = MultimodalEmbedding(config)
        self.pre_decoder = nn.ModuleList(pre_decoder_block(config.pre) for _ in range(config.pre.num_layers))

    def context(self, batch: Batch) -> SequenceContext:
        """Mask and positions of this batch, shared by every block."""
        mask = attention_mask(batch, self.image_attention)
        return self.adapt_context(SequenceContext(mask, batch.position_ids_BS, self.attention_backend))

    def encode(self, batch: Batch, context: SequenceContext) -> torch.Tensor:
        """The pre-decoder's hidden state H_m, [B, S, D]."""
        x_BSD = self.embedding(batch)
        for block in self.pre_decoder:
            x_BSD = block(x_BSD, context)
        return x_BSD


class HaploVLForDistillation(_PreDecoder):
    """Stage 1: embedding, pre-decoder and the throw-away heads. No connector, no post-decoder.

    Args:
        config: sizes.
        teacher_width: width of the vision teacher's features.
        attention_backend: see `kernels.attention`.
    """

    def __init__(self, config: ModelConfig, teacher_width: int, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend)
        self.distillation = DistillationHeads(config, teacher_width)

    def forward(self, batch: Batch, teacher_PD: torch.Tensor, loss_fn: Callable[..., LossT]) -> LossT:
        """The losses of Eq. 2-4.

        Args:
            batch: one micro-batch.
            teacher_PD: the vision teacher's features of the batch's patches.
            loss_fn: see `losses.distillation.distillation_loss`.
        """
        hidden_BSD = self.encode(batch, self.context(batch))
        return self.distillation(hidden_BSD, batch, teacher_PD, self.embedding.text.weight, loss_fn)


class HaploVL(_PreDecoder):
    """The whole model.

    Args:
        config: sizes.
        attention_backend: see `kernels.attention`.
    """

    def __init__(self, config: ModelConfig, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend)
        self.connector = nn.Linear(config.pre.hidden_size, config.post.hidden_size, bias=False)
        self.post_decoder = nn.ModuleList(post_decoder_block(config.post) for _ in range(config.post.num_layers))
        self.final_norm = RMSNorm(config.post.hidden_size, eps=config.post.norm_epsilon)
        self.lm_head = OutputHead(config)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """What the output head reads, [B, S, L]."""
        context = self.context(batch)
        x_BSL = self.connector(self.encode(batch, context))
        for block in self.post_decoder:
            x_BSL = block(x_BSL, context)
        return self.final_norm(x_BSL)

    def forward(self, batch: Batch, loss_fn: Callable[..., LossT]) -> LossT:
        """The loss of Eq. 1: `loss_fn(hidden_ML, weight_VL, labels_M)` over the trained positions."""
        return self.lm_head(self.hidden_states(batch), batch, loss_fn)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, S, V]."""
        return self.lm_head.logits(self.hidden_states(batch))
