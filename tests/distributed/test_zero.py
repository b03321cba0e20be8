"""ZeRO 0-3 on two ranks against one plain torch process: losses, gradient norms and weights after two steps.

The reference below knows nothing of DeepSpeed, of ranks or of accumulation: it sees the global batch as one tensor,
divides by counts that it takes from the labels itself, and steps torch's AdamW. The two ranks see it in two
micro-batches each.

Planted once to see these tests fail: the factor for DeepSpeed's averaging left out of `train_step`, and the counts of a
part of the global batch instead of all of it. A mask that is causal only is the same on both sides;
`tests/unit/model/test_model.py` catches that.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.parallel.groups import build_groups
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.recipe import apply_recipe, parameter_groups
from megatron_haplovl.training.setup import build_model
from megatron_haplovl.training.teacher import random_teacher
from tests.distributed.cases import STEPS, config, result_file
from tests.distributed.launch import run_ranks

ONE_RANK = build_groups()
RECIPES = ("distill", "align", "full")

# Measured worst cases over all recipes and stages: loss 2.3e-7, norm 1.0e-7 (relative), weights 5.3e-7.
LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-6, 5e-6
# Measured: loss 1.9e-3, weights 3.6e-3 beyond their rounding to 8 bits. AdamW's first steps move every weight by about
# the learning rate, 1e-3, whatever the gradient's size, so that where its sign is lost in rounding a weight may end two
# such steps away.
BF16_LOSS_TOLERANCE, BF16_WEIGHT_TOLERANCE = 1e-2, 5e-3


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """One launch of all cases."""
    folder = tmp_path_factory.mktemp("zero")
    run_ranks("worker_zero.py", 2, str(folder))
    return folder


def whole_batches(c):
    """The global batches of the first steps, each as one tensor, from a stream without ranks."""
    schedule = dataclasses.replace(c.schedule, micro_batch_size=c.schedule.global_batch_size)
    c = dataclasses.replace(c, schedule=schedule)
    return build_loader((), c, num_steps=STEPS, dp_rank=0, dp_size=1).micro_batches()


@pytest.fixture(scope="module")
def serial():
    """Recipe -> (losses and norms per step, weights) of the plain reference."""
    runs = {recipe: train_serially(config(recipe)) for recipe in RECIPES}
    return {recipe: (metrics, weights) for recipe, (metrics, _, weights) in runs.items()}


def train_serially(c):
    """(losses and norms per step, gradients of the first step, weights) of one plain process."""
    stage1 = c.recipe.recipe == "distill"
    teacher = random_teacher(c.model, c.init.teacher_layer, c.run.seed) if stage1 else None
    whole = build_model(c, ONE_RANK)
    fill_weights(whole, c)
    model = whole.module
    apply_recipe(model, c.recipe)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, c.optimizer),
        lr=c.optimizer.lr,
        betas=(c.optimizer.adam_beta1, c.optimizer.adam_beta2),
        eps=c.optimizer.adam_eps,
    )
    metrics: list[dict[str, float]] = []
    gradients: dict[str, torch.Tensor] = {}
    batches = whole_batches(c)
    for _ in range(STEPS):
        batch = next(batches)
        if teacher is None:
            sums = model(batch, next_token_loss)
            losses = {"lm loss": sums["lm loss"] / int((batch.labels_BS != IGNORE_INDEX).sum())}
        else:
            sums = model(batch, teacher(batch), distillation_loss)
            text = int(batch.text_mask_BS.sum())
            losses = {
                "vision loss": sums["vision loss"] / batch.patch_target_P.numel(),
                "feature loss": sums["feature loss"] / text,
                "ctp loss": sums["ctp loss"] / text,
            }
        sum(losses.values()).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not gradients:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(trained, c.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({**{name: loss.item() for name, loss in losses.items()}, "grad norm": norm.item()})
    return metrics, gradients, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_rank_without_images_beside_one_with_images():
    """What the comparison below must include: peers hang there under ZeRO-3."""
    streams = [build_loader((), config("full"), num_steps=STEPS, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    images = [[batch.patch_target_P.numel() > 0 for batch in stream.micro_batches()] for stream in streams]
    assert any(a != b for a, b in zip(*images, strict=True)), images


def test_the_reference_sees_several_documents_images_and_tiles():
    c = config("full")
    stream = build_loader((), c, num_steps=STEPS, dp_rank=0, dp_size=1)
    assert stream.counts(0).documents >= 2 * c.schedule.global_batch_size
    batch: Batch = next(whole_batches(c))
    assert batch.tiles_TCHW.shape[0] > 2 * c.schedule.global_batch_size and batch.newline_target_N.numel() > 0


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_equals_one_plain_process(distributed, serial, recipe, zero_stage):
    result = torch.load(result_file(distributed, recipe, zero_stage, "fp32"), weights_only=True)
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
def test_bf16_stays_near_fp32(distributed, serial, recipe, zero_stage, mode):
    result = torch.load(result_file(distributed, recipe, zero_stage, mode), weights_only=True)
    metrics, weights = serial[recipe]
    for got, expected in zip(result["metrics"], metrics, strict=True):
        for name in expected.keys() - {"grad norm"}:
            assert got[name] == pytest.approx(expected[name], rel=BF16_LOSS_TOLERANCE), name
    for name, weight in weights.items():
        got = result["weights"][name].float()
        torch.testing.assert_close(got, weight, rtol=2**-7, atol=BF16_WEIGHT_TOLERANCE, msg=name)
