"""When a loss is a spike."""

from __future__ import annotations

import statistics

import pytest

from megatron_haplovl.training.guards.spikes import HISTORY, WARM_UP, SpikeWatch


def test_nothing_is_a_spike_before_the_warm_up() -> None:
    watch = SpikeWatch(10.0)
    for _ in range(WARM_UP - 1):
        watch.add(1.0)
    assert watch.ratio(1e6) is None
    watch.add(1.0)
    assert watch.ratio(1e6) == 1e6


@pytest.mark.parametrize(("loss", "ratio"), [(20.0, None), (20.1, 10.05), (float("inf"), float("inf"))])
def test_it_is_more_than_the_factor_times_the_median(loss: float, ratio: float | None) -> None:
    # Mean 3.6, median 2: one earlier spike must not hide the next.
    watch = SpikeWatch(10.0, [2.0] * 24 + [42.0])
    assert watch.ratio(loss) == (None if ratio is None else pytest.approx(ratio))


def test_only_the_last_steps_count_and_a_restart_knows_them() -> None:
    watch = SpikeWatch(2.0, [100.0] * HISTORY)
    for number in range(HISTORY):
        watch.add(1.0 + number)
    assert watch.losses == [1.0 + number for number in range(HISTORY)]
    median = statistics.median(watch.losses)
    assert SpikeWatch(2.0, watch.losses).ratio(2 * median + 1) == pytest.approx((2 * median + 1) / median)


def test_losses_of_nothing_have_no_spikes() -> None:
    assert SpikeWatch(10.0, [0.0] * 50).ratio(1.0) is None
