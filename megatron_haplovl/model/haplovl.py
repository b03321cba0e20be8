"""The model: embedding, pre-decoder, connector, post-decoder, norm, head (paper Sec. 3.1 and Fig. 3).

It is a flat list of layers, named by the paths of their parameters: `embedding`, `pre_decoder.0` ..., `connector`,
`post_decoder.0` ..., `final_norm`, `lm_head`. Two classes share the first half, with the same names:
:class:`HaploVLForDistillation` is what stage 1 trains and ends in `distillation`, :class:`HaploVL` is the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.kernels.mask import mixed_mask
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.block import Block, post_decoder_block, pre_decoder_block
from megatron_haplovl.model.embeddings import MultimodalEmbedding
from megatron_haplovl.model.heads import DistillationHeads, LossT, OutputHead
from megatron_haplovl.model.norm import RMSNorm


def _unchanged(inputs: AttentionInputs) -> AttentionInputs:
    return inputs


def run_layers(layers: Iterable[nn.Module], x_BSD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
    """The hidden state after some layers between embedding and head; its width may change on the way."""
    for layer in layers:
        x_BSD = layer(x_BSD, inputs) if isinstance(layer, Block) else layer(x_BSD)
    return x_BSD


class LayeredModel(nn.Module):
    """What both stages have: the flat layer list, which begins with the embedding and the pre-decoder's blocks."""

    HEAD: ClassVar[str]
    """Name of the last layer, which computes the losses.

    Call it as a module with (hidden, batch, ...), because parallel layouts hook into that call.
    """

    def __init__(self, config: ModelConfig, attention_backend: str) -> None:
        super().__init__()
        self.attention_backend = attention_backend
        # Context parallelism is applied from outside: it changes here what the blocks are told.
        self.adapt_inputs: Callable[[AttentionInputs], AttentionInputs] = _unchanged
        self.image_attention = config.image_attention
        self.embedding = MultimodalEmbedding(config)
        self.pre_decoder = nn.ModuleList(pre_decoder_block(config.pre) for _ in range(config.pre.num_layers))

    def layers(self) -> dict[str, nn.Module]:
        """The flat layer list, by name; in a pipeline, only the layers of this stage."""
        flat: dict[str, nn.Module] = {}
        for name, child in self.named_children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                flat.update((f"{name}.{number}", block) for number, block in child.named_children())
            else:
                flat[name] = child
        return flat

    def attention_inputs(
        self, kv_start_BS: torch.Tensor, kv_end_BS: torch.Tensor, position_ids_BS: torch.Tensor
    ) -> AttentionInputs:
        """Mask and positions of a batch (its fields of these names), shared by every block."""
        mask = mixed_mask(kv_start_BS, kv_end_BS, self.image_attention)
        return self.adapt_inputs(AttentionInputs(mask, position_ids_BS, self.attention_backend))

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The input of the last layer, the head: [B, S, width]."""
        inputs = self.attention_inputs(batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS)
        embedding, *inner, _head = self.layers().values()
        return run_layers(inner, embedding(batch), inputs)

    def losses(self, hidden_BSD: torch.Tensor, batch: Batch, *targets_and_loss: Any) -> Any:
        """The losses of a micro-batch.

        Args:
            hidden_BSD: what :meth:`hidden_states` returns.
            batch: the micro-batch.
            *targets_and_loss: the stage's targets, then the loss function.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, *targets_and_loss: Any) -> Any:
        """The losses of a micro-batch; arguments as for :meth:`losses`."""
        return self.losses(self.hidden_states(batch), batch, *targets_and_loss)

    def parameters_read_elsewhere(self) -> Iterable[tuple[nn.Module, torch.Tensor]]:
        """Modules that read a parameter of another module in their forward pass, and that parameter."""
        return ()


class HaploVLForDistillation(LayeredModel):
    """Stage 1: embedding, pre-decoder and the throw-away heads. No connector, no post-decoder.

    Args:
        config: sizes.
        teacher_width: width of the vision teacher's features.
        attention_backend: see `kernels.attention`.
    """

    HEAD = "distillation"

    def __init__(self, config: ModelConfig, teacher_width: int, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend)
        self.distillation = DistillationHeads(config, teacher_width)

    def losses(
        self, hidden_BSD: torch.Tensor, batch: Batch, teacher_PD: torch.Tensor, loss_fn: Callable[..., LossT]
    ) -> LossT:
        """The losses of Eq. 2-4 from the pre-decoder's hidden state H_m.

        Args:
            hidden_BSD: what :meth:`hidden_states` returns.
            batch: one micro-batch.
            teacher_PD: the vision teacher's features of the batch's patches.
            loss_fn: see `losses.distillation.distillation_loss`.
        """
        return self.distillation(hidden_BSD, batch, teacher_PD, self.embedding.text.weight, loss_fn)

    def parameters_read_elsewhere(self) -> Iterable[tuple[nn.Module, torch.Tensor]]:
        """The heads read the embedding's word matrix."""
        return ((self.distillation, self.embedding.text.weight),)


class HaploVL(LayeredModel):
    """The whole model.

    Args:
        config: sizes.
        attention_backend: see `kernels.attention`.
    """

    HEAD = "lm_head"

    def __init__(self, config: ModelConfig, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend)
        self.connector = nn.Linear(config.pre.hidden_size, config.post.hidden_size, bias=False)
        self.post_decoder = nn.ModuleList(post_decoder_block(config.post) for _ in range(config.post.num_layers))
        self.final_norm = RMSNorm(config.post.hidden_size, eps=config.post.norm_epsilon)
        self.lm_head = OutputHead(config)

    def losses(self, hidden_BSL: torch.Tensor, batch: Batch, loss_fn: Callable[..., LossT]) -> LossT:
        """The loss of Eq. 1: `loss_fn(hidden_ML, weight_VL, labels_M, sources)` over the trained positions."""
        return self.lm_head(hidden_BSL, batch, loss_fn)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, S, V]."""
        return self.lm_head.logits(self.hidden_states(batch))
