"""A batch counted in samples, packed and dealt to ranks, against one plain process with one sample per row.

The tolerances are those of `test_parallel.py`; nothing here rounds otherwise than there.
"""

from __future__ import annotations

import pytest

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.loader import BatchLoader, build_loader
from tests.distributed.cases import (
    IN_SAMPLES,
    SAMPLES_LAYOUTS,
    SHARED_HEADS,
    config,
    parallel_case,
    parallel_config,
)
from tests.distributed.parallel_runs import ParallelRuns
from tests.distributed.reference import train_serially
from tests.distributed.test_parallel import BOTH_STAGES, compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return ParallelRuns(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def serial():
    """One sample per row."""
    return {r: train_serially(config(r, **SHARED_HEADS, **IN_SAMPLES, data__packing=False)) for r in BOTH_STAGES}


def first_step(rank: int, ranks: int, layout: str) -> tuple[BatchLoader, list[Batch]]:
    c = parallel_config(parallel_case("full", f"samples {layout}"), "torch")
    loader = build_loader((), c, num_steps=2, dp_rank=rank, dp_size=ranks)
    batches = loader.micro_batches()
    return loader, [next(batches) for _ in range(loader.micro_batches_of(0))]


def test_ranks_have_empty_micro_batches_beside_full_ones() -> None:
    loader, _ = first_step(0, 1, "DP 4, ZeRO 2")
    assert loader.counts(0).documents == 7
    steps = [first_step(rank, 4, "DP 4, ZeRO 2")[1] for rank in range(4)]
    shapes = {tuple(batch.tokens_BS.shape) for batches in steps for batch in batches}
    assert shapes == {(1, 96), (1, 1)}
    # More samples than sequences: some share one.
    assert sum(batch.tokens_BS.shape[1] == 96 for batches in steps for batch in batches) < 7


@pytest.mark.parametrize("layout", SAMPLES_LAYOUTS)
@pytest.mark.parametrize("recipe", BOTH_STAGES)
def test_equals_one_sample_per_row(runs, serial, recipe, layout):
    compare(runs.result(recipe, f"samples {layout}"), serial[recipe])
