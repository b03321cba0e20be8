import json
import math
from typing import Any

import pytest
import torch

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.engine.deepspeed_config import deepspeed_config
from megatron_haplovl.engine.metrics import reduce_metrics, total_loss
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation
from megatron_haplovl.parallel.groups import Group, ParallelGroups
from megatron_haplovl.parallel.pipeline import PipelineCut, keep_stage
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.logging import training_line
from megatron_haplovl.training.model_setup import build_model
from megatron_haplovl.training.recipe import apply_recipe, parameter_groups
from megatron_haplovl.training.schedule import learning_rate
from tests.unit.model.test_model import TINY


def config(stage="finetune", **sections):
    overrides: dict[tuple[str, ...], Any] = {
        (section, name): value for section, values in sections.items() for name, value in values.items()
    }
    return build_config(stage, "haplovl-debug", {("data", "mock_data"): True, **overrides})


def test_learning_rate_warms_up_and_decays():
    c = config(
        optimizer={"lr": 1.0, "min_lr": 0.1},
        schedule={"train_iters": 24, "lr_warmup_iters": 4, "lr_decay_iters": 14, "lr_decay_style": "cosine"},
    )
    assert [learning_rate(c, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(c, 4) == 1.0
    assert learning_rate(c, 9) == pytest.approx(0.55)
    assert learning_rate(c, 6) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    assert learning_rate(c, 14) == learning_rate(c, 23) == pytest.approx(0.1)


@pytest.mark.parametrize(("style", "halfway"), [("linear", 0.5), ("constant", 1.0)])
def test_other_decays(style, halfway):
    c = config(optimizer={"lr": 1.0}, schedule={"train_iters": 10, "lr_decay_style": style})
    assert learning_rate(c, 5) == pytest.approx(halfway)


def trained_names(model, c):
    apply_recipe(model, c.recipe)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_distillation_freezes_only_the_teachers_matrix():
    model = HaploVLForDistillation(TINY, 16)
    everything = {name for name, _ in model.named_parameters()}
    assert everything - trained_names(model, config("pretrain")) == {"embedding.text.weight"}


def test_align_trains_the_connector_and_full_everything():
    model = HaploVL(TINY)
    assert trained_names(model, config(recipe={"recipe": "align"})) == {"connector.weight"}
    assert trained_names(model, config()) == {name for name, _ in model.named_parameters()}


def test_freeze_flags_take_parts_away():
    model = HaploVL(TINY)
    names = trained_names(model, config(recipe={"freeze_pre_decoder": True, "freeze_post_decoder": True}))
    assert {name.split(".")[0] for name in names} == {"embedding", "connector"}
    with pytest.raises(ValueError, match="nothing to train"):
        apply_recipe(model, config(recipe={"recipe": "align", "freeze_connector": True}).recipe)


def test_parameter_groups_have_their_rates_and_no_decay_on_vectors():
    model = HaploVL(TINY)
    c = config(optimizer={"lr": 1e-3, "connector_lr": 4e-3, "weight_decay": 0.1})
    apply_recipe(model, c.recipe)
    groups = parameter_groups(model, c.optimizer)
    # The largest group comes first and alone: DeepSpeed joins the small groups behind it to reduce their gradients.
    matrices = ["post_decoder", "connector", "pre_decoder", "embedding"]
    vectors = [f"{part} (no decay)" for part in matrices if part != "connector"]
    assert [group["name"] for group in groups] == [*matrices, *vectors]
    names = {p: n for n, p in model.named_parameters()}
    assert sorted(names[p] for g in groups for p in g["params"]) == sorted(names.values())
    for group in groups:
        assert group["lr_ratio"] == (4.0 if group["name"].startswith("connector") else 1.0)
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)


def test_a_learning_rate_for_a_frozen_part_is_refused():
    model = HaploVL(TINY)
    c = config(recipe={"recipe": "align"}, optimizer={"pre_decoder_lr": 1e-3})
    apply_recipe(model, c.recipe)
    with pytest.raises(ValueError, match="--pre-decoder-lr is given, but this run does not train that part"):
        parameter_groups(model, c.optimizer)


def test_every_stage_has_every_group_of_the_optimizer():
    """DeepSpeed adds the gradient norm up group by group over the stages."""
    config = build_config("finetune", "haplovl-debug", {("optimizer", "connector_lr"): 1e-3})
    model = HaploVL(TINY)
    whole = parameter_groups(model, config.optimizer)
    trained = {name: parameter.ndim for name, parameter in model.named_parameters()}
    keep_stage(model, ["post_decoder.1", "final_norm", "lm_head"])
    groups = parameter_groups(model, config.optimizer, trained=trained)
    assert [{**g, "params": []} for g in groups] == [{**g, "params": []} for g in whole]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {g["name"] for g in groups if g["params"]} == {"post_decoder", "post_decoder (no decay)"}


def test_a_stage_that_would_train_nothing_is_refused():
    config = build_config("finetune", "haplovl-debug", {("recipe", "recipe"): "align"})
    layers = tuple(HaploVL(config.model).layers())
    groups = ParallelGroups(pipeline=Group(0, 2, (0, 1)))
    with pytest.raises(ValueError, match=r"pipeline stage 1 \(post_decoder.0 ... lm_head\) would train nothing"):
        build_model(config, groups, PipelineCut(layers, (0, layers.index("post_decoder.0"))))


def test_losses_are_divided_by_global_counts():
    terms = (LossTerm("a", "text_tokens"), LossTerm("b", "patch_tokens"), LossTerm("c", "text_tokens", weight=None))
    weighted = (LossTerm("a", "text_tokens", 0.5), terms[1], LossTerm("c", "text_tokens", 3.0))
    counts = StepCounts(lm_tokens=1, text_tokens=4, patch_tokens=0, tokens=9, documents=2)
    sums = {"a": torch.tensor(6.0), "b": torch.tensor(0.0), "c": torch.tensor(2.0)}
    assert float(total_loss(sums, terms, counts)) == 1.5
    assert float(total_loss(sums, weighted, counts)) == 0.5 * 1.5 + 3.0 * 0.5
    assert reduce_metrics(sums, terms, counts, Group()) == {"a": 1.5, "b": 0.0, "c": 0.5}


def test_deepspeed_json_is_merged(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False}, "train_batch_size": "auto"}))
    c = config(
        schedule={"global_batch_size": 8, "micro_batch_size": 2},
        parallel={"zero_stage": 2, "deepspeed_config": str(path)},
    )
    merged = deepspeed_config(c, data_parallel_size=2)
    assert merged["zero_optimization"] == {
        **{"stage": 2, "overlap_comm": False},
        **{"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}},
    }
    assert (merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"]) == (2, 2)
    # DeepSpeed multiplies the size out itself, because it counts context-parallel ranks as data-parallel ones.
    assert "train_batch_size" not in merged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage is 3, but the flags say 1"),
        ('{"train_batch_size": 7}', "train_batch_size is 7, but the flags say 128"),
        ('{"optimizer": {"type": "Adam"}}', "'optimizer' is set by flags"),
        ('{"pipeline": {"activation_checkpoint_interval": 1}}', "'pipeline' is set by flags"),
        ('{"tensorboard": {"enabled": true}}', "'tensorboard' is set by flags"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "device is 'cpu', but the flags say 'none'",
        ),
        ('{"zero_optimization": {"offload_param": {"buffer_size": 9}}}', "offload_param.buffer_size is not used here"),
        ('{"zero_optimization": {"cpu_offload": true}}', "an old name; remove it and give --offload-optimizer cpu"),
        ('{"zero_optimization": 3}', "zero_optimization is 3, but the flags say"),
        ('{"offload": "auto"}', "offload is 'auto', and no flag sets it"),
        ("[]", "not a JSON object"),
        ("{", "Expecting property name"),
    ],
)
def test_deepspeed_json_must_agree(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        deepspeed_config(config(parallel={"deepspeed_config": str(path)}), 1)


def test_offload_reaches_deepspeed(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "cpu", "pin_memory": False}}}))
    offload = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu", "deepspeed_config": str(path)}
    for implementation in ("auto", "torch"):
        c = config(parallel=offload, optimizer={"adamw_implementation": implementation})
        merged = deepspeed_config(c, 1)
        assert merged["zero_optimization"] == {
            **{"stage": 3, "offload_optimizer": {"device": "cpu"}},
            **{"offload_param": {"device": "cpu", "pin_memory": False}},
        }
        # By default DeepSpeed refuses to offload any other optimizer than its own.
        assert ("zero_force_ds_cpu_optimizer" in merged) == (implementation == "torch")
    path.write_text('{"zero_force_ds_cpu_optimizer": true}')
    with pytest.raises(ValueError, match="zero_force_ds_cpu_optimizer is True, but the flags say False"):
        deepspeed_config(c, 1)


def test_batch_must_divide_over_the_ranks():
    with pytest.raises(ValueError, match="use a multiple of 6"):
        deepspeed_config(config(schedule={"global_batch_size": 8, "micro_batch_size": 2}), 3)


def test_flops_of_a_model_counted_by_hand():
    # Pre-decoder: 2 blocks of 4 x 16^2 + 2 x 16 x 32; post: 2 blocks of 2 x 24^2 + 2 x 24 x 12 + 3 x 24 x 32.
    matrices = 2 * 2048 * 10 + 50 * 24 * 3 + 2 * 4032 * 10 + 16 * 24 * 10
    attention = (2 * 16 + 2 * 24) * 77
    flops = training_flops(TINY, tokens=10, head_tokens=3, visible_pairs=77, stage=FINETUNE)
    assert flops == 6 * matrices + 12 * attention


def test_log_line_has_megatrons_form():
    line = training_line(10, 100, {"consumed samples": 40, "lm loss": 1.25, "grad norm": 0.5})
    assert line == " iteration       10/     100 | consumed samples: 40 | lm loss: 1.250000E+00 | grad norm: 0.500 |"
