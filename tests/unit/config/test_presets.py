"""The presets hold the paper's sizes: parameters per part, counted by hand, of models that exist on the meta device."""

import pytest
import torch

from megatron_haplovl.config.presets import MODELS, SEQ_LENGTHS
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.data.image_geometry import Frames, Picture, visual_layouts
from megatron_haplovl.model.haplovl import HaploVL

# CLIP-ViT-L block: 4 (1024^2 + 1024) attention, 1024 x 4096 + 4096 and 4096 x 1024 + 1024 MLP, 4 x 1024 norms.
PRE_DECODER = 24 * (4_198_400 + 4_198_400 + 4_195_328 + 4_096)
# projector d x l aside: patch 588 x 1024, position 576 x 1024, pre_norm 2 x 1024.
VISION = 602_112 + 589_824 + 2_048
NEWLINE = 1_024

EXPECTED = {
    "haplovl-7b": {
        "embedding": 32_000 * 4_096 + 4_096 * 1_024 + VISION,
        "pre_decoder": PRE_DECODER,
        "connector": 4_194_304,
        # q, k, v, o of 4096^2; SwiGLU 3 x 4096 x 11008; two norms.
        "post_decoder": 32 * (4 * 16_777_216 + 135_266_304 + 8_192),
        "final_norm": 4_096,
        "lm_head": 131_072_000,
    },
    "haplovl-8b": {
        "embedding": 128_256 * 4_096 + 4_096 * 1_024 + VISION + NEWLINE,
        "pre_decoder": PRE_DECODER,
        "connector": 4_194_304,
        # q, o of 4096^2; k, v of 1024 x 4096; SwiGLU 3 x 4096 x 14336; two norms.
        "post_decoder": 32 * (33_554_432 + 8_388_608 + 176_160_768 + 8_192),
        "final_norm": 4_096,
        "lm_head": 525_336_576,
    },
    "haplovl-7b-pro": {
        "embedding": 152_064 * 3_584 + 3_584 * 1_024 + VISION + NEWLINE,
        "pre_decoder": PRE_DECODER,
        "connector": 3_670_016,
        # q with bias, o without, k and v of 512 x 3584 with biases; SwiGLU 3 x 3584 x 18944; two norms.
        "post_decoder": 28 * (12_848_640 + 12_845_056 + 3_671_040 + 203_685_888 + 7_168),
        "final_norm": 3_584,
        "lm_head": 544_997_376,
    },
}


def parameters_by_part(model: torch.nn.Module) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


@pytest.mark.parametrize("preset", EXPECTED)
def test_parameters_per_part(preset):
    with torch.device("meta"):
        model = HaploVL(MODELS[preset])
    assert parameters_by_part(model) == EXPECTED[preset]


def test_total_of_the_8b_model():
    assert sum(EXPECTED["haplovl-8b"].values()) == 8_342_154_240


def test_multi_image_model_continues_from_the_8b_model():
    assert MODELS["haplovl-8b-mi"] == MODELS["haplovl-8b"]


def test_the_multi_image_context_holds_ten_images_or_a_video_of_ten_frames():
    """The figures at the head of its recipe: an image of several has one tile, and so has a frame."""
    vision, length = MODELS["haplovl-8b-mi"].vision, SEQ_LENGTHS["haplovl-8b-mi"]

    def tokens(*visuals):
        return sum(layout.num_tokens for layout in visual_layouts(visuals, vision))

    image = Picture(672, 672)
    assert (tokens(image), tokens(image, image)) == (2352, 2 * 600)
    assert tokens(*[image] * 10) < length < tokens(*[image] * 11)
    assert tokens(Frames(10)) < length < tokens(Frames(11))
    assert (length - tokens(Frames(8)), 9728 - tokens(Frames(16))) == (1535, 511)


@pytest.mark.parametrize("preset", MODELS)
def test_presets_are_consistent(preset):
    validate_model(MODELS[preset])
