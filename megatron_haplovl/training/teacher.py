"""The vision teacher of stage 1: a Hugging Face CLIP vision transformer, frozen and never differentiated."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_compatibility import vision_config_of
from megatron_haplovl.data.batch import Batch


class VisionTeacher(nn.Module):
    """T_v of paper Eq. 2.

    Args:
        clip: the teacher.
        layer: index into its `hidden_states`; -1 is the last. The class token is dropped.
    """

    def __init__(self, clip: CLIPVisionModel, layer: int) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.layer = layer
        depth = clip.config.num_hidden_layers
        if not -(depth + 1) <= layer <= depth:
            raise ValueError(
                f"--teacher-layer {layer}: the teacher has {depth} layers, so it goes from {-depth - 1} to {depth}"
            )

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.clip.config.hidden_size

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Features [P, D] of the batch's patches, in their order; every tile is one image to the teacher."""
        if batch.tiles_TCHW.shape[0] == 0:
            return batch.tiles_TCHW.new_zeros(0, self.width)
        tiles_TCHW = batch.tiles_TCHW.to(self.clip.dtype)
        if self.layer in (-1, self.clip.config.num_hidden_layers):
            # Without the other layers' outputs, which would all be kept.
            features_TLD = self.clip(tiles_TCHW).last_hidden_state
        else:
            features_TLD = self.clip(tiles_TCHW, output_hidden_states=True).hidden_states[self.layer]
        return features_TLD[:, 1:].flatten(0, 1).index_select(0, batch.patch_source_P)


def teacher_width(folder: str | None, model: ModelConfig) -> int:
    """Width of the features of the teacher in a folder; without one, of :func:`random_teacher`."""
    return model.pre.hidden_size if folder is None else CLIPVisionConfig.from_pretrained(folder).hidden_size


def load_teacher(folder: str, model: ModelConfig, layer: int) -> VisionTeacher:
    """Read the teacher from a Hugging Face folder.

    Raises:
        ValueError: its tiles or patches differ from the model's.
    """
    clip = CLIPVisionModel.from_pretrained(folder)
    for ours, theirs in (("image_size", clip.config.image_size), ("patch_size", clip.config.patch_size)):
        if getattr(model.vision, ours) != theirs:
            raise ValueError(
                f"the vision teacher in {folder} has {ours} {theirs}, the model {getattr(model.vision, ours)}; "
                f"set --{ours.replace('_', '-')} {theirs}"
            )
    return VisionTeacher(clip, layer)


def random_teacher(model: ModelConfig, layer: int, seed: int) -> VisionTeacher:
    """A teacher with random weights and the pre-decoder's sizes, for --mock-data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPVisionModel(vision_config_of(model))
    return VisionTeacher(clip, layer)
