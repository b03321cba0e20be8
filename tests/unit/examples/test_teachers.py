"""The small teachers fit the model that they initialise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from examples.common.train_vision_teacher import build_clip
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.conversion.hf_compatibility import check_vision_config
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import train_sentencepiece


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
def test_the_clip_has_the_pre_decoders_sizes_and_activation(tmp_path, activation):
    tokenizer = load_tokenizer(str(train_sentencepiece(tmp_path, pad_id=2, eos_id=3))).hf
    debug = MODELS["haplovl-debug"]
    model = dataclasses.replace(debug, pre=dataclasses.replace(debug.pre, activation=activation))
    clip = build_clip(model, tokenizer)
    vision = clip.config.vision_config
    assert isinstance(vision, CLIPVisionConfig)
    check_vision_config(vision, model, Path("clip"))
    size = model.vision.image_size
    with torch.no_grad():
        hidden = clip.vision_model(pixel_values=torch.zeros(1, 3, size, size)).last_hidden_state
    assert hidden.shape == (1, (size // model.vision.patch_size) ** 2 + 1, model.pre.hidden_size)
