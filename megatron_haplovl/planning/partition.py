"""Where a pipeline is cut: contiguous stages of the flat layer list, by cost. Pure functions on lists of numbers.

A cut is the tuple of the stages' first layers, `(0, ...)`, strictly increasing; stage s holds the layers from `cut[s]`
to `cut[s + 1]`, the last one to the end of the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

METHODS = ("auto", "parameters", "uniform")
"""Names that `--pipeline-partition` takes; anything else is an explicit cut."""


@dataclass(frozen=True)
class LayerLoad:
    """What one layer costs the stage that holds it."""

    name: str
    seconds: float
    """Forward and backward of one micro-batch, in any unit of time."""
    trained_parameters: float
    static_bytes: float
    """Bytes of parameters, gradients and optimizer state."""
    saved_bytes: float
    """Bytes that each micro-batch in flight keeps from forward to backward."""


def cut_layers(method: str, layers: Sequence[LayerLoad], stages: int, micro_batches: int) -> tuple[int, ...]:
    """Cut a list of layers into stages.

    Args:
        method: `auto` makes the slowest stage as fast as possible and takes, among all such cuts, one whose fullest
            stage holds least. `parameters` makes the stage with most trained parameters as small as possible
            (DeepSpeed's method of this name counts the same, but minimises the largest stage less the smallest).
            `uniform` gives every stage equally many layers, or the first ones one more. Anything else names the first
            layer of every stage but the first, separated by commas (`pre_decoder.12,connector,post_decoder.16`).
        layers: the flat list.
        stages: number of stages.
        micro_batches: micro-batches per optimizer step.

    Raises:
        ValueError: more stages than layers, or an explicit cut that does not fit.
    """
    if not 1 <= stages <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot be cut into {stages} stages; each needs at least one layer")
    match method:
        case "auto":
            return _auto(layers, stages, micro_batches)
        case "parameters":
            total = [0.0, *accumulate(layer.trained_parameters for layer in layers)]
            return _smallest_maximum(len(layers), stages, lambda _, first, end: total[end] - total[first])[1]
        case "uniform":
            size, larger = divmod(len(layers), stages)
            return tuple(stage * size + min(stage, larger) for stage in range(stages))
        case _:
            return _explicit(method, [layer.name for layer in layers], stages)


def stage_sums(values: Sequence[float], cut: Sequence[int]) -> list[float]:
    """The sum of `values` over each stage of a cut."""
    return [sum(values[first:end]) for first, end in pairwise((*cut, len(values)))]


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """The most micro-batches between forward and backward pass on one stage of DeepSpeed's 1F1B schedule."""
    return min(stages - stage, micro_batches)


def _auto(layers: Sequence[LayerLoad], stages: int, micro_batches: int) -> tuple[int, ...]:
    seconds, static, saved = (
        [0.0, *accumulate(values)]
        for values in zip(*((layer.seconds, layer.static_bytes, layer.saved_bytes) for layer in layers), strict=True)
    )
    slowest, _ = _smallest_maximum(len(layers), stages, lambda _, first, end: seconds[end] - seconds[first])
    limit = slowest + 1e-9 * seconds[-1]  # Sums of equal layers differ by their rounding.

    def bytes_within_limit(stage: int, first: int, end: int) -> float:
        if seconds[end] - seconds[first] > limit:
            return math.inf
        return static[end] - static[first] + in_flight(stage, stages, micro_batches) * (saved[end] - saved[first])

    return _smallest_maximum(len(layers), stages, bytes_within_limit)[1]


def _smallest_maximum(
    length: int, stages: int, cost: Callable[[int, int, int], float]
) -> tuple[float, tuple[int, ...]]:
    """The cut whose most expensive stage is cheapest, by dynamic programming over (stage, end).

    Args:
        length: number of layers.
        stages: number of stages.
        cost: cost of `(stage, first, end)`; must not grow when layers are taken away, so that the search can stop
            early.

    Returns:
        The cost of the most expensive stage, and the cut; among equal cuts the one whose last stages are shortest.
    """
    best = [0.0] + [math.inf] * length
    came_from: list[list[int]] = []
    for stage in range(stages):
        reached, origin = [math.inf] * (length + 1), [0] * (length + 1)
        for end in range(stage + 1, length - (stages - stage - 1) + 1):
            for first in range(end - 1, stage - 1, -1):
                here = cost(stage, first, end)
                if here >= reached[end]:
                    break  # Longer stages only cost more.
                largest = max(best[first], here)
                if largest < reached[end]:
                    reached[end], origin[end] = largest, first
        best = reached
        came_from.append(origin)
    cut, end = [], length
    for origin in reversed(came_from):
        end = origin[end]
        cut.append(end)
    return best[length], tuple(reversed(cut))


def _explicit(text: str, names: Sequence[str], stages: int) -> tuple[int, ...]:
    firsts = [word.strip() for word in text.split(",")]
    unknown = [name for name in firsts if name not in names]
    if unknown:
        raise ValueError(
            f"--pipeline-partition {text}: {unknown[0]!r} is no layer; the layers are {_ranges(names)}, and the "
            f"methods {', '.join(METHODS)}"
        )
    cut = (0, *(names.index(name) for name in firsts))
    if len(cut) != stages:
        raise ValueError(
            f"--pipeline-partition {text}: {len(firsts)} first layers make {len(cut)} stages, not {stages}; name the "
            "first layer of every stage but the first"
        )
    for before, after in pairwise(cut):
        if after <= before:
            raise ValueError(
                f"--pipeline-partition {text}: {names[after]} does not come after {names[before]}, the first layer of "
                "the stage before; every stage needs a layer"
            )
    return cut


def _ranges(names: Sequence[str]) -> str:
    """`a.0 ... a.23, b` for a.0, a.1, ..., a.23, b."""
    words: list[str] = []
    for name, after in zip(names, [*names[1:], ""], strict=True):
        stem, _, number = name.partition(".")
        if number in ("", "0"):
            words.append(name)
        elif after.partition(".")[0] != stem:
            words[-1] += f" ... {name}"
    return ", ".join(words)
