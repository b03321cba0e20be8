"""What is said of held-out sources that no evaluation reads."""

from __future__ import annotations

import numpy as np

from megatron_haplovl.training.validation import name_unread_sources


def test_a_source_that_no_batch_holds_is_named(log_lines: list[str]) -> None:
    counts = np.array([[3, 9, 9, 9], [0, 0, 0, 0], [1, 0, 2, 0]])
    name_unread_sources(("a", "b", "c"), counts, 10)
    assert log_lines == [
        "WARNING held-out data: no sample of b is in the 10 global batches of an evaluation, so there is no loss of "
        "it; raise --eval-iters"
    ]
    name_unread_sources(("a", "c"), counts[[0, 2]], 10)
    assert len(log_lines) == 1
