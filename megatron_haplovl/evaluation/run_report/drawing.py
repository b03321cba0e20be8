"""Panels as pictures, by matplotlib."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_haplovl.evaluation.run_report.panels import Curve, Panel

COLOURS = ("#1f77b4", "#d95f02", "#2a9d3f", "#8e44ad", "#c0392b", "#7f7f7f", "#00959e", "#b8860b")
_ACROSS = 3
_STYLES, _MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


def check_matplotlib() -> None:
    """Check that charts can be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the charts need the package matplotlib: pip install matplotlib")


def svg_of(panels: Sequence[Panel]) -> bytes:
    """Panels side by side, as an SVG that needs nothing else."""
    file = io.BytesIO()
    figure = _figure(panels)
    figure.savefig(file, format="svg")
    return file.getvalue()


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, as a PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(panels).savefig(path, format="png", dpi=110)


def _figure(panels: Sequence[Panel]) -> Any:
    # Without pyplot, which would keep every figure and ask for a display.
    from matplotlib.figure import Figure

    across = min(_ACROSS, max(1, len(panels)))
    rows = -(-len(panels) // across)
    figure = Figure(figsize=(4.4 * across, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return figure


def _draw(axis: Any, panel: Panel) -> None:
    several = len({curve.series for curve in panel.curves}) > 1
    for curve in panel.curves:
        axis.plot(curve.x, curve.y, **_look(curve, several))
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("optimizer step" + (f"  ({panel.smoothing})" if panel.smoothing else ""), fontsize=8)
    axis.set_ylabel(panel.unit, fontsize=8)
    if panel.is_log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _place: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    elif not any(curve.y.any() for curve in panel.curves):
        axis.set_ylim(-0.05, 1)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if any(curve.label for curve in panel.curves):
        axis.legend(fontsize=7, framealpha=0.7)


def _look(curve: Curve, several: bool) -> dict[str, Any]:
    """Where several columns share a panel, they have the colours, and runs differ in dashes and marks."""
    colour = COLOURS[(curve.series if several else curve.run) % len(COLOURS)]
    dashes = _STYLES[curve.run % len(_STYLES)] if several else "-"
    # A legend leaves out what begins with an underscore.
    look: dict[str, Any] = {"color": colour, "label": curve.label or "_"}
    match curve.kind:
        case "raw":
            return {**look, "alpha": 0.25, "linewidth": 0.8, "linestyle": dashes, "label": "_"}
        case "points":
            return {
                **look,
                "linestyle": "--",
                "marker": _MARKS[curve.run % len(_MARKS)],
                "markersize": 3.5,
                "linewidth": 1,
            }
        case _:
            return {**look, "linewidth": 1.5, "linestyle": dashes, **({} if len(curve.x) > 1 else {"marker": "o"})}
