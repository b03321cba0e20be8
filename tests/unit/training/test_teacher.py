"""The vision teacher beside transformers' own hidden states, for every family and layer.

Planted once to see it fail: CLIP's class token kept, SigLIP's colours left as they are, the norm behind SigLIP's blocks
applied, one layer too many.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from megatron_haplovl.conversion.hf_compatibility import vision_config_of
from megatron_haplovl.conversion.hf_sources import VISION_TOWERS
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.dataset import collate, lay_out_document
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, Sample
from megatron_haplovl.training.teacher import load_teacher
from tests.fixtures.tiny_haplo import noise_image, tiny_model

MODEL = tiny_model()
CELLS = MODEL.vision.cells_per_tile
DEPTH = 2
TILES = torch.randint(
    256, (2, 3, MODEL.vision.image_size, MODEL.vision.image_size), generator=torch.Generator().manual_seed(0)
).byte()
# Patches of both tiles, in another order than theirs.
SOURCE = torch.randperm(2 * CELLS, generator=torch.Generator().manual_seed(1))[: CELLS + 1]


def batch_of(tiles: torch.Tensor) -> Batch:
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(
        tokens_BS=nothing,
        labels_BS=nothing,
        text_mask_BS=nothing,
        position_ids_BS=nothing,
        kv_start_BS=nothing,
        kv_end_BS=nothing,
        tiles_TCHW=tiles,
        patch_source_P=SOURCE[: len(tiles) * CELLS],
        patch_target_P=SOURCE,
        newline_target_N=torch.zeros(0),
        visible_pairs=0,
    )


def tower_of(name: str):
    settings = vision_config_of(dataclasses.replace(MODEL, pre=dataclasses.replace(MODEL.pre, num_layers=DEPTH)))
    (family,) = (tower for tower in VISION_TOWERS if tower.name == name)
    if name == "SigLIP":
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "patch_size",
            "image_size",
        )
        network: PreTrainedModel = SiglipVisionModel(
            SiglipVisionConfig(**{key: getattr(settings, key) for key in names})
        )
    else:
        network = family.model_class(settings)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return family, network.eval()


@pytest.mark.parametrize("layer", [-1, -2, 0, DEPTH])
@pytest.mark.parametrize("name", [tower.name for tower in VISION_TOWERS])
def test_features_are_the_towers_hidden_states(name, layer, tmp_path):
    family, network = tower_of(name)
    network.save_pretrained(tmp_path)
    pixels = (TILES / 255 - torch.tensor(family.mean).view(3, 1, 1)) / torch.tensor(family.std).view(3, 1, 1)
    with torch.no_grad():
        expected = network(pixels, output_hidden_states=True).hidden_states[layer]
    teacher = load_teacher(str(tmp_path), MODEL, layer)
    assert teacher.width == MODEL.pre.hidden_size
    found = teacher(batch_of(TILES))
    patches = expected[:, expected.shape[1] - CELLS :].flatten(0, 1)
    # Measured: 9e-7 of values up to 3.
    torch.testing.assert_close(found, patches[SOURCE], rtol=0, atol=1e-5)
    assert float(expected.abs().max()) > 1


@pytest.mark.parametrize("name", [tower.name for tower in VISION_TOWERS])
def test_each_tile_and_each_frame_is_an_image_to_the_teacher(name, tmp_path):
    """Beside the tower run on one tile or frame after the other, cut here by hand; two samples in one sequence."""
    family, network = tower_of(name)
    network.save_pretrained(tmp_path)
    vision = MODEL.vision
    side, cells = vision.image_size, vision.cells_per_side
    wide, frames = noise_image(side, 2 * side, 1), [noise_image(2 * side, side, seed) for seed in (2, 3, 4)]
    one_tile = noise_image(side, side, 5)
    ids, marks = np.array([5, 63, 7], np.int32), np.array([False, True, False])
    alone = Sample(ids, np.ones(3, np.uint8), marks, (encoded(wide),))
    several = Sample(
        np.repeat(ids, 2),
        np.ones(6, np.uint8),
        np.repeat(marks, 2),
        (EncodedVideo(tuple(map(encoded, frames))), encoded(one_tile)),
    )
    documents = [lay_out_document([sample], vision) for sample in (alone, several)]
    found = load_teacher(str(tmp_path), MODEL, -1)(collate([documents], 64, vision))

    def features(picture):
        colours = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
        pixels = (colours - torch.tensor(family.mean).view(3, 1, 1)) / torch.tensor(family.std).view(3, 1, 1)
        with torch.no_grad():
            return network(pixels[None], output_hidden_states=True).hidden_states[-1][0, -CELLS:]

    left, right = (features(wide.crop((x, 0, x + side, side))).unflatten(0, (cells, cells)) for x in (0, side))
    expected = [torch.cat([left, right], dim=1).flatten(0, 1)]
    expected += [features(frame.resize((side, side), Image.Resampling.BICUBIC)) for frame in frames]
    expected.append(features(one_tile))
    # As above: the sums run in another order.
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return EncodedImage(buffer.getvalue(), image.height, image.width)


def test_a_batch_without_images_has_no_features(tmp_path):
    _, network = tower_of("SigLIP")
    network.save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path), MODEL, -1)(batch_of(TILES[:0])).shape == (0, MODEL.pre.hidden_size)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    _, network = tower_of("CLIP")
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--teacher-layer 3: the teacher has 2 layers, so it goes from -3 to 2"):
        load_teacher(str(tmp_path), MODEL, 3)
