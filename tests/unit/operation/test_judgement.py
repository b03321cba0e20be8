"""Who is suspected, case by case."""

import pytest

from megatron_haplovl.operation.judgement import Limits, judge
from tests.unit.operation.beat import seen, waiting

LIMITS = Limits(end=540)

AT_WORK = {
    "all at work": [seen(0), seen(1)],
    "a short wait for a rank that computes": [waiting(0, 15), seen(1)],
    "a long wait for a rank that moves": [waiting(0, 50), seen(1, in_phase=50)],
    "a short wait for one another": [waiting(0, 15), waiting(1, 15)],
    "one of two has waited long, the other has just come": [waiting(0, 40), waiting(1, 2)],
    "all compute, in one long call each": [seen(0, still=100), seen(1, still=100)],
    "the first step may take a minute": [waiting(0, 55, settled=False), seen(1, still=55, settled=False)],
    "a rank has ended, and nobody waits for it": [seen(0, age=100, left=True), seen(1)],
    "a beat is late": [seen(0), seen(1, age=11)],
}


@pytest.mark.parametrize("ranks", AT_WORK.values(), ids=AT_WORK)
def test_nobody_is_suspected(ranks):
    assert judge(ranks, LIMITS) is None


SUSPECTS = {
    "its process is stopped": ([waiting(0, 2), seen(1, age=13)], "silent", [1]),
    "two are stopped": ([seen(0, age=13), waiting(1, 2), seen(2, age=14)], "silent", [0, 2]),
    "silence comes before standstill": ([seen(0, still=40), seen(1, age=13), waiting(2, 30)], "silent", [1]),
    "it sleeps, and the others wait": ([waiting(0, 21), seen(1, still=21)], "stuck", [1]),
    "it sleeps in the loader": ([waiting(0, 21), seen(1, still=21, phase="loader")], "stuck", [1]),
    "one sleeps, another works": ([waiting(0, 25), seen(1, still=25), seen(2)], "stuck", [1]),
    "two sleep, one of them earlier in the step": (
        [waiting(0, 25), seen(1, still=25, order=19), seen(2, still=25)],
        "stuck",
        [1],
    ),
    "it sleeps in the first step": ([waiting(0, 61, settled=False), seen(1, still=61, settled=False)], "stuck", [1]),
    "collectives on a device: the others wait ahead of it": (
        [seen(0, still=21, order=25), seen(1, still=21, order=20)],
        "stuck",
        [1],
    ),
    "it moves, and the others have waited long": ([waiting(0, 61), seen(1)], "busy", [1]),
    "all wait, one of them elsewhere": ([waiting(0, 30), waiting(1, 30, order=20)], "behind", [1]),
    "all wait, one of them a step behind": ([waiting(0, 30), waiting(1, 30, step=4, order=90)], "behind", [1]),
    "all wait at the same place": ([waiting(0, 30), waiting(1, 30)], "all", []),
    "the others wait for one that has ended": ([waiting(0, 30), seen(1, age=40, left=True)], "left", [1]),
}


@pytest.mark.parametrize(("ranks", "kind", "culprits"), SUSPECTS.values(), ids=SUSPECTS)
def test_somebody_is_suspected(ranks, kind, culprits):
    finding = judge(ranks, LIMITS)
    assert finding is not None
    assert (finding.kind, [beat.rank for beat in finding.culprits]) == (kind, culprits)
    assert finding.lasted < LIMITS.end


ENDS = {
    "they have waited for a silent one": [waiting(0, 541), seen(1, age=541)],
    "the silent one was silent before they came": [waiting(0, 30), seen(1, age=541)],
    "they have waited for one that moves": [waiting(0, 541), seen(1)],
    "it was stuck before they came": [waiting(0, 30), seen(1, still=541)],
    "they have waited for one in its first step": [waiting(0, 541), seen(1, still=541, settled=False)],
    "they have waited for one another": [waiting(0, 541), waiting(1, 541)],
}


@pytest.mark.parametrize("ranks", ENDS.values(), ids=ENDS)
def test_the_run_ends_in_time(ranks):
    finding = judge(ranks, LIMITS)
    assert finding is not None and finding.lasted >= LIMITS.end


def test_a_watch_that_is_broken_ends_nothing():
    """Its rank trains on, so nobody waits for it for long."""
    finding = judge([waiting(0, 1), seen(1, age=10_000)], LIMITS)
    assert finding is not None and finding.lasted < LIMITS.end


def test_a_short_timeout_is_kept():
    """Shorter than the patience with first steps."""
    limits = Limits(end=16)
    finding = judge([waiting(0, 16, settled=False), seen(1, still=16, settled=False)], limits)
    assert finding is not None and finding.kind == "stuck" and finding.lasted >= limits.end
