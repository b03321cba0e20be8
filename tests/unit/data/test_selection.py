"""Strategies of sampling and the sides of a split.

Planted once to see it fail: a random choice by number, the last of equal hashes first, the test's share given to
training, random choices by the same bits as the split.
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_haplovl.config.mixture import parse_sampling, parse_split
from megatron_haplovl.data.selection import on_side, sampled

TOTAL = 20_000
HASHES = np.random.default_rng(0).integers(0, 2**64, TOTAL, dtype=np.uint64)


def chosen(text: str, cap: int | None = None, hashes: np.ndarray = HASHES) -> list[int]:
    numbers = sampled(len(hashes), parse_sampling(text), cap, hashes)
    return list(range(len(hashes))) if numbers is None else numbers.tolist()


def test_first_and_end_go_by_the_order() -> None:
    assert sampled(TOTAL, parse_sampling("all"), None, None) is None
    assert sampled(TOTAL, parse_sampling("all"), TOTAL, None) is None
    assert chosen("first:3") == [0, 1, 2] and chosen("end:0.01%") == [TOTAL - 2, TOTAL - 1]
    assert len(chosen("first:10%", cap=7)) == 7 and set(chosen("first:10%", cap=7)) < set(range(2000))


def test_random_goes_by_what_a_sample_holds() -> None:
    tenth, fifth = chosen("random:10%"), chosen("random:20%")
    assert len(tenth) == TOTAL // 10 and tenth == sorted(tenth) and set(tenth) < set(fifth)
    # The same samples in another order.
    order = np.random.default_rng(1).permutation(TOTAL)
    assert sorted(order[chosen("random:10%", hashes=HASHES[order])].tolist()) == tenth
    # Over the whole file: 2,000 draws have a mean of TOTAL / 2 +- 129.
    assert abs(np.mean(tenth) - TOTAL / 2) < 600
    assert chosen("random:10%") == chosen("all", cap=TOTAL // 10)


def test_of_equal_samples_the_earlier_ones() -> None:
    assert chosen("random:2", hashes=np.full(5, 7, dtype=np.uint64)) == [0, 1]


def test_sides_have_no_sample_in_common_and_the_right_shares() -> None:
    split = parse_split("90,8,2")
    train, valid = on_side(HASHES, split, "train"), on_side(HASHES, split, "valid")
    assert not (train & valid).any()
    # Standard deviations of 42, 38 and 20.
    assert abs(int(train.sum()) - 18_000) < 200 and abs(int(valid.sum()) - 1_600) < 200
    assert abs(int((~train & ~valid).sum()) - 400) < 100
    # What a smaller share holds out, a larger one does, too.
    assert not (on_side(HASHES, parse_split("99,1"), "valid") & ~valid).any()


@pytest.mark.parametrize("value", [0, 2**64 - 1])
def test_the_smallest_and_the_largest_hash_are_on_one_side(value: int) -> None:
    hashes = np.array([value], dtype=np.uint64)
    sides = [bool(on_side(hashes, parse_split("1,999999"), side)[0]) for side in ("train", "valid")]
    assert sides == [value > 0, value == 0]


def test_a_random_choice_says_nothing_of_the_side() -> None:
    valid = on_side(HASHES, parse_split("9,1"), "valid")
    # 2,000 draws of which a tenth is held out: 200 +- 13.
    assert abs(int(valid[chosen("random:10%")].sum()) - 200) < 60
