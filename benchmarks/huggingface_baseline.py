"""The straightforward implementation that the training-step benchmark compares with.

It is what a working first version built from the library looks like: transformers' own CLIP and Llama layers with eager
attention, one padded row per sample, a dense 4-d mask, logits of every position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_compatibility import language_config_of, vision_config_of
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch


class HuggingFaceBaseline(nn.Module):
    """Embeddings, CLIP layers, a connector, Llama layers, a head; for one image at the start of every sample.

    The pre-decoder has no RoPE here, which only helps its time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pre, post = config.pre, config.post
        clip, llama = vision_config_of(config), language_config_of(config)
        assert isinstance(llama, LlamaConfig), "the baseline has no biases"
        clip._attn_implementation = llama._attn_implementation = "eager"
        self.text = nn.Embedding(config.vocab_size, post.hidden_size)
        self.text_projector = nn.Linear(post.hidden_size, pre.hidden_size, bias=False)
        self.patch = nn.Conv2d(3, pre.hidden_size, config.vision.patch_size, config.vision.patch_size, bias=False)
        self.position = nn.Parameter(torch.zeros(config.vision.cells_per_tile, pre.hidden_size))
        self.newline = nn.Parameter(torch.zeros(pre.hidden_size))
        self.pre_norm = nn.LayerNorm(pre.hidden_size)
        self.pre_decoder = CLIPEncoder(clip)  # type: ignore[arg-type]
        self.connector = nn.Linear(pre.hidden_size, post.hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(llama)
        self.post_decoder = nn.ModuleList(LlamaDecoderLayer(llama, i) for i in range(post.num_layers))
        self.final_norm = LlamaRMSNorm(post.hidden_size)
        self.lm_head = nn.Linear(post.hidden_size, config.vocab_size, bias=False)
        self.side = config.vision.cells_per_side

    def forward(self, tiles_BCHW: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean loss over trained tokens. `batch` has one sample per sequence, padded on the right, image first."""
        text_BSD = self.text_projector(self.text(batch.tokens_BS))
        patch_BPD = self.patch(tiles_BCHW).flatten(2).transpose(1, 2) + self.position
        rows = patch_BPD.unflatten(1, (self.side, self.side))
        newline = self.newline.expand(*rows.shape[:2], 1, -1)
        image_BND = torch.cat((rows, newline), dim=2).flatten(1, 2)
        x_BSD = self.pre_norm(torch.cat((image_BND, text_BSD[:, image_BND.shape[1] :]), dim=1))

        key_S = torch.arange(x_BSD.shape[1])
        visible_BSS = (key_S >= batch.kv_start_BS.unsqueeze(-1)) & (key_S < batch.kv_end_BS.unsqueeze(-1))
        mask_BSS = torch.zeros(visible_BSS.shape, dtype=x_BSD.dtype).masked_fill_(~visible_BSS, float("-inf"))
        mask_B1SS = mask_BSS.unsqueeze(1).to(x_BSD.device)
        x_BSD = self.pre_decoder(inputs_embeds=x_BSD, attention_mask=mask_B1SS).last_hidden_state
        x_BSL = self.connector(x_BSD)
        embeddings = self.rotary(x_BSL, batch.position_ids_BS)
        for layer in self.post_decoder:
            x_BSL = layer(
                x_BSL,
                attention_mask=mask_B1SS,
                position_ids=batch.position_ids_BS,
                position_embeddings=embeddings,
                use_cache=False,
            )
        logits_BSV = self.lm_head(self.final_norm(x_BSL)).float()
        return F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), ignore_index=IGNORE_INDEX)
