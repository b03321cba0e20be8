"""Which packs and documents the steps of a growing batch have, across epochs, and how ranks share them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.mock_source import MockSource
from megatron_haplovl.data.plan.cache import PlanInputs, SourceShare, cached_plan
from megatron_haplovl.data.plan.dealing import EMPTY, MicroBatchNumbers
from megatron_haplovl.data.plan.epoch import PlanSettings, build_epoch
from megatron_haplovl.data.plan.packs import PackPlan, StepPlan
from tests.unit.data.plan.test_epoch import make_source

RAMP, FULL = (3, 3, 110), 12
STEPS = 70
SETTINGS = PlanSettings(7, 128, packing=True, shuffle=True, skip_long_samples=False, step_samples=FULL, rampup=RAMP)


def sizes(number: int) -> list[int]:
    """From the definition: three levels of 36 2/3 samples, and then the full batch."""
    found: list[int] = []
    while len(found) < number:
        found.append(min(FULL, 3 + 3 * (3 * sum(found) // 110)))
    return found


def plan_of(settings: PlanSettings, epochs: int) -> PackPlan:
    return PackPlan([build_epoch([make_source(101, 1)], [], settings, number) for number in range(epochs)])


def documents(plan: PackPlan, packs: range) -> list[list[tuple[int, int]]]:
    return [document for pack in packs for document in plan.documents(pack)]


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_has_exactly_its_samples(packing: bool) -> None:
    plan = plan_of(dataclasses.replace(SETTINGS, packing=packing), 8)
    steps = StepPlan(plan, BatchSchedule(FULL, RAMP), in_samples=True)
    expected = sizes(STEPS)
    assert [len(documents(plan, steps.packs_of(step))) for step in range(STEPS)] == expected
    assert [steps.counts(step).documents for step in range(STEPS)] == expected
    assert [steps.counts_before(step).documents for step in range(STEPS)] == np.cumsum([0, *expected])[:-1].tolist()
    # Nothing between two steps, nothing twice: each sample comes once in a pass over the source.
    assert all(steps.packs_of(a).stop == steps.packs_of(b).start for a, b in pairwise(range(STEPS)))
    drawn = documents(plan, range(steps.packs_of(STEPS - 1).stop, plan.num_packs))
    assert len(drawn) + sum(expected) == 8 * 96
    times = Counter(sample for _, sample in (item for epoch in plan.epochs for item in epoch.items.tolist()))
    assert len(times) == 101 and set(times.values()) == {7, 8}
    # An epoch has eight full batches, and none of the later steps begins where an epoch does.
    ends = {plan.start(epoch) for epoch in range(1, 8)}
    assert not ends & {steps.packs_of(step).start for step in range(STEPS)}


def test_the_epochs_are_those_of_the_samples_without_a_ramp() -> None:
    """The ramp cuts the same stream of samples into other steps."""
    plain = plan_of(dataclasses.replace(SETTINGS, rampup=()), 3)
    for epoch, other in zip(plan_of(SETTINGS, 3).epochs, plain.epochs, strict=True):
        assert sorted(map(tuple, epoch.items.tolist())) == sorted(map(tuple, other.items.tolist()))


def test_packs_of_a_level() -> None:
    settings = dataclasses.replace(SETTINGS, step_samples=None, rampup=())
    epoch = build_epoch([make_source(101, 1)], [], settings, 0)
    for cycle in (True, False):
        plan = PackPlan([epoch] if cycle else [epoch] * 20, cycle=cycle)
        steps = StepPlan(plan, BatchSchedule(FULL, RAMP))
        before = np.cumsum([0, *sizes(2 * STEPS)]).tolist()
        expected = [range(*pair) for pair in pairwise(before[: STEPS + 1])]
        assert [steps.packs_of(step) for step in range(STEPS)] == expected
        assert plan.num_packs <= before[steps.num_steps] and plan.num_packs > before[steps.num_steps - 1]


@pytest.mark.parametrize("in_samples", [True, False])
def test_ranks_share_every_step_and_count_alike(in_samples: bool) -> None:
    plan = plan_of(SETTINGS if in_samples else dataclasses.replace(SETTINGS, step_samples=None, rampup=()), 20)
    steps = StepPlan(plan, BatchSchedule(FULL, RAMP), in_samples=in_samples)
    for ranks, micro in ((1, 1), (3, 1), (1, 3)):
        numbers = [MicroBatchNumbers(steps, STEPS, micro, rank, ranks) for rank in range(ranks)]
        per_step = [numbers[0].per_step.size(step) for step in range(STEPS)]
        assert len(set(per_step)) > 2 and all(n.per_step == numbers[0].per_step for n in numbers)
        assert [len(list(n)) for n in numbers] == [len(n) for n in numbers] == [sum(per_step)] * ranks
        level = np.array(sizes(STEPS))
        for step in range(STEPS):
            dealt = [pack for n in numbers for row in n.of_step(step) for pack in row]
            assert sorted(pack for pack in dealt if pack != EMPTY) == list(steps.packs_of(step))
            assert len(dealt) == per_step[step] * ranks * micro
            most = max(len(steps.packs_of(s)) for s in range(STEPS) if level[s] == level[step])
            assert level[step] == FULL or per_step[step] == -(-most // (ranks * micro))
        numbers[0].first_step = 9
        assert list(numbers[0])[0] == numbers[0].of_step(9)[0] and len(numbers[0]) == sum(per_step[9:])


VISION = VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="pad")


def inputs(settings: PlanSettings) -> PlanInputs:
    return PlanInputs([SourceShare(MockSource(100, VISION, 64, 0, num_samples=50))], [], VISION, settings)


def test_the_key_knows_of_a_ramp_only_where_there_is_one() -> None:
    plain = dataclasses.replace(SETTINGS, rampup=())
    keys = {inputs(dataclasses.replace(SETTINGS, rampup=ramp)).key for ramp in ((), RAMP, (3, 3, 111), (6, 3, 110))}
    assert len(keys) == 4
    share = inputs(plain).main[0]
    parts = {
        "algorithm": 3,
        "main": [share.key],
        "aux": [],
        "vision": dataclasses.asdict(VISION),
        "settings": {
            **{"seed": 7, "seq_length": 128, "packing": True, "shuffle": True},
            **{"skip_long_samples": False, "step_samples": FULL},
        },
    }
    text = json.dumps(parts, sort_keys=True).encode()
    assert inputs(plain).key == hashlib.sha256(text).hexdigest()[:32], "as in versions without a ramp"


@pytest.mark.parametrize("needed", range(1, 31))
def test_as_many_epochs_are_planned_as_the_last_step_needs(tmp_path, needed: int) -> None:
    """A step that begins in the last epoch may end behind it."""
    batches = BatchSchedule(FULL, RAMP)
    settings = dataclasses.replace(SETTINGS, seq_length=64)
    plan = cached_plan(
        inputs(settings),
        tmp_path,
        min_documents=batches.before(needed),
        is_builder=True,
        barrier=lambda: None,
    )
    steps = StepPlan(plan, batches, in_samples=True)
    assert steps.counts(needed - 1).documents == sizes(needed)[-1]
    assert len(plan.epochs) == -(-batches.before(needed) // 48)
