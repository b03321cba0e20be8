"""A model cut into stages computes what it computes whole, wherever it is cut, and no parameter is lost or renamed."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch

from megatron_haplovl.engine.pipeline import MicroBatchSlot, PipelineStage
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation
from megatron_haplovl.model.initialization import initialize_weights
from megatron_haplovl.parallel.pipeline import PipelineCut, keep_stage
from tests.unit.model.test_model import TINY, make_batch

BATCH = make_batch(["tItt", "IttI", "ttt"], 60)
CAUSAL = dataclasses.replace(TINY, image_attention="causal")


def build(stage1, config=TINY):
    model = HaploVLForDistillation(config, 8) if stage1 else HaploVL(config)
    initialize_weights(dict(model.named_parameters()), 0.3, seed=0)
    model.embedding.text.weight.requires_grad_(not stage1)
    return model


def losses(model, stage1, hidden):
    if not stage1:
        return model.losses(hidden, BATCH, next_token_loss)["lm loss"]
    teacher_PD = torch.linspace(-1, 1, BATCH.patch_target_P.numel() * 8).view(-1, 8).square()
    return sum(model.losses(hidden, BATCH, teacher_PD, distillation_loss).values())


def last_loss(model, stage1, hidden, _batch):
    return losses(model, stage1, hidden)


def run_stages(model, stages, stage1):
    tensors = (BATCH.kv_start_BS, BATCH.kv_end_BS, BATCH.position_ids_BS)
    for number in range(len(stages.first)):
        part = copy.deepcopy(model)
        keep_stage(part, stages.of(number))
        slot = MicroBatchSlot()
        stage = PipelineStage(
            part,
            stages.of(number),
            slot,
            partial(last_loss, part, stage1),
            torch.nn.ParameterList(),
        )
        if stage.is_first or stage.is_last:
            slot.put(BATCH)
        tensors = stage(tensors)
    return tensors


@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("stage1", [False, True])
def test_every_cut_gives_the_loss_of_the_whole_model(stage1, config):
    model = build(stage1, config)
    layers = tuple(model.layers())
    whole = losses(model, stage1, model.hidden_states(BATCH))
    for place in range(1, len(layers)):
        assert torch.equal(run_stages(model, PipelineCut(layers, (0, place)), stage1), whole), layers[place]
    assert torch.equal(run_stages(model, PipelineCut(layers, tuple(range(len(layers)))), stage1), whole)


@pytest.mark.parametrize("stage1", [False, True])
def test_stages_hold_every_parameter_once_under_its_own_name(stage1):
    model = build(stage1)
    stages = PipelineCut(tuple(model.layers()), (0, 2, 3))
    held = []
    for number in range(3):
        part = copy.deepcopy(model)
        keep_stage(part, stages.of(number))
        names = [name for name, _ in part.named_parameters()]
        held += [name for name in names if stages.of_parameter(name) == number]
        # Beside the heads of stage 1 there is a copy of the matrix that they read.
        assert [n for n in names if stages.of_parameter(n) != number] == (
            ["embedding.text.weight"] if stage1 and number == 2 else []
        )
    assert held == [name for name, _ in model.named_parameters()]


def test_the_flat_list_and_its_stages():
    layers = tuple(build(False).layers())
    assert layers == (
        *("embedding", "pre_decoder.0", "pre_decoder.1", "connector", "post_decoder.0", "post_decoder.1"),
        *("final_norm", "lm_head"),
    )
    stages = PipelineCut(layers, (0, 3, 7))
    assert [stages.of(number) for number in range(3)] == [layers[:3], layers[3:7], layers[7:]]
    assert stages.partition == "connector,lm_head"
    assert stages.of_parameter("pre_decoder.1.mlp.up_proj.weight") == 0
    assert stages.of_parameter("connector.weight") == 1
    assert stages.of_parameter("lm_head.weight") == 2
