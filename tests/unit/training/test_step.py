"""What the loop itself counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_haplovl.operation.phase import PhaseClock
from megatron_haplovl.training.logging import training_line
from megatron_haplovl.training.step import TimedBatches


def test_waiting_for_batches_is_counted_and_nothing_else() -> None:
    def slow() -> Iterator[Any]:
        for number in range(3):
            time.sleep(0.05)
            yield SimpleNamespace(number=number, tokens_BS=torch.zeros(2, 96))

    batches: Any = TimedBatches(slow(), PhaseClock(), str)
    assert batches.waited == 0
    for number in range(3):
        assert next(batches).number == number
        time.sleep(0.1)  # The step's own time.
    assert 0.15 <= batches.waited < 0.3
    assert batches.positions == 3 * 2 * 96
    with pytest.raises(StopIteration):
        next(batches)


def test_the_wait_is_a_column_with_one_digit() -> None:
    assert training_line(1, 2, {"loader wait (ms)": 1.26}).endswith("| loader wait (ms): 1.3 |")
