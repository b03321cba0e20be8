"""Stage cuts against all cuts that there are, and against DeepSpeed's own partitioners."""

from __future__ import annotations

import itertools
import random

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from deepspeed.runtime.utils import partition_uniform

from megatron_haplovl.planning.partition import LayerLoad, cut_layers, in_flight, stage_sums


def random_layers(generator: random.Random, count: int) -> list[LayerLoad]:
    """Layers with few distinct times, so that many cuts are equally fast, and any memory."""
    return [
        LayerLoad(
            name=f"layer.{i}",
            seconds=generator.choice((0.1, 0.1, 0.3, 0.7)),
            trained_parameters=generator.randint(1, 9),
            static_bytes=generator.randint(0, 50),
            saved_bytes=generator.randint(0, 50),
        )
        for i in range(count)
    ]


def every_cut(count: int, stages: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in itertools.combinations(range(1, count), stages - 1)]


def slowest(layers: list[LayerLoad], cut: tuple[int, ...]) -> float:
    return round(max(stage_sums([layer.seconds for layer in layers], cut)), 9)


def fullest(layers: list[LayerLoad], cut: tuple[int, ...], micro_batches: int) -> float:
    static = stage_sums([layer.static_bytes for layer in layers], cut)
    saved = stage_sums([layer.saved_bytes for layer in layers], cut)
    return max(static[s] + saved[s] * sum(1 for m in range(micro_batches) if m < len(cut) - s) for s in range(len(cut)))


@pytest.mark.parametrize("seed", range(40))
def test_auto_is_the_best_of_all_cuts(seed: int) -> None:
    generator = random.Random(seed)
    layers = random_layers(generator, generator.randint(1, 11))
    stages, micro_batches = generator.randint(1, len(layers)), generator.randint(1, 6)
    found = cut_layers("auto", layers, stages, micro_batches)
    best = min((slowest(layers, cut), fullest(layers, cut, micro_batches)) for cut in every_cut(len(layers), stages))
    assert (slowest(layers, found), fullest(layers, found, micro_batches)) == best
    assert len(found) == stages and found[0] == 0 and all(a < b for a, b in itertools.pairwise(found))


def test_memory_decides_between_equally_fast_cuts() -> None:
    # Three layers of a second each on two stages: the pair may come first or last, but first it is twice in flight.
    layers = [LayerLoad(f"layer.{i}", 1.0, 1, 0, 10) for i in range(3)]
    assert cut_layers("auto", layers, 2, micro_batches=8) == (0, 1)
    # With weights at the end, the last stage is to hold only that.
    heavy = [*layers[:2], LayerLoad("layer.2", 1.0, 1, 100, 10)]
    assert cut_layers("auto", heavy, 2, micro_batches=8) == (0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_parameters_is_the_best_of_all_cuts(seed: int) -> None:
    generator = random.Random(seed)
    layers = random_layers(generator, generator.randint(2, 11))
    stages = generator.randint(1, len(layers))
    weights = [layer.trained_parameters for layer in layers]
    found = max(stage_sums(weights, cut_layers("parameters", layers, stages, 1)))
    assert found == min(max(stage_sums(weights, cut)) for cut in every_cut(len(layers), stages))


def test_uniform_is_deepspeeds() -> None:
    for count in range(1, 20):
        layers = random_layers(random.Random(0), count)
        for stages in range(1, count + 1):
            assert list(cut_layers("uniform", layers, stages, 1)) == partition_uniform(count, stages)[:-1]


LAYERS = [
    LayerLoad(name, 1.0, 1, 1, 1)
    for name in ("embedding", "pre_decoder.0", "pre_decoder.1", "connector", "post_decoder.0", "lm_head")
]


def test_explicit_cut() -> None:
    assert cut_layers("pre_decoder.1, connector,lm_head", LAYERS, 4, 1) == (0, 2, 3, 5)


@pytest.mark.parametrize(
    ("text", "stages", "message"),
    [
        (
            "pre_decoder.7",
            2,
            "'pre_decoder.7' is no layer; the layers are embedding, pre_decoder.0 ... pre_decoder.1, ",
        ),
        ("equal", 2, "'equal' is no layer.* methods auto, parameters, uniform"),
        ("connector", 3, "1 first layers make 2 stages, not 3"),
        ("connector,pre_decoder.1", 3, "pre_decoder.1 does not come after connector"),
        ("connector,connector", 3, "connector does not come after connector"),
        ("embedding", 2, "embedding does not come after embedding"),
    ],
)
def test_explicit_cuts_that_do_not_fit(text: str, stages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_layers(text, LAYERS, stages, 1)


@pytest.mark.parametrize("stages", [0, 7])
def test_a_stage_needs_a_layer(stages: int) -> None:
    with pytest.raises(ValueError, match=f"6 layers cannot be cut into {stages} stages"):
        cut_layers("auto", LAYERS, stages, 1)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (3, 2), (4, 4), (4, 9), (5, 3)])
def test_in_flight_is_what_deepspeeds_schedule_does(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        flying, most = 0, 0
        for commands in TrainSchedule(micro_batches, stages, stage).steps():
            flying += sum(isinstance(c, ForwardPass) for c in commands)
            most = max(most, flying)
            flying -= sum(isinstance(c, BackwardPass) for c in commands)
        assert in_flight(stage, stages, micro_batches) == most
