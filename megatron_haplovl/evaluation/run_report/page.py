"""The report as one HTML page that needs nothing else: no script, no address of anything."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from itertools import groupby

from megatron_haplovl.data.inspection.drawing import data_uri
from megatron_haplovl.data.inspection.page import page
from megatron_haplovl.evaluation.run_report.answers import answers_html
from megatron_haplovl.evaluation.run_report.drawing import COLOURS, svg_of
from megatron_haplovl.evaluation.run_report.metrics import Start
from megatron_haplovl.evaluation.run_report.panels import Panel, step_seconds
from megatron_haplovl.evaluation.run_report.record import RunRecord, differing_settings, unusual_settings
from megatron_haplovl.evaluation.run_report.summary import duration, ending_words, moment, summary_rows

_STYLE = """
body { max-width: 1250px; }
.charts { width: 100%; }
.note { color: #666; font-size: 90%; }
.last { padding: .6em 1em; border-left: .4em solid #888; background: #f6f6f6; }
.good { border-color: #2a9d3f; }
.bad { border-color: #c0392b; }
.left td, .left th { text-align: left; vertical-align: top; }
.phases { display: flex; height: 1.6em; max-width: 800px; }
.phases div { overflow: hidden; }
.question { border-top: 1px solid #ddd; padding-top: .5em; }
.swatch { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; }
h2 { border-bottom: 1px solid #ddd; }
"""
_DEBUG_FILES = 30


def report_page(runs: Sequence[RunRecord], panels: Sequence[Panel]) -> str:
    """The page.

    Args:
        runs: one, or several to compare.
        panels: their charts; see `panels.panels_of`.
    """
    title = " and ".join(run.name for run in runs)
    parts = [f"<style>{_STYLE}</style>", *map(_last_words, runs), _summary(runs), *_charts(panels), _phases(runs)]
    parts += [answers_html(runs), _settings(runs), *(_events(run) for run in runs), *(_notes(run) for run in runs)]
    return page(f"Training report: {title}", "\n".join(part for part in parts if part))


def _last_words(run: RunRecord) -> str:
    words = run.last_words
    if words is None:
        return ""
    kind = {0: "good", 75: "good"}.get(words["code"], "bad") if isinstance(words.get("code"), int) else "bad"
    said = html.escape(str(words.get("sentence", "")))
    where = [f"step {words['step']}" if words.get("step") is not None else "", str(words.get("host") or "")]
    where += [moment(words.get("time"))]
    small = html.escape(", ".join(part for part in where if part))
    before = words.get("previous")
    earlier = f"<br>Before that: {html.escape(json.dumps(before))}" if before else ""
    return (
        f'<p class="last {kind}"><b>{html.escape(run.name)}: {html.escape(ending_words(run))}.</b> {said} '
        f'<span class="note">({small}){earlier}</span></p>'
    )


def _summary(runs: Sequence[RunRecord]) -> str:
    head = "".join(f"<th>{_swatch(number)}{html.escape(run.name)}</th>" for number, run in enumerate(runs))
    rows = "".join(
        f"<tr><td>{html.escape(what)}</td>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"
        for what, values in summary_rows(runs)
    )
    return f'<table class="left"><tr><th></th>{head}</tr>{rows}</table>'


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="background: {COLOURS[number % len(COLOURS)]}"></span>'


def _charts(panels: Sequence[Panel]) -> list[str]:
    """A picture for each section. Panels of a section stand behind one another already."""
    parts = []
    for section, group in groupby(panels, key=lambda panel: panel.section):
        of_section = list(group)
        source = data_uri(svg_of(of_section), "image/svg+xml")
        names = html.escape(", ".join(panel.title for panel in of_section))
        width = 100 * min(3, len(of_section)) // 3
        image = f'<img class="charts" style="width: {width}%" src="{source}" alt="{names}">'
        parts.append(f"<h2>{html.escape(section)}</h2>{image}")
    return parts


def _phases(runs: Sequence[RunRecord]) -> str:
    bars = []
    for run in runs:
        seconds = step_seconds(run)
        if seconds is None or seconds[2] <= 0:
            continue
        in_steps, waited, in_all = seconds
        shares = {
            "waiting for the loader": (waited, COLOURS[4]),
            "the rest of the steps": (in_steps - waited, COLOURS[0]),
            "saving, evaluating, restarts and steps done again": (max(0.0, in_all - in_steps), COLOURS[5]),
        }
        whole = sum(value for value, _ in shares.values())
        bar = "".join(
            f'<div style="width: {100 * value / whole:.2f}%; background: {colour}"></div>'
            for value, colour in shares.values()
        )
        legend = "".join(
            f'<span class="swatch" style="background: {colour}"></span>{html.escape(name)}: '
            f"{100 * value / whole:.1f} % ({duration(value)})"
            for name, (value, colour) in shares.items()
        )
        bars.append(f'<p>{html.escape(run.name)}</p><div class="phases">{bar}</div><p class="note">{legend}</p>')
    return "<h2>Where the time went</h2>" + "".join(bars) if bars else ""


def _settings(runs: Sequence[RunRecord]) -> str:
    known = [run for run in runs if run.config is not None]
    configs = [run.config for run in known if run.config is not None]
    parts = []
    if len(configs) > 1:
        head = "".join(f"<th>{html.escape(run.name)}</th>" for run in known)
        rows = "".join(
            f"<tr><td>{html.escape(flag)}</td>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"
            for flag, values in differing_settings(configs)
        )
        table = f'<table class="left"><tr><th>setting</th>{head}</tr>{rows}</table>'
        parts.append(f"<h2>Settings in which the runs differ</h2>{table if rows else '<p>None.</p>'}")
    for run, config in zip(known, configs, strict=True):
        preset, flags = unusual_settings(config)
        title = html.escape(f"Settings of {run.name} that differ from {preset}")
        parts.append(f"<h2>{title}</h2><pre>{html.escape(chr(10).join(flags)) or 'none'}</pre>")
    return "".join(parts)


def _events(run: RunRecord) -> str:
    lines = [_start(start, is_first=number == 0) for number, start in enumerate(run.metrics.starts)]
    lines += [
        f"step {restart.again_from:,} was logged again after step {restart.reached:,}: the run was taken back"
        for restart in run.metrics.restarts
    ]
    if run.checkpoints:
        steps = ", ".join(f"step {step:,}" for step in run.checkpoints)
        lines.append(f"checkpoints that are still there, of all that were saved: {steps}")
    if run.debug_files:
        shown = run.debug_files[:_DEBUG_FILES]
        more = f" and {len(run.debug_files) - len(shown)} more" if len(run.debug_files) > len(shown) else ""
        lines.append(f"files for finding faults: {', '.join(shown)}{more}")
    return _list(f"Starts, checkpoints and faults of {run.name}", lines)


def _start(start: Start, *, is_first: bool) -> str:
    parts = [f"start at step {start.step:,}", moment(start.time), start.run_id and f"run id {start.run_id}"]
    said = [", ".join(part for part in parts if part)]
    if start.repeated:
        said.append(f"{start.repeated:,} logged steps were done again")
    if start.aside is not None:
        said.append(f"what was logged before is in {start.aside}")
    if start.ending_before is not None:
        said.append(f"the start before ended: {start.ending_before}")
    elif not is_first or start.aside is not None:
        said.append("how the start before ended is not known")
    return "; ".join(said)


def _notes(run: RunRecord) -> str:
    return _list(f"What is not shown of {run.name}", run.notes)


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>{html.escape(title)}</h2><ul>{items}</ul>" if items else ""
