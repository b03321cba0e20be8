"""SigLIP's vision tower beside the training model.

Its blocks are CLIP's. Around them it differs:

    no class token, so that every row of its position embedding is a patch's
    a bias on the patch embedding          added to the position embedding, which is added to the same patches
    images normalised by 0.5 and 0.5       our patch embedding gets the same colours normalised as CLIP's are; both
                                           are linear in the pixel, so its weight and that bias take up the difference
    no norm in front of the blocks         ours, which is there, starts at weight 1 and bias 0; that is not the identity
    norm and attention pooling behind      left out, as CLIP's are
"""

from __future__ import annotations

import re

import torch
from transformers import SiglipVisionModel

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_mapping import Entry, VisionTower, resize_note, resize_positions, vision_blocks

_NO_NORM = "SigLIP has none: starts at weight 1 and bias 0"


def siglip_vision_table(model: ModelConfig, *, side: int) -> list[Entry]:
    """Names relative to SigLIP's vision tower.

    Args:
        model: sizes.
        side: patches along one side of SigLIP's image; where the model's tile has another number, the position
            embedding is interpolated.
    """
    d, k, tile = model.pre.hidden_size, model.vision.patch_size, model.vision.cells_per_side
    patch = ("embeddings.patch_embedding.weight", (d, 3, k, k))
    bias = ("embeddings.patch_embedding.bias", (d,))
    with_bias = "with SigLIP's patch bias"
    return [
        Entry(
            *patch,
            ("embedding.patch.weight",),
            ((d, 3 * k * k),),
            lambda weight: (weight.float() * _colour_change(0)).flatten(1).to(weight.dtype),
            note="for images normalised as CLIP's",
        ),
        Entry(
            "embeddings.position_embedding.weight",
            (side**2, d),
            ("embedding.position",),
            ((tile**2, d),),
            lambda position, weight, bias: (
                resize_positions(position.float(), tile)
                + bias.float()
                + (weight.float() * _colour_change(1)).sum((1, 2, 3))
            ).to(position.dtype),
            theirs_too=(patch, bias),
            note=", ".join(filter(None, (resize_note(side, tile), with_bias))),
        ),
        Entry(*bias, ("embedding.pre_norm.weight",), ((d,),), torch.ones_like, note=_NO_NORM),
        Entry(*bias, ("embedding.pre_norm.bias",), ((d,),), torch.zeros_like, note=_NO_NORM),
        *vision_blocks(model),
    ]


SIGLIP = VisionTower(
    name="SigLIP",
    model_type="siglip",
    model_class=SiglipVisionModel,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    leading_positions=0,
    has_first_norm=False,
    table=siglip_vision_table,
    extra=re.compile(
        r"(vision_model\.)?(embeddings\.position_ids|post_layernorm\.\w+|head\..*)|text_model\..*|logit_(scale|bias)"
    ),
)


def _colour_change(which: int) -> torch.Tensor:
    """Scale (0) or shift (1) from our colours to SigLIP's, [3, 1, 1]."""
    return torch.tensor([change[which] for change in SIGLIP.colour_change()]).view(3, 1, 1)
