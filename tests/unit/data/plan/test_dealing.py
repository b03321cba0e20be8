"""How a step's sequences are shared by ranks, and how full they are where a batch is counted in samples."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.data_scale import image_and_text_counts, llava_counts
from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.data.plan.dealing import EMPTY, MicroBatchNumbers, deal
from megatron_haplovl.data.plan.epoch import BlendedSource, PlanSettings, build_epoch
from megatron_haplovl.data.plan.packs import COUNT_NAMES, PackPlan, StepPlan


def column(counts: np.ndarray, name: str) -> np.ndarray:
    return counts[:, COUNT_NAMES.index(name)]


@pytest.mark.parametrize(("seq_length", "ranks", "most"), [(6144, 8, 1.03), (6144, 64, 1.1), (32768, 64, 1.1)])
def test_pairs_and_tiles_are_even(seq_length: int, ranks: int, most: float) -> None:
    counts = image_and_text_counts(3 * seq_length, np.random.default_rng(1))
    settings = PlanSettings(0, seq_length, packing=True, shuffle=True, skip_long_samples=False)
    plan = StepPlan(PackPlan([build_epoch([BlendedSource("x", 1.0, counts)], [], settings, 0)]), BatchSchedule(256))
    for step in range(3):
        of_packs = plan.counts_of_packs(step)
        dealt = deal(column(of_packs, "pairs"), column(of_packs, "tiles"), ranks)
        assert sorted(dealt.reshape(-1).tolist()) == list(range(256))
        for name in ("pairs", "tiles"):
            sums, in_order = (column(of_packs, name)[o].sum(axis=0) for o in (dealt, np.arange(256).reshape(-1, ranks)))
            assert sums.max() / sums.mean() < min(most, in_order.max() / in_order.mean())


@pytest.mark.parametrize(("seq_length", "batch", "fill"), [(2048, 128, 0.86), (2048, 256, 0.86), (4096, 128, 0.93)])
def test_a_step_of_samples_is_nearly_full(seq_length: int, batch: int, fill: float) -> None:
    """Lengths like LLaVA's: an image of 600 tokens and a skewed text."""
    source = BlendedSource("llava", 1.0, llava_counts(20_000, np.random.default_rng(0)))
    settings = PlanSettings(0, seq_length, packing=True, shuffle=True, skip_long_samples=False, step_samples=batch)
    drawn: list[int] = []
    for number in range(2):
        epoch = build_epoch([source], [], settings, number)
        documents = np.diff(epoch.cumulative[epoch.step_offsets, COUNT_NAMES.index("documents")])
        assert documents.tolist() == [batch] * round(20_000 / batch)
        assert column(epoch.counts, "tokens").sum() / (epoch.num_packs * seq_length) >= fill
        drawn += epoch.items[:, 1].tolist()
    # Epochs of whole steps cut the stream elsewhere, but each sample comes once in a pass.
    times = np.unique(drawn, return_counts=True)[1]
    assert len(times) == 20_000 and times.max() == 2


def test_every_step_has_as_many_sequences_and_the_rest_is_empty() -> None:
    source = BlendedSource("llava", 1.0, llava_counts(1000, np.random.default_rng(0)))
    settings = PlanSettings(0, 2048, packing=True, shuffle=True, skip_long_samples=False, step_samples=50)
    epochs = [build_epoch([source], [], settings, number) for number in range(2)]
    for cycle in (False, True):
        plan = StepPlan(PackPlan(epochs[: 1 if cycle else 2], cycle=cycle), BatchSchedule(50), in_samples=True)
        assert plan.num_steps == (20 if cycle else 40)
        ranks = [list(MicroBatchNumbers(plan, 40, 4, rank, 3)) for rank in range(3)]
        per_step = -(-plan.most_packs.size(0) // 12)
        assert {len(rank) for rank in ranks} == {40 * per_step}
        for step in range(40):
            got = [pack for rank in ranks for row in rank[step * per_step : (step + 1) * per_step] for pack in row]
            real = [pack for pack in got if pack != EMPTY]
            assert sorted(real) == list(plan.packs_of(step)) and len(got) == 12 * per_step
            assert plan.counts(step).documents == 50
            assert plan.counts_before(step).documents == 50 * step
            documents = [document for pack in real for document in plan.packs.documents(pack)]
            assert len(documents) == 50
        assert plan.packs_of(25) == range(plan.packs_of(24).stop, plan.packs_of(26).start)
