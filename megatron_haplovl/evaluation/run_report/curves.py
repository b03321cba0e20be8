"""Curves that can be drawn: smoothed, and with few enough points, whatever the length of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_haplovl.evaluation.run_report.metrics import Column

FloatArray = npt.NDArray[np.float64]

POINTS = 1500
"""Most points of a drawn curve; a panel is not as wide in pixels."""
_SHARE = 50
"""The smoothing window is this part of the run, unless another is given."""


def usual_window(values: int) -> int:
    """Values that an average reaches over where nobody says how many."""
    return max(1, round(values / _SHARE))


def smoothed(values: Sequence[float], window: int) -> FloatArray:
    """Exponential moving average, as in the paper's Figure 6, which does not give its weight.

    `s += 2 / (window + 1) * (x - s)`, from the first value on: its centre of mass is that of a plain average over
    `window` values. It passes over NaN.
    """
    weight = 2.0 / (window + 1)
    result = np.full(len(values), math.nan)
    state = math.nan
    for i, value in enumerate(values):
        if value == value:
            state = value if state != state else state + weight * (value - state)
        result[i] = state
    return result


def thinned(
    steps: Sequence[int], values: Sequence[float] | FloatArray, points: int = POINTS
) -> tuple[FloatArray, FloatArray]:
    """A curve of few points that looks like the whole: the least and the greatest value of each stretch stay.

    So a single spike is drawn, however long the run is.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if len(x) <= points:
        return x, y
    kept: list[npt.NDArray[np.int64]] = []
    for stretch in np.array_split(np.arange(len(x)), points // 2):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept.append(np.array([finite[y[finite].argmin()], finite[y[finite].argmax()]]))
        if len(finite) < len(stretch):
            # A gap stays one.
            kept.append(stretch[~np.isfinite(y[stretch])][:1])
    index = np.unique(np.concatenate(kept))
    return x[index], y[index]


def last_finite(column: Column) -> float | None:
    """The last value that is one."""
    return next((value for value in reversed(column.values) if math.isfinite(value)), None)
