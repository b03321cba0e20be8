"""Properties that every plan must have, and its independence of everything but data and seed."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from megatron_haplovl.data.plan.epoch import BlendedSource, PlanSettings, apportion, build_epoch
from megatron_haplovl.data.plan.packing import best_fit_decreasing
from megatron_haplovl.data.plan.packs import COUNT_NAMES, EpochPlan
from megatron_haplovl.data.sources import SampleCounts

SETTINGS = PlanSettings(seed=7, seq_length=128, packing=True, shuffle=True, skip_long_samples=False)


def make_source(
    size: int, seed: int, weight: float | None = 1.0, longest: int = 100, epochs: float | None = None
) -> BlendedSource:
    random = np.random.default_rng(seed)
    visual = random.integers(0, 2, size=size) * 16
    tokens = np.maximum(random.integers(5, longest + 1, size=size), visual + 5)
    text = tokens - visual
    counts = SampleCounts(tokens, text, visual, text // 2, visual // 4, visual * 7)
    return BlendedSource(f"source{seed}", weight, counts, epochs=epochs)


def draws(plan: EpochPlan) -> Counter[tuple[int, int]]:
    return Counter((int(source), int(sample)) for source, sample in plan.items)


def documents(plan: EpochPlan) -> list[list[tuple[int, int]]]:
    return [document for pack in range(plan.num_packs) for document in plan.documents(pack)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_and_no_pack_too_long(packing: bool, shuffle: bool) -> None:
    source = make_source(500, 1)
    settings = dataclasses.replace(SETTINGS, packing=packing, shuffle=shuffle)
    plan = build_epoch([source], [], settings, 0)
    assert draws(plan) == Counter({(0, i): 1 for i in range(500)})
    for pack in range(plan.num_packs):
        samples = [sample for document in plan.documents(pack) for _, sample in document]
        c = source.counts
        expected = [
            int(c.lm_tokens[samples].sum()),
            int(c.text_tokens[samples].sum()),
            int(c.patch_tokens[samples].sum()),
            int(c.tokens[samples].sum()),
            len(samples),
            int(c.tiles[samples].sum()),
            sum(int(c.tokens[i]) * (int(c.tokens[i]) + 1) // 2 + int(c.visual_pairs[i]) for i in samples),
        ]
        assert plan.counts[pack].tolist() == expected
        assert 0 < expected[COUNT_NAMES.index("tokens")] <= settings.seq_length
        assert packing or len(samples) == 1
    if not packing and not shuffle:
        assert plan.items[:, 1].tolist() == list(range(500))


def test_packing_is_tight() -> None:
    plan = build_epoch([make_source(5000, 1)], [], SETTINGS, 0)
    filled = plan.counts[:, COUNT_NAMES.index("tokens")].sum() / (plan.num_packs * SETTINGS.seq_length)
    assert filled > 0.98


def test_same_seed_same_plan_and_epochs_differ() -> None:
    sources = [make_source(300, 1), make_source(100, 2, weight=0.5)]
    first, again = (build_epoch(sources, [], SETTINGS, 3) for _ in range(2))
    for name in ("items", "doc_offsets", "pack_offsets", "counts"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for other in (
        build_epoch(sources, [], SETTINGS, 4),
        build_epoch(sources, [], dataclasses.replace(SETTINGS, seed=8), 3),
    ):
        assert not np.array_equal(first.items, other.items)


def test_the_plan_is_frozen() -> None:
    """A plan must not change with the version of anything, because a run that resumes would see other data."""
    tokens = np.array([60, 12, 33, 47, 90, 21, 75, 8, 54, 110, 40, 29])
    none = np.zeros_like(tokens)
    plan = build_epoch([BlendedSource("x", 1.0, SampleCounts(tokens, tokens, none, none, none, none))], [], SETTINGS, 1)
    assert plan.items[:, 1].tolist() == [9, 7, 3, 6, 10, 11, 5, 2, 4, 0, 8, 1]
    assert plan.pack_offsets.tolist() == [0, 2, 4, 7, 9, 12]


def test_blending_by_weight_goes_through_every_sample() -> None:
    sources = [make_source(300, 1, weight=3.0), make_source(100, 2, weight=1.0), make_source(40, 3, weight=0.4)]
    per_epoch = apportion([3.0, 1.0, 0.4], 440)
    assert per_epoch == [300, 100, 40]
    sources = [make_source(300, 1, weight=1.0), make_source(100, 2, weight=3.0)]
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        plan = build_epoch(sources, [], SETTINGS, epoch)
        assert Counter(plan.items[:, 0].tolist()) == {0: 100, 1: 300}
        seen.update(draws(plan))
    # 3 epochs x 100 draws are one pass over the first source, 3 x 300 are nine over the second.
    assert seen == Counter({**{(0, i): 1 for i in range(300)}, **{(1, i): 9 for i in range(100)}})


def test_apportion() -> None:
    assert apportion([1, 1, 1], 10) == [4, 3, 3]
    assert apportion([0.001, 1], 10) == [0, 10]
    for total in (1, 17, 1000):
        shares = apportion([0.3, 0.5, 0.7], total)
        assert sum(shares) == total
        assert all(abs(s - w / 1.5 * total) < 1 for s, w in zip(shares, [0.3, 0.5, 0.7], strict=True))


def test_source_with_no_draw_in_an_epoch() -> None:
    plan = build_epoch([make_source(10, 1, weight=1e-9), make_source(10, 2)], [], SETTINGS, 0)
    assert set(plan.items[:, 0].tolist()) == {1}


def test_joining() -> None:
    main, aux = make_source(400, 1, longest=70), [make_source(150, 2, longest=70), make_source(90, 3, longest=70)]
    used: Counter[int] = Counter()
    aux_first = 0
    for epoch in range(2):
        plan = build_epoch([main], aux, SETTINGS, epoch)
        assert [source for source, _ in draws(plan)].count(0) == 400
        alone = 0
        for document in documents(plan):
            lengths = [[main, *aux][source].counts.tokens[sample] for source, sample in document]
            assert sum(lengths) <= SETTINGS.seq_length
            kinds = [source > 0 for source, _ in document]
            assert kinds in ([False], [True, False], [False, True])
            alone += len(document) == 1
            aux_first += kinds[0]
            used.update(source for source, _ in document)
        assert plan.stats["not_joined"] == alone > 0
        assert plan.counts[:, COUNT_NAMES.index("documents")].sum() == 400
    joined = used[1] + used[2]
    assert 0.4 < aux_first / joined < 0.6
    assert used[1] / joined == pytest.approx(0.5, abs=0.1)  # equal weights


def test_auxiliary_samples_are_all_drawn() -> None:
    main, aux = make_source(120, 1, longest=30), make_source(60, 2, longest=30)
    plan = build_epoch([main], [aux], SETTINGS, 0)
    assert [draws(plan)[1, i] for i in range(60)] == [2] * 60


def test_too_long() -> None:
    source = make_source(50, 1)
    source.counts.tokens[[20, 33]] = [129, 500]
    with pytest.raises(ValueError, match=r"source1: sample 20 has 129 tokens.*--seq-length 128 \(2 of 50.*has 500"):
        build_epoch([source], [], SETTINGS, 0)
    plan = build_epoch([source], [], dataclasses.replace(SETTINGS, skip_long_samples=True), 0)
    assert plan.stats["skipped_long"] == 2
    assert draws(plan) == Counter({(0, i): 1 for i in range(50) if i not in (20, 33)})
    source.counts.tokens[:] = 1000
    with pytest.raises(ValueError, match="source1: no sample fits"):
        build_epoch([source], [], dataclasses.replace(SETTINGS, skip_long_samples=True), 0)


def test_best_fit() -> None:
    # 6 leaves 4, 5 leaves 5: the 4 goes where it fits exactly.
    assert best_fit_decreasing(np.array([4, 6, 5]), 10).tolist() == [0, 0, 1]
    assert best_fit_decreasing(np.array([10, 10]), 10).tolist() == [0, 1]
    assert best_fit_decreasing(np.array([3, 3, 3, 1]), 10).tolist() == [0, 0, 0, 0]


def test_passes_of_a_source() -> None:
    """Two passes, half a pass and a weight beside each other; half a pass goes on in the next epoch."""
    twice, half = make_source(30, 1, weight=None, epochs=2.0), make_source(40, 2, weight=None, epochs=0.5)
    light, heavy = make_source(40, 3, weight=1.0), make_source(20, 4, weight=3.0)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(2):
        plan = build_epoch([twice, half, light, heavy], [], SETTINGS, epoch)
        assert Counter(plan.items[:, 0].tolist()) == {0: 60, 1: 20, 2: 15, 3: 45}
        seen.update(draws(plan))
    assert {key: seen[key] for key in seen if key[0] < 2} == {
        **{(0, i): 4 for i in range(30)},
        **{(1, i): 1 for i in range(40)},
    }
    with pytest.raises(ValueError, match=r"no sample would be drawn in an epoch: source5 0\.001 times"):
        build_epoch([make_source(5, 5, weight=None, epochs=0.001)], [], SETTINGS, 0)
    with pytest.raises(ValueError, match="source1: an auxiliary source .* give it a weight"):
        build_epoch([light], [twice], SETTINGS, 0)


def test_some_samples_of_a_source() -> None:
    source = dataclasses.replace(make_source(50, 1), samples=np.array([40, 3, 17]))
    assert draws(build_epoch([source], [], SETTINGS, 0)) == Counter({(0, 40): 1, (0, 3): 1, (0, 17): 1})
    unpacked = dataclasses.replace(SETTINGS, shuffle=False, packing=False)
    assert build_epoch([source], [], unpacked, 0).items[:, 1].tolist() == [40, 3, 17]
    source.counts.tokens[[5, 17]] = 500
    with pytest.raises(ValueError, match=r"source1: sample 17 has 500 tokens.*\(1 of 3 samples"):
        build_epoch([source], [], SETTINGS, 0)
