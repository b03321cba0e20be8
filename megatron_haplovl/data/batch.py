"""The one type that crosses from data to model: a micro-batch of packed sequences.

Shape legend of the tensor names. A file that needs other letters lists them at its head.

    B  packed sequences in the micro-batch      S  tokens of a packed sequence (visual tokens included)
    D  width of the hidden state                V  vocabulary
    T  image tiles in the micro-batch           C, H, W  channels, height and width of a tile
    P  patches that became tokens               N  newline tokens
    Z  positions of the micro-batch, B * S      I  distinct images of a data set
    H  (in attention tensors) heads             K  width of one head
    G  key/value heads                          F  numbers of a patch
    L  width of the post-decoder                M  trained or text tokens

A sequence holds several documents, a document several images; images of one sequence follow each other in token order.
*Visual tokens* are patches and newlines together, *patch tokens* are patches alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron_haplovl.data.gaps import Gap
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD

IGNORE_INDEX = -100
"""Label of a position that is not trained (torch's cross-entropy convention)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    The mixed mask (paper Sec. 3.1, "Masking strategy") is two vectors: query i of a sequence sees exactly the keys
    `kv_start[i] <= j < kv_end[i]` of the same sequence. Padding sees itself only and is never trained.
    """

    tokens_BS: torch.Tensor
    """int64 token ids; 0 where the position is visual or padding."""
    labels_BS: torch.Tensor
    """int64 next-token labels (already shifted); IGNORE_INDEX where nothing is trained. Stage 2."""
    text_mask_BS: torch.Tensor
    """bool, True at text tokens. Stage 1 trains all of them."""
    position_ids_BS: torch.Tensor
    """int64, counted through text and image tokens alike from each document's start."""
    kv_start_BS: torch.Tensor
    """int32, first visible key: the first token of the document."""
    kv_end_BS: torch.Tensor
    """int32, one past the last visible key: i + 1 for text, the image's end for an image token."""
    tiles_TCHW: torch.Tensor
    """uint8 pixels, in the order in which the images appear; `pixels_TCHW` normalises them. T may be 0."""
    patch_source_P: torch.Tensor
    """int64 index into the T * cells_per_tile patches of `tiles_TCHW` (tile by tile, row-major in a tile)."""
    patch_target_P: torch.Tensor
    """int64 index into the flattened B * S positions, where that patch's token stands."""
    newline_target_N: torch.Tensor
    """int64 index into the flattened B * S positions, where an image newline stands."""
    visible_pairs: int
    """(query, key) pairs that attend: the unit of attention's arithmetic."""
    source_BS: torch.Tensor | None = None
    """int32 number of the source that a token is from, -1 at padding; None if there is one source only."""
    num_sources: int = 1
    """Sources that there are, whether they are in this batch or not."""
    packs: tuple[int, ...] = ()
    """Number of each sequence in the plan, `plan.dealing.EMPTY` for one that the step has no pack for."""
    gaps: tuple[Gap, ...] = ()
    """What of these packs could not be read, and is not in the batch."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; only the mask's vectors stay on the host.

        Attention plans its work from them there, without waiting for the device.
        """
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name not in ("kv_start_BS", "kv_end_BS")
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while other work goes on."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **pinned)

    def pixels_TCHW(self) -> torch.Tensor:
        """float32 `(tile / 255 - mean) / std`, on a CPU bit for bit as `image_processing.normalise`."""
        device = self.tiles_TCHW.device
        # Tensors, because a GPU multiplies by the reciprocal of a number, and copied so that nobody waits.
        mean, std = (torch.tensor(v).view(3, 1, 1).to(device, non_blocking=True) for v in (CLIP_MEAN, CLIP_STD))
        return self.tiles_TCHW.float().mul_(1 / 255).sub_(mean).div_(std)


@dataclass(frozen=True)
class StepCounts:
    """Valid tokens in one whole global batch, known from the pack plan: the denominators of the losses."""

    lm_tokens: int
    """Positions with a label, stage 2."""
    text_tokens: int
    """Text tokens, stage 1's L_feat and L_ctp (S in paper Eq. 3 and 4)."""
    patch_tokens: int
    """Patch tokens (newlines not counted), stage 1's L_v (hw in paper Eq. 2)."""
    tokens: int
    """All tokens that are not padding."""
    documents: int
    """Documents (samples, or joined samples)."""
    pairs: int = 0
    """(query, key) pairs of the mixed mask, padding not counted: the unit of attention's arithmetic."""
