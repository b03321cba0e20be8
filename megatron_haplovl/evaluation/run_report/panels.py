"""Which panels a report has, and which columns stand in which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_haplovl.evaluation.run_report.curves import FloatArray, smoothed, thinned, usual_window
from megatron_haplovl.evaluation.run_report.metrics import VALIDATION
from megatron_haplovl.evaluation.run_report.record import RunRecord

STEP_TIME, LOADER_WAIT = "elapsed time per iteration (ms)", "loader wait (ms)"
# Every line has it, and a table says it better than a curve.
_IN_THE_TABLE = ("consumed ", "global batch size")
_UNITS = {
    "learning rate": "learning rate",
    "grad norm": "norm before clipping",
    "tokens per gpu per second (tgs)": "tokens / s and device",
    "TFLOPs": "TFLOP/s and device",
    "samples per second": "samples / s",
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    """In the legend; empty if it has none."""
    run: int
    """Number of the run, which chooses the colour unless several columns share the panel."""
    series: int
    """Number of the column in the panel."""
    kind: str
    """raw: pale; smooth: bold; points: dashed with marks."""
    x: FloatArray
    y: FloatArray


@dataclass(frozen=True)
class Panel:
    """One chart."""

    section: str
    title: str
    unit: str
    """Of the vertical axis."""
    curves: tuple[Curve, ...]
    smoothing: str
    """How the bold curves were made of the pale ones; empty if there are none."""
    is_log: bool = False
    """Whether the vertical axis is logarithmic."""


def panels_of(runs: Sequence[RunRecord], window: int | None = None) -> list[Panel]:
    """The panels of some runs, in order. Every column is in one of them or in :func:`table_columns`.

    Args:
        runs: one or several, drawn over one another.
        window: log lines that smoothing reaches over (default: a part of each run).
    """
    names = [name for name in _all_columns(runs) if not name.startswith(_IN_THE_TABLE)]
    if all(run.metrics.column("loss").values == run.metrics.column("lm loss").values for run in runs):
        # Stage 2 has one loss, under two names.
        names = [name for name in names if name != "loss"]
    lines = [max((len(column.steps) for column in run.metrics.columns.values()), default=0) for run in runs]
    reaches = [usual_window(number) if window is None else window for number in lines]
    averaged = " and ".join(str(reach) for reach in sorted(set(reaches)))
    panels = []
    for section, title, columns, unit in _grouped(names):
        curves = tuple(_curves(runs, columns, reaches))
        values = [y for curve in curves for y in curve.y if y == y]
        # Losses fall over decades; a chart of them must not be all beginning.
        is_log = section == "Losses" and "accuracy" not in title and bool(values) and min(values) > 0
        if values:
            has_average = any(curve.kind == "raw" for curve in curves)
            smoothing = f"bold: moving average over {averaged} log lines" if has_average else ""
            panels.append(Panel(section, title, unit, curves, smoothing, is_log and max(values) > 8 * min(values)))
    return panels


def table_columns(runs: Sequence[RunRecord]) -> list[str]:
    """Columns whose last values stand in a table only."""
    return [name for name in _all_columns(runs) if name.startswith(_IN_THE_TABLE)]


def _all_columns(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.metrics.columns))


def _grouped(names: Sequence[str]) -> list[tuple[str, str, list[str], str]]:
    """(section, title, columns, unit) of each panel, every name in one."""
    plain = [name.removeprefix(VALIDATION) for name in names]
    terms = list(dict.fromkeys(name for name in plain if "/" not in name and name.endswith(("loss", "accuracy"))))
    groups: list[tuple[str, str, list[str], str]] = []
    left = list(names)

    def take(section: str, title: str, columns: list[str], unit: str) -> None:
        mine = [name for name in columns if name in left]
        if mine:
            groups.append((section, title, mine, unit))
            left[:] = [name for name in left if name not in mine]

    for term in sorted(terms, key=lambda term: term == "loss"):
        take("Losses", term, [term, VALIDATION + term], "share" if "accuracy" in term else "loss")
    for term in sorted({name.partition("/")[0] for name in plain if "/" in name and not name.startswith("consumed")}):
        if "loss" in term:
            take("Losses by source", f"{term} by source", [n for n in names if n.startswith(f"{term}/")], "loss")
            held_out = [n for n in names if n.startswith(f"{VALIDATION}{term}/")]
            take("Losses by source", f"held-out {term} by source", held_out, "loss")
    for name in [n for n in left if n.startswith(VALIDATION)]:
        take("Held-out figures", name.removeprefix(VALIDATION), [name], "share")
    take("Optimizer", "learning rate", [n for n in left if n.startswith("learning rate")], "learning rate")
    for name in [n for n in left if "norm" in n]:
        take("Optimizer", name, [name], _UNITS.get(name, "norm"))
    for name in [n for n in left if n in _UNITS or n.startswith("MFU")]:
        take("Throughput", name, [name], _UNITS.get(name, "share"))
    take("Time", "time per step", [n for n in left if n.endswith("(ms)")], "ms")
    for name in [n for n in left if "memory" in n]:
        take("Memory", name, [name], name.rpartition("(")[2].rstrip(")") if "(" in name else "")
    for name in [n for n in left if n.startswith("number of")]:
        take("Skipped", name, [name], "since the start")
    for name in list(left):
        take("Other columns", name, [name], "")
    return groups


def _curves(runs: Sequence[RunRecord], names: Sequence[str], reaches: Sequence[int]) -> list[Curve]:
    """The curves of some columns, those of a run behind one another.

    Args:
        runs: the runs.
        names: the columns that share the panel.
        reaches: for each run, how many log lines an average reaches over.
    """
    curves = []
    training = [name for name in names if not name.startswith(VALIDATION)]
    is_pair = len(names) == 2 and len(training) == 1
    for number, (run, reach) in enumerate(zip(runs, reaches, strict=True)):
        for series, name in enumerate(names):
            column = run.metrics.column(name)
            if not column.steps:
                continue
            # A held-out curve has the colour of the training curve that it stands beside.
            place = 0 if is_pair else series
            words = [run.name] if len(runs) > 1 else []
            words += [_short_name(name)] if len(names) > 1 and not is_pair else []
            words += [("held out" if name not in training else "training")] if is_pair else []
            label = ", ".join(words)
            if name not in training:
                curves.append(Curve(label, number, place, "points", *thinned(column.steps, column.values)))
            elif is_noisy(name) and reach > 1:
                curves.append(Curve("", number, place, "raw", *thinned(column.steps, column.values)))
                average = smoothed(column.values, reach)
                curves.append(Curve(label, number, place, "smooth", *thinned(column.steps, average)))
            else:
                curves.append(Curve(label, number, place, "smooth", *thinned(column.steps, column.values)))
    return curves


def _short_name(name: str) -> str:
    """What tells a column from the others of its panel."""
    return name.rpartition("/")[2] if "/" in name else name.removesuffix(" (ms)")


def is_noisy(name: str) -> bool:
    """Whether a column is noisy; rates, counts and memory are what they are."""
    return any(word in name for word in ("loss", "accuracy", "norm", "(ms)", "per second", "TFLOPs", "MFU", "(tgs)"))


def step_seconds(run: RunRecord) -> tuple[float, float, float] | None:
    """Seconds of the run in steps, of these waiting for the loader, and between its first and last line in all.

    Each is as far as the log's lines tell: a line speaks for the steps since the line before.

    Returns:
        None without these columns or their times.
    """
    column, waits = run.metrics.column(STEP_TIME), run.metrics.column(LOADER_WAIT)
    if len(column.steps) < 2:
        return None
    steps = [last - first for first, last in zip(column.steps, column.steps[1:], strict=False)]
    in_steps = sum(n * ms for n, ms in zip(steps, column.values[1:], strict=True)) / 1000
    waited = 0.0
    if len(waits.steps) == len(column.steps):
        waited = sum(n * ms for n, ms in zip(steps, waits.values[1:], strict=True)) / 1000
    in_all = column.times[-1] - column.times[0]
    return (in_steps, waited, in_all) if in_all == in_all and in_steps == in_steps else None
