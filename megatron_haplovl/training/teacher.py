"""The vision teacher of stage 1: a pretrained vision transformer, frozen and never differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.conversion.clip_mapping import CLIP
from megatron_haplovl.conversion.hf_compatibility import vision_config_of
from megatron_haplovl.conversion.hf_mapping import VisionTower
from megatron_haplovl.conversion.hf_sources import vision_tower_of
from megatron_haplovl.data.batch import Batch


class VisionTeacher(nn.Module):
    """T_v of paper Eq. 2.

    Args:
        tower: an instance of `family.model_class`. Its layers behind the one that teaches are dropped.
        family: says how its pixels are normalised, and which of its positions are no patches.
        layer: index into its `hidden_states`; -1 is the last.

    Raises:
        ValueError: the tower has no such layer.
    """

    def __init__(self, tower: Any, family: VisionTower, layer: int) -> None:
        super().__init__()
        depth = tower.config.num_hidden_layers
        if not -(depth + 1) <= layer <= depth:
            raise ValueError(
                f"--teacher-layer {layer}: the teacher has {depth} layers, so it goes from {-depth - 1} to {depth}"
            )
        self.tower = tower.eval().requires_grad_(False)
        inner = getattr(tower, "vision_model", tower)  # The names differ between releases of transformers.
        inner.encoder.layers = inner.encoder.layers[: layer % (depth + 1)]
        # The output of what comes behind the blocks is no hidden state.
        inner.post_layernorm = nn.Identity()
        inner.use_head = False
        self._leading = family.leading_positions
        self._colour_change = family.colour_change()

    @property
    def width(self) -> int:
        """Width of the features."""
        return int(self.tower.config.hidden_size)

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Features [P, D] of the batch's patches, in their order; every tile is one image to the teacher."""
        pixels_TCHW = batch.pixels_TCHW()
        if pixels_TCHW.shape[0] == 0:
            return pixels_TCHW.new_zeros(0, self.width)
        features_TSD = self.tower(self._its_colours(pixels_TCHW).to(self.tower.dtype)).last_hidden_state
        return features_TSD[:, self._leading :].flatten(0, 1).index_select(0, batch.patch_source_P)

    def _its_colours(self, pixels_TCHW: torch.Tensor) -> torch.Tensor:
        """The same pixels, normalised as the teacher wants them."""
        if all(change == (1.0, 0.0) for change in self._colour_change):
            return pixels_TCHW
        channels = [pixels_TCHW[:, i] * scale + shift for i, (scale, shift) in enumerate(self._colour_change)]
        return torch.stack(channels, dim=1)


def teacher_width(config: Config) -> int:
    """Width of the features of :func:`build_teacher`'s teacher."""
    folder = config.init.vision_teacher
    return config.model.pre.hidden_size if folder is None else int(vision_tower_of(folder)[1].hidden_size)


def build_teacher(config: Config, device: torch.device) -> VisionTeacher:
    """The teacher in --vision-teacher, or without one (--mock-data) a random one, on a device in the run's format."""
    init = config.init
    if init.vision_teacher is None:
        teacher = random_teacher(config.model, init.teacher_layer, config.run.seed)
    else:
        teacher = load_teacher(init.vision_teacher, config.model, init.teacher_layer)
    return teacher.to(device, torch.bfloat16 if config.precision.bf16 else torch.float32)


def load_teacher(folder: str, model: ModelConfig, layer: int) -> VisionTeacher:
    """Read the teacher from a Hugging Face folder.

    Raises:
        ValueError: the teacher is of no known family, or its tiles or patches differ from the model's.
    """
    family, config = vision_tower_of(folder)
    for ours, theirs in (("image_size", config.image_size), ("patch_size", config.patch_size)):
        if getattr(model.vision, ours) != theirs:
            raise ValueError(
                f"the vision teacher in {folder} has {ours} {theirs}, the model {getattr(model.vision, ours)}; "
                f"set --{ours.replace('_', '-')} {theirs}"
            )
    return VisionTeacher(
        family.model_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False), family, layer
    )


def random_teacher(model: ModelConfig, layer: int, seed: int) -> VisionTeacher:
    """A CLIP with random weights and the pre-decoder's sizes, for --mock-data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIP.model_class(vision_config_of(model))
    return VisionTeacher(clip, CLIP, layer)
