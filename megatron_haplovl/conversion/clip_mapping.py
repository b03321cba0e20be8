"""CLIP's vision tower beside the training model."""

from __future__ import annotations

import re

from transformers import CLIPVisionModel

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_mapping import (
    Entry,
    VisionTower,
    norm_entries,
    patch_entry,
    resize_note,
    resize_positions,
    vision_blocks,
)
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD


def clip_vision_table(model: ModelConfig, *, side: int) -> list[Entry]:
    """CLIP's vision tower, names relative to it. Its class token and post-LayerNorm have no counterpart.

    Args:
        model: sizes.
        side: patches along one side of CLIP's image; if the model's tile has another number, the position embedding is
            interpolated.
    """
    d, tile = model.pre.hidden_size, model.vision.cells_per_side
    return [
        patch_entry("embeddings.patch_embedding.weight", model),
        Entry(
            "embeddings.position_embedding.weight",
            (side**2 + 1, d),
            ("embedding.position",),
            ((tile**2, d),),
            # Row 0 belongs to the class token.
            lambda position: resize_positions(position[1:], tile),
            note=resize_note(side, tile),
        ),
        *norm_entries("embedding.pre_norm", "pre_layrnorm", d),
        *vision_blocks(model),
    ]


CLIP = VisionTower(
    name="CLIP",
    model_type="clip",
    model_class=CLIPVisionModel,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    leading_positions=1,
    has_first_norm=True,
    table=clip_vision_table,
    extra=re.compile(
        r"(vision_model\.)?(embeddings\.(class_embedding|position_ids)|post_layernorm\.\w+)"
        r"|text_model\..*|(visual|text)_projection\.weight|logit_scale"
    ),
)
