"""Cuts of real model sizes: what moves them, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from deepspeed.runtime.utils import partition_balanced

from megatron_haplovl.config.layout import Layout, Workload
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN, StageSpec
from megatron_haplovl.data.image_geometry import Picture, visual_layouts
from megatron_haplovl.planning.cost import layer_costs
from megatron_haplovl.planning.cost_units import Precision, Speeds
from megatron_haplovl.planning.engine_memory import gradient_traffic
from megatron_haplovl.planning.estimate import estimate
from megatron_haplovl.planning.machine import DataSheet, machine_of
from megatron_haplovl.planning.partition import LayerLoad, stage_sums
from megatron_haplovl.planning.stage_cut import layer_loads, stage_cut
from megatron_haplovl.planning.work import Work, work_of_sequence

STAGE2 = frozenset({"embedding", "pre_decoder", "connector", "post_decoder"})
STAGE1 = frozenset({"embedding", "pre_decoder", "distillation"})
MODEL = MODELS["haplovl-8b"]
WORK = work_of_sequence(6144, visuals=visual_layouts([Picture(672, 672)], MODEL.vision), text=256, trained=128)


def cut(model: ModelConfig = MODEL, work: Work = WORK, stages: int = 4, **settings: Any) -> tuple[int, ...]:
    """First layers of the stages; stage 2 in bf16 on GPUs unless said otherwise."""
    return names_and_cut(model, work, Layout(pipeline=stages), **settings)[1]


def names_and_cut(model: ModelConfig, work: Work, layout: Layout, **settings: Any) -> tuple[list[str], tuple[int, ...]]:
    defaults: dict[str, Any] = {
        "device": "cuda",
        "bf16": True,
        "trained": STAGE2,
        "stage": FINETUNE,
        "method": "auto",
        "micro_batches": 8,
    }
    return stage_cut(model, work, layout, **{**defaults, **settings})


def loads(trained: frozenset[str] = STAGE2, stage: StageSpec = FINETUNE, device: str = "cuda") -> list[LayerLoad]:
    costs = layer_costs(MODEL, WORK, Layout(), Precision(), trained=trained, stage=stage)
    return layer_loads(costs, Layout(), machine_of(device, bf16=True), bf16=True)


def test_names_are_the_flat_list() -> None:
    names, first_layers = names_and_cut(MODEL, WORK, Layout(pipeline=4))
    pre, post = [f"pre_decoder.{i}" for i in range(24)], [f"post_decoder.{i}" for i in range(32)]
    assert names == ["embedding", *pre, "connector", *post, "final_norm", "lm_head"]
    assert len(first_layers) == 4 and first_layers[0] == 0
    names, _ = names_and_cut(MODEL, WORK, Layout(pipeline=2), trained=STAGE1, stage=PRETRAIN)
    assert names == ["embedding", *pre, "distillation"]


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_no_border_can_move_and_make_the_slowest_stage_faster(stages: int) -> None:
    seconds = [layer.seconds for layer in loads()]
    found = cut(stages=stages)
    slowest = max(stage_sums(seconds, found))
    for border in range(1, stages):
        for step in (-1, 1):
            moved = (*found[:border], found[border] + step, *found[border + 1 :])
            if all(a < b for a, b in pairwise((*moved, len(seconds)))):
                assert max(stage_sums(seconds, moved)) >= slowest * (1 - 1e-9)


def test_a_heavier_head_moves_the_borders_towards_it() -> None:
    light = cut(dataclasses.replace(MODEL, vocab_size=1024))
    # All text is trained, over a vocabulary that costs as much as blocks do.
    heavy = cut(dataclasses.replace(MODEL, vocab_size=256 * 1024), dataclasses.replace(WORK, head_tokens=6144))
    assert all(after > before for after, before in zip(heavy[1:], light[1:], strict=True))


def test_the_area_of_the_mask_changes_the_cut() -> None:
    # The wide post-decoder has more attention (4,096 channels against 1,024), but compared with its own products the
    # narrow pre-decoder has more: long documents make the pre-decoder's share larger.
    long = dataclasses.replace(WORK, tokens=65536, patches=62208, pairs=2156.6e6)
    short = dataclasses.replace(long, pairs=65536 * 128.0)
    assert cut(work=long)[1] < cut(work=short)[1]


def test_frozen_parts_weigh_less() -> None:
    # No backward pass before the post-decoder, so the first stage takes more layers.
    assert cut(trained=frozenset({"post_decoder"}))[1] > cut()[1]


def test_ranks_of_the_layout_are_seen() -> None:
    alone = names_and_cut(MODEL, WORK, Layout(pipeline=4))[1]
    # Messages of eight tensor ranks weigh more in the narrow pre-decoder.
    split = names_and_cut(MODEL, WORK, Layout(pipeline=4, tensor=8))[1]
    assert split[1] < alone[1]


def test_teacher_is_at_work_in_stage_1() -> None:
    seconds = [layer.seconds for layer in loads(STAGE1, stage=PRETRAIN)]
    # It holds the teacher's forward pass and the vocabulary's logits.
    assert seconds[-1] > 5 * seconds[1]
    with_tiles, without = (
        layer_costs(MODEL, work, Layout(), Precision(), trained=STAGE1, stage=PRETRAIN)[-1].moved_bytes
        for work in (WORK, dataclasses.replace(WORK, tiles=0))
    )
    # In bf16, 24 blocks: two norms and two sums of the width, three passes of the activation; a class token per tile.
    assert with_tiles - without == pytest.approx(24 * 2 * (10 * 1024 + 7 * 4096) * 577 * WORK.tiles)
    assert cut(stages=2, trained=STAGE1, stage=PRETRAIN)[1] > 13


def test_cpu_and_gpu_cut_differently() -> None:
    # On a CPU attention and elementwise operations are slower compared with products: the pre-decoder weighs more.
    assert cut(device="cpu")[1] < cut(device="cuda")[1]
    with pytest.raises(ValueError, match="the speed of device 'tpu' is not known"):
        cut(device="tpu")


def test_the_planner_makes_the_same_cut() -> None:
    layout = Layout(tensor=2, pipeline=4, data=2, micro_batch_size=2, recompute="selective")
    plan = estimate(
        Workload(MODEL, seq_length=6144, global_batch_size=128),
        WORK,
        layout,
        DataSheet().cluster(gpus=16),
        trained=STAGE2,
        bf16=True,
    )
    names, found = names_and_cut(MODEL, WORK * 2, layout, micro_batches=plan.micro_batches)
    assert found == plan.cut
    assert tuple(names[first] for first in found) == plan.first_layers


def test_parameters_counts_trained_ones_as_deepspeed_does() -> None:
    assert cut(method="parameters", stages=3) == tuple(
        partition_balanced([layer.trained_parameters for layer in loads()], 3)[:-1]
    )
    # The frozen matrix W weighs nothing in stage 1, and neither does the teacher: twelve blocks on either side.
    trained = [layer.trained_parameters for layer in loads(STAGE1, stage=PRETRAIN)]
    assert trained[0] < trained[1] and trained[-1] < trained[1]
    assert cut(method="parameters", stages=2, trained=STAGE1, stage=PRETRAIN) == (0, 13)


def test_explicit_cuts() -> None:
    assert cut(method="connector", stages=2) == (0, 25)
    with pytest.raises(ValueError, match="1 first layers make 2 stages, not 4"):
        cut(method="connector")
    with pytest.raises(ValueError, match=r"'pre_decoder.24' is no layer.*methods auto, parameters, uniform"):
        cut(method="pre_decoder.24", stages=2)


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="26 layers cannot be cut into 27 stages"):
        cut(stages=27, trained=STAGE1, stage=PRETRAIN)


def test_seconds_of_a_layer_by_hand() -> None:
    machine = dataclasses.replace(
        machine_of("cuda", bf16=True), speeds=Speeds(products=1e30, attention=1e30, memory=1e9), intra_hop=0.0
    )
    costs = layer_costs(MODEL, WORK, Layout(), Precision(), trained=STAGE2, stage=FINETUNE)
    block = layer_loads(costs, Layout(), machine, bf16=True)[30]
    # A bf16 gradient is read and added to a sum in fp32, beside what the operations move.
    assert block.seconds == pytest.approx((costs[30].moved_bytes + 10 * costs[30].parameters) / 1e9)
    fp32 = layer_loads(costs, Layout(), machine, bf16=False)[30]
    assert fp32.seconds - block.seconds == pytest.approx(2 * costs[30].parameters / 1e9)
    frozen = layer_costs(MODEL, WORK, Layout(), Precision(), trained=frozenset({"connector"}), stage=FINETUNE)
    assert layer_loads(frozen, Layout(), machine, bf16=True)[30].seconds == pytest.approx(frozen[30].moved_bytes / 1e9)
    tensor = Layout(tensor=2)
    costs = layer_costs(MODEL, WORK, tensor, Precision(), trained=STAGE2, stage=FINETUNE)
    narrow = dataclasses.replace(machine, speeds=Speeds(1e30, 1e30, 1e30), intra_node=1e9)
    assert layer_loads(costs, tensor, narrow, bf16=True)[30].seconds == pytest.approx(costs[30].tensor_bytes / 1e9)


@pytest.mark.parametrize(
    ("bf16", "zero_stage", "per_parameter"),
    [
        (False, 0, 4 + 8),
        (False, 1, 4 + 8),
        (True, 0, 2 * 6 + 12),  # Autocast's casts, back and forth; a sum in fp32.
        (True, 1, 2 + 8),
        (True, 2, 2 * 2 + (2 + 8) / 4),  # A copy, and a quarter of the sum.
        (True, 3, 2 * 2 + (2 + 8) / 4),
        (False, 2, 2 * 4 + (4 + 8) / 4),
    ],
)
def test_traffic_of_gradients(bf16: bool, zero_stage: int, per_parameter: float) -> None:
    moved = gradient_traffic(1000, bf16=bf16, zero_stage=zero_stage, replicas=4)
    assert moved == pytest.approx(1000 * per_parameter)


def test_gradients_of_the_vocabulary_are_moved_whole() -> None:
    def moved(trained: frozenset[str], index: int) -> float:
        return layer_costs(MODEL, WORK, Layout(), Precision(), trained=trained, stage=FINETUNE)[index].moved_bytes

    matrix = 2 * MODEL.vocab_size * MODEL.post.hidden_size
    # The head's gradient is multiplied in place; the lookup's is filled with zeros.
    assert moved(STAGE2, -1) - moved(frozenset({"connector"}), -1) == 2 * matrix
    assert moved(STAGE2, 0) - 3 * moved(frozenset({"connector"}), 0) == matrix
