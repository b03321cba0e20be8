"""Beats grow old while the store answers, and only then."""

from megatron_haplovl.operation.arrivals import Arrivals
from megatron_haplovl.operation.exchange import Received
from tests.unit.operation.beat import beat


def ages(arrivals, **changed):
    return {one.beat.rank: one.age for one in arrivals.seen(beat(1, number=9), changed.get("silent"))}


def test_the_age_of_a_beat():
    arrivals = Arrivals()
    arrivals.update(Received(1, beats={0: beat(0), 1: beat(1), 2: beat(2)}), 0.5)
    for number in range(2, 6):
        # Rank 2 beats on, rank 0 does not.
        now = {0: beat(0), 1: beat(1), 2: beat(2, number=number)}
        arrivals.update(Received(number, beats=now), 1.0)
    assert ages(arrivals) == {0: 4.0, 1: 0.0, 2: 0.0}


def test_a_store_that_does_not_answer_makes_only_its_holder_older():
    arrivals = Arrivals()
    arrivals.update(Received(1, beats={0: beat(0), 2: beat(2)}), 0.5)
    for _ in range(7):
        arrivals.update(Received(1, beats={0: beat(0), 2: beat(2)}), 2.0)
    assert arrivals.silence == 14.0
    assert ages(arrivals) == {0: 0.0, 1: 0.0, 2: 0.0}
    assert ages(arrivals, silent=0) == {0: 14.0, 1: 0.0, 2: 0.0}
