"""Sizes of global batches against a loop written from Megatron-LM's definition, and runs that count samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

import pytest

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.cli import build_config, parse_args

RAMPS = [
    (16, (4, 4, 48)),
    (16, (4, 4, 50)),  # Levels of 16 2/3 samples.
    (16, (2, 1, 100)),  # Steps end behind their levels.
    (32, (8, 8, 10)),  # Levels shorter than a step are passed over.
    (7, (1, 3, 1)),
    (12, (12, 5, 60)),  # No rise at all.
    (49, (1, 1, 1000)),  # A float of 1000 / 48 times 48 k may fall short of 1000 k.
    (1536, (32, 32, 5_859_375)),
    (20, ()),
]
MOCK = ["--model", "haplovl-debug", "--mock-data"]


def megatron(full: int, ramp: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Samples consumed before a step, and its size."""
    consumed = 0
    while True:
        size = full
        if ramp and ramp[0] < full:
            start, increment, samples = ramp
            per_level = Fraction(samples, (full - start) // increment)
            size = min(full, start + increment * (consumed // per_level))
        yield consumed, size
        consumed += size


@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_sizes_are_megatrons(full: int, ramp: tuple[int, ...]) -> None:
    batches = BatchSchedule(full, ramp)
    number = batches.levels.firsts[-1] + 100
    expected = list(islice(megatron(full, ramp), number))
    assert [(batches.before(step), batches.size(step)) for step in range(number)] == expected
    assert {size for _, size in expected} <= set(batches.sizes)
    assert [batches.levels.sizes[0], batches.levels.sizes[-1]] == [expected[0][1], full]
    changes = [step for step in range(number) if step == 0 or expected[step][1] != expected[step - 1][1]]
    assert list(batches.levels.firsts) == changes
    for samples in range(0, expected[60][0] + 2):
        assert batches.steps_for(samples) == next(step for step in range(99) if expected[step][0] >= samples)


@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_every_sample_is_in_one_step(full: int, ramp: tuple[int, ...]) -> None:
    levels = BatchSchedule(full, ramp).levels
    of_samples = [step for step in range(50) for _ in range(levels.size(step))][:2000]
    assert [levels.step_at(sample) for sample in range(len(of_samples))] == of_samples


@pytest.mark.parametrize(
    ("full", "ramp", "message"),
    [
        (0, (), "--global-batch-size must be at least 1, got 0"),
        (16, (4,), "three numbers, START INCREMENT SAMPLES, got 4"),
        (16, (4, 4, 9, 9), "three numbers, START INCREMENT SAMPLES, got 4 4 9 9"),
        (16, (0, 4, 9), "START, INCREMENT and SAMPLES must be at least 1"),
        (16, (4, 0, 9), "START, INCREMENT and SAMPLES must be at least 1"),
        (16, (4, -4, 9), "START, INCREMENT and SAMPLES must be at least 1"),
        (16, (4, 4, 0), "START, INCREMENT and SAMPLES must be at least 1"),
        (16, (20, 4, 9), "20 4 9 starts with more than --global-batch-size 16"),
        (16, (4, 5, 9), "the difference of 12 is not a multiple of INCREMENT 5"),
    ],
)
def test_what_is_no_ramp_is_refused(full: int, ramp: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSchedule(full, ramp)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rampup-batch-size 4 4", "three numbers"),
        ("--rampup-batch-size 4 5 9 --global-batch-size 16", "is not a multiple of INCREMENT 5"),
        ("--rampup-batch-size 20 4 9 --global-batch-size 16", "starts with more than"),
        ("--rampup-batch-size -4 4 9 --global-batch-size 16", "must be at least 1"),
        ("--rampup-batch-size 4 4 9 --global-batch-size 0", "--global-batch-size must be at least 1"),
        (
            "--rampup-batch-size 4 3 9 --global-batch-size 16 --micro-batch-size 4",
            "--rampup-batch-size 4 3 9 has steps of 7, which is not a multiple of --micro-batch-size 4",
        ),
        ("--train-samples 0", "--train-samples must be at least 1, got 0"),
        ("--train-samples 64 --train-iters 4", "--train-iters (command line) counts steps, and a run of --train-sam"),
        ("--train-samples 64 --lr-warmup-iters 4", "leave it out or give --lr-warmup-samples"),
        ("--train-samples 64 --lr-decay-iters 4", "leave it out or give --lr-decay-samples"),
        ("--train-samples 64 --lr-decay-iters 4 --lr-decay-samples 64", "--lr-decay-iters (command line) counts steps"),
        ("--train-samples 64 --lr-warmup-iters 0 --lr-warmup-samples 9", "--lr-warmup-iters (command line) counts st"),
        ("--lr-warmup-samples 9", "--lr-warmup-samples 9 needs --train-samples; give that, or --lr-warmup-iters"),
        ("--lr-decay-samples 9", "--lr-decay-samples 9 needs --train-samples; give that, or --lr-decay-iters"),
        (
            "--train-samples 64 --lr-warmup-samples 64",
            "--lr-warmup-samples 64 must be at least 0 and less than the 64 samples of --lr-decay-samples",
        ),
        ("--train-samples 64 --lr-warmup-samples -1", "--lr-warmup-samples -1 must be at least 0"),
        ("--train-samples 64 --lr-decay-samples 32 --lr-decay-style constant", "leave out --lr-decay-samples"),
    ],
)
def test_contradictions_are_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args("finetune", argv=[*MOCK, *words.split()])
    assert message in capsys.readouterr().err


def test_a_level_may_be_odd_where_samples_are_counted() -> None:
    words = "--rampup-batch-size 4 3 9 --global-batch-size 16 --micro-batch-size 4 --batch-unit samples"
    assert parse_args("finetune", argv=[*MOCK, *words.split()]).schedule.rampup_batch_size == (4, 3, 9)


def schedule(stage: str, **values: Any) -> Any:
    return build_config(stage, "haplovl-debug", {("schedule", name): value for name, value in values.items()}).schedule


@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_samples_are_the_fewest_steps_that_hold_them(full: int, ramp: tuple[int, ...]) -> None:
    for samples in (1, full, full + 1, 10 * full - 1, 7_000_000):
        found = schedule("finetune", global_batch_size=full, rampup_batch_size=ramp, train_samples=samples).train_iters
        assert BatchSchedule(full, ramp).before(found - 1) < samples <= BatchSchedule(full, ramp).before(found)


def test_a_stages_warm_up_is_taken_as_full_batches() -> None:
    """Stage 1 warms up over 2,000 steps unless it is told otherwise, and a run in samples must not lose that."""
    found = schedule("pretrain", train_samples=10**7, rampup_batch_size=(64, 64, 10**6))
    assert (found.warmup, found.decay_end, found.lr_warmup_iters) == (2000 * 256, 10**7, 0)
    assert schedule("pretrain", train_samples=10**7, lr_warmup_samples=0).warmup == 0


def test_a_checkpoints_settings_say_the_same_again(tmp_path) -> None:
    words = "--train-samples 999 --rampup-batch-size 4 4 48 --global-batch-size 16 --lr-warmup-samples 30"
    config = parse_args("finetune", argv=[*MOCK, *words.split()])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config.to_dict(), "iteration": 3}))
    assert parse_args("finetune", argv=["--config", str(path)]) == config
    longer = parse_args("finetune", argv=["--config", str(path), "--train-samples", "9999"])
    assert longer.schedule.train_iters > config.schedule.train_iters


def test_the_other_count_is_refused_on_top_of_a_file(tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train-iters: 5\n")
    with pytest.raises(SystemExit):
        parse_args("finetune", argv=[*MOCK, "--config", str(path), "--train-samples", "64"])
    assert f"--train-iters ({path}) counts steps" in capsys.readouterr().err
