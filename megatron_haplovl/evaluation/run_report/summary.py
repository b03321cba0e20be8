"""The figures at the head of a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_haplovl.evaluation.run_report.curves import last_finite, smoothed, usual_window
from megatron_haplovl.evaluation.run_report.metrics import VALIDATION
from megatron_haplovl.evaluation.run_report.panels import step_seconds, table_columns
from megatron_haplovl.evaluation.run_report.record import RunRecord

_CODES = {0: "done", 1: "needs a person", 70: "machine fault", 75: "to be started again"}


def summary_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(what, its value for each run); what no run has is left out."""
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("ended", _ending),
        ("steps", _steps),
        ("loss (smoothed)", lambda run: _last_smoothed(run, "loss")),
        *((name, _last_of(name)) for name in _held_out(runs)),
        ("learning rate", _last_of("learning rate")),
        ("tokens per second and device", _mean_of("tokens per gpu per second (tgs)")),
        ("time between first and last line", _wall_time),
        ("starts", _starts),
        ("restarts that repeated steps", _restarts),
        ("checkpoints that are still there", _checkpoints),
        *((name, _last_of(name)) for name in table_columns(runs)),
    ]
    found = [(what, [value(run) for run in runs]) for what, value in rows]
    return [(what, values) for what, values in found if any(values)]


def number(value: float) -> str:
    """A figure that is read at a glance."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Such as `3 d 04 h` or `12 min 07 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def moment(seconds: object) -> str:
    """A time since 1970, in UTC; empty for anything else."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e11:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def ending_words(run: RunRecord) -> str:
    """What the exit code of a run's last words means; empty without last words."""
    if run.last_words is None:
        return ""
    code = run.last_words.get("code")
    return _CODES.get(code, f"code {code}") if isinstance(code, int) else f"code {code}"


def _ending(run: RunRecord) -> str:
    if run.last_words is None:
        return "no last words: it is running, or was killed"
    return f"{ending_words(run)}: {run.last_words.get('sentence', '')}"


def _steps(run: RunRecord) -> str:
    last = max((column.steps[-1] for column in run.metrics.columns.values() if column.steps), default=None)
    if last is None:
        return ""
    return f"{last:,}" + (f" of {run.config.schedule.train_iters:,}" if run.config is not None else "")


def _last_smoothed(run: RunRecord, name: str) -> str:
    values = run.metrics.column(name).values
    if not values:
        return ""
    last = smoothed(values, usual_window(len(values)))[-1]
    return number(last) if last == last else ""


def _last_of(name: str) -> Callable[[RunRecord], str]:
    def value(run: RunRecord) -> str:
        found = last_finite(run.metrics.column(name))
        return "" if found is None else number(found)

    return value


def _mean_of(name: str) -> Callable[[RunRecord], str]:
    def value(run: RunRecord) -> str:
        values = [v for v in run.metrics.column(name).values if v == v]
        return number(sum(values) / len(values)) if values else ""

    return value


def _held_out(runs: Sequence[RunRecord]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.metrics.columns)
    return [name for name in names if name.startswith(VALIDATION) and "/" not in name]


def _wall_time(run: RunRecord) -> str:
    seconds = step_seconds(run)
    return "" if seconds is None else duration(seconds[2])


def _starts(run: RunRecord) -> str:
    starts = run.metrics.starts
    repeated = sum(start.repeated for start in starts)
    return f"{len(starts)}" + (f"; {repeated:,} logged steps were done again" if repeated else "") if starts else ""


def _restarts(run: RunRecord) -> str:
    """Of a file that holds more than lines of starts tell."""
    is_known = run.metrics.lines and (run.metrics.restarts or not run.metrics.starts)
    return str(len(run.metrics.restarts)) if is_known else ""


def _checkpoints(run: RunRecord) -> str:
    return ", ".join(f"{step:,}" for step in run.checkpoints)
