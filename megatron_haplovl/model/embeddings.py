"""From tokens and pixels to one mixed sequence (paper Sec. 3.1, "Multi-modal embedding layers")."""

from __future__ import annotations

import torch
from torch import nn

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.batch import Batch


class MultimodalEmbedding(nn.Module):
    """Embeds text and patches into the pre-decoder's width and normalises the mixed sequence.

    The text embedding has two forms. `factored`: the language model's matrix [V, l] and a projector l -> d, as trained
    in stage 1. `folded`: their product [V, d], as in a released checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.pre.hidden_size
        vision = config.vision
        self.patch_size = vision.patch_size
        if config.text_embedding == "factored":
            self.text = nn.Embedding(config.vocab_size, config.post.hidden_size)
            self.text_projector: nn.Linear | None = nn.Linear(config.post.hidden_size, width, bias=False)
        else:
            self.text = nn.Embedding(config.vocab_size, width)
            self.text_projector = None
        self.patch = nn.Linear(3 * vision.patch_size**2, width, bias=False)
        self.position = nn.Parameter(torch.empty(vision.cells_per_tile, width))
        self.image_newline = nn.Parameter(torch.empty(width)) if vision.image_newline else None
        self.pre_norm = nn.LayerNorm(width, eps=config.pre.layernorm_epsilon)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The mixed sequence, normalised.

        Returns:
            [B, S, D].
        """
        x_BSD = self.text(batch.tokens_BS)
        if self.text_projector is not None:
            x_BSD = self.text_projector(x_BSD)
        # A batch without images embeds zero patches and copies zero rows: the vision parameters then take part with a
        # gradient of zero. Skipping them would leave a rank without images out of its neighbours' collectives, and
        # ZeRO-3 would wait for ever.
        # Under autocast the sums below come out in fp32 beside a bf16 projection, hence the casts.
        visual_PD = self._embed_patches(batch)
        x_ZD = x_BSD.flatten(0, 1).index_copy(0, batch.patch_target_P, visual_PD.to(x_BSD.dtype))
        if self.image_newline is not None:
            newline_ND = self.image_newline.expand(batch.newline_target_N.numel(), -1)
            x_ZD = x_ZD.index_copy(0, batch.newline_target_N, newline_ND.to(x_BSD.dtype))
        return self.pre_norm(x_ZD.view_as(x_BSD))

    def _embed_patches(self, batch: Batch) -> torch.Tensor:
        """Embeddings [P, D] of the patches that became tokens; a tile's cells have the same positions in every tile."""
        pixels_TCHW = batch.pixels_TCHW().to(self.patch.weight.dtype)
        patches_PF = cut_patches(pixels_TCHW, self.patch_size).index_select(0, batch.patch_source_P)
        cell_P = batch.patch_source_P % self.position.shape[0]
        return self.patch(patches_PF) + self.position.index_select(0, cell_P)


def cut_patches(pixels_TCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut tiles into flattened windows, in the memory order of a convolution's weight (channel, row, column).

    Returns:
        [T * (H / k) * (W / k), C * k * k], tile by tile and row-major in a tile.
    """
    t, c, h, w = pixels_TCHW.shape
    rows, columns = h // patch_size, w // patch_size
    cut = pixels_TCHW.reshape(t, c, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(t * rows * columns, c * patch_size * patch_size)
