"""ZeRO 0-3 on two ranks against one plain torch process: losses, gradient norms and weights after two steps.

The reference (`reference.py`) sees the global batch as one tensor. The two ranks see it in two micro-batches each.

Planted once to see these tests fail: the factor for DeepSpeed's averaging left out of `train_step`, and the counts of a
part of the global batch instead of all of it. A mask that is only causal would be the same on both sides;
`tests/unit/model/test_model.py` catches it.
"""

from __future__ import annotations

import pytest
import torch

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.loader import build_loader
from tests.distributed.cases import STEPS, config, result_file
from tests.distributed.launch import run_ranks
from tests.distributed.reference import train_serially, whole_batches

RECIPES = ("distill", "align", "full")

# Measured worst cases over all recipes and stages: loss 2.3e-7, norm 1.0e-7 (relative), weights 5.3e-7.
LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-6, 5e-6
# Measured: loss 1.9e-3, weights 3.6e-3 beyond their rounding to 8 bits. AdamW's first steps move every weight by about
# the learning rate, 1e-3, whatever the gradient's size. If rounding loses the gradient's sign, a weight may end two
# such steps away.
BF16_LOSS_TOLERANCE, BF16_WEIGHT_TOLERANCE = 1e-2, 5e-3


@pytest.fixture(scope="module")
def serial():
    """Recipe -> (losses and norms per step, weights) of the plain reference."""
    runs = {recipe: train_serially(config(recipe)) for recipe in RECIPES}
    return {recipe: (metrics, weights) for recipe, (metrics, _, weights) in runs.items()}


def test_a_rank_without_images_beside_one_with_images():
    """The comparison below must include such a batch, because it makes other programs hang under ZeRO-3."""
    loaders = [build_loader((), config("full"), num_steps=STEPS, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    images = [[batch.patch_target_P.numel() > 0 for batch in loader.micro_batches()] for loader in loaders]
    assert any(a != b for a, b in zip(*images, strict=True)), images


def test_the_reference_sees_several_documents_images_and_tiles():
    c = config("full")
    loader = build_loader((), c, num_steps=STEPS, dp_rank=0, dp_size=1)
    assert loader.counts(0).documents >= 2 * c.schedule.global_batch_size
    batch: Batch = next(whole_batches(c))
    assert batch.tiles_TCHW.shape[0] > 2 * c.schedule.global_batch_size and batch.newline_target_N.numel() > 0


def test_the_first_step_has_every_kind_of_document():
    """Every layout is run on these batches, so all of them train on images and videos in every combination."""
    found = set(documents_of(next(whole_batches(config("full")))))
    assert {(), ("image",), ("image", "image"), ("video of 4",), ("image", "video of 4")} <= found


def documents_of(batch: Batch) -> list[tuple[str, ...]]:
    """Images and videos of each document, read off the mask: a frame is a block without newlines."""
    newlines = set(batch.newline_target_N.tolist())
    documents = []
    for row, (starts, ends) in enumerate(zip(batch.kv_start_BS.tolist(), batch.kv_end_BS.tolist(), strict=True)):
        visual = (~batch.text_mask_BS[row]).tolist()
        for first in sorted(set(starts)):
            length = starts.count(first)
            visuals, frames, position = [], 0, first
            while position < first + length:
                end = ends[position]
                lines = sum(row * len(starts) + p in newlines for p in range(position, end))
                if visual[position] and lines == 0:
                    frames += 1
                elif visual[position]:
                    visuals.append(f"video of {frames}" if frames else "image")
                    frames = 0
                position = end
            assert frames == 0 or length == 1  # Padding is neither text nor a frame.
            documents += [tuple(visuals)] if length > 1 else []
    return documents


def trained(folder, recipe, zero_stage, mode):
    run_ranks("worker_zero.py", 2, str(folder), recipe, str(zero_stage), mode)
    return torch.load(result_file(folder, recipe, zero_stage, mode), weights_only=True)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_equals_one_plain_process(tmp_path, serial, recipe, zero_stage):
    result = trained(tmp_path, recipe, zero_stage, "fp32")
    metrics, weights = serial[recipe]
    for got, expected in zip(result["metrics"], metrics, strict=True):
        for name, value in expected.items():
            tolerance = NORM_TOLERANCE if name == "grad norm" else LOSS_TOLERANCE
            assert got[name] == pytest.approx(value, rel=tolerance), name
    assert metrics[0]["grad norm"] > config(recipe).optimizer.clip_grad or recipe == "align"
    assert result["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("zero_stage", "mode"), [*((z, "bf16") for z in (0, 1, 2, 3)), *((z, "bf16-offload") for z in (1, 2, 3))]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_stays_near_fp32(tmp_path, serial, recipe, zero_stage, mode):
    result = trained(tmp_path, recipe, zero_stage, mode)
    metrics, weights = serial[recipe]
    for got, expected in zip(result["metrics"], metrics, strict=True):
        for name in expected.keys() - {"grad norm"}:
            assert got[name] == pytest.approx(expected[name], rel=BF16_LOSS_TOLERANCE), name
    for name, weight in weights.items():
        got = result["weights"][name].float()
        torch.testing.assert_close(got, weight, rtol=2**-7, atol=BF16_WEIGHT_TOLERANCE, msg=name)
