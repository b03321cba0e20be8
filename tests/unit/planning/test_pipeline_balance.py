"""The stage benchmark on a small model: each stage alone computes what it computes in the whole. Nothing is timed."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from benchmarks.pipeline_balance import Stages, flat_model, measure, shrunk
from benchmarks.planner_memory import STAGE2, build, make_batch
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN, StageSpec
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.model.haplovl import HaploVL


def small() -> ModelConfig:
    """Two blocks and two, at a sixteenth of haplovl-7b's widths, and images of four patches."""
    config = shrunk(MODELS["haplovl-7b"], 16)
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=28),
        pre=dataclasses.replace(config.pre, num_layers=2),
        post=dataclasses.replace(config.post, num_layers=2),
    )


def test_proportions_are_kept() -> None:
    full, eighth = MODELS["haplovl-7b"], shrunk(MODELS["haplovl-7b"], 8)
    assert (eighth.pre.num_layers, eighth.post.num_layers) == (24, 32)
    for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads"):
        assert getattr(full.pre, name) == 8 * getattr(eighth.pre, name)
        assert getattr(full.post, name) == 8 * getattr(eighth.post, name)
    assert full.vocab_size == 8 * eighth.vocab_size and eighth.post.num_key_value_heads == 4


def test_stages_alone_make_the_whole_models_gradients() -> None:
    config = small()
    batch = make_batch(config, (8, 9), 30, untrained=3)
    whole = build(config, torch.float32, FINETUNE, STAGE2)
    assert isinstance(whole, HaploVL)
    whole(batch, next_token_loss)["lm loss"].backward()

    runner = Stages(model := flat_model(config, batch, FINETUNE, torch.float32))
    parameters = dict(model.model.named_parameters())
    assert parameters.keys() == {name for name, _ in whole.named_parameters()}
    for parameter in parameters.values():
        parameter.grad = None
    for first, end in ((0, 2), (2, 5), (5, 8)):
        runner.run(first, end)
    for name, parameter in whole.named_parameters():
        grad = parameters[name].grad
        assert grad is not None and parameter.grad is not None
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [FINETUNE, PRETRAIN], ids=str)
def test_records(stage: StageSpec) -> None:
    records = measure(
        small(), stage, torch.device("cpu"), torch.float32, (2,), 1, with_deepspeed=True, clock=time.perf_counter
    )
    assert [record["partition"] for record in records] == ["auto", "parameters", "uniform"]
    for record in records:
        assert record["training_stage"] == (1 if stage.has_teachers else 2)
        assert len(record["stage_seconds"]) == len(record["first_layers"]) == 2
        assert sum(record["predicted_stage_seconds"]) == pytest.approx(sum(record["stage_seconds"]))
        slowest, mean = max(record["stage_seconds"]), sum(record["stage_seconds"]) / 2
        assert record["imbalance"] == pytest.approx(slowest / mean - 1.0)
    assert records[2]["first_layers"] == ["embedding", "pre_decoder.1" if stage.has_teachers else "post_decoder.0"]
