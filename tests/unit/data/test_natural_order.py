"""Numbers in names count as numbers, and a folder's files stay together."""

from __future__ import annotations

import random

from megatron_haplovl.data.natural_order import natural_key

IN_ORDER = ["1.jpg", "01.jpg", "2.jpg", "10.jpg", "a/2/9.jpg", "a/10/1.jpg", "a-1/1.jpg", "b2c10", "b2c9x", "b10"]


def test_the_order_is_that_of_people() -> None:
    expected = ["01.jpg", "1.jpg", "2.jpg", "10.jpg", "a/2/9.jpg", "a/10/1.jpg", "a-1/1.jpg", "b2c9x", "b2c10", "b10"]
    for seed in range(5):
        assert sorted(random.Random(seed).sample(IN_ORDER, len(IN_ORDER)), key=natural_key) == expected
    assert len({natural_key(name) for name in IN_ORDER}) == len(IN_ORDER)
