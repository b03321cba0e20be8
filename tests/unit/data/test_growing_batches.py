"""Batches of a loader while the global batch grows: the same on any number of ranks, and from any step on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.data.loader import build_loader
from tests.unit.data.test_loader import make_config, make_loader, rows, same

# Of 24 samples an epoch: three sizes before the full one, and steps that begin in one epoch and end in the next.
RAMP = {"global_batch_size": 10, "rampup_batch_size": (4, 2, 50), "micro_batch_size": 1}
SIZES = [4] * 5 + [6] * 3 + [8] * 2 + [10] * 3
UNITS = ("packs", "samples")


def test_the_sizes_are_those_that_the_tests_rely_on() -> None:
    batches = BatchSchedule(10, (4, 2, 50))
    assert [batches.size(step) for step in range(len(SIZES))] == SIZES
    assert sum(SIZES[:10]) > 2 * 24 and sum(SIZES) % 24


@pytest.mark.parametrize("unit", UNITS)
def test_ranks_read_what_one_rank_reads(tiny_prefix: str, tmp_path: Path, unit: str) -> None:
    config = make_config(tmp_path, batch_unit=unit, **RAMP)
    one = make_loader(tiny_prefix, config, num_steps=len(SIZES))
    expected = one.micro_batches()
    of_steps = [rows(next(expected) for _ in range(one.micro_batches_of(step))) for step in range(len(SIZES))]
    loaders = [make_loader(tiny_prefix, config, num_steps=len(SIZES), dp_rank=rank, dp_size=2) for rank in range(2)]
    reading = [loader.micro_batches() for loader in loaders]
    for step, wanted in enumerate(of_steps):
        numbers = {loader.micro_batches_of(step) for loader in loaders}
        assert len(numbers) == 1 and (unit == "samples" or numbers == {SIZES[step] // 2})
        got = [row for batches in reading for row in rows(next(batches) for _ in range(min(numbers)))]
        assert Counter(filter(any, got)) == Counter(filter(any, wanted)) and any(map(any, got))
        counted = one.counts(step).documents if unit == "samples" else len(one._plan.packs_of(step))
        assert counted == SIZES[step]
    assert all(next(batches, None) is None for batches in (expected, *reading))
    assert one.fewest_micro_batches < one.most_micro_batches


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("unit", UNITS)
def test_reading_may_begin_at_any_step(tiny_prefix: str, tmp_path: Path, unit: str, workers: int) -> None:
    config = make_config(tmp_path, batch_unit=unit, num_workers=workers, **RAMP)
    loader = make_loader(tiny_prefix, config, num_steps=len(SIZES))
    whole = list(loader.micro_batches())
    for first in (0, 3, 5, 9, 12):
        rest = list(loader.micro_batches(first))
        assert len(rest) == sum(loader.micro_batches_of(step) for step in range(first, len(SIZES)))
        assert all(map(same, rest, whole[len(whole) - len(rest) :]))
        steps = [step for step in range(first, len(SIZES)) for _ in range(loader.micro_batches_of(step))]
        said = [loader.describe(first, number) for number in range(len(rest))]
        assert [int(words.split()[1].rstrip(",")) for words in said] == [step + 1 for step in steps]
        before = loader.counts_before(first)
        assert before.tokens == sum(loader.counts(step).tokens for step in range(first))


def test_mock_data_does_not_begin_the_ramp_anew() -> None:
    """It has 1,024 samples, which a run without a ramp reads over and over."""
    config = make_config(None, mock_data=True, batch_unit="samples", **RAMP)
    batches = BatchSchedule.of(config.schedule)
    loader = build_loader((), config, num_steps=230, dp_rank=0, dp_size=1)
    assert batches.before(229) > 2 * 1024
    assert [loader.counts(step).documents for step in range(230)] == [batches.size(step) for step in range(230)]


@pytest.mark.parametrize("unit", UNITS)
def test_held_out_data_knows_of_no_ramp(tiny_prefix: str, tmp_path: Path, unit: str) -> None:
    ramp, plain = (
        make_loader(tiny_prefix, make_config(tmp_path, batch_unit=unit, **values), num_steps=100, shuffle=False)
        for values in (RAMP, {**RAMP, "rampup_batch_size": ()})
    )
    assert ramp.plan_key == plain.plan_key and ramp.steps_available == plain.steps_available
    assert all(map(same, ramp.micro_batches(), plain.micro_batches()))


def test_ranks_that_cannot_share_a_level_are_refused(tiny_prefix: str, tmp_path: Path) -> None:
    for ramp, size, bad in (((4, 2, 50), 5, 4), ((5, 5, 50), 2, 5), ((10, 2, 50), 5, None), ((5, 5, 50), 5, None)):
        values = {**RAMP, "rampup_batch_size": ramp}
        for unit in UNITS:
            config = make_config(tmp_path, batch_unit=unit, **values)
            if unit == "samples" or bad is None:
                make_loader(tiny_prefix, config, dp_size=size)
                continue
            with pytest.raises(ValueError, match=f"has steps of {bad}, .* x {size} data-parallel ranks; make START"):
                make_loader(tiny_prefix, config, dp_size=size)
