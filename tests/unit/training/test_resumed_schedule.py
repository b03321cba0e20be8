"""Which learning rates a resumed run goes on with, beside a formula of their own."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.training.resumed_schedule import resumed_schedule
from megatron_haplovl.training.schedule import learning_rate

DONE = 60


def config(**changes):
    defaults = {
        **{"schedule__train_iters": 100, "schedule__lr_warmup_iters": 10, "schedule__lr_decay_style": "cosine"},
        **{"optimizer__lr": 1e-3, "optimizer__min_lr": 1e-4, "data__mock_data": True, "checkpoint__load": "there"},
    }
    values = {tuple(name.split("__")): value for name, value in {**defaults, **changes}.items()}
    return build_config("finetune", "haplovl-debug", values)


def rates(style, peak, floor, warmup, end, steps):
    """All rates at once, written down from the shape of the curve: a ramp, then a part of a cosine or a line."""
    step = np.arange(steps)
    part = np.clip((step - warmup) / (end - warmup), 0.0, 1.0)
    weight = {"cosine": np.cos(part * np.pi / 2) ** 2, "linear": 1.0 - part, "constant": np.ones(steps)}[style]
    return np.where(step < warmup, peak * (step + 1) / max(warmup, 1), floor + (peak - floor) * weight)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint's folder with a run's settings in it."""

    def save(settings, step=DONE):
        (tmp_path / "config.json").write_text(json.dumps({**settings.to_dict(), "iteration": step}))
        return tmp_path

    return save


def remaining(found, last):
    return [learning_rate(found.config, step) for step in range(DONE, last)]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_an_interrupted_schedule_goes_on_exactly(saved, style):
    floor = 0.0 if style == "constant" else 1e-4
    settings = config(schedule__lr_decay_style=style, optimizer__min_lr=floor)
    found = resumed_schedule(settings, saved(settings), DONE)
    assert found.config == settings and not found.remark and not found.is_jump
    expected = rates(style, 1e-3, floor if style != "constant" else 1e-3, 10, 100, 100)[DONE:]
    np.testing.assert_allclose(remaining(found, 100), expected, rtol=1e-12)
    # Interrupted or not, the same numbers to the last bit.
    assert remaining(found, 100) == [learning_rate(settings, step) for step in range(DONE, 100)]


def test_a_longer_run_says_that_the_rate_jumps(saved):
    longer = config(schedule__train_iters=200)
    found = resumed_schedule(longer, saved(config()), DONE)
    assert found.is_jump and found.config == longer
    old, new = rates("cosine", 1e-3, 1e-4, 10, 100, 100)[DONE], rates("cosine", 1e-3, 1e-4, 10, 200, 200)[DONE]
    assert f"at step {DONE + 1} the checkpoint's rate is {old:.6g}, the flags' {new:.6g}" in found.remark
    assert "the learning rate jumps (--train-iters was 100 and is 200" in found.remark
    assert "--use-checkpoint-opt_param-scheduler" in found.remark and "--override-opt_param-scheduler" in found.remark


def test_the_flags_are_meant(saved):
    longer = config(schedule__train_iters=200, checkpoint__override_opt_param_scheduler=True)
    found = resumed_schedule(longer, saved(config()), DONE)
    assert found.config == longer and not found.is_jump and "the flags' schedule" in found.remark
    np.testing.assert_allclose(remaining(found, 200), rates("cosine", 1e-3, 1e-4, 10, 200, 200)[DONE:], rtol=1e-12)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_the_checkpoints_schedule_goes_on(saved, style):
    floor = 0.0 if style == "constant" else 1e-4
    before = config(schedule__lr_decay_style=style, optimizer__min_lr=floor)
    asked = {"checkpoint__use_checkpoint_opt_param_scheduler": True}
    longer = config(schedule__train_iters=200, optimizer__lr=5.0, schedule__lr_warmup_iters=3, **asked)
    found = resumed_schedule(longer, saved(before), DONE)
    expected = rates(style, 1e-3, floor if style != "constant" else 1e-3, 10, 100, 200)[DONE:]
    np.testing.assert_allclose(remaining(found, 200), expected, rtol=1e-12)
    assert found.config.schedule.train_iters == 200 and not found.is_jump
    # What is saved from now on says the same to the next restart, which has the same flags.
    again = resumed_schedule(longer, saved(found.config, 150), 150)
    assert remaining(again, 200) == remaining(found, 200)


def test_a_difference_that_begins_later_is_a_remark(saved):
    found = resumed_schedule(config(schedule__train_iters=200), saved(config(), 4), 4)
    assert not found.is_jump and "will differ from what it would have been" in found.remark


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 2e-3), ("min_lr", 0.0), ("connector_lr", 1e-5), ("post_decoder_lr", 1e-5)]
)
def test_every_rate_is_looked_at(saved, name, value):
    found = resumed_schedule(config(**{f"optimizer__{name}": value}), saved(config()), DONE)
    assert found.is_jump and f"--{name.replace('_', '-')} was" in found.remark


def test_the_same_end_in_other_words_is_no_difference(saved):
    found = resumed_schedule(config(schedule__lr_decay_iters=100), saved(config()), DONE)
    assert not found.remark
    assert dataclasses.replace(found.config.schedule, lr_decay_iters=None) == config().schedule


def in_samples(**changes):
    """The same run, counted in samples: 100 full batches of 8 behind a ramp."""
    defaults = {
        **{"schedule__train_samples": 800, "schedule__lr_warmup_samples": 80, "schedule__lr_decay_style": "cosine"},
        **{"schedule__global_batch_size": 8, "schedule__rampup_batch_size": (4, 4, 40)},
        **{"optimizer__lr": 1e-3, "optimizer__min_lr": 1e-4, "data__mock_data": True, "checkpoint__load": "there"},
    }
    values = {tuple(name.split("__")): value for name, value in {**defaults, **changes}.items()}
    return build_config("finetune", "haplovl-debug", values)


def test_a_schedule_in_samples_goes_on_exactly(saved):
    found = resumed_schedule(in_samples(), saved(in_samples()), DONE)
    assert found.config == in_samples() and not found.remark and not found.is_jump


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"schedule__train_samples": 1600}, "--train-samples was 800 and is 1600"),
        ({"schedule__lr_decay_samples": 1600}, "--lr-decay-samples was 800 and is 1600"),
        ({"schedule__lr_warmup_samples": 0}, "--lr-warmup-samples was 80 and is 0"),
    ],
)
def test_a_difference_in_samples_is_named_and_the_checkpoints_schedule_can_go_on(saved, changes, flag):
    found = resumed_schedule(in_samples(**changes), saved(in_samples()), DONE)
    assert found.is_jump and flag in found.remark
    asked = in_samples(**changes, checkpoint__use_checkpoint_opt_param_scheduler=True)
    found = resumed_schedule(asked, saved(in_samples()), DONE)
    was = [learning_rate(in_samples(), step) for step in range(DONE, 105)]
    assert [learning_rate(found.config, step) for step in range(DONE, 105)] == was
    assert found.config.schedule.train_iters == asked.schedule.train_iters


def test_a_schedule_that_counts_something_else(saved):
    found = resumed_schedule(in_samples(), saved(config()), DONE)
    assert found.is_jump and "--train-samples was None and is 800" in found.remark
    asked = in_samples(checkpoint__use_checkpoint_opt_param_scheduler=True)
    with pytest.raises(ValueError, match="the checkpoint's learning rate is counted in iters, this run in samples"):
        resumed_schedule(asked, saved(config()), DONE)
